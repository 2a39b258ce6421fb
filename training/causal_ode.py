"""Causal ODE: a few-step generator learns to jump from a state of the teacher's ODE to its end (CausVid, arXiv 2412.07772)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dit_ops import flow_to_x0
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.flow_matching import cameras
from dit_ops.training.roles import take_roles


@dataclass(frozen=True)
class CausalODEConfig:
    """denoising_steps and shift must be those that the trajectories were sampled with."""

    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0


class CausalODEStage:
    """`MSE(x_t − σ·v(x_t, t), x_end)`; x_t is one of the kept states, `[x_{t_0}, …, x_{t_K−1}, x_end, ground truth]`."""

    config_class = CausalODEConfig

    def __init__(self, config: CausalODEConfig, backbones: dict[str, nn.Module], negative: dict[str, Tensor] | None = None):
        self.config = config
        self.roles = take_roles("causal_ode", backbones, trained=("generator",))
        self.timesteps = FlowSchedule(config.shift).few_step(config.denoising_steps)

    def updates(self, step: int) -> list[str]:
        return ["generator"]

    def loss(self, role: str, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """batch: trajectory [B, K + 2, F, Cz, h, w], condition: dict of [B, …], viewmats [B, F, 4, 4], Ks [B, F, 3, 3]."""
        states = batch["trajectory"].float()
        B, K = states.shape[0], len(self.timesteps)
        if states.shape[1] != K + 2:
            raise ValueError(
                f"causal_ode: trajectory must hold {K + 2} states (denoising_steps {list(self.config.denoising_steps)}, the "
                f"sample, the ground truth), got {states.shape[1]}"
            )
        *_, x_end, clean = states.unbind(1)
        k = draws.integers("step", 0, K, (B,))
        x = states[torch.arange(B, device=states.device), k.to(states.device)]
        t = self.timesteps[k].to(states.device)
        flow = self.roles["generator"](x, t, **batch["condition"], clean_latents=clean, **cameras(batch))
        x0 = flow_to_x0(x, flow, t / 1000)
        return nnf.mse_loss(x0.float(), x_end.float()), {}
