"""Few-step generation block after block with the re-noise sampler: x0 from each step, fresh noise, next level. No guidance.

x0 = x − σ·v;  x' = (1 − σ')·x0 + σ'·ε  (Song et al. 2023, arXiv 2303.01469, algorithm 1)
"""

from collections.abc import Iterator

from torch import Tensor

from dit_ops import flow_to_x0, renoise
from dit_ops.flow import FlowSchedule
from dit_ops.pipelines import stages
from dit_ops.pipelines.base import Pipeline


class FewStepPipeline(Pipeline):
    """Causal backbone distilled to the few levels of `denoising_steps`, shifted."""

    def network_steps(self, state: stages.State) -> int | None:
        blocks = stages.count_blocks(self.backbone, state)
        return None if blocks is None else blocks * (len(state.settings.denoising_steps) + 1) - 1

    def denoise(self, state: stages.State) -> Iterator[Tensor]:
        if state.guided:
            raise ValueError(f"guidance must be 1 in a few-step model (it is distilled in), got {state.settings.guidance}")
        timesteps = FlowSchedule(state.settings.shift).few_step(state.settings.denoising_steps).tolist()
        caches = stages.new_caches(self.backbone, state)
        x: Tensor | None = None
        for first, last in stages.causal_blocks(self.backbone, state):
            if x is not None:
                stages.remember(self.backbone, state, x, first, caches)
            x = stages.initial_noise(state, first, last)
            for i, t in enumerate(timesteps):
                flow, _ = stages.predict_flow(self.backbone, state, x, t, first, caches)
                if i + 1 < len(timesteps):
                    noise = stages.renoise_noise(state, first, last, i)
                    x = renoise(x, flow, noise, t / 1000, timesteps[i + 1] / 1000)
                else:
                    x = flow_to_x0(x, flow, t / 1000)
            yield x
