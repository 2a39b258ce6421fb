"""Throughput of a training run: time per phase, tokens per second, model FLOPs utilisation, peak memory."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit_ops.training import flops

# dense bf16 matrix FLOPs per second, from the vendors' data sheets; the first name that is part of the device's name counts
PEAK_FLOPS = {
    "B300": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Of one device in bf16; None where it is not known, and for fp32."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


class Meters:
    """One step at a time: `begin()`, `phase(name)` around the work, `take()`. CUDA phases are timed by events, without a wait.

    peak   FLOPs per second of one device; None leaves the utilisation out
    """

    def __init__(self, device: torch.device, peak: float | None):
        self.device, self.peak = device, peak
        self.flops = 0.0  # of this rank in this step: forward, and twice that for backward; what is recomputed counts once
        self.tokens = 0  # video tokens trained on, of all ranks
        self._started = 0.0
        self._marks: list[tuple[str, Any, Any]] = []

    def watch(self, backbone: nn.Module, ranks: int) -> None:
        """Counts the FLOPs of every forward of a backbone that `ranks` ranks share."""

        def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            done = flops.forward_flops(module, *args, **kwargs)
            self.flops += done * (3 if torch.is_grad_enabled() and module.training else 1) / ranks

        if flops.knows(backbone):
            backbone.register_forward_pre_hook(count, with_kwargs=True)

    def begin(self) -> None:
        self._started, self._marks, self.flops, self.tokens = time.perf_counter(), [], 0.0, 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self._now()
        yield
        self._marks.append((name, before, self._now()))

    def take(self) -> dict[str, float]:
        """The finished step's values."""
        seconds: dict[str, float] = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for name, before, after in self._marks:
            elapsed = before.elapsed_time(after) / 1000 if self.device.type == "cuda" else after - before
            seconds[f"{name}_seconds"] = seconds.get(f"{name}_seconds", 0.0) + elapsed
        step = time.perf_counter() - self._started
        values = {"step_seconds": step, **seconds, "tokens_per_second": self.tokens / step, "peak_memory_gb": self._memory()}
        if self.peak and self.flops:
            values["mfu"] = self.flops / (step * self.peak)
        return values

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _memory(self) -> float:
        """Peak since the start: allocated device memory, or this process's on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def video_tokens(backbone: nn.Module, latents: Tensor) -> int:
    """Tokens of latents [B, F, Cz, h, w]; without a known patch every latent pixel is one."""
    ph, pw = getattr(backbone, "patch", (1, 1))
    if latents.dim() != 5:
        return latents.shape[0]
    B, frames, _, height, width = latents.shape
    return B * frames * (height // ph) * (width // pw)
