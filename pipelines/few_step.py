"""Few-step generation block after block with the re-noise sampler: x0 from each step, fresh noise, next level. No guidance.

x0 = x − σ·v;  x' = (1 − σ')·x0 + σ'·ε  (Song et al. 2023, arXiv 2303.01469, algorithm 1)
"""

from itertools import pairwise
from typing import Any

from torch import Tensor

from dit_ops import flow_to_x0, renoise
from dit_ops.flow import FlowSchedule
from dit_ops.pipelines import stages
from dit_ops.pipelines.base import CausalPipeline
from dit_ops.pipelines.causal import CausalPass
from dit_ops.pipelines.request import State


def choose_few_timesteps(state: State, backbone: Any, condition: Any) -> None:
    """The levels of `denoising_steps`, shifted."""
    if state.guided:
        raise ValueError(f"guidance must be 1 in a few-step model (it is distilled in), got {state.settings.guidance}")
    state.timesteps = FlowSchedule(state.settings.shift).few_step(state.settings.denoising_steps).tolist()


class FewStepPipeline(CausalPipeline):
    """Causal backbone distilled to the few levels of `denoising_steps`, shifted."""

    stages = (choose_few_timesteps, stages.encode_text, stages.encode_image, stages.encode_video)

    def denoise_block(self, state: State, first: int, last: int, passes: list[CausalPass]) -> Tensor:
        x = stages.initial_noise(state, first, last)
        for i, (t, following) in enumerate(pairwise(state.timesteps)):
            flow, _ = stages.predict_flow(self.backbone, state, x, t, first, passes)
            x = renoise(x, flow, stages.renoise_noise(state, first, last, i), t / 1000, following / 1000)
        t = state.timesteps[-1]
        flow, _ = stages.predict_flow(self.backbone, state, x, t, first, passes)
        return flow_to_x0(x, flow, t / 1000)
