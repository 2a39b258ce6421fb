"""The stages of generation: small functions over one small state.

validate → encode_condition → initial_noise → denoise (the pipeline's own) → decode → write_videos

Every random number is drawn by (seed, frame, step), so a video does not depend on how it is cut into blocks or requests.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_ops.camera import intrinsics_matrix, parse_trajectory, trajectory_frames
from dit_ops.conditions.arguments import in_dtype, negative_of, of_frames, per_sample, with_negative
from dit_ops.draws import Draws
from dit_ops.pipelines.cameras import CameraPath, Cameras, Piece
from dit_ops.pipelines.settings import Settings
from dit_ops.video import Mp4Writer


@dataclass
class State:
    """One request of B prompts on its way through the stages."""

    settings: Settings
    prompts: list[str]
    seeds: list[int]
    frames: int | None  # latent frames, or fewer where the path ends; None: as many as the path has
    latent_size: tuple[int, int, int]  # Cz, h, w
    cameras: CameraPath | None
    device: torch.device
    image: Tensor | None = None  # known first frame [B, 3, H, W]
    conditions: list[dict[str, Tensor]] = field(default_factory=list)  # arguments [B or 2B, …], one entry per network pass
    on_step: Callable[[], None] | None = None  # called after every network step

    @property
    def guided(self) -> bool:
        return self.settings.guidance != 1


def validate(
    backbone: Any,
    condition: Any,
    prompts: str | Sequence[str],
    pose: str | Sequence[str] | Cameras | Iterator[Piece] | None,
    seed: int | Sequence[int],
    frames: int | None,
    settings: Settings,
    image: Tensor | None = None,
) -> State:
    """Checks a request and fills what it leaves open. A single pose or trajectory serves every prompt."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    B = len(prompts)
    seeds = [seed + b for b in range(B)] if isinstance(seed, int) else list(seed)
    if len(seeds) != B:
        raise ValueError(f"seed must be one number or one per prompt ({B}), got {len(seeds)}")
    if condition.latent_channels != backbone.latent_channels:
        raise ValueError(
            f"the backbone wants {backbone.latent_channels} latent channels, the condition makes {condition.latent_channels}"
        )
    if pose is not None and backbone.camera is None:
        raise ValueError("this model has no camera branch and takes no pose, but one was given")
    if pose is None and backbone.camera is not None:
        raise ValueError("this model follows a camera: pose is needed, a pose string such as w*4,l*8 or a trajectory; got none")
    if frames is not None and frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    if isinstance(pose, Iterator):
        if image is not None and frames is None:
            raise ValueError("frames must be given for an image whose poses are decided while streaming, got None")
        cameras = CameraPath.from_pieces(pose, B, settings.intrinsics, backbone.device)
    elif pose is not None:
        cameras = CameraPath(*_cameras(pose, B, frames, settings), backbone.device)
        frames = cameras.frames
    else:
        cameras, frames = None, frames or settings.frames
    plane = _latent_plane(backbone, condition, settings)
    return State(
        settings=settings,
        prompts=prompts,
        seeds=seeds,
        frames=frames,
        latent_size=(condition.latent_channels, *plane),
        cameras=cameras,
        device=backbone.device,
        image=None if image is None else _image(image, B, settings),
    )


def _image(image: Tensor, B: int, settings: Settings) -> Tensor:
    image = image[None] if image.dim() == 3 else image
    if image.dim() != 4 or image.shape[0] not in (1, B) or image.shape[1:] != (3, settings.height, settings.width):
        expected = f"[3, {settings.height}, {settings.width}] in [-1, 1], or one of {B} prompts each"
        raise ValueError(f"image must be {expected}, got {list(image.shape)}")
    return image.expand(B, -1, -1, -1)


def _cameras(pose: str | Sequence[str] | Cameras, B: int, frames: int | None, settings: Settings) -> Cameras:
    given: list[Any] = [pose] if isinstance(pose, str) else list(pose)
    poses = [p for p in given if isinstance(p, str)]
    if len(poses) == len(given):
        if not poses:
            raise ValueError("pose must hold at least one pose string, got none")
        counts = [trajectory_frames(text) for text in poses]
        frames = counts[0] if frames is None else frames
        for text, count in zip(poses, counts, strict=True):
            if count != frames:
                raise ValueError(f"pose {text!r} gives {count} latent frames (1 + its counts), but {frames} are wanted")
        viewmats = torch.stack([parse_trajectory(text) for text in poses])
        Ks = intrinsics_matrix(*settings.intrinsics).expand(*viewmats.shape[:2], 3, 3)
    else:
        viewmats, Ks = (t[None] if t.dim() == 3 else t for t in given)
        if viewmats.shape[2:] != (4, 4) or Ks.shape != (*viewmats.shape[:2], 3, 3):
            raise ValueError(
                f"pose must be viewmats [B, F, 4, 4] and Ks [B, F, 3, 3], got {list(viewmats.shape)} and {list(Ks.shape)}"
            )
        if frames is not None and viewmats.shape[1] != frames:
            raise ValueError(f"the trajectory has {viewmats.shape[1]} poses, but {frames} latent frames are wanted")
    if viewmats.shape[0] not in (1, B):
        raise ValueError(f"pose must be one trajectory or one per prompt ({B}), got {viewmats.shape[0]}")
    return viewmats.expand(B, -1, -1, -1), Ks.expand(B, -1, -1, -1)


