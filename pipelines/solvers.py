"""Multi-step solvers of dx/dσ = v from σ = 1 to 0, with classifier-free guidance.

A solver lists the timesteps that the network sees; `step(i, x, cond, uncond)` goes from level i to the next.
"""

import torch
from torch import Tensor

from dit_ops import cfg_euler_step
from dit_ops.flow import FlowSchedule
from dit_ops.pipelines.settings import Settings


class Euler:
    """x ← x + (σ' − σ)·v on the shifted flow schedule."""

    def __init__(self, settings: Settings):
        self.sigmas = FlowSchedule(settings.shift).sampling(settings.num_steps).tolist()
        self.timesteps = [1000 * sigma for sigma in self.sigmas[:-1]]
        self.guidance = settings.guidance

    def step(self, i: int, x: Tensor, cond: Tensor, uncond: Tensor | None) -> Tensor:
        return cfg_euler_step(x, cond, uncond, self.guidance, self.sigmas[i], self.sigmas[i + 1])


class UniPC:
    """diffusers' UniPCMultistepScheduler as Wan ships it: order 2, flow sigmas, integer timesteps (arXiv 2302.04867)."""

    def __init__(self, settings: Settings):
        from diffusers import UniPCMultistepScheduler

        self.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=settings.shift, num_train_timesteps=1000
        )
        self.scheduler.set_timesteps(settings.num_steps)
        self.scheduler.set_begin_index(0)
        self.timesteps = [float(t) for t in self.scheduler.timesteps]
        self.guidance = settings.guidance

    def step(self, i: int, x: Tensor, cond: Tensor, uncond: Tensor | None) -> Tensor:
        flow = cond.to(x.dtype)
        if uncond is not None:
            flow = torch.lerp(uncond.to(x.dtype), flow, self.guidance)
        return self.scheduler.step(flow, self.scheduler.timesteps[i], x, return_dict=False)[0]


def solver(settings: Settings) -> Euler | UniPC:
    """A fresh solver: UniPC keeps a history, so every block needs its own."""
    return UniPC(settings) if settings.solver == "unipc" else Euler(settings)
