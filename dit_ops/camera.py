"""Cameras: pose strings, trajectories, intrinsics, and the projective matrices of ProPE.

OpenCV axes (x right, y down, z forward). A view matrix is world-to-camera, rigid, 4×4; the first frame of a trajectory is the
identity. Intrinsics are normalised by the image size: fx/W, fy/H, cx/W, cy/H.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

STEP = 0.08  # world units per latent frame
ANGLE = 3.0  # degrees per latent frame
DEFAULT_INTRINSICS = (0.5050505, 0.89786756, 0.5, 0.5)  # fx/W, fy/H, cx/W, cy/H of the camera data that Wan worlds train on

# key: (yaw about y, pitch about x) in degrees, (x, y, z) in the camera's own axes
KEYS: dict[str, tuple[float, float, float, float, float]] = {
    "w": (0, 0, 0, 0, STEP),
    "s": (0, 0, 0, 0, -STEP),
    "d": (0, 0, STEP, 0, 0),
    "a": (0, 0, -STEP, 0, 0),
    "u": (0, 0, 0, -STEP, 0),
    "dn": (0, 0, 0, STEP, 0),
    "j": (-ANGLE, 0, 0, 0, 0),
    "l": (ANGLE, 0, 0, 0, 0),
    "i": (0, ANGLE, 0, 0, 0),
    "k": (0, -ANGLE, 0, 0, 0),
    "stay": (0, 0, 0, 0, 0),
}
ALIASES = {"left": "j", "right": "l", "up": "i", "down": "k"}
OPPOSITE = {"w": "s", "a": "d", "u": "dn", "j": "l", "i": "k", "stay": "stay"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
_SEGMENT = re.compile(r"([a-z]+(?:\+[a-z]+)*)\*(\d+)")


def parse_segments(text: str) -> list[tuple[str, int]]:
    """`"a*4,w+up*8"` → `[("a", 4), ("w+i", 8)]`; aliases are resolved. A bad segment is named."""
    segments = []
    for i, part in enumerate(text.split(",")):
        match = _SEGMENT.fullmatch(part.strip(" "))
        keys = [ALIASES.get(key, key) for key in match[1].split("+")] if match else []
        if match is None or not KEYS.keys() >= set(keys):
            valid = ", ".join([*KEYS, *ALIASES])
            raise ValueError(
                f"pose string {text!r}: segment {i + 1} must be key*count with a key of {valid}, or several joined by +, "
                f"got {part.strip(' ')!r}"
            )
        segments.append(("+".join(keys), int(match[2])))
    return segments


def parse_trajectory(text: str) -> Tensor:
    """Pose string → world-to-camera `[F, 4, 4]` fp32, `F = 1 + Σ counts`, one pose per latent frame, first = identity.

    Grammar: `key*count(,key*count)*`; w s a d u dn move 0.08 along the camera's own axes, j l yaw and i k pitch by 3°, stay
    keeps the pose, and `w+l*4` is four steps of both at once.
    """
    trajectory = Trajectory()
    return torch.cat([torch.eye(4)[None], trajectory.extend(text)])


class Trajectory:
    """A trajectory that grows: `extend("w*2")` twice gives the poses of `"w*4"`, bit for bit."""

    def __init__(self) -> None:
        self._pose = torch.eye(4, dtype=torch.float64)  # camera-to-world

    def extend(self, text: str) -> Tensor:
        """World-to-camera `[Σ counts, 4, 4]` fp32 of the steps that `text` adds."""
        poses = []
        for key, count in parse_segments(text):
            move = _motion(key)
            for _ in range(count):
                self._pose = self._pose @ move
                poses.append(self._pose)
        return invert_rigid(torch.stack(poses)).float() if poses else torch.empty(0, 4, 4)


def join_segments(segments: Iterable[tuple[str, int]]) -> str:
    """The pose string of (key, count) pairs; neighbours with the same key become one segment, empty ones none."""
    joined: list[tuple[str, int]] = []
    for key, count in segments:
        if joined and joined[-1][0] == key:
            joined[-1] = (key, joined[-1][1] + count)
        elif count:
            joined.append((key, count))
    return ",".join(f"{key}*{count}" for key, count in joined)


def _motion(key: str) -> Tensor:
    """One step in the camera's own frame, `[4, 4]` fp64: rotation Ry(yaw)·Rx(pitch), then the shift along the turned axes."""
    yaw, pitch, *shift = (sum(values) for values in zip(*(KEYS[k] for k in key.split("+")), strict=True))
    cy, sy = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    cp, sp = math.cos(math.radians(pitch)), math.sin(math.radians(pitch))
    rotation_y = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]], dtype=torch.float64)
    rotation_x = torch.tensor([[1, 0, 0], [0, cp, -sp], [0, sp, cp]], dtype=torch.float64)
    rotation = rotation_y @ rotation_x
    move = torch.eye(4, dtype=torch.float64)
    move[:3, :3] = rotation
    move[:3, 3] = rotation @ torch.tensor(shift, dtype=torch.float64)
    return move


