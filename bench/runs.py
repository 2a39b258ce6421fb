"""Runs one op on every backend and against its peers: forward and backward, each group interleaved and recorded."""

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from dit_ops._library import use_backend
from dit_ops.bench import measure

BACKENDS = ("dense", "cuda", "triton", "cpu", "reference", "torch.compile")


@dataclass(frozen=True)
class Peer:
    """Another library's function of the same leaves. missing: why it cannot be called; forward_only: it has no backward."""

    fn: Callable | None
    missing: str | None = None
    forward_only: bool = False


def arguments(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="cut every shape to at most this many tokens per sample")
    parser.add_argument("--shapes", type=int, help="the first so many shapes (default: all)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS[1:]), choices=BACKENDS)
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of every backend (default: %(default)s)")
    parser.add_argument("--output", help="file to append the lines to, or - for none (default: bench/results/<device>.jsonl)")
    return parser.parse_args()


def bench_op(
    op: str,
    fn: Callable,
    shape: str,
    leaves: list[Tensor],
    cotangents: list[Tensor],
    args: argparse.Namespace,
    moved: list[int],
    peers: dict[str, Peer] | None = None,
    flops: tuple[float, float] = (0, 0),
) -> None:
    """fn(*leaves) without gradients, and its backward. moved: the least bytes of forward, and of forward plus backward.

    flops: useful ones of forward and of backward, of an op that computes more than it moves
    """
    makers, missing = _makers(fn, leaves, cotangents, args.backends, peers or {})
    with functorch_config.patch(donated_buffer=False):  # the backward is timed many times over one graph
        for pass_, moved_bytes, useful in (("forward", moved[0], flops[0]), ("backward", moved[1] - moved[0], flops[1])):
            group = {name: functools.partial(make, pass_ == "backward") for name, make in makers.items()}
            key = {"op": op, "shape": shape, "dtype": str(leaves[0].dtype).removeprefix("torch."), "pass": pass_}
            bench_group(key, group, args, moved_bytes, missing, flops=useful)


def _makers(
    fn: Callable, leaves: list[Tensor], cotangents: list[Tensor], backends: list[str], peers: dict[str, Peer]
) -> tuple[dict[str, Callable[[bool], measure.Run]], dict[str, str]]:
    """What makes a run, forward or backward, by name; and why some cannot be made."""
    torch._dynamo.reset()
    functions = {b: _on("reference" if b == "torch.compile" else b, fn) for b in backends}
    if "torch.compile" in functions:
        functions["torch.compile"] = _on("reference", torch.compile(fn, dynamic=False))
    makers = {name: _maker(run, leaves, cotangents) for name, run in functions.items()}
    makers |= {name: _maker(p.fn, leaves, cotangents, p.forward_only) for name, p in peers.items() if p.fn is not None}
    return makers, {name: p.missing or "not installed" for name, p in peers.items() if p.fn is None}


def forward_makers(
    fn: Callable, leaves: list[Tensor], backends: list[str], peers: dict[str, Peer] | None = None
) -> dict[str, Callable[[], measure.Run]]:
    makers, _ = _makers(fn, leaves, [], backends, peers or {})
    return {name: functools.partial(make, False) for name, make in makers.items()}


def bench_group(
    key: dict[str, str],
    makers: Mapping[str, Callable[[], measure.Run]],
    args: argparse.Namespace,
    moved_bytes: int,
    missing: dict[str, str] | None = None,
    calls: int = 1,
    flops: float = 0,
) -> None:
    """Times what the makers make, all of them in turns; one that cannot be made or run gives its reason."""
    reasons, runs = dict(missing or {}), {}
    for name, make in makers.items():
        try:
            run = make()
            measure.warm_up(run, args.device)
            runs[name] = run
        except NotImplementedError as refusal:
            reasons[name] = str(refusal)
        except (RuntimeError, ImportError, AttributeError, TypeError, ValueError, AssertionError) as error:
            if name in BACKENDS and name != "torch.compile":
                raise
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    times = measure.interleaved(runs, args.device, args.repeats)
    sensed = measure.sensors(args.device)
    for name in [*makers, *(name for name in reasons if name not in makers)]:
        figures = times.get(name), reasons.get(name), calls, sensed
        record = measure.row({**key, "backend": name}, args.device, moved_bytes, *figures)
        measure.write(record | measure.compute_rates(record, args.device, flops), args.output)


def _on(backend: str, fn: Callable) -> Callable:
    def run(*leaves):
        with use_backend(backend):
            return fn(*leaves)

    return run


def _maker(fn: Callable, leaves: list[Tensor], cotangents: list[Tensor], forward_only: bool = False) -> Callable:
    def make(backward: bool) -> measure.Run:
        if not backward:

            def forward():
                with torch.no_grad():
                    return fn(*leaves)

            return forward
        if forward_only:
            raise NotImplementedError("it has no backward")
        out = fn(*leaves)
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        return lambda: torch.autograd.grad(outs, leaves, cotangents, retain_graph=True, allow_unused=True)

    return make
