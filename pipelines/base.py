"""What all pipelines share: the list of stages, run as a stream or to the end."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_ops.pipelines import stages
from dit_ops.pipelines.settings import Settings


class Pipeline:
    """A backbone, a condition and default settings. A pipeline class adds `denoise`, which yields clean latents.

    backbone    flow prediction `[B, F, Cz, h, w]`    condition    text encoder and codec
    """

    def __init__(self, backbone: Any, condition: Any, settings: Settings | None = None):
        self.backbone, self.condition = backbone, condition
        self.settings = settings or Settings()

    def network_steps(self, state: stages.State) -> int:
        """Network steps of a request, for a progress bar."""
        raise NotImplementedError

    def denoise(self, state: stages.State) -> Iterator[Tensor]:
        """Clean latents [B, F, Cz, h, w], chunk by chunk."""
        raise NotImplementedError

    @torch.inference_mode()
    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        pose: str | Sequence[str] | stages.Cameras | None = None,
        seed: int | Sequence[int] = 0,
        frames: int | None = None,
        on_step: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """Yields decoded chunks [B, Fp, 3, H, W] in [−1, 1] as they are ready.

        pose      a pose string, one per prompt, or (viewmats [F, 4, 4], Ks [F, 3, 3]); a model with a camera branch needs one
        seed      one per prompt, or the first: prompt b then uses seed + b
        frames    latent frames; they must agree with the pose
        on_step   called with (network steps done, of all)
        options   any field of Settings
        """
        state = stages.validate(self.backbone, self.condition, prompts, pose, seed, frames, self.settings.override(options))
        stages.encode_text(state, self.condition, self.backbone.dtype)
        stages.encode_camera(state)
        if on_step is not None:
            state.on_step = _counter(on_step, self.network_steps(state))
        yield from stages.decode(self.condition, self.denoise(state))

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> Tensor:
        """The whole video [B, Fp, 3, H, W]; arguments of `stream`."""
        return torch.cat(list(self.stream(prompts, **options)), dim=1)


def _counter(on_step: Callable[[int, int], None], total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    return step