def mirror_trajectory(text: str) -> str:
    """The pose string with every key replaced by its opposite: the control that a camera model must not follow."""
    opposite = lambda key: "+".join(OPPOSITE[k] for k in key.split("+"))
    return ",".join(f"{opposite(key)}*{count}" for key, count in parse_segments(text))


def trajectory_frames(text: str) -> int:
    """Poses (latent frames) that a pose string describes."""
    return 1 + sum(count for _, count in parse_segments(text))


def invert_rigid(transform: Tensor) -> Tensor:
    """`[R | t]⁻¹ = [Rᵀ | −Rᵀt]` of rigid `[..., 4, 4]`."""
    rotation, translation = transform[..., :3, :3], transform[..., :3, 3:]
    back = rotation.transpose(-1, -2)
    top = torch.cat([back, -back @ translation], dim=-1)
    return torch.cat([top, transform[..., 3:, :]], dim=-2)


def align_to_first(viewmats: Tensor) -> Tensor:
    """World-to-camera `[..., F, 4, 4]` with the world moved into the first camera: `V_i ← V_i · V_0⁻¹`."""
    return viewmats @ invert_rigid(viewmats[..., :1, :, :])


def quaternion_poses_to_viewmats(poses: Tensor) -> Tensor:
    """World-to-camera poses `[..., 7]` as (tx, ty, tz, qx, qy, qz, qw) → `[..., 4, 4]`."""
    t, q = poses[..., :3], torch.nn.functional.normalize(poses[..., 3:], dim=-1)
    x, y, z, w = q.unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], -1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], -1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], -1),
    ]
    top = torch.cat([torch.stack(rows, -2), t[..., None]], dim=-1)
    bottom = torch.tensor([0, 0, 0, 1], dtype=poses.dtype, device=poses.device).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], dim=-2)


def intrinsics_matrix(fx: float, fy: float, cx: float = 0.5, cy: float = 0.5) -> Tensor:
    """Normalised intrinsics `[3, 3]` fp32."""
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float32)


def trajectory_from_json(path: str | Path) -> tuple[Tensor, Tensor]:
    """Pose file `{"0": {"extrinsic": camera-to-world 4×4, "K": 3×3 pixels}, …}` → viewmats `[F, 4, 4]`, Ks `[F, 3, 3]`, fp32.

    Poses are re-aligned to the first frame. The image size is taken as twice the principal point, so K becomes
    fx/(2cx), fy/(2cy), 0.5, 0.5.
    """
    with open(path, encoding="utf-8") as file:
        frames = json.load(file)
    if not isinstance(frames, dict) or not frames or set(frames) != {str(i) for i in range(len(frames))}:
        raise ValueError(f'pose file {path}: expected an object with keys "0" to "F-1", got {_short(frames)}')
    cameras, intrinsics = [], []
    for i in range(len(frames)):
        frame = frames[str(i)]
        for name, size in (("extrinsic", 4), ("K", 3)):
            if not isinstance(frame, dict) or _shape(frame.get(name)) != (size, size):
                raise ValueError(f"pose file {path}: frame {i} needs {name!r} as a {size}×{size} matrix, got {_short(frame)}")
        cameras.append(torch.tensor(frame["extrinsic"], dtype=torch.float64))
        k = frame["K"]
        intrinsics.append(intrinsics_matrix(k[0][0] / (2 * k[0][2]), k[1][1] / (2 * k[1][2])))
    return align_to_first(invert_rigid(torch.stack(cameras))).float(), torch.stack(intrinsics)


def _shape(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not value or not all(isinstance(r, list) and len(r) == len(value[0]) for r in value):
        return None
    return len(value), len(value[0])


def _short(value: object) -> str:
    text = json.dumps(list(value) if isinstance(value, dict) else value)
    return text if len(text) < 80 else text[:77] + "..."


def projective_cameras(viewmats: Tensor, Ks: Tensor) -> tuple[Tensor, Tensor]:
    """ProPE's matrices `P = lift(diag(fx, fy, 1))·V` and `P⁻¹`, each `[B, F, 4, 4]` in at least fp32.

    viewmats: rigid world-to-camera `[B, F, 4, 4]`    Ks: normalised intrinsics `[B, F, 3, 3]`; cx, cy and skew are not used
    Li et al. 2025, "Cameras as Relative Positional Encoding" (arXiv 2507.10496); all channels, as minWM trains it.
    """
    if viewmats.dim() != 4 or viewmats.shape[-2:] != (4, 4):
        raise ValueError(f"viewmats must be [B, F, 4, 4], got {list(viewmats.shape)}")
    if Ks.shape != (*viewmats.shape[:2], 3, 3):
        raise ValueError(f"Ks must be [B, F, 3, 3] = {[*viewmats.shape[:2], 3, 3]}, got {list(Ks.shape)}")
    dtype = torch.promote_types(torch.promote_types(viewmats.dtype, Ks.dtype), torch.float32)
    viewmats, Ks = viewmats.to(dtype), Ks.to(dtype)
    one = torch.ones_like(Ks[..., 0, 0])
    focal = torch.stack([Ks[..., 0, 0], Ks[..., 1, 1], one, one], dim=-1)  # lift(Kn) is diagonal
    return focal[..., :, None] * viewmats, invert_rigid(viewmats) / focal[..., None, :]
