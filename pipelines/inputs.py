"""What a request is given in files: poses, a known picture, a known video."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dit_ops.camera import trajectory_from_json
from dit_ops.pipelines.cameras import Cameras
from dit_ops.video import iterate_mp4

UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow says to pictures that it cannot read


def deal_poses(pose: str | None, count: int) -> list[str | None]:
    """A pose for each of `count` videos. A trajectory file (.txt) has a pose string per line: one for all, or one for each."""
    if pose is None or not pose.lower().endswith(".txt"):
        return [pose] * count
    if not Path(pose).is_file():
        raise FileNotFoundError(f"no such file: {pose}")
    lines = [line.strip() for line in Path(pose).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if len(lines) not in (1, count):
        raise ValueError(f"trajectory file {pose} must have one line, or one for each of {count} videos, got {len(lines)}")
    return [*lines] * (count // len(lines))


def names_pose_file(pose: str) -> bool:
    """Whether a pose is the path of a pose JSON file."""
    return pose.lower().endswith(".json")


def read_pose(pose: str | None) -> str | Cameras | None:
    """A pose string as it is; the trajectory of a `.json` file."""
    if pose is None or not names_pose_file(pose):
        return pose
    try:
        return trajectory_from_json(pose)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"pose file {pose} is not one that can be read ({error})") from error


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """A picture scaled to cover height × width and cropped at the centre → [3, H, W] in [−1, 1]."""
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            picture = ImageOps.fit(upright.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a picture that can be read ({error})") from error
    levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return levels.permute(2, 0, 1) / 127.5 - 1


def read_video(path: str | Path, height: int, width: int, fps: float, stride: int) -> Tensor:
    """The last frames of a video that fill whole latent frames of `stride` frames → [F, 3, height, width] in [−1, 1].

    They are taken at `fps`, the nearest frame each, and scaled and cropped as read_image does.
    """
    frames = [_cover(frame, height, width) for frame in iterate_mp4(path)]
    if not frames:
        raise ValueError(f"{path} is a video without frames")
    with av.open(str(path)) as file:
        rate = float(file.streams.video[0].average_rate or fps)
    count = int((len(frames) - 1) * fps / rate + 0.5) + 1
    count -= (count - 1) % stride
    back = [round(i * rate / fps) for i in range(count)]
    return torch.stack([frames[max(0, len(frames) - 1 - i)] for i in reversed(back)])


def _cover(frame: Tensor, height: int, width: int) -> Tensor:
    """[3, h, w] scaled to cover height × width and cropped at the centre."""
    scale = max(height / frame.shape[1], width / frame.shape[2])
    size = max(height, round(frame.shape[1] * scale)), max(width, round(frame.shape[2] * scale))
    if size != frame.shape[1:]:
        frame = torch.nn.functional.interpolate(frame[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frame[:, top : top + height, left : left + width].clone()


def _check_picture(path: str) -> None:
    """Its header: what it is, and how large."""
    try:
        with Image.open(path):
            pass
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a picture that can be read ({error})") from error


def _check_video(path: str) -> None:
    """Its first frame."""
    if next(iterate_mp4(path), None) is None:
        raise ValueError(f"{path} is a video without frames")


READABLE: dict[str, Callable[[str], Any]] = {"pose": read_pose, "image": _check_picture, "video": _check_video}
