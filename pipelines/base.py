"""What all pipelines share: the list of stages, run as a stream or to the end, and the loop over causal blocks."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_ops.pipelines import stages
from dit_ops.pipelines.cameras import Cameras, Piece
from dit_ops.pipelines.causal import CausalPass
from dit_ops.pipelines.overlap import decode_beside
from dit_ops.pipelines.request import State, validate
from dit_ops.pipelines.settings import Settings
from dit_ops.pipelines.stages import Stage


class Pipeline:
    """A backbone, a condition and default settings. A pipeline class adds `denoise`, which yields clean latents.

    backbone    flow prediction `[B, F, Cz, h, w]`    condition    text encoder and codec
    stages      what comes before `denoise`: functions of (state, backbone, condition)
    causal      frames are made block after block, and known ones can be continued
    """

    stages: tuple[Stage, ...] = (
        stages.choose_timesteps,
        stages.encode_text,
        stages.encode_image,
        stages.encode_video,
    )
    causal = True

    def __init__(self, backbone: Any, condition: Any, settings: Settings | None = None):
        self.backbone, self.condition = backbone, condition
        self.settings = settings or Settings()

    def network_steps(self, state: State) -> int | None:
        """Network steps of a request, for a progress bar; None where its end is not known."""
        raise NotImplementedError

    def denoise(self, state: State) -> Iterator[Tensor]:
        """Clean latents [B, F, Cz, h, w], chunk by chunk."""
        raise NotImplementedError

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        pose: str | Sequence[str] | Cameras | Iterator[Piece] | None = None,
        seed: int | Sequence[int] = 0,
        frames: int | None = None,
        image: Tensor | None = None,
        video: Tensor | None = None,
        overlap: bool | None = None,
        on_step: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Generator[Tensor, None, None]:
        """Yields decoded chunks [B, Fp, 3, H, W] in [−1, 1] as they are ready.

        pose      a pose string, one per prompt, or (viewmats [F, 4, 4], Ks [F, 3, 3]); a model with a camera branch needs one;
                  or an iterator of pose strings (or of one per prompt) that is read only as far as the next causal block needs,
                  so poses may be decided after a chunk was seen; the video ends with it, and equals that of the joined strings
        seed      one per prompt, or the first: prompt b then uses seed + b
        frames    latent frames, known ones included; they must agree with the pose; of an iterator, the most that are made
        image     [3, H, W] or [B, 3, H, W] in [−1, 1]: the first frame that is known (image to video)
        video     [Fp, 3, H, W] or [B, Fp, 3, H, W] in [−1, 1]: first frames that a causal model continues; they are yielded
                  too, as the codec gives them back, and the pose covers them
        overlap   a chunk is decoded while the next one is made, whose poses are then read before the chunk is seen.
                  None: on a GPU, if the poses are known from the start
        on_step   called with (network steps done, of all); of all is 0 where the end is not known
        options   any field of Settings
        """
        settings = self.settings.override(options)
        with torch.inference_mode():
            given = (prompts, pose, seed, frames, settings, image, video)
            state = validate(self.backbone, self.condition, *given, causal=self.causal)
        return self._chunks(state, overlap, on_step)

    @torch.inference_mode()
    def _chunks(
        self, state: State, overlap: bool | None, on_step: Callable[[int, int], None] | None
    ) -> Generator[Tensor, None, None]:
        for stage in self.stages:
            stage(state, self.backbone, self.condition)
        if on_step is not None:
            state.on_step = _counter(on_step, self.network_steps(state) or 0)
        if overlap is None:
            overlap = state.device.type == "cuda" and not state.poses_come
        decode = decode_beside if overlap else stages.decode
        yield from decode(state, self.condition, self.denoise(state))

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> Tensor:
        """The whole video [B, Fp, 3, H, W]; arguments of `stream`."""
        return torch.cat(list(self.stream(prompts, **options)), dim=1)


class CausalPipeline(Pipeline):
    """Block after block, each behind the clean ones before it. A pipeline class adds `denoise_block`."""

    def network_steps(self, state: State) -> int | None:
        return stages.count_steps(self.backbone, state)

    def denoise_block(self, state: State, first: int, last: int, passes: list[CausalPass]) -> Tensor:
        """Clean latents [B, last − first, Cz, h, w] of frames [first, last); those before them are in the passes' caches."""
        raise NotImplementedError

    def denoise(self, state: State) -> Iterator[Tensor]:
        passes = stages.causal_passes(self.backbone, state)
        x: Tensor | None = None
        for first, last in stages.causal_blocks(self.backbone, state):
            if x is not None:
                stages.remember(self.backbone, state, x, first, passes)
            x = stages.known_latents(state, first, last)
            if x is None:
                x = self.denoise_block(state, first, last, passes)
            yield x


def _counter(on_step: Callable[[int, int], None], total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    return step
