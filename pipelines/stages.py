"""The stages of generation: small functions over one small state (pipelines/request.py).

validate → the pipeline's list, by default encode_text, encode_image, encode_video, choose_timesteps → denoise, which draws
initial_noise and asks predict_flow → decode → write_videos

A stage of the list takes (state, backbone, condition) and fills its part of the state. Every random number is drawn by
(seed, frame, step), so a video does not depend on how it is cut into blocks or requests.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_ops.conditions.arguments import in_dtype, negative_of, of_frames, per_sample, with_negative
from dit_ops.draws import Draws
from dit_ops.pipelines.causal import CausalPass, capture_of
from dit_ops.pipelines.request import State
from dit_ops.pipelines.solvers import solver
from dit_ops.pipelines.transfer import to_device
from dit_ops.video import Mp4Writer

Stage = Callable[[State, Any, Any], None]


def encode_text(state: State, backbone: Any, condition: Any) -> None:
    """Text per network pass: [cond], [cond, uncond], or one batch [cond ‖ uncond]."""
    given = in_dtype(condition.encode_text(state.prompts), state.device, backbone.dtype)
    state.conditions = [given]
    if state.guided:
        encoded = condition.encode_text([state.settings.negative_prompt])
        negative = per_sample(in_dtype(encoded, state.device, backbone.dtype))[0]
        batched = state.settings.batched_guidance
        state.conditions = [with_negative(given, negative)] if batched else [given, negative_of(given, negative)]


def encode_image(state: State, backbone: Any, condition: Any) -> None:
    """The known first frame, the same in every pass that encode_text made."""
    if state.image is None or state.frames is None:
        return
    given = in_dtype(condition.encode_image(state.image, state.frames), state.device, backbone.dtype)
    for of_pass in state.conditions:
        copies = _rows(of_pass) // len(state.prompts)
        of_pass |= {name: value.repeat(copies, *[1] * (value.dim() - 1)) for name, value in given.items()}


def encode_video(state: State, backbone: Any, condition: Any) -> None:
    """Latents of the known first frames that are continued."""
    if state.video is not None:
        known = condition.encode_to_latent(state.video).to(state.device, torch.float32)
        state.known = known.expand(len(state.prompts), -1, -1, -1, -1)


def choose_timesteps(state: State, backbone: Any, condition: Any) -> None:
    """The timesteps of the multi-step solver."""
    state.timesteps = list(solver(state.settings).timesteps)


def initial_noise(state: State, first: int, last: int) -> Tensor:
    """ε of frames [first, last): [B, last − first, Cz, h, w] fp32."""
    return _noise(state, "noise", [(f,) for f in range(first, last)])


def renoise_noise(state: State, first: int, last: int, step: int) -> Tensor:
    """Fresh ε that a few-step sampler adds after `step`."""
    return _noise(state, "renoise", [(f, step) for f in range(first, last)])


def _noise(state: State, name: str, counters: list[tuple[int, ...]]) -> Tensor:
    videos = [torch.stack([Draws(seed).at(*c).normal(name, state.latent_size) for c in counters]) for seed in state.seeds]
    return to_device(torch.stack(videos), state.device)


def predict_flow(
    backbone: Any,
    state: State,
    x: Tensor,
    t: float,
    first: int = 0,
    passes: list[CausalPass] | None = None,
    *,
    keys_only: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Flow of frames [first, first + F) at timestep t: (conditional, unconditional or None). Both see the same camera.

    x: [B, F, Cz, h, w]    passes: of `causal_passes`, or None for a bidirectional model
    keys_only: x is a result for the caches to keep; there is no flow
    """
    last, cameras = first + x.shape[1], {}
    if state.cameras is not None:
        cameras = dict(zip(("viewmats", "Ks"), state.cameras.of(first, last), strict=True))
        if getattr(backbone, "action", None) is not None and not keys_only:
            cameras["action"] = state.cameras.actions_of(first, last)
    if passes is not None:
        flows = [of_pass(x, t, first, cameras, keys_only=keys_only) for of_pass in passes]
    else:
        flows = [_predict_all(backbone, condition, x, t, cameras) for condition in state.conditions]
    if state.on_step is not None:
        state.on_step()
    cond, *uncond = flows if len(flows) == 2 else flows[0].split(len(x))
    return cond, uncond[0] if uncond else None


