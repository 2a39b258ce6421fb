"""Multi-step generation block after block: each block is denoised from pure noise and sees the clean blocks before it."""

from torch import Tensor

from dit_ops.conditions.arguments import of_frames
from dit_ops.pipelines import stages
from dit_ops.pipelines.base import CausalPipeline
from dit_ops.pipelines.causal import CausalPass
from dit_ops.pipelines.request import State
from dit_ops.pipelines.solvers import solver


class AutoregressivePipeline(CausalPipeline):
    """Causal backbone with a KV cache per guidance pass."""

    def denoise_block(self, state: State, first: int, last: int, passes: list[CausalPass]) -> Tensor:
        sampler = solver(state.settings)
        x = stages.initial_noise(state, first, last)
        for i, t in enumerate(state.timesteps):
            x = sampler.step(i, x, *stages.predict_flow(self.backbone, state, x, t, first, passes))
        return self.backbone.keep_known(x, **of_frames(state.conditions[0], first, last))
