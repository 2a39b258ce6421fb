"""One stream of a model: the keys that are down become camera steps, the frames become JPEG files in memory."""

import io
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dit_ops.camera import join_segments
from dit_ops.play.protocol import KEYS
from dit_ops.video import Mp4Writer, to_uint8

JPEG_QUALITY = 92


class Steering:
    """Keys that are down → a pose step per latent frame. Written by the connection, read by the model's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._down: tuple[str, ...] = ()
        self._tapped: set[str] = set()  # pressed since the last step, perhaps released since
        self._number = 0
        self._followed = 0
        self._taken: list[tuple[str, int]] = []

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
                self._followed = self._number
            key = "+".join(name for name in KEYS.values() if name in pressed) or "stay"
            self._taken.append((key, 1))
            yield f"{key}*1"

    def taken(self) -> tuple[str, int]:
        """The pose string of the steps since the last call, and the number of the key change that they follow."""
        pose, self._taken = join_segments(self._taken), []
        return pose, self._followed


@dataclass(frozen=True)
class Chunk:
    """JPEG frames of one causal block and what the page shows beside them."""

    frames: list[bytes]
    pose: str  # the steps of this block
    keys: int  # the key change that it follows
    seconds: float  # spent computing


class Stream:
    """A running generation. `next_chunk` and `close` belong to the one thread that owns the model.

    keep      latest frames kept for saving
    options   fields of the pipeline's Settings
    """

    def __init__(self, pipeline: Any, prompt: str, seed: int, keep: int, **options: Any) -> None:
        self.name = secrets.token_urlsafe(12)
        self.steering = Steering()
        self.frames = 0
        self.kept: deque[bytes] = deque(maxlen=keep)
        self._chunks = pipeline.stream(prompt, pose=self.steering.steps(), seed=seed, **options)

    def next_chunk(self) -> Chunk | None:
        """Computes the next block; None when the model's stream has ended."""
        started = time.perf_counter()
        pixels = next(self._chunks, None)
        if pixels is None:
            return None
        frames = [encode_jpeg(image) for image in to_uint8(pixels[0])]
        self.frames += len(frames)
        self.kept.extend(frames)
        pose, keys = self.steering.taken()
        return Chunk(frames, pose, keys, time.perf_counter() - started)

    def close(self) -> None:
        """Ends the generation and lets go of its cache."""
        self._chunks.close()


def encode_jpeg(image: torch.Tensor) -> bytes:
    """[H, W, 3] uint8 → JPEG."""
    out = io.BytesIO()
    Image.fromarray(image.numpy()).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()


def write_video(frames: Iterable[bytes], path: Path, fps: float) -> None:
    """JPEG frames → an mp4 file."""
    with Mp4Writer(path, fps) as out:
        for frame in frames:
            with Image.open(io.BytesIO(frame)) as image:
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
            out.write(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
