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

    def network_steps(self, state: stages.State) -> int | None:
        """Network steps of a request, for a progress bar; None where its end is not known."""
        raise NotImplementedError

    def denoise(self, state: stages.State) -> Iterator[Tensor]:
        """Clean latents [B, F, Cz, h, w], chunk by chunk."""
        raise NotImplementedError

    @torch.inference_mode()
    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        pose: str | Sequence[str] | stages.Cameras | Iterator[stages.Piece] | None = None,
        seed: int | Sequence[int] = 0,
        frames: int | None = None,
        image: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """Yields decoded chunks [B, Fp, 3, H, W] in [−1, 1] as they are ready.

        pose      a pose string, one per prompt, or (viewmats [F, 4, 4], Ks [F, 3, 3]); a model with a camera branch needs one;
                  or an iterator of pose strings (or of one per prompt) that is read only as far as the next causal block needs,
                  so poses may be decided after a chunk was seen; the video ends with it, and equals that of the joined strings
        seed      one per prompt, or the first: prompt b then uses seed + b
        frames    latent frames; they must agree with the pose; of an iterator, the most that are made
        image     [3, H, W] or [B, 3, H, W] in [−1, 1]: the first frame that is known (image to video)
        on_step   called with (network steps done, of all); of all is 0 where the end is not known
        options   any field of Settings
        """
        settings = self.settings.override(options)
        state = stages.validate(self.backbone, self.condition, prompts, pose, seed, frames, settings, image)
        stages.encode_condition(state, self.condition, self.backbone)
        if on_step is not None:
            state.on_step = _counter(on_step, self.network_steps(state) or 0)
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
