"""Teacher forcing: a block-causal model denoises every block given the clean blocks before it (CausVid, arXiv 2412.07772)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_ops import add_noise
from dit_ops.conditions.arguments import process_condition
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.flow_matching import TimestepLaw, cameras, check_probability, draw_timesteps, drop_text, flow_loss
from dit_ops.training.roles import take_roles


@dataclass(frozen=True)
class TeacherForcingConfig:
    """noise_augmentation_max_timestep > 0 noises the clean blocks, too, up to that timestep, so that a model learns to continue
    its own, imperfect, blocks. one_timestep: all blocks of a sample share one, as HunyuanVideo's recipe has it.
    text_dropout, weighted, timesteps: as in the bidirectional stage."""

    shift: float = 5.0
    text_dropout: float = 0.0
    weighted: bool = True
    timesteps: TimestepLaw = "uniform"
    one_timestep: bool = False
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

    def __init__(self, config: TeacherForcingConfig, backbones: dict[str, Any], negative: dict[str, Tensor]):
        self.config = config
        self.roles = take_roles("teacher_forcing", backbones, trained=("generator",))
        self.block_frames = backbones["generator"].block_frames
        if self.block_frames is None:
            raise ValueError("teacher_forcing: the generator has no causal blocks: set model.block_frames")
        self.negative = negative
        self.schedule = FlowSchedule(config.shift)

    def updates(self, step: int) -> list[str]:
        return ["generator"]

    def loss(self, role: str, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """batch: latents [B, F, Cz, h, w], condition: dict of [B, …], viewmats [B, F, 4, 4], Ks [B, F, 3, 3]."""
        x0 = batch["latents"].float()
        law = self.config.timesteps
        t = self.per_block(
            lambda shape: draw_timesteps(self.schedule, law, shape, draws), x0, self.config.one_timestep
        )  # [B, F]
        noise = draws.normal("noise", tuple(x0.shape), device=x0.device)
        clean, clean_t = self.augmented(x0, draws)
        condition = drop_text(batch["condition"], self.negative, self.config.text_dropout, draws)
        given = {"clean_latents": clean, "clean_timestep": clean_t, **cameras(batch)}
        inputs, target = process_condition({"latents": x0, **condition}, noise, t, **given)
        weight = self.schedule.training_weight(t) if self.config.weighted else None
        return flow_loss(self.roles["generator"](**inputs), target, weight), {}

    def augmented(self, x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The clean half and its timesteps [B, F]: t ≤ noise_augmentation_max_timestep and noise of its own, or x0 itself at 0.

        The schedule falls, so the small timesteps are its last entries.
        """
        limit, N = self.config.noise_augmentation_max_timestep, self.schedule.num_steps
        if limit == 0:
            return x0, torch.zeros(x0.shape[:2], device=x0.device)
        small = int((self.schedule.timesteps <= limit).sum())
        t = self.per_block(lambda shape: self.schedule.timesteps[draws.integers("clean_timestep", N - small, N, shape)], x0)
        return add_noise(x0, draws.normal("clean_noise", tuple(x0.shape), device=x0.device), t / 1000), t

    def per_block(self, draw: Callable[[tuple[int, int]], Tensor], x0: Tensor, shared: bool = False) -> Tensor:
        """One number per sample and block, looked up by frame: [B, F]. The last block may be shorter. shared: per sample."""
        B, frames = x0.shape[:2]
        block = torch.arange(frames) // self.block_frames
        return draw((B, 1 if shared else int(block[-1]) + 1))[:, 0 * block if shared else block].to(x0.device)