def _latent_plane(backbone: Any, condition: Any, settings: Settings) -> tuple[int, int]:
    plane = []
    patch = backbone.transformer.config.patch_size  # one number, or (t, h, w)
    *_, ph, pw = (patch, patch) if isinstance(patch, int) else patch
    for name, pixels, patch_size in (("height", settings.height, ph), ("width", settings.width, pw)):
        unit = condition.spatial_stride * patch_size
        if pixels % unit:
            raise ValueError(f"{name} must be a multiple of {unit} pixels for this model, got {pixels}")
        plane.append(pixels // condition.spatial_stride)
    return plane[0], plane[1]


def encode_condition(state: State, condition: Any, backbone: Any) -> None:
    """Text and image per network pass: [cond], [cond, uncond], or one batch [cond ‖ uncond], which differ in text."""
    dtype = backbone.dtype
    given = condition.encode_text(state.prompts)
    if state.image is not None and state.frames is not None:
        given = {**given, **condition.encode_image(state.image, state.frames)}
    given = in_dtype(given, state.device, dtype)
    state.conditions = [given]
    if state.guided:
        negative = per_sample(in_dtype(condition.encode_text([state.settings.negative_prompt]), state.device, dtype))[0]
        batched = state.settings.batched_guidance
        state.conditions = [with_negative(given, negative)] if batched else [given, negative_of(given, negative)]


def initial_noise(state: State, first: int, last: int) -> Tensor:
    """ε of frames [first, last): [B, last − first, Cz, h, w] fp32."""
    return _noise(state, "noise", [(f,) for f in range(first, last)])


def renoise_noise(state: State, first: int, last: int, step: int) -> Tensor:
    """Fresh ε that a few-step sampler adds after `step`."""
    return _noise(state, "renoise", [(f, step) for f in range(first, last)])


def _noise(state: State, name: str, counters: list[tuple[int, ...]]) -> Tensor:
    videos = [torch.stack([Draws(seed).at(*c).normal(name, state.latent_size) for c in counters]) for seed in state.seeds]
    return torch.stack(videos).to(state.device)


def predict_flow(
    backbone: Any,
    state: State,
    x: Tensor,
    t: float,
    first: int = 0,
    caches: list[Any] | None = None,
    *,
    clean: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Flow of frames [first, first + F) at timestep t: (conditional, unconditional or None). Both see the same camera.

    x: [B, F, Cz, h, w]    caches: one per network pass, or None for a bidirectional model
    clean: x is a result to remember; a backbone with an action branch is given its labels otherwise only, as in training
    """
    B, last = x.shape[0], first + x.shape[1]
    flows = []
    for i, condition in enumerate(state.conditions):
        copies = _rows(condition) // B
        options: dict[str, Any] = of_frames(condition, first, last)
        if state.cameras is not None:
            viewmats, Ks = (c.repeat(copies, 1, 1, 1) for c in state.cameras.of(first, last))
            options |= {"viewmats": viewmats, "Ks": Ks}
            if getattr(backbone, "action", None) is not None and not clean:
                options["action"] = state.cameras.actions_of(first, last).repeat(copies, 1)
        if caches is not None:
            options |= {"cache": caches[i], "start_frame": first}
        timestep = torch.full((B * copies,), t, dtype=torch.float32, device=x.device)
        flows.append(backbone(x.repeat(copies, 1, 1, 1, 1).to(backbone.dtype), timestep, **options))
    if state.on_step is not None:
        state.on_step()
    cond, *uncond = torch.cat(flows).split(B)
    return cond, uncond[0] if uncond else None


def causal_blocks(backbone: Any, state: State) -> Iterator[tuple[int, int]]:
    """Frame ranges [first, last) that are generated together; the last one may be shorter.

    The poses of a block are asked for when the block is, so they may be decided after the block before was seen.
    """
    size, first = _block_frames(backbone, state), 0
    while (last := _known_frames(state, first + size)) > first:
        yield first, last
        first = last


def count_blocks(backbone: Any, state: State) -> int | None:
    """Causal blocks of a request; None where its end is not known."""
    size = _block_frames(backbone, state)
    return None if state.frames is None else -(-state.frames // size)


def _block_frames(backbone: Any, state: State) -> int:
    size = state.settings.block_frames or backbone.block_frames
    if size is None:
        raise ValueError("this backbone was not trained with causal blocks: block_frames must be given, got None")
    return size


def _known_frames(state: State, wanted: int) -> int:
    """How many of the first `wanted` frames there will be."""
    wanted = wanted if state.frames is None else min(wanted, state.frames)
    return wanted if state.cameras is None else state.cameras.ready(wanted)


def all_frames(state: State) -> int:
    """Latent frames of a request whose end is known from the start."""
    if state.frames is None or (state.cameras is not None and state.cameras.pieces is not None):
        raise ValueError("this model makes all frames at once: pose must be a pose string or a trajectory, got an iterator")
    return state.frames


def new_caches(backbone: Any, state: State) -> list[Any]:
    """One KV cache per network pass."""
    _, h, w = state.latent_size
    window = {"window_frames": state.settings.window_frames, "sink_frames": state.settings.sink_frames}
    return [backbone.new_cache(_rows(condition), h, w, **window) for condition in state.conditions]


def _rows(condition: dict[str, Tensor]) -> int:
    return len(next(iter(condition.values())))


def remember(backbone: Any, state: State, x0: Tensor, last: int, caches: list[Any]) -> None:
    """Clean rerun at t = 0 of the block that ends before frame `last`: the cache keeps keys and values of its result.

    It is put off to the start of the next block: a chunk is shown earlier, and the last one is never rerun.
    """
    predict_flow(backbone, state, x0, 0.0, last - x0.shape[1], caches, clean=True)


def decode(condition: Any, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Latent chunks [B, F, Cz, h, w] → pixel chunks [B, Fp, 3, H, W] in [−1, 1], each as soon as its latents are there."""
    yield from condition.decode_stream(chunks)


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
