"""The stages of generation: small functions over one small state.

validate → encode_text → encode_camera → initial_noise → denoise (the pipeline's own) → decode → write_videos

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
from dit_ops.draws import Draws
from dit_ops.pipelines.settings import Settings
from dit_ops.video import Mp4Writer

Cameras = tuple[Tensor, Tensor]  # viewmats [F, 4, 4] and Ks [F, 3, 3], or both with a leading B


@dataclass
class State:
    """One request of B prompts on its way through the stages."""

    settings: Settings
    prompts: list[str]
    seeds: list[int]
    frames: int  # latent frames
    latent_size: tuple[int, int, int]  # Cz, h, w
    cameras: Cameras | None  # viewmats [B, F, 4, 4], Ks [B, F, 3, 3]
    device: torch.device
    texts: list[Tensor] = field(default_factory=list)  # text states [B or 2B, T, Dt], one entry per network pass
    on_step: Callable[[], None] | None = None  # called after every network step

    @property
    def guided(self) -> bool:
        return self.settings.guidance != 1


def validate(
    backbone: Any,
    condition: Any,
    prompts: str | Sequence[str],
    pose: str | Sequence[str] | Cameras | None,
    seed: int | Sequence[int],
    frames: int | None,
    settings: Settings,
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
    cameras = None if pose is None else _cameras(pose, B, frames, settings)
    return State(
        settings=settings,
        prompts=prompts,
        seeds=seeds,
        frames=(frames or settings.frames) if cameras is None else cameras[0].shape[1],
        latent_size=(condition.latent_channels, *_latent_plane(backbone, condition, settings)),
        cameras=cameras,
        device=backbone.device,
    )


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
    patch = backbone.transformer.config.patch_size
    for name, pixels, patch_size in (("height", settings.height, patch[1]), ("width", settings.width, patch[2])):
        unit = condition.spatial_stride * patch_size
        if pixels % unit:
            raise ValueError(f"{name} must be a multiple of {unit} pixels for this model, got {pixels}")
        plane.append(pixels // condition.spatial_stride)
    return plane[0], plane[1]


def encode_text(state: State, condition: Any, dtype: torch.dtype) -> None:
    """Text states per network pass: [cond], [cond, uncond], or one batch [cond ‖ uncond]."""
    text = condition.encode_text(state.prompts).to(state.device, dtype)
    state.texts = [text]
    if state.guided:
        negative = condition.encode_text([state.settings.negative_prompt]).to(text).expand_as(text)
        state.texts = [torch.cat([text, negative])] if state.settings.batched_guidance else [text, negative.contiguous()]


def encode_camera(state: State) -> None:
    """Moves the trajectory to the device; cameras stay fp32 whatever the model's dtype."""
    if state.cameras is not None:
        viewmats, Ks = state.cameras
        state.cameras = viewmats.to(state.device, torch.float32), Ks.to(state.device, torch.float32)


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
    backbone: Any, state: State, x: Tensor, t: float, first: int = 0, caches: list[Any] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Flow of frames [first, first + F) at timestep t: (conditional, unconditional or None). Both see the same camera.

    x: [B, F, Cz, h, w]    caches: one per network pass, or None for a bidirectional model
    """
    B, last = x.shape[0], first + x.shape[1]
    flows = []
    for i, text in enumerate(state.texts):
        copies = text.shape[0] // B
        options: dict[str, Any] = {}
        if state.cameras is not None:
            viewmats, Ks = (c[:, first:last].repeat(copies, *[1] * (c.dim() - 1)) for c in state.cameras)
            options |= {"viewmats": viewmats, "Ks": Ks}
        if caches is not None:
            options |= {"cache": caches[i], "start_frame": first}
        timestep = torch.full((B * copies,), t, dtype=torch.float32, device=x.device)
        flows.append(backbone(x.repeat(copies, 1, 1, 1, 1).to(backbone.dtype), timestep, text, **options))
    if state.on_step is not None:
        state.on_step()
    cond, *uncond = torch.cat(flows).split(B)
    return cond, uncond[0] if uncond else None


def causal_blocks(backbone: Any, state: State) -> list[tuple[int, int]]:
    """Frame ranges [first, last) that are generated together; the last one may be shorter."""
    size = state.settings.block_frames or backbone.block_frames
    if size is None:
        raise ValueError("this backbone was not trained with causal blocks: block_frames must be given, got None")
    return [(f, min(f + size, state.frames)) for f in range(0, state.frames, size)]


def new_caches(backbone: Any, state: State) -> list[Any]:
    """One KV cache per network pass."""
    _, h, w = state.latent_size
    window = {"window_frames": state.settings.window_frames, "sink_frames": state.settings.sink_frames}
    return [backbone.new_cache(text.shape[0], h, w, **window) for text in state.texts]


def remember(backbone: Any, state: State, x0: Tensor, first: int, caches: list[Any]) -> None:
    """Clean rerun at t = 0: the cache keeps keys and values of the block's result. The last block needs none."""
    if first + x0.shape[1] < state.frames:
        predict_flow(backbone, state, x0, 0.0, first, caches)


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
