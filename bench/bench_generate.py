"""python bench/bench_generate.py [--device cpu] [--seconds N] -> JSON lines for every way of running one causal model.

A stream of Wan 2.1 1.3B with a camera branch and random weights: one video, 480×832, a window of 20 latent frames, blocks of 4,
4 steps and a clean rerun per block, bf16; no text encoder and no VAE. On a CPU a small model streams in fp32. The ways:

dit_ops, graphs            our operators; every step of a full ring is the replay of a CUDA graph (on a GPU)
dit_ops, eager launches    our operators, launched from Python
reference                  the same model and pipeline with use_backend("reference"): plain PyTorch, attention by its SDPA
torch.compile              that, compiled (generate_peers.py says what and how)
and after these, if time is left, ours with the compact cache and with guidance in one batch or in two passes.

All share the weights and each has a cache. Once every ring is full they take turns chunk by chunk, A B … B A; a chunk is timed
from an idle device to an idle device. A way whose cache has no room beside the others runs after them. A second line of every
way tells what one network step costs besides time (counters.py), of chunks that are not timed.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import dit_ops
from dit_ops.backbones.wan import WanBackbone
from dit_ops.bench import generate_peers, measure
from dit_ops.bench.counters import Counter
from dit_ops.bench.generate_streams import Stream, start_all, take_turns
from dit_ops.pipelines.autoregressive import AutoregressivePipeline
from dit_ops.pipelines.base import Pipeline
from dit_ops.pipelines.few_step import FewStepPipeline

BLOCK, WINDOW, STEPS = 4, 20, 4
CYCLE = WINDOW // BLOCK  # chunks after which the slots of the ring repeat
PIXEL_FRAMES = 4  # per latent frame
PEERS = ("reference", "torch.compile")


@dataclass(frozen=True)
class Model:
    name: str
    config: dict[str, Any]  # of diffusers' Wan transformer
    text: tuple[int, int]  # tokens, channels
    height: int
    width: int
    dtype: torch.dtype

    @property
    def shape(self) -> str:
        video = f"{self.height}×{self.width}, window of {WINDOW} latent frames, blocks of {BLOCK}, {STEPS} steps"
        return f"{self.name} with camera, {video}"

    def cache_bytes(self, rows: int) -> int:
        """Keys and values of a full window as attention reads them, both paths: 2 · layers · rows · L · 2N · D numbers."""
        layers, N, D = (self.config[name] for name in ("num_layers", "num_attention_heads", "attention_head_dim"))
        return 4 * layers * rows * WINDOW * (self.height // 16) * (self.width // 16) * N * D * self.dtype.itemsize


WAN = Model(
    "wan2.1-1.3b",
    {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    (512, 4096),
    480,
    832,
    torch.bfloat16,
)
SMALL = Model(
    "4 layers of 4 heads of 64",
    {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 4, "text_dim": 64},
    (32, 64),
    128,
    128,
    torch.float32,
)


class RandomCondition:
    """Random text states; latents are not decoded."""

    latent_channels, spatial_stride, temporal_stride = 16, 8, PIXEL_FRAMES

    def __init__(self, text: tuple[int, int], device: str) -> None:
        self.text, self.device = text, device

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": torch.randn(len(prompts), *self.text, device=self.device)}

    def decode_stream(self, chunks: Iterable[Tensor], *, context: int | None = None) -> Iterator[Tensor]:
        yield from chunks


@dataclass(frozen=True)
class Way:
    name: str
    inside: Callable[[], contextlib.AbstractContextManager[Any]]  # what its chunks run in
    settle: int = 1  # chunks of a full ring until all are alike
    pipeline: type[Pipeline] = FewStepPipeline
    options: dict[str, Any] = field(default_factory=dict)


def ways(device: str, compiler: str | Callable[..., Any] = "inductor") -> tuple[list[Way], list[Way]]:
    """Those that take turns, and those that run after them."""
    launched, guided = generate_peers.launched, {"guidance": 5.0, "num_steps": STEPS}
    graphs = Way("dit_ops, graphs", contextlib.nullcontext, 2 * CYCLE)  # a step is launched, recorded, and replayed
    ours = Way("dit_ops, eager launches", launched)
    peers = [Way(PEERS[0], generate_peers.reference), Way(PEERS[1], generate_peers.Compiled(compiler))]
    return [*([] if device == "cpu" else [graphs]), ours, *peers], [
        Way(f"{ours.name}, compact cache", launched, options={"compact_cache": True}),
        Way(f"{ours.name}, guidance in one batch", launched, 1, AutoregressivePipeline, guided | {"batched_guidance": True}),
        Way(f"{ours.name}, guidance in two passes", launched, 1, AutoregressivePipeline, guided),
    ]


def random_backbone(model: Model, device: str) -> WanBackbone:
    """Made on the device. The camera branch, zero in a new model, is random as well: zeros would cost less power."""
    with torch.device(device):
        backbone = WanBackbone.from_config(model.config, camera=True, block_frames=BLOCK).to(model.dtype)
        for weight in [] if backbone.camera is None else backbone.camera.parameters():
            torch.nn.init.normal_(weight, std=0.02)
    return backbone.eval().requires_grad_(False)


def stream_of(way: Way, backbone: WanBackbone, model: Model, args: argparse.Namespace) -> Stream:
    """As long as it is timed, and two chunks more to be counted."""
    pipeline = way.pipeline(backbone, RandomCondition(model.text, args.device))
    frames = BLOCK * (CYCLE + way.settle + args.chunks + 2)
    options = {"height": model.height, "width": model.width, "window_frames": WINDOW, **way.options}
    chunks = lambda on_step: pipeline.stream("", pose=f"w*{frames - 1}", overlap=False, on_step=on_step, **options)
    need = model.cache_bytes(2 if "guidance" in options else 1)
    return Stream(way.name, chunks, way.inside, args.device, CYCLE, way.settle, need)


def attention_kernel(stream: Stream, model: Model) -> str:
    """Whose kernel computes the self-attention of a full window; for the peers, which one torch's SDPA chooses."""
    N, D = (model.config[name] for name in ("num_attention_heads", "attention_head_dim"))
    tokens = model.height // 16 * (model.width // 16)
    q, k = (torch.empty(1, n * tokens, 2 * N, D, device=stream.device, dtype=model.dtype) for n in (BLOCK, WINDOW))
    with stream.inside():
        ours = dit_ops.explain("attention", q, k, k)
    if ours.backend != "reference":
        return ours.detail
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return f"SDPA, {SDPBackend(torch._fused_sdp_choice(q, k, k)).name}"


