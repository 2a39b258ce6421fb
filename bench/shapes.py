"""The token shapes of real models, and the command line, of the benches of adaln and its relatives."""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dit_ops.rope import Rope3D
from dit_ops.testing import record

SHAPES = {  # B, L, C, F
    "wan2.1-1.3b, 480p, 21 latent frames": (1, 32760, 1536, 21),
    "wan2.1-14b, 480p, 21 latent frames": (1, 32760, 5120, 21),
    "wan2.1-1.3b, one streaming chunk of 3 latent frames": (1, 4680, 1536, 3),
    "rooms-tiny, 8 latent frames of 2 by 2 tokens": (16, 32, 128, 8),
}
GRIDS = {  # B, F, H, W, N, D
    "wan2.1-1.3b, 480p, 21 latent frames": (1, 21, 30, 52, 12, 128),
    "wan2.1-14b, 480p, 21 latent frames": (1, 21, 30, 52, 40, 128),
    "wan2.1-1.3b, one streaming chunk of 3 latent frames": (1, 3, 30, 52, 12, 128),
    "rooms-tiny, 8 latent frames of 2 by 2 tokens": (16, 8, 2, 2, 4, 32),
}
BACKENDS = ("cuda", "triton", "cpu", "reference", "torch.compile")


def arguments(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="cut every shape to at most this many tokens per sample")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    return parser.parse_args()


def shapes(tokens: int | None) -> Iterator[tuple[str, int, int, int, int]]:
    """name, B, L, C, F"""
    for name, (B, L, C, F) in SHAPES.items():
        if tokens is None or tokens >= L:
            yield name, B, L, C, F
        else:
            yield f"{name}, first {tokens // F * F} tokens", B, tokens // F * F, C, F


def head_shapes(args: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...], tuple[int, int, int], tuple[Tensor, ...]]]:
    """name, (B, L, N, D), grid, rope; --tokens cuts whole frames off."""
    for name, (B, F, H, W, N, D) in GRIDS.items():
        frames = F if args.tokens is None else min(F, max(1, args.tokens // (H * W)))
        rope = Rope3D(D).tables(frames, H, W, args.device)
        yield name if frames == F else f"{name}, first {frames}", (B, frames * H * W, N, D), (frames, H, W), rope


def bench_op(
    op: str,
    fn: Callable,
    shape: str,
    leaves: list[Tensor],
    cotangents: list[Tensor],
    args: argparse.Namespace,
    moved: list[int],
) -> None:
    """One line per backend for fn(*leaves) without gradients, and one with; moved: the least bytes of either."""
    for backend in args.backends:
        run = torch.compile(fn) if backend == "torch.compile" else fn

        def forward(run=run):
            with torch.no_grad():
                run(*leaves)

        def both(run=run):
            torch.autograd.grad(run(*leaves), leaves, cotangents)

        name = f"{shape}, {leaves[0].dtype}"
        record(op, name, backend, "forward", forward, args.device, moved[0])
        record(op, name, backend, "forward + backward", both, args.device, moved[1])
