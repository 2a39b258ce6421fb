"""One stream of a model: the keys that are down become camera steps, the frames become JPEG files in memory."""

import io
import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dit_ops.camera import join_segments
from dit_ops.play.protocol import KEYS
from dit_ops.video import Mp4Writer, to_uint8

JPEG_QUALITY = 92


class Steering:
    """Keys that are down → a pose step per latent frame. Written by the connection, read by the model's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._down: tuple[str, ...] = ()
        self._tapped: set[str] = set()  # pressed since the last step, perhaps released since
        self._number = 0
        self._read: deque[tuple[str, int]] = deque()  # steps whose frames are still to come, and the key changes they follow
        self._followed = 0

    def press(self, down: tuple[str, ...], number: int) -> None:
        with self._lock:
            self._down, self._number = down, number
            self._tapped |= set(down)

    def steps(self) -> Iterator[str]:
        """Endless: what is pressed, or was since the last step, at the moment a step is asked for; `stay` when nothing is."""
        while True:
            with self._lock:
                pressed = {*self._down, *self._tapped}
                self._tapped.clear()
                key = "+".join(name for name in KEYS.values() if name in pressed) or "stay"
                self._read.append((key, self._number))
            yield f"{key}*1"

    def take(self, count: int) -> tuple[str, int]:
        """The pose string of the next `count` steps, and the number of the key change that all of them follow.

        Steps are taken with the frames that they led to: a model may have read those of later frames already.
        """
        with self._lock:
            steps = [self._read.popleft() for _ in range(count)]
        if steps:
            self._followed = steps[0][1]
        return join_segments((key, 1) for key, _ in steps), self._followed


@dataclass(frozen=True)
class Chunk:
    """Frames of one causal block and what the page shows beside them."""

    images: Tensor  # [F, H, W, 3] uint8 on the CPU
    pose: str  # the steps of this block
    keys: int  # the key change that it follows


class _Stopped(Exception):
    """Ends a generation between two network steps."""


class Stream:
    """A running generation. `next_chunk` and `close` belong to the one thread that owns the model.

    keep      latest frames kept for saving
    options   of the pipeline's stream: overlap, and fields of its Settings
    """

    def __init__(self, pipeline: Any, prompt: str, seed: int, keep: int, **options: Any) -> None:
        self.name = secrets.token_urlsafe(12)
        self.steering = Steering()
        self.frames = 0  # computed
        self.sent = 0  # of them, to the page
        self.kept: deque[bytes] = deque(maxlen=keep)
        self._steps = 0  # poses of the frames computed, after the start pose
        self._latent_frames = pipeline.condition.latent_frames
        self._stopped = threading.Event()
        self._chunks = pipeline.stream(prompt, pose=self.steering.steps(), seed=seed, on_step=self._on_step, **options)

    def next_chunk(self) -> Chunk | None:
        """Computes the next block; None when the model's stream has ended."""
        pixels = next(self._chunks, None)
        if pixels is None:
            return None
        images = to_uint8(pixels[0])
        self.frames += len(images)
        steps = self._latent_frames(self.frames) - 1
        pose, keys = self.steering.take(steps - self._steps)
        self._steps = steps
        return Chunk(images, pose, keys)

    def stop(self) -> None:
        """From any thread: the block that is being computed ends after its current network step, with an error."""
        self._stopped.set()

    def close(self) -> None:
        """Ends the generation and lets go of its cache."""
        self._chunks.close()

    def _on_step(self, done: int, total: int) -> None:
        if self._stopped.is_set():
            raise _Stopped


def encode_jpegs(images: Tensor) -> list[bytes]:
    """[F, H, W, 3] uint8 → JPEG files."""
    files = []
    for image in images.numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        files.append(file.getvalue())
    return files


def write_video(frames: Iterable[bytes], path: Path, fps: float) -> None:
    """JPEG frames → an mp4 file."""
    with Mp4Writer(path, fps) as out:
        for frame in frames:
            with Image.open(io.BytesIO(frame)) as image:
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
            out.write(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
