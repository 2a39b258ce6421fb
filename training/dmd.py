"""Distribution matching distillation of a causal few-step generator on its own rollouts (DMD2, arXiv 2405.14867;
Self Forcing, arXiv 2506.08009)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dit_ops import add_noise, flow_to_x0
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.flow_matching import cameras, flow_loss
from dit_ops.training.guidance import cond_and_uncond_flow
from dit_ops.training.roles import take_roles
from dit_ops.training.rollout import inference_with_trajectory


@dataclass(frozen=True)
class DMDConfig:
    """guidance g of the real score in `u + g·(c − u)`; scores are compared at timesteps in [min, max]_score_timestep.

    The defaults are Wan's recipe. HunyuanVideo 1.5's: exclusive, score_range "exit_step", normalizer "batch", context "last".

    exclusive        at a generator step the fake score is not trained
    score_range      "fixed": σ = shift(u), u ~ U[0, 1). "exit_step": u between the raw levels of the exit step and of the next
    normalizer       mean|x − x0_real| per "sample", or over the "batch" of this micro batch
    context          what later blocks see: each block as it was at the "exit" step, or denoised to the "last" step
    score_timestep   "sigma": the scores are fed 1000·σ. "reversed": ⌊1000·(1 − u)⌋, which has no meaning but was fed to
                     released HunyuanVideo 1.5 scores
    """

    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    guidance: float = 4.0
    generator_every: int = 5
    min_score_timestep: float = 20.0
    max_score_timestep: float = 980.0
    exclusive: bool = False
    score_range: Literal["fixed", "exit_step"] = "fixed"
    normalizer: Literal["sample", "batch"] = "sample"
    context: Literal["exit", "last"] = "exit"
    score_timestep: Literal["sigma", "reversed"] = "sigma"


class DMDStage:
    """The generator follows `E[∇KL] ∝ x0_fake(x_t) − x0_real(x_t)`; fake_score is trained to denoise what the generator makes.

    generator is causal; real_score (frozen) and fake_score are bidirectional.
    """

    config_class = DMDConfig

    def __init__(self, config: DMDConfig, backbones: dict[str, nn.Module], negative: dict[str, Tensor]):
        if config.generator_every < 1:
            raise ValueError(f"dmd: generator_every must be at least 1, got {config.generator_every}")
        if config.exclusive and config.generator_every < 2:
            raise ValueError(
                "dmd: generator_every must be at least 2 with exclusive, or the fake score is never trained, got 1"
            )
        self.config = config
        self.roles = take_roles("dmd", backbones, trained=("generator", "fake_score"), frozen=("real_score",))
        self.negative = negative
        self.schedule = FlowSchedule(config.shift)
        self.timesteps = self.schedule.few_step(config.denoising_steps)

    def updates(self, step: int) -> list[str]:
        if step % self.config.generator_every:
            return ["fake_score"]
        return ["generator"] if self.config.exclusive else ["generator", "fake_score"]

    def loss(self, role: str, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """batch: latents [B, F, Cz, h, w] (for their shape), condition: dict of [B, …], viewmats, Ks [B, F, …]."""
        if role == "generator":
            return self.generator_loss(batch, draws)
        return self.fake_score_loss(batch, draws)

    def generator_loss(self, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`0.5·mean((x − sg(x − g))²)`, whose gradient is g / numel, with g = dmd_gradient at a random σ."""
        condition, camera = batch["condition"], cameras(batch)
        x, timestep_from, _ = self.rollout(batch, draws)
        with torch.no_grad():
            x_t, _, sigma, t = self.noised(x, draws)
            flow_fake = self.roles["fake_score"](x_t, t, **condition, **camera)
            cond, uncond = cond_and_uncond_flow(self.roles["real_score"], x_t, t, condition, self.negative, **camera)
            flow_real = uncond + self.config.guidance * (cond - uncond)
            x0_fake, x0_real = flow_to_x0(x_t, flow_fake, sigma), flow_to_x0(x_t, flow_real, sigma)
            g = dmd_gradient(x, x0_fake, x0_real, per_sample=self.config.normalizer == "sample")
        x = x.double()
        loss = 0.5 * nnf.mse_loss(x, (x - g).detach())
        return loss, {"dmd_gradient": g.abs().mean(), "timestep_from": timestep_from}

    def fake_score_loss(self, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`MSE(v_fake(x_t, t), ε − x0)` with x0 a rollout of the generator."""
        with torch.no_grad():
            x, _, _ = self.rollout(batch, draws)
            x_t, noise, _, t = self.noised(x, draws)
        flow = self.roles["fake_score"](x_t, t, **batch["condition"], **cameras(batch))
        return flow_loss(flow, noise.float() - x.float()), {}

    def exit_step(self, draws: Draws) -> int:
        """One for all blocks, micro batches and ranks of an update: it decides how many forwards (collectives) there are."""
        return int(draws.of_update().integers("exit_step", 0, len(self.timesteps)))

    def rollout(self, batch: dict, draws: Draws) -> tuple[Tensor, float, float]:
        latents = batch["latents"]
        noise = draws.normal("noise", tuple(latents.shape), device=latents.device)
        return inference_with_trajectory(
            self.roles["generator"],
            noise,
            batch["condition"],
            timesteps=self.timesteps,
            exit_step=self.exit_step(draws),
            draws=draws,
            context=self.config.context,
            **cameras(batch),
        )

    def noised(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(x_t, ε, σ, t)` with σ [B] = clamp(shift(u)) and t what the scores are fed."""
        config = self.config
        u = draws.uniform("score_sigma", (x.shape[0],), device=x.device)
        if config.score_range == "exit_step":
            levels = [level / 1000 for level in config.denoising_steps] + [0.0]
            k = self.exit_step(draws)
            u = levels[k + 1] + (levels[k] - levels[k + 1]) * u
        low, high = config.min_score_timestep / 1000, config.max_score_timestep / 1000
        sigma = self.schedule.shifted(u).clamp(low, high)
        noise = draws.normal("score_noise", tuple(x.shape), device=x.device, dtype=x.dtype)
        t = 1000 * sigma if config.score_timestep == "sigma" else (1000 * (1 - u)).floor()
        return add_noise(x, noise, sigma), noise, sigma, t


def dmd_gradient(x: Tensor, x0_fake: Tensor, x0_real: Tensor, *, per_sample: bool = True) -> Tensor:
    """`(x0_fake − x0_real) / mean|x − x0_real|`, per sample or over the batch; fp64, non-finite values made finite."""
    x, x0_fake, x0_real = x.double(), x0_fake.double(), x0_real.double()
    scale = (x - x0_real).abs().flatten(1).mean(1).clamp_min(1e-8)
    scale = scale if per_sample else scale.mean().expand_as(scale)
    return torch.nan_to_num((x0_fake - x0_real) / scale.view(-1, *[1] * (x.dim() - 1)))
