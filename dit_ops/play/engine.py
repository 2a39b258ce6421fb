"""The one model of a server: a thread that owns it and one that encodes, whose turn it is, and what can be saved."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_ops.masks import check_window
from dit_ops.play.stream import Stream, encode_jpegs, write_video

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Sizes and times that keep a slow, vanished or hostile client from costing more than its share."""

    clients: int = 8  # connections at once
    ahead_seconds: float = 0.5  # the next chunk is made when less than this is left to show
    stall_seconds: float = 20.0  # a client that shows nothing, or takes no data, for this long is dropped
    keep_seconds: float = 60.0  # latest part of a stream that can be saved
    queue: int = 64  # messages that wait for a client's socket


class Turn:
    """`async with turn(waiting)`: one at a time, first come, first served; `waiting(n)` is called when n are before, and again
    when fewer are."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._line: list[Callable[[int], None]] = []  # who has the turn, then who waits for it

    @asynccontextmanager
    async def __call__(self, waiting: Callable[[int], None]) -> AsyncIterator[None]:
        self._line.append(waiting)
        if len(self._line) > 1:
            waiting(len(self._line) - 1)
        try:
            async with self._lock:
                yield
        finally:
            place = self._line.index(waiting)
            del self._line[place]
            for ahead, told in enumerate(self._line[place:], place):
                if ahead:
                    told(ahead)


@dataclass
class Engine:
    """Runs a pipeline for one client at a time, the others in the order in which they asked.

    options   fields of the pipeline's Settings for every stream, such as window_frames
    overlap   a chunk is decoded while the next one is computed: more frames per second, and keys are read one chunk earlier
    """

    pipeline: Any
    options: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    overlap: bool = False

    def __post_init__(self) -> None:
        self.settings = self.pipeline.settings.override(self.options)
        check_window("the cache", self.settings.window_frames, self.settings.sink_frames)
        device = self.pipeline.backbone.device
        self.turn = Turn()
        self.clients = 0
        self.streams: dict[str, Stream] = {}  # what can be saved: the latest stream of every connected client
        self._saving = asyncio.Lock()
        self._model = ThreadPoolExecutor(1, "play-model", _use_device, (device,))
        self._jpeg = ThreadPoolExecutor(1, thread_name_prefix="play-jpeg")
        self._video = ThreadPoolExecutor(1, thread_name_prefix="play-video")

    def new_stream(self, prompt: str, seed: int) -> Stream:
        keep = max(1, round(self.limits.keep_seconds * self.settings.fps))
        return Stream(self.pipeline, prompt, seed, keep, overlap=self.overlap, **self.options)

    async def on_model(self, call: Callable[[], T]) -> T:
        """Runs `call` on the model's thread, after what was asked of it before."""
        return await asyncio.get_running_loop().run_in_executor(self._model, call)

    async def jpegs(self, images: Tensor) -> list[bytes]:
        """[F, H, W, 3] uint8 → JPEG files, beside the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._jpeg, encode_jpegs, images)

    async def video(self, stream: Stream) -> bytes | None:
        """An mp4 file of the frames that are kept; None while another one is being made."""
        if self._saving.locked():
            return None
        async with self._saving:
            frames = list(stream.kept)
            return await asyncio.get_running_loop().run_in_executor(self._video, _mp4, frames, self.settings.fps)

    async def close(self) -> None:
        """Ends the threads, once the last stream is closed."""
        async with self.turn(lambda ahead: None):
            for thread in (self._model, self._jpeg, self._video):
                thread.shutdown()


def _use_device(device: torch.device) -> None:
    """A thread has its own current device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _mp4(frames: list[bytes], fps: float) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(frames, path, fps)
        return path.read_bytes()
