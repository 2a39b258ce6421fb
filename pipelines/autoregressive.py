"""Multi-step generation block after block: each block is denoised from pure noise and sees the clean blocks before it."""

from collections.abc import Iterator

from torch import Tensor

from dit_ops.conditions.arguments import of_frames
from dit_ops.pipelines import stages
from dit_ops.pipelines.base import Pipeline
from dit_ops.pipelines.solvers import solver


class AutoregressivePipeline(Pipeline):
    """Causal backbone with a KV cache per guidance pass."""

    def network_steps(self, state: stages.State) -> int | None:
        blocks = stages.count_blocks(self.backbone, state)
        return None if blocks is None else blocks * (len(solver(state.settings).timesteps) + 1) - 1

    def denoise(self, state: stages.State) -> Iterator[Tensor]:
        caches = stages.new_caches(self.backbone, state)
        x: Tensor | None = None
        for first, last in stages.causal_blocks(self.backbone, state):
            if x is not None:
                stages.remember(self.backbone, state, x, first, caches)
            sampler = solver(state.settings)
            x = stages.initial_noise(state, first, last)
            for i, t in enumerate(sampler.timesteps):
                x = sampler.step(i, x, *stages.predict_flow(self.backbone, state, x, t, first, caches))
            if hasattr(self.backbone, "keep_known"):
                x = self.backbone.keep_known(x, **of_frames(state.conditions[0], first, last))
            yield x
