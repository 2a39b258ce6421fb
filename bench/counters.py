"""What the network steps of a stream cost besides time, from torch's profiler and allocator.

Counted of every step: reads from the device that the host waits for, allocations, and what the host starts: kernels, graphs and
copies on a GPU, operators on a CPU. There, tensors of a few bytes are Python numbers and do not count as allocations.
"""

import contextlib
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import Self

MARK = "end of a network step"
WAITS = "called a synchronizing"  # in the warning of torch.cuda.set_sync_debug_mode
READS = ("aten::_local_scalar_dense", "aten::nonzero")
SMALLEST = 64  # bytes
LAUNCH = re.compile(r"(cuda|cu)(Launch|GraphLaunch|Memcpy|Memset)")

Event = dict[str, Any]


class Counter:
    """`with counter: …`, with `counter.mark()` at the end of every network step. Afterwards the counts can be read."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.events: list[Event] = []
        self._stats: list[dict[str, int]] = []  # of a GPU, at the start and at every mark

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        os.environ.setdefault("TEARDOWN_CUPTI", "0")  # a second start of CUPTI beside CUDA graphs crashes
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA][: self.on_gpu]]
        self._profile = self._stack.enter_context(profile(activities=activities, profile_memory=not self.on_gpu))
        if self.on_gpu:
            self._caught = self._stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self._stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")
            self._stats.append(self._so_far())
        return self

    def mark(self) -> None:
        if self.on_gpu:
            self._stats.append(self._so_far())
        with record_function(MARK):
            pass

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        with tempfile.TemporaryDirectory() as folder:
            self._profile.export_chrome_trace(f"{folder}/trace.json")
            self.events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]

    def _so_far(self) -> dict[str, int]:
        stats = torch.cuda.memory_stats()
        return {
            "syncs": sum(WAITS in str(warning.message) for warning in self._caught or ()),
            "allocations": stats["allocation.all.allocated"],
            "device_allocations": stats["num_device_alloc"],
        }

    def most(self, steps: int) -> dict[str, int]:
        """The most that one of the last `steps` steps cost; of a GPU, device_allocations are those that its driver made."""
        count = started_on_gpu if self.on_gpu else done_on_cpu
        found = [count(self.events, *span) for span in spans(self.events)[-steps:]]
        for i, (before, after) in enumerate(zip(self._stats[-steps - 1 :], self._stats[-steps:], strict=False)):
            found[i] |= {name: after[name] - before[name] for name in after}
        return {name: max(step[name] for step in found) for name in found[0]}

    def peak(self) -> int:
        """The most bytes of CPU tensors that were made since the start and lived at one time."""
        live = [0]
        for event in sorted((e for e in self.events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
            live.append(live[-1] + event["args"]["Bytes"])
        return max(live)

    def kept(self, steps: int) -> int:
        """By how many bytes of CPU tensors the last `steps` steps leave more than they found."""
        start, end = spans(self.events)[-steps][0], spans(self.events)[-1][1]
        return sum(e["args"]["Bytes"] for e in self.events if e["name"] == "[memory]" and start <= e["ts"] < end)


def spans(events: list[Event]) -> list[tuple[float, float]]:
    """Start and end of every step: from mark to mark."""
    marks = sorted(e["ts"] for e in events if e["name"] == MARK and e.get("cat") == "user_annotation")
    return list(zip([0.0, *marks], marks, strict=False))


def started_on_gpu(events: list[Event], start: float, end: float) -> dict[str, int]:
    """A call of the driver inside a call of the runtime has the same correlation."""
    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and start <= e["ts"] < end]
    return {"launches": len({e["args"]["correlation"] for e in calls if LAUNCH.match(e["name"])})}


def done_on_cpu(events: list[Event], start: float, end: float) -> dict[str, int]:
    """launches: operators that no other one called."""
    inside = [e for e in events if "ts" in e and start <= e["ts"] < end]
    ops = sorted((e for e in inside if e.get("cat") == "cpu_op"), key=lambda e: (e["ts"], -e["dur"]))
    launches, until = 0, start
    for op in ops:
        if op["ts"] >= until:
            launches, until = launches + 1, op["ts"] + op["dur"]
    return {
        "syncs": sum(e["name"] in READS for e in ops),
        "allocations": sum(e["args"]["Bytes"] >= SMALLEST for e in inside if e["name"] == "[memory]"),
        "launches": launches,
    }
