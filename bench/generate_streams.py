"""Streams of one model that is run in several ways: each from its first chunk to a steady state, then all of them in turns."""

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

FAILURES = (RuntimeError, ImportError, AttributeError, TypeError, ValueError, AssertionError)
SPARE = 8 << 30  # bytes that a chunk may need besides its cache

OnStep = Callable[..., None]


@dataclass
class Stream:
    """One way to run the model.

    chunks   on_step -> the chunks of a new stream    inside   what every chunk runs in
    fill     chunks that fill the ring                settle   chunks after that until all are alike
    need     bytes of the cache
    """

    name: str
    chunks: Callable[[OnStep], Iterator[Tensor]]
    inside: Callable[[], contextlib.AbstractContextManager[Any]]
    device: str
    fill: int
    settle: int = 1
    need: int = 0
    on_step: OnStep = lambda *_: None
    times: list[float] = field(default_factory=list)  # seconds: a chunk before all others, those that fill, those in turns
    compiled: int = 0  # graphs that Dynamo has compiled
    settled: int = 0  # how many of them before the turns
    peak: int = 0  # bytes on a GPU, of everything but the weights
    kept: int = 0  # bytes on a GPU that the last chunk left more than it found
    _held: int = 0
    _running: Any = None

    def chunk(self) -> float:
        """Seconds that the next chunk takes, from an idle device to an idle device."""
        if self._running is None:
            self._running = self.chunks(lambda *done: self.on_step(*done))
        graphs, before = counters["stats"]["unique_graphs"], self._memory()
        start = time.perf_counter()
        with self.inside():
            next(self._running)
        if self.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if self.device != "cpu":
            self.peak = max(self.peak, self._held + torch.cuda.max_memory_allocated() - before)
            self.kept = torch.cuda.memory_allocated() - before
            self._held += self.kept
        self.compiled += counters["stats"]["unique_graphs"] - graphs
        return seconds

    def _memory(self) -> int:
        if self.device == "cpu":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def close(self) -> None:
        """Frees the cache; the next chunk is the first of a new stream."""
        if self._running is not None:
            self._running.close()
        self._running, self._held = None, 0
        if self.device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()

    def start(self) -> None:
        """A first chunk, which compiles what the way needs; then a new stream that is run until it is steady."""
        self.times = [self.chunk()]
        self.close()
        self.times += [self.chunk() for _ in range(self.fill)]
        for _ in range(self.settle):
            self.chunk()
        self.settled = self.compiled

    @property
    def timed(self) -> list[float]:
        """Seconds of the chunks in turns."""
        return self.times[1 + self.fill :]

    def has_room(self) -> bool:
        if self.device == "cpu":
            return True
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] > self.need + SPARE


def start_all(streams: list[Stream]) -> tuple[list[Stream], list[tuple[Stream, str]], list[Stream]]:
    """(those that run, those that cannot and why, those for which there is no room beside the first)"""
    started: list[Stream] = []
    failed: list[tuple[Stream, str]] = []
    waiting: list[Stream] = []
    for stream in streams:
        if started and not stream.has_room():
            waiting.append(stream)
            continue
        try:
            stream.start()
            started.append(stream)
        except FAILURES as error:
            traceback.print_exc()
            failed.append((stream, f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"))
        if stream not in started:
            stream.close()
    return started, failed, waiting


def take_turns(streams: list[Stream], turns: int, until: float) -> None:
    """A B … B A, a chunk of each: `turns` times, or from the third turn on until the clock passes `until`."""
    for turn in range(turns):
        if turn >= 2 and time.monotonic() > until:
            return
        for stream in streams if turn % 2 == 0 else streams[::-1]:
            stream.times.append(stream.chunk())
