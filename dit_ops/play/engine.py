"""The one model of a server: a thread that owns it, whose turn it is, and the streams that can be saved."""

import asyncio
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dit_ops.masks import check_window
from dit_ops.play.stream import Stream, write_video

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Sizes and times that keep a slow, vanished or hostile client from costing more than its share."""

    clients: int = 8  # connections at once
    ahead_seconds: float = 0.5  # the next chunk is made when less than this is left to show
    stall_seconds: float = 20.0  # a client that shows nothing, or takes no data, for this long is dropped
    keep_seconds: float = 60.0  # latest part of a stream that can be saved
    queue: int = 64  # messages that wait for a client's socket


@dataclass
class Engine:
    """Runs a pipeline for one client at a time, the others in the order in which they asked.

    options   fields of the pipeline's Settings for every stream, such as window_frames
    """

    pipeline: Any
    options: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.settings = self.pipeline.settings.override(self.options)
        check_window("play", self.settings.window_frames, self.settings.sink_frames)
        self.turn = asyncio.Lock()  # fair: first come, first served
        self.asking = 0  # clients that have the turn or wait for it
        self.clients = 0
        self.streams: dict[str, Stream] = {}  # what can be saved: the latest stream of every connected client
        self._saving = asyncio.Lock()
        self._model = ThreadPoolExecutor(1, thread_name_prefix="play-model")
        self._video = ThreadPoolExecutor(1, thread_name_prefix="play-video")

    def new_stream(self, prompt: str, seed: int) -> Stream:
        keep = max(1, round(self.limits.keep_seconds * self.settings.fps))
        return Stream(self.pipeline, prompt, seed, keep, **self.options)

    async def on_model(self, call: Callable[[], T]) -> T:
        """Runs `call` on the model's thread, after what was asked of it before."""
        return await asyncio.get_running_loop().run_in_executor(self._model, call)

    async def video(self, stream: Stream) -> bytes | None:
        """An mp4 file of the frames that are kept; None while another one is being made."""
        if self._saving.locked():
            return None
        async with self._saving:
            frames = list(stream.kept)
            return await asyncio.get_running_loop().run_in_executor(self._video, _mp4, frames, self.settings.fps)

    async def close(self) -> None:
        """Ends the threads, once the last stream is closed."""
        async with self.turn:
            self._model.shutdown()
            self._video.shutdown()


def _mp4(frames: list[bytes], fps: float) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(frames, path, fps)
        return path.read_bytes()
