"""Shared by tests/ and bench/: error budgets, one timer and the bench record."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dit_ops._library import use_backend


def assert_within_rounding(name: str, got: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0) -> None:
    """A kernel may err `factor` times as much as plain PyTorch in the same dtype does, plus one rounding step.

    exact: the reference on fp64 inputs    plain: the reference on the very inputs the kernel got
    """
    assert got.dtype == plain.dtype and got.shape == exact.shape, f"{name}: {got.dtype} {list(got.shape)}"
    if got.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    err, allowed = ((t.double() - exact).abs().max().item() for t in (got, plain))
    step = torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert err <= factor * allowed + step, f"{name}: error {err:.3e}, plain PyTorch {allowed:.3e}, rounding step {step:.3e}"


def run_with_grads(fn: Callable, tensors: dict[str, Tensor | None], cotangents: list[Tensor], **kwargs) -> dict[str, Tensor]:
    """Outputs y0, y1, ... of fn(**tensors, **kwargs) and the gradient d<name> of every tensor that is present."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = fn(**leaves, **kwargs)
    outs = list(out) if isinstance(out, tuple) else [out]
    present = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(outs, list(present.values()), cotangents)
    results = {f"y{i}": y.detach() for i, y in enumerate(outs)}
    return results | {f"d{name}": g for name, g in zip(present, grads, strict=True)}


def check_backend(
    fn: Callable, tensors: dict[str, Tensor | None], cotangents: list[Tensor], backend: str, *, factor: float = 2.0, **kwargs
) -> None:
    """Outputs and gradients of fn on `backend`, each within rounding of the fp64 reference."""
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    exact = run_with_grads(fn, wide, [c.double() for c in cotangents], backend="reference", **kwargs)
    plain = run_with_grads(fn, tensors, cotangents, backend="reference", **kwargs)
    got = run_with_grads(fn, tensors, cotangents, backend=backend, **kwargs)
    for name in exact:
        assert_within_rounding(f"{backend} {name}", got[name], exact[name], plain[name], factor)


def time_us(fn: Callable[[], object], device: str, repeats: int = 50) -> list[float]:
    """Sorted times of fn in microseconds: on a GPU by events with the L2 cache flushed before every call, else by the clock."""
    for _ in range(5):
        fn()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter_ns()
            fn()
            times.append((time.perf_counter_ns() - start) / 1e3)
        return sorted(times)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start_event, end_event in events:
        flush.zero_()
        start_event.record()
        fn()
        end_event.record()
    torch.cuda.synchronize()
    return sorted(start_event.elapsed_time(end_event) * 1e3 for start_event, end_event in events)


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")
    return f"{model}, {torch.get_num_threads()} threads"


def record(
    op: str, shape: str, backend: str, pass_: str, run: Callable[[], object], device: str, moved_bytes: int, repeats: int = 50
) -> None:
    """Times one backend and prints one JSON line; a backend that refuses the call prints its reason."""
    line: dict[str, object] = {"op": op, "shape": shape, "backend": backend, "pass": pass_, "device": device_name(device)}
    try:
        with use_backend("reference" if backend == "torch.compile" else backend):
            times = time_us(run, device, repeats)
        median = statistics.median(times)
        line |= {"us": round(median, 1), "min_us": round(times[0], 1), "GB/s": round(moved_bytes / median / 1e3, 1)}
    except NotImplementedError as refusal:
        line |= {"refused": str(refusal)}
    print(json.dumps(line))
