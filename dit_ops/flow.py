"""Flow matching: x_t = (1 − σ)·x0 + σ·ε, the network predicts v = ε − x0, timestep t = 1000·σ."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlowSchedule:
    """Noise levels `σ' = s·σ / (1 + (s − 1)·σ)` of `σ = 1, 1 − 1/N, …, 1/N` for shift `s` and `N = num_steps`.

    Esser et al. 2024 (arXiv 2403.03206), section 5.3.2; Wan 2.1 uses shift 3 to 8.
    """

    shift: float
    num_steps: int = 1000

    def __post_init__(self):
        if self.shift <= 0:
            raise ValueError(f"FlowSchedule: shift must be positive, got {self.shift}")
        if self.num_steps < 1:
            raise ValueError(f"FlowSchedule: num_steps must be at least 1, got {self.num_steps}")

    def shifted(self, sigma: Tensor | float) -> Tensor:
        """σ' for any σ in [0, 1]; fp32 unless σ is fp64."""
        sigma = torch.as_tensor(sigma)
        sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32))
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    @cached_property
    def sigmas(self) -> Tensor:
        """`[num_steps]` fp32, from 1 downwards; the terminal 0 is not in it."""
        return self.sampling(self.num_steps)[:-1]

    @cached_property
    def timesteps(self) -> Tensor:
        """`[num_steps]` fp32, 1000·σ."""
        return 1000 * self.sigmas

    @cached_property
    def _weight_shape(self) -> tuple[float, float]:
        """min y and mean(y − min y) of the weight's bell y(t) = exp(−2·((t − 500)/1000)²) over the 1000-step table."""
        y = self._bell(1000 * self.shifted(torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]))
        return y.min().item(), (y - y.min()).sum().item() / 1000

    @staticmethod
    def _bell(t: Tensor) -> Tensor:
        return torch.exp(-2 * ((t - 500) / 1000) ** 2)

    def training_weight(self, t: Tensor) -> Tensor:
        """Loss weight of timestep t (any shape): a bell around 500, 0 at t = 1000, mean 1 over the 1000-step table."""
        low, mean = self._weight_shape
        return ((self._bell(t.double()) - low) / mean).clamp_min(0).to(torch.float32)

    def sampling(self, steps: int) -> Tensor:
        """`[steps + 1]` noise levels from 1 to exactly 0 for a sampler of `steps` steps."""
        if steps < 1:
            raise ValueError(f"FlowSchedule: steps must be at least 1, got {steps}")
        return self.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).float()

    def few_step(self, steps: Sequence[float]) -> Tensor:
        """Timesteps of a few-step sampler: `[1000, 750, 500, 250]` at shift 5 → `[1000, 937.5, 833.33, 625]`."""
        t = torch.tensor(list(steps), dtype=torch.float64)
        if t.numel() == 0 or t.max() > 1000 or t.min() <= 0 or (t.diff() >= 0).any():
            raise ValueError(f"FlowSchedule: steps must fall strictly from at most 1000 to above 0, got {list(steps)}")
        return (1000 * self.shifted(t / 1000)).float()


def per_frame(value: Tensor, frames: int) -> Tensor:
    """`[B]` or `[B, F]` → `[B, F]`."""
    if value.dim() == 1:
        value = value[:, None].expand(-1, frames)
    if value.dim() != 2 or value.shape[1] != frames:
        raise ValueError(f"timestep must be [B] or [B, F] with F = {frames}, got {list(value.shape)}")
    return value
