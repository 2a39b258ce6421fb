"""Teacher forcing: a block-causal model denoises every block given the clean blocks before it (CausVid, arXiv 2412.07772)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_ops import add_noise
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.flow_matching import check_probability, drop_text, flow_loss
from dit_ops.training.roles import take_roles


@dataclass(frozen=True)
class TeacherForcingConfig:
    """noise_augmentation_max_timestep > 0 noises the clean blocks, too, up to that timestep, so that a model learns to continue
    its own, imperfect, blocks. text_dropout, weighted: as in the bidirectional stage."""

    shift: float = 5.0
    text_dropout: float = 0.0
    weighted: bool = True
    noise_augmentation_max_timestep: float = 0.0

    def __post_init__(self):
        check_probability("teacher_forcing", "text_dropout", self.text_dropout)
        limit, lowest = self.noise_augmentation_max_timestep, FlowSchedule(self.shift).timesteps[-1].item()
        if limit != 0 and not lowest <= limit <= 1000:
            raise ValueError(
                f"teacher_forcing: noise_augmentation_max_timestep must be 0 (off) or in [{lowest:.4g}, 1000], "
                f"the timesteps of shift {self.shift}, got {limit}"
            )


class TeacherForcingStage:
    """`w(t)·MSE(v(x_t, t | clean), ε − x0)` over the noisy half of `[clean ‖ noisy]`; one timestep per block and sample."""

    config_class = TeacherForcingConfig

    def __init__(self, config: TeacherForcingConfig, backbones: dict[str, Any], negative_text: Tensor):
        self.config = config
        self.roles = take_roles("teacher_forcing", backbones, trained=("generator",))
        self.block_frames = backbones["generator"].block_frames
        if self.block_frames is None:
            raise ValueError("teacher_forcing: the generator has no causal blocks: set model.block_frames")
        self.negative_text = negative_text
        self.schedule = FlowSchedule(config.shift)

    def updates(self, step: int) -> list[str]:
        return ["generator"]

    def loss(self, role: str, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """batch: latents [B, F, Cz, h, w], text [B, T, Dt], viewmats [B, F, 4, 4], Ks [B, F, 3, 3]."""
        x0 = batch["latents"].float()
        i = self.per_block(draws.integers, "timestep", 0, self.schedule.num_steps, x0)
        t = self.schedule.timesteps[i].to(x0.device)  # [B, F]
        noise = draws.normal("noise", tuple(x0.shape), device=x0.device)
        clean, clean_t = self.augmented(x0, draws)
        flow = self.roles["generator"](
            add_noise(x0, noise, t / 1000),
            t,
            drop_text(batch["text"], self.negative_text, self.config.text_dropout, draws),
            clean_latents=clean,
            clean_timestep=clean_t,
            viewmats=batch.get("viewmats"),
            Ks=batch.get("Ks"),
        )
        return flow_loss(flow, x0, noise, self.schedule.training_weight(t) if self.config.weighted else None), {}

    def augmented(self, x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The clean half and its timesteps [B, F]: t ≤ noise_augmentation_max_timestep and noise of its own, or x0 itself at 0.

        The schedule falls, so the small timesteps are its last entries.
        """
        limit, N = self.config.noise_augmentation_max_timestep, self.schedule.num_steps
        if limit == 0:
            return x0, torch.zeros(x0.shape[:2], device=x0.device)
        small = int((self.schedule.timesteps <= limit).sum())
        i = self.per_block(draws.integers, "clean_timestep", N - small, N, x0)
        t = self.schedule.timesteps[i].to(x0.device)
        return add_noise(x0, draws.normal("clean_noise", tuple(x0.shape), device=x0.device), t / 1000), t

    def per_block(self, integers: Callable[..., Tensor], name: str, low: int, high: int, x0: Tensor) -> Tensor:
        """Integers in [low, high), one per sample and block, looked up by frame: [B, F]. The last block may be shorter."""
        B, frames = x0.shape[:2]
        block = torch.arange(frames) // self.block_frames
        return integers(name, low, high, (B, int(block[-1]) + 1))[:, block]
