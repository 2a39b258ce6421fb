"""3D rotary position embedding of video DiTs: each axis (frame, height, width) rotates its own share of the head."""

from functools import lru_cache

import torch
from torch import Tensor

POSITIONS = 1024  # positions per axis in one table; longer streams get longer tables


class Rope3D:
    """Factored tables: `angle = position · theta^(−2i / d_axis)` for the pair (2i, 2i+1) of an axis of `d_axis` channels.

    head_dim = 128 → axes of 44, 42, 42 channels (Wan). `splits` sets other shares, e.g. (16, 56, 56) for HunyuanVideo.
    Su et al. 2021 (arXiv 2104.09864); Wan 2.1 (arXiv 2503.20314).
    """

    def __init__(self, head_dim: int, theta: float = 10000.0, splits: tuple[int, int, int] | None = None):
        side = 2 * (head_dim // 6)
        self.splits = splits or (head_dim - 2 * side, side, side)
        if sum(self.splits) != head_dim or any(d % 2 or d < 2 for d in self.splits):
            raise ValueError(f"Rope3D: splits must be three even sizes that sum to head_dim = {head_dim}, got {self.splits}")
        self.theta = theta

    def tables(self, frames: int, height: int, width: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Three fp32 tables `[positions, d_axis / 2, 2]` of (cos, sin) that cover at least the asked positions."""
        need = (frames, height, width)
        t, h, w = (
            _table(d, self.theta, -(-n // POSITIONS) * POSITIONS, str(device)) for d, n in zip(self.splits, need, strict=True)
        )
        return t, h, w

    def rows(self, first: int, last: int, device: torch.device | str = "cpu") -> Tensor:
        """Rows [first, last) of the frame table, computed on the device: for streams without end, which no table covers."""
        return _rows(self.splits[0], self.theta, first, last, device)


@lru_cache(maxsize=64)
def _table(dim: int, theta: float, positions: int, device: str) -> Tensor:
    """Built in fp64 on the host, once per (size, theta, device); never as inference tensors, which training could not use."""
    with torch.inference_mode(False):
        return _rows(dim, theta, 0, positions, "cpu").to(device)


def _rows(dim: int, theta: float, first: int, last: int, device: torch.device | str) -> Tensor:
    freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = torch.arange(first, last, dtype=torch.float64, device=device)[:, None] * freq
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()
