"""Discrete actions: what a camera does between two latent frames, as one of 81 classes."""

import torch
from torch import Tensor

from dit_ops.camera import invert_rigid

CLASSES = 81  # 9 translations · 9 rotations
MIN_SHIFT = 0.01  # world units per latent frame: less is no movement
MIN_ANGLE = 0.05  # degrees per latent frame
_DIAGONALS = {(1, 3): 5, (1, 4): 6, (2, 3): 7, (2, 4): 8}  # two of the four directions at once


def action_labels(viewmats: Tensor) -> Tensor:
    """World-to-camera `[..., F, 4, 4]` → labels `[..., F]` int64, `9·translation + rotation`; the first frame has 0.

    Frame i is labelled by its pose in the camera of frame i − 1, so label a whole trajectory before cutting it into chunks.
    Both factors count alike, 0 being none:
    translation    1 forward, 2 back, 3 right, 4 left: within 60° of the axis, at least 0.01 long
    rotation       1 yaw right, 2 yaw left, 3 pitch up, 4 pitch down: beyond 0.05°, angles of Rz·Ry·Rx
    5 = 1 and 3, 6 = 1 and 4, 7 = 2 and 3, 8 = 2 and 4. HY-WorldPlay's classes; training and generation share this function.
    """
    if viewmats.dim() < 3 or viewmats.shape[-2:] != (4, 4):
        raise ValueError(f"viewmats must be [..., F, 4, 4], got {list(viewmats.shape)}")
    viewmats = viewmats.double()
    step = viewmats[..., :-1, :, :] @ invert_rigid(viewmats[..., 1:, :, :])  # camera i in the axes of camera i − 1
    shift, R = step[..., :3, 3], step[..., :3, :3]
    length = shift.norm(dim=-1)
    direction = torch.where(length > MIN_SHIFT, 1.0, 0.0)[..., None] * shift / length.clamp_min(1e-12)[..., None]
    cos60 = 0.5
    translation = _classes(direction[..., 2], direction[..., 0], cos60)
    yaw, pitch = -R[..., 2, 0].clamp(-1, 1).asin(), torch.atan2(R[..., 2, 1], R[..., 2, 2])
    rotation = _classes(yaw.rad2deg(), pitch.rad2deg(), MIN_ANGLE)
    labels = 9 * translation + rotation
    return torch.cat([torch.zeros_like(viewmats[..., :1, 0, 0], dtype=torch.int64), labels], dim=-1)


def _classes(first: Tensor, second: Tensor, limit: float) -> Tensor:
    """0 … 8 from two signed amounts that count beyond ±limit."""
    a = torch.where(first > limit, 1, 0) + torch.where(first < -limit, 2, 0)
    b = torch.where(second > limit, 3, 0) + torch.where(second < -limit, 4, 0)
    classes = a + b  # right where at most one is there
    for (i, j), value in _DIAGONALS.items():
        classes = torch.where((a == i) & (b == j), value, classes)
    return classes
