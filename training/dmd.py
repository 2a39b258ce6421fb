"""Distribution matching distillation of a causal few-step generator on its own rollouts (DMD2, arXiv 2405.14867;
Self Forcing, arXiv 2506.08009)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dit_ops import add_noise, flow_to_x0
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.flow_matching import flow_loss
from dit_ops.training.guidance import cond_and_uncond_flow
from dit_ops.training.roles import take_roles
from dit_ops.training.rollout import inference_with_trajectory


@dataclass(frozen=True)
class DMDConfig:
    """guidance g of the real score in `u + g·(c − u)`; scores are compared at timesteps in [min, max]_score_timestep."""

    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    guidance: float = 4.0
    generator_every: int = 5
    min_score_timestep: float = 20.0
    max_score_timestep: float = 980.0


class DMDStage:
    """The generator follows `E[∇KL] ∝ x0_fake(x_t) − x0_real(x_t)`; fake_score is trained to denoise what the generator makes.

    generator is causal; real_score (frozen) and fake_score are bidirectional.
    """

    config_class = DMDConfig

    def __init__(self, config: DMDConfig, backbones: dict[str, nn.Module], negative_text: Tensor):
        if config.generator_every < 1:
            raise ValueError(f"dmd: generator_every must be at least 1, got {config.generator_every}")
        self.config = config
        self.roles = take_roles("dmd", backbones, trained=("generator", "fake_score"), frozen=("real_score",))
        self.negative_text = negative_text
        self.schedule = FlowSchedule(config.shift)
        self.timesteps = self.schedule.few_step(config.denoising_steps)

    def updates(self, step: int) -> list[str]:
        return ["generator", "fake_score"] if step % self.config.generator_every == 0 else ["fake_score"]

    def loss(self, role: str, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """batch: latents [B, F, Cz, h, w] (for their shape), text [B, T, Dt], viewmats [B, F, 4, 4], Ks [B, F, 3, 3]."""
        if role == "generator":
            return self.generator_loss(batch, draws)
        return self.fake_score_loss(batch, draws)

    def generator_loss(self, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`0.5·mean((x − sg(x − g))²)`, whose gradient is g / numel, with g = dmd_gradient at a random σ."""
        camera = _camera(batch)
        x, timestep_from, _ = self.rollout(batch, draws)
        with torch.no_grad():
            x_t, _, sigma = self.noised(x, draws)
            flow_fake = self.roles["fake_score"](x_t, 1000 * sigma, batch["text"], **camera)
            cond, uncond = cond_and_uncond_flow(
                self.roles["real_score"], x_t, 1000 * sigma, batch["text"], self.negative_text, **camera
            )
            flow_real = uncond + self.config.guidance * (cond - uncond)
            g = dmd_gradient(x, flow_to_x0(x_t, flow_fake, sigma), flow_to_x0(x_t, flow_real, sigma))
        x = x.double()
        loss = 0.5 * nnf.mse_loss(x, (x - g).detach())
        return loss, {"dmd_gradient": g.abs().mean(), "timestep_from": timestep_from}

    def fake_score_loss(self, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`MSE(v_fake(x_t, t), ε − x0)` with x0 a rollout of the generator."""
        with torch.no_grad():
            x, _, _ = self.rollout(batch, draws)
            x_t, noise, sigma = self.noised(x, draws)
        flow = self.roles["fake_score"](x_t, 1000 * sigma, batch["text"], **_camera(batch))
        return flow_loss(flow, x, noise), {}

    def rollout(self, batch: dict, draws: Draws) -> tuple[Tensor, float, float]:
        """One exit step for all blocks, micro batches and ranks: it decides how many forwards (collectives) there are."""
        same_everywhere = Draws(draws.seed, draws.counters[:2])  # (step, update)
        exit_step = int(same_everywhere.integers("exit_step", 0, len(self.timesteps)))
        latents = batch["latents"]
        noise = draws.normal("noise", tuple(latents.shape), device=latents.device)
        return inference_with_trajectory(
            self.roles["generator"],
            noise,
            batch["text"],
            timesteps=self.timesteps,
            exit_step=exit_step,
            draws=draws,
            **_camera(batch),
        )

    def noised(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """`(x_t, ε, σ)` with σ [B] = clamp(shift(U[0, 1)))."""
        low, high = self.config.min_score_timestep / 1000, self.config.max_score_timestep / 1000
        sigma = self.schedule.shifted(draws.uniform("score_sigma", (x.shape[0],), device=x.device)).clamp(low, high)
        noise = draws.normal("score_noise", tuple(x.shape), device=x.device, dtype=x.dtype)
        return add_noise(x, noise, sigma), noise, sigma


def dmd_gradient(x: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """`(x0_fake − x0_real) / mean|x − x0_real|`, the mean per sample; fp64, NaN and infinities set to finite values."""
    x, x0_fake, x0_real = x.double(), x0_fake.double(), x0_real.double()
    scale = (x - x0_real).abs().flatten(1).mean(1).clamp_min(1e-8)
    return torch.nan_to_num((x0_fake - x0_real) / scale.view(-1, *[1] * (x.dim() - 1)))


def _camera(batch: dict) -> dict[str, Any]:
    return {"viewmats": batch.get("viewmats"), "Ks": batch.get("Ks")}
