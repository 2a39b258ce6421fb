"""Multi-step generation of all frames at once."""

from collections.abc import Iterator

from torch import Tensor

from dit_ops.pipelines import stages
from dit_ops.pipelines.base import Pipeline
from dit_ops.pipelines.solvers import solver


class BidirectionalPipeline(Pipeline):
    """Every frame sees every frame; one chunk with the whole video."""

    def network_steps(self, state: stages.State) -> int:
        return len(solver(state.settings).timesteps)

    def denoise(self, state: stages.State) -> Iterator[Tensor]:
        sampler = solver(state.settings)
        x = stages.initial_noise(state, 0, stages.all_frames(state))
        for i, t in enumerate(sampler.timesteps):
            x = sampler.step(i, x, *stages.predict_flow(self.backbone, state, x, t))
        yield self.backbone.keep_known(x, **state.conditions[0]) if hasattr(self.backbone, "keep_known") else x
