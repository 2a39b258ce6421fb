"""Causal consistency distillation: neighbouring states of the teacher's ODE must map to the same x0 (arXiv 2303.01469)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dit_ops import add_noise, cfg_euler_step, flow_to_x0
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.flow_matching import cameras
from dit_ops.training.guidance import cond_and_uncond_flow
from dit_ops.training.roles import take_roles


@dataclass(frozen=True)
class ConsistencyConfig:
    """num_steps levels of the teacher's sampler; guidance g in `u + g·(c − u)`; terminal: the step to σ = 0 is trained, too."""

    num_steps: int = 50
    shift: float = 5.0
    guidance: float = 3.0
    terminal: bool = False


class ConsistencyStage:
    """`MSE(x0_student(x_i, t_i), x0_EMA(x_{i+1}, t_{i+1}))`, where the teacher's Euler step leads from x_i to x_{i+1}.

    All networks are teacher-forced: the clean half is the ground truth. Noise levels stay in fp32: a timestep rounded to bf16
    would change the Euler step σ_{i+1} − σ_i by up to 66 %. After the last step, to σ = 0, x0 is the teacher's own x.
    """

    config_class = ConsistencyConfig
    needs_ema = True

    def __init__(self, config: ConsistencyConfig, backbones: dict[str, nn.Module], negative: dict[str, Tensor]):
        if config.num_steps < 2:
            raise ValueError(f"consistency: num_steps must be at least 2, got {config.num_steps}")
        self.config = config
        self.roles = take_roles("consistency", backbones, trained=("generator",), frozen=("teacher",))
        blocks = {role: backbone.block_frames for role, backbone in backbones.items()}
        if blocks["teacher"] != blocks["generator"]:
            raise ValueError(f"consistency: teacher and generator must have the same block_frames, got {blocks}")
        self.ema: dict[str, nn.Module] = {}  # set by the engine
        self.negative = negative
        self.sigmas = FlowSchedule(config.shift).sampling(config.num_steps)  # [num_steps + 1], 1 … 0

    def updates(self, step: int) -> list[str]:
        return ["generator"]

    def loss(self, role: str, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """batch: latents [B, F, Cz, h, w], condition: dict of [B, …], viewmats [B, F, 4, 4], Ks [B, F, 3, 3]."""
        clean, condition = batch["latents"].float(), batch["condition"]
        B, device = clean.shape[0], clean.device
        given = {"clean_latents": clean, **cameras(batch)}

        i = draws.integers("level", 0, self.config.num_steps - (not self.config.terminal), (B,))
        sigma, sigma_next = self.sigmas[i].to(device), self.sigmas[i + 1].to(device)
        x = add_noise(clean, draws.normal("noise", tuple(clean.shape), device=device), sigma)
        with torch.no_grad():
            cond, uncond = cond_and_uncond_flow(self.roles["teacher"], x, 1000 * sigma, condition, self.negative, **given)
            x_next = cfg_euler_step(x, cond, uncond, self.config.guidance, sigma, sigma_next)
            flow_next = self.ema["generator"](x_next, 1000 * sigma_next, **condition, **given)
            target = flow_to_x0(x_next, flow_next, sigma_next)
        flow = self.roles["generator"](x, 1000 * sigma, **condition, **given)
        x0 = flow_to_x0(x, flow, sigma)
        return nnf.mse_loss(x0.float(), target.float()), {}
