"""python bench/bench_attention.py [--device cpu] [--tokens N] -> a JSON line per shape, pass and backend.

Rates count useful operations: 4 · pairs · N · D forward, where pairs are those that the mask lets see each other, and 2.5
times as many backward. The last lines are the memory of the two modes of a cache.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import dit_ops
from dit_ops.bench import measure
from dit_ops.bench.attention_peers import attention_peers
from dit_ops.bench.runs import arguments, bench_op
from dit_ops.cache import KVCache
from dit_ops.layout import VideoLayout
from dit_ops.masks import Full, Intervals, Mask, TeacherForcing
from dit_ops.rope import Rope3D

MODELS = {"wan2.1-1.3b": (12, 30), "hunyuanvideo-1.5": (16, 54), "wan2.1-14b": (40, 40)}  # heads of one path, layers
FRAMES, CHUNK, HEIGHT, WIDTH, D, TEXT = 21, 3, 30, 52, 128, 512
BACKENDS = ("dense", "triton", "reference")


@dataclasses.dataclass(frozen=True)
class Shape:
    """unused: slots of the buffer that lie before the keys and are not read"""

    name: str
    heads: int
    mask: Mask
    unused: int = 0
    deterministic: bool = False


def frame_size(args: argparse.Namespace) -> int:
    """Tokens of a frame: those of 480p, or what --tokens leaves to each of the frames of both halves."""
    size = HEIGHT * WIDTH
    return size if args.tokens is None else max(1, min(size, args.tokens // (2 * FRAMES)))


def shapes(args: argparse.Namespace) -> Iterator[Shape]:
    size = frame_size(args)
    q, kv, text = CHUNK * size, FRAMES * size, min(TEXT, size)
    cut = "" if size == HEIGHT * WIDTH else f", frames of {size} tokens"
    forcing = TeacherForcing(VideoLayout(FRAMES, size, 1, block_frames=CHUNK, halves=2))
    gap = Intervals(((0, q, ((0, text), (2 * text, kv + text))),), q, kv + text)  # as many keys as without text
    for model, (N, _) in MODELS.items():
        chunk = f"{model}, one chunk of {CHUNK} of {FRAMES} latent frames"
        yield Shape(f"{chunk}{cut}", N, Full(q, kv))
        yield Shape(f"{chunk}, keys behind unused slots of a ring{cut}", N, Full(q, kv), unused=text)
        yield Shape(f"{chunk}, text apart from the ring{cut}", N, gap)
        yield Shape(f"{chunk}, a quarter of the heads{cut}", max(1, N // 4), Full(q, kv))
        yield Shape(f"{model}, teacher forcing{cut}", N, forcing)
        yield Shape(f"{model}, teacher forcing{cut}", N, forcing, deterministic=True)


def tensors(shape: Shape, args: argparse.Namespace) -> list[Tensor]:
    dtype = getattr(torch, args.dtype)
    lengths = (shape.mask.queries, *[shape.mask.keys + shape.unused] * 2)
    q, k, v = (torch.randn(1, n, shape.heads, D, device=args.device).to(dtype) for n in lengths)
    return [q.requires_grad_(), *(t[:, shape.unused :].detach().requires_grad_() for t in (k, v))]


def bench_shape(shape: Shape, args: argparse.Namespace) -> None:
    q, k, v = tensors(shape, args)
    flops = 4.0 * shape.mask.pairs() * shape.heads * D
    fn = functools.partial(dit_ops.attention, mask=shape.mask, deterministic=shape.deterministic)
    op = "attention, deterministic" if shape.deterministic else "attention"
    peers = attention_peers(shape.mask, args.device, shape.deterministic)
    moved = [2 * q.nbytes + 2 * k.nbytes, 6 * q.nbytes + 6 * k.nbytes]  # q, k, v -> o; then do, q, k, v, o -> dq, dk, dv
    bench_op(op, fn, shape.name, [q, k, v], [torch.randn_like(q)], args, moved, peers, (flops, 2.5 * flops))


def cache_bytes(rotated: bool, layers: int, N: int, size: int, dtype: torch.dtype) -> int:
    """Bytes of a full cache of both paths, text included; nothing is allocated."""
    text, path = min(TEXT, size), 2 if rotated else 1
    cache = KVCache(layers, window_frames=FRAMES, sink_frames=CHUNK, prefix=text, rotated=rotated)
    k = torch.empty(1, CHUNK * size, path * N, D, dtype=dtype, device="meta")
    P_inv = torch.empty(1, CHUNK, 4, 4, device="meta")
    with torch.no_grad(), dit_ops.use_backend("reference"):
        cache.begin(0, CHUNK, size, rope=Rope3D(D), size=(size, 1), P_inv=P_inv, device="meta")
        for layer in range(layers):
            cache.write_prefix(layer, k[:, :text], k[:, :text])
            cache.slots(layer, k, path * N)
            if layer == 0 and not rotated:
                cache.visible(0)  # the buffer that layers share
    return cache.nbytes


def main() -> None:
    args = arguments(__doc__)
    args.backends = [b for b in BACKENDS if b == "dense" or b in args.backends]
    for shape in [*shapes(args)][: args.shapes]:
        bench_shape(shape, args)
    size, dtype = frame_size(args), getattr(torch, args.dtype)
    for model, (N, layers) in MODELS.items():
        for rotated, mode in ((True, "as attention reads them"), (False, "before RoPE and ProPE")):
            key = {
                "op": "cache",
                "shape": f"{model}, {FRAMES} latent frames of {size} tokens",
                "dtype": args.dtype,
                "pass": "memory",
            }
            figures = {"backend": f"keys and values {mode}", "bytes": cache_bytes(rotated, layers, N, size, dtype)}
            measure.write({**key, **figures, **measure.about(args.device)}, args.output)


if __name__ == "__main__":
    main()
