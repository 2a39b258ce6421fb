"""Video files: H.264 mp4 through PyAV.

Players and yuv420p want even sizes, so an odd height or width gains one row or column that repeats the last one.
Colours are written as BT.709, limited range, and tagged so.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from dit_ops.files import atomic_path


class Mp4Writer:
    """Writes chunks of frames as they come: `with Mp4Writer(path, fps) as out: out.write(frames)`.

    path    appears only when the block ends without an error; until then a hidden file beside it grows
    fps     frames per second, any positive number
    quality H.264's constant rate factor, 0 (lossless) to 51; 16 keeps small videos clean
    """

    def __init__(self, path: str | os.PathLike, fps: float, *, quality: int = 16):
        if not fps > 0:
            raise ValueError(f"write_mp4: fps must be positive, got {fps}")
        self.path = Path(path)
        self.fps = Fraction(fps).limit_denominator(1001)
        self.quality = quality
        self.size: tuple[int, int] | None = None  # height and width of the frames given, before padding
        self.frames = 0

    def __enter__(self) -> "Mp4Writer":
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            self._file = stack.enter_context(av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}))
            self._open = stack.pop_all()
        return self

    def write(self, frames: Tensor) -> None:
        """frames: [F, 3, H, W] in [-1, 1], any floating dtype and device; values outside are clipped."""
        check_frames("write_mp4", frames)
        size = (frames.shape[2], frames.shape[3])
        if self.size is None:
            self.size = size
            self._open_stream(*size)
        if size != self.size:
            raise ValueError(f"write_mp4: every chunk must be {list(self.size)} pixels, got {list(size)}")
        for image in to_uint8(pad_to_even(frames)).numpy():
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            self._file.mux(self._stream.encode(frame))
            self.frames += 1

    def _open_stream(self, height: int, width: int) -> None:
        self._stream = self._file.add_stream("libx264", rate=self.fps, options={"crf": str(self.quality), "preset": "medium"})
        self._stream.height, self._stream.width = height + height % 2, width + width % 2
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = 1  # BT.709

    def __exit__(self, *error) -> bool | None:
        if error[0] is not None:
            return self._open.__exit__(*error)
        with self._open:
            if not self.frames:
                raise ValueError("write_mp4: frames must hold at least one frame, got none")
            self._file.mux(self._stream.encode())
        return None


def write_mp4(path: str | os.PathLike, frames: Tensor, fps: float, *, quality: int = 16) -> None:
    """Writes frames [F, 3, H, W] in [-1, 1] to an mp4 (H.264, yuv420p) in one atomic step."""
    check_frames("write_mp4", frames)
    with Mp4Writer(path, fps, quality=quality) as out:
        out.write(frames)


def read_mp4(path: str | os.PathLike) -> tuple[Tensor, float]:
    """→ (frames [F, 3, H, W] fp32 in [-1, 1], frames per second)."""
    chunks = list(iterate_mp4(path))
    if not chunks:
        raise ValueError(f"read_mp4: {path} holds no video frame")
    with av.open(str(path)) as file:
        rate = file.streams.video[0].average_rate
    return torch.stack(chunks), float(rate or 0)


def iterate_mp4(path: str | os.PathLike) -> Iterator[Tensor]:
    """The frames of a video one after the other, each [3, H, W] fp32 in [-1, 1]."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"read_mp4: path must be a video file, {path} does not exist")
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise ValueError(f"read_mp4: {path} has no video stream")
            for frame in file.decode(video=0):
                image = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                yield image.permute(2, 0, 1).float() / 127.5 - 1
    except av.error.InvalidDataError as error:
        raise ValueError(f"read_mp4: {path} is not a video that FFmpeg can read ({error.strerror})") from error


def check_frames(what: str, frames: Tensor) -> None:
    if frames.dim() != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"{what}: frames must be [F, 3, H, W] with at least one frame, got {list(frames.shape)}")
    if not frames.is_floating_point():
        raise ValueError(f"{what}: frames must be floating point in [-1, 1], got {frames.dtype}")
    if not frames.isfinite().all():
        raise ValueError(f"{what}: frames must be finite, got NaN or infinity")


def pad_to_even(frames: Tensor) -> Tensor:
    """Repeats the last row and column where the height or width is odd."""
    height, width = frames.shape[-2:]
    return torch.nn.functional.pad(frames, (0, width % 2, 0, height % 2), mode="replicate")


def to_uint8(frames: Tensor) -> Tensor:
    """[F, 3, H, W] in [-1, 1] → [F, H, W, 3] uint8 on the CPU, rounded to the nearest level."""
    return ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
