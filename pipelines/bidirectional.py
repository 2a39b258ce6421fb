"""Bidirectional generation: all frames at once, with a multi-step solver."""

from collections.abc import Iterator

from torch import Tensor

from dit_ops.pipelines import stages
from dit_ops.pipelines.base import Pipeline
from dit_ops.pipelines.request import State
from dit_ops.pipelines.solvers import solver


class BidirectionalPipeline(Pipeline):
    """Every frame sees every frame; one chunk with the whole video."""

    stages = (stages.choose_timesteps, stages.encode_text, stages.encode_image)
    causal = False

    def network_steps(self, state: State) -> int:
        return len(state.timesteps)

    def denoise(self, state: State) -> Iterator[Tensor]:
        sampler = solver(state.settings)
        x = stages.initial_noise(state, 0, stages.all_frames(state))
        for i, t in enumerate(state.timesteps):
            x = sampler.step(i, x, *stages.predict_flow(self.backbone, state, x, t))
        yield self.backbone.keep_known(x, **state.conditions[0])