def _predict_all(backbone: Any, condition: dict[str, Tensor], x: Tensor, t: float, cameras: dict[str, Tensor]) -> Tensor:
    """One bidirectional pass over all frames."""
    copies = _rows(condition) // len(x)
    given = of_frames(condition, 0, x.shape[1])
    given |= {name: value.repeat(copies, *[1] * (value.dim() - 1)) for name, value in cameras.items()}
    timestep = torch.full((len(x) * copies,), t, dtype=torch.float32, device=x.device)
    return backbone(x.repeat(copies, 1, 1, 1, 1).to(backbone.dtype), timestep, **given)


def _rows(condition: dict[str, Tensor]) -> int:
    return len(next(iter(condition.values())))


def causal_blocks(backbone: Any, state: State) -> Iterator[tuple[int, int]]:
    """Frame ranges [first, last) that are made together: of the known frames, then of the others; the last may be shorter.

    The poses of a block are asked for when the block is, so they may be decided after the block before was seen.
    """
    size, first = _block_frames(backbone, state), 0
    known = 0 if state.known is None else state.known.shape[1]
    while (last := _ready(state, min(first + size, known) if first < known else first + size)) > first:
        yield first, last
        first = last


def known_latents(state: State, first: int, last: int) -> Tensor | None:
    """Latents of a block of known frames; None for one that is to be made."""
    return None if state.known is None or first >= state.known.shape[1] else state.known[:, first:last]


def count_steps(backbone: Any, state: State) -> int | None:
    """Network steps of a causal request: those of every block that is made, and a rerun of every block but the last.

    None where the end is not known.
    """
    if state.frames is None:
        return None
    size, known = _block_frames(backbone, state), 0 if state.known is None else state.known.shape[1]
    made = -(-(state.frames - known) // size)
    return made * len(state.timesteps) + made + -(-known // size) - 1


def _block_frames(backbone: Any, state: State) -> int:
    size = state.settings.block_frames or backbone.block_frames
    if size is None:
        raise ValueError("this backbone was not trained with causal blocks: block_frames must be given, got None")
    return size


def _ready(state: State, wanted: int) -> int:
    """How many of the first `wanted` frames there will be."""
    wanted = wanted if state.frames is None else min(wanted, state.frames)
    return wanted if state.cameras is None else state.cameras.ready(wanted)


def all_frames(state: State) -> int:
    """Latent frames of a request whose end is known from the start."""
    if state.frames is None or state.poses_come:
        raise ValueError("this model makes all frames at once: pose must be a pose string or a trajectory, got an iterator")
    return state.frames


def causal_passes(backbone: Any, state: State) -> list[CausalPass]:
    """Of one stream: one pass per entry of `state.conditions`, each with its own KV cache."""
    settings, (_, h, w) = state.settings, state.latent_size
    window = {"window_frames": settings.window_frames, "sink_frames": settings.sink_frames}
    capture = capture_of(backbone, settings.window_frames is not None)
    caches = [
        backbone.new_cache(_rows(condition), h, w, rotated=not settings.compact_cache, **window)
        for condition in state.conditions
    ]
    return [CausalPass(backbone, *each, capture) for each in zip(state.conditions, caches, strict=True)]


def remember(backbone: Any, state: State, x0: Tensor, last: int, passes: list[CausalPass]) -> None:
    """Clean rerun at t = 0 of the block that ends before frame `last`: the caches keep keys and values of its result.

    It is put off to the start of the next block: a chunk is shown earlier, and the last one is never rerun.
    """
    predict_flow(backbone, state, x0, 0.0, last - x0.shape[1], passes, keys_only=True)


def decode(state: State, condition: Any, chunks: Iterator[Tensor]) -> Generator[Tensor, None, None]:
    """Latent chunks [B, F, Cz, h, w] → pixel chunks [B, Fp, 3, H, W] in [−1, 1], each as soon as its latents are there.

    A stream whose end is not known is decoded in bounded memory, with no more past than the model sees.
    """
    context = state.settings.window_frames if state.frames is None else None
    yield from condition.decode_stream(chunks, context=context)


def write_videos(chunks: Iterator[Tensor], paths: Sequence[str | Path], fps: float) -> int:
    """Writes chunk by chunk, one mp4 per prompt; every file appears when all are complete. Returns the pixel frames of each."""
    frames = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(Mp4Writer(path, fps)) for path in paths]
        for chunk in chunks:
            if len(chunk) != len(writers):
                raise ValueError(f"write_videos: paths must name one file per prompt ({len(chunk)}), got {len(writers)}")
            frames += chunk.shape[1]
            for writer, video in zip(writers, chunk, strict=True):
                writer.write(video)
    return frames