def timed(stream: Stream, weights: int) -> dict[str, object]:
    """Figures of the chunks that were timed in turns, and of those before."""
    low, median, high = measure.quartiles(sorted(stream.timed))
    figures: dict[str, object] = {
        "chunk_s": round(median, 5),
        "iqr_s": round(high - low, 5),
        "chunks": len(stream.timed),
        "latent_fps": round(BLOCK / median, 2),
        "fps": round(BLOCK * PIXEL_FRAMES / median, 2),
        "first_s": round(stream.times[1], 4),
        "cold_first_s": round(stream.times[0], 3),
        "fill_s": [round(seconds, 4) for seconds in stream.times[1 : 1 + stream.fill]],
        "compiled": stream.compiled,
        "recompiled": stream.compiled - stream.settled,
    }
    return figures if stream.device == "cpu" else figures | {"memory": weights + stream.peak, "kept": stream.kept}


def counted(stream: Stream, weights: int) -> dict[str, object]:
    """What the steps of one more chunk cost besides time; on a CPU of a new stream, whose memory is counted from its start."""
    counter, chunks = Counter(stream.device), 1
    if stream.device == "cpu":
        stream.close()
        chunks += stream.fill + stream.settle
    stream.on_step = lambda *_: counter.mark()
    with counter:
        for _ in range(chunks):
            stream.chunk()
    steps = STEPS + 1  # and the clean rerun
    figures: dict[str, object] = dict(counter.most(steps))
    if stream.device == "cpu":
        figures |= {"memory": weights + counter.peak(), "kept": counter.kept(steps)}
        if stream.name == "torch.compile":
            del figures["launches"]  # the profiler does not see what Inductor wrote
    return figures


def record(
    stream: Stream, model: Model, args: argparse.Namespace, pass_: str, figures: dict[str, object], **more: object
) -> None:
    key = {"op": "generate", "shape": model.shape, "dtype": str(model.dtype).removeprefix("torch."), "pass": pass_}
    measure.write({**key, "backend": stream.name, **figures, **more, **measure.about(args.device)}, args.output)


def race(streams: list[Stream], model: Model, weights: int, args: argparse.Namespace, until: float) -> list[str]:
    """Runs and records streams, as many at a time as there is room for. Returns the names of those of ours that failed."""
    broken, waiting = [], streams
    while waiting:
        started, failed, waiting = start_all(waiting)
        for stream, reason in failed:
            record(stream, model, args, "chunk", {"refused": reason})
            broken += [stream.name] if stream.name not in PEERS else []
        take_turns(started, args.chunks, until)
        sensed, beside = measure.sensors(args.device), [stream.name for stream in started]
        for stream in started:
            kernel = attention_kernel(stream, model)
            record(stream, model, args, "chunk", timed(stream, weights), attention=kernel, beside=beside, **sensed)
        for stream in started:
            record(stream, model, args, "step", counted(stream, weights))
            stream.close()
    return broken


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunks", type=int, default=6, help="timed chunks of every way (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="then two chunks are enough (default: %(default)s)")
    parser.add_argument("--output", help="file to append the lines to, or - for none (default: bench/results/<device>.jsonl)")
    return parser.parse_args()


def main(args: argparse.Namespace, model: Model, compiler: str | Callable[..., Any] = "inductor") -> None:
    until = time.monotonic() + args.seconds
    backbone = random_backbone(model, args.device)
    weights = sum(p.nbytes for p in backbone.parameters())
    racing, after = ([stream_of(way, backbone, model, args) for way in group] for group in ways(args.device, compiler))
    broken = race(racing, model, weights, args, until)
    for stream in after:
        if time.monotonic() > until:
            record(stream, model, args, "chunk", {"refused": f"no time was left of {args.seconds:g} seconds"})
        else:
            broken += race([stream], model, weights, args, until)
    if broken:
        raise SystemExit(f"failed: {', '.join(broken)}")


if __name__ == "__main__":
    args = arguments()
    main(args, SMALL if args.device == "cpu" else WAN)
