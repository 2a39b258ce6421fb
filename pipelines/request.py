"""A request on its way through the stages of generation, and the checks that it starts with."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from dit_ops.camera import intrinsics_matrix, parse_trajectory, trajectory_frames
from dit_ops.pipelines.cameras import CameraPath, Cameras, Piece
from dit_ops.pipelines.settings import Settings


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
    image: Tensor | None = None  # first frame [B, 3, H, W] for the channels of a condition
    video: Tensor | None = None  # first frames [1 or B, Fp, 3, H, W] that a causal model continues
    known: Tensor | None = None  # latents [B, F, Cz, h, w] of `video`
    timesteps: list[float] = field(default_factory=list)  # that the network sees, of every block
    conditions: list[dict[str, Tensor]] = field(default_factory=list)  # arguments [B or 2B, …], one entry per network pass
    on_step: Callable[[], None] | None = None  # called after every network step

    @property
    def guided(self) -> bool:
        return self.settings.guidance != 1

    @property
    def poses_come(self) -> bool:
        """Whether poses are still decided while the video streams."""
        return self.cameras is not None and self.cameras.pieces is not None


def validate(
    backbone: Any,
    condition: Any,
    prompts: str | Sequence[str],
    pose: str | Sequence[str] | Cameras | Iterator[Piece] | None,
    seed: int | Sequence[int],
    frames: int | None,
    settings: Settings,
    image: Tensor | None = None,
    video: Tensor | None = None,
    *,
    causal: bool = True,
) -> State:
    """Checks a request and fills what it leaves open. A single pose, trajectory, image or video serves every prompt.

    causal: the model makes block after block, so it can continue known frames; an image for which a causal model has no
    channels is a video of one frame
    """
    prompts = [prompts] if isinstance(prompts, str) else _list("prompts", prompts, str, "a string, or one per video")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    B = len(prompts)
    whole = "a whole number, or one per prompt"
    seeds = [int(seed) + b for b in range(B)] if isinstance(seed, Integral) else _list("seed", seed, Integral, whole)
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
    plane = _latent_plane(backbone, condition, settings)
    image, video = _known_pixels(image, video, B, settings, causal, backbone.takes_condition_latents)
    if isinstance(pose, Iterator):
        if image is not None and frames is None:
            raise ValueError("frames must be given for an image whose poses are decided while streaming, got None")
        cameras = CameraPath.from_pieces(pose, B, settings.intrinsics, backbone.device)
    elif pose is not None:
        cameras = CameraPath(*_cameras(pose, B, frames, settings), backbone.device)
        frames = cameras.frames
    else:
        cameras, frames = None, frames or settings.frames
    known = 0 if video is None else condition.latent_frames(video.shape[1])
    if frames is not None and known >= frames:
        of_pose = "" if cameras is None else ", and so must the pose"
        raise ValueError(
            f"frames must count the known ones too{of_pose}: more than the {known} latent frames of the video, got {frames}"
        )
    return State(
        settings=settings,
        prompts=prompts,
        seeds=seeds,
        frames=frames,
        latent_size=(condition.latent_channels, *plane),
        cameras=cameras,
        device=backbone.device,
        image=image,
        video=video,
    )


def _list(name: str, given: Any, kind: type, expected: str) -> list[Any]:
    """given as a list of `kind`; ValueError for anything else, a string included."""
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else [None]
    if not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{name} must be {expected}, got {given!r}")
    return values


def _known_pixels(
    image: Tensor | None, video: Tensor | None, B: int, settings: Settings, causal: bool, has_channels: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(image [B, 3, H, W] for the condition's channels, video [1 or B, Fp, 3, H, W] to continue)."""
    size = [3, settings.height, settings.width]
    for name, value in (("image", image), ("video", video)):
        if value is not None and not isinstance(value, Tensor):
            how = f"dit_ops.pipelines.files.read_{name} reads a file"
            raise ValueError(f"{name} must be a tensor in [-1, 1] ({how}), got {type(value).__name__}")
    if image is not None:
        expected = f"image must be {size} in [-1, 1], or one of {B} prompts each, got {list(image.shape)}"
        image = image[None] if image.dim() == 3 else image
        if image.dim() != 4 or image.shape[0] not in (1, B) or list(image.shape[1:]) != size:
            raise ValueError(expected)
    if video is not None:
        expected = f"video must be [Fp, {', '.join(map(str, size))}] in [-1, 1], or one of {B} prompts each, "
        expected += f"got {list(video.shape)}"
        video = video[None] if video.dim() == 4 else video
        if video.dim() != 5 or video.shape[0] not in (1, B) or not video.shape[1] or list(video.shape[2:]) != size:
            raise ValueError(expected)
        if not causal:
            raise ValueError("this model makes all frames at once and continues no video, but one was given")
    if image is None or has_channels:
        return None if image is None else image.expand(B, -1, -1, -1), video
    if not causal:
        raise ValueError("this model has no channels for a known frame and takes no image, but one was given")
    if video is not None:
        raise ValueError("image and video exclude each other in this model, which would start with either, got both")
    return None, image[:, None]


def _cameras(pose: str | Sequence[str] | Cameras, B: int, frames: int | None, settings: Settings) -> Cameras:
    given: list[Any] = [pose] if isinstance(pose, str) else list(pose) if isinstance(pose, Sequence) else [pose]
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
        if len(given) != 2 or not all(isinstance(t, Tensor) for t in given):
            how = "a pose string, one per prompt, an iterator of them, or the two tensors viewmats and Ks"
            raise ValueError(f"pose must be {how}, got {', '.join(type(t).__name__ for t in given)}")
        viewmats, Ks = (t[None] if t.dim() == 3 else t for t in given)
        if viewmats.shape[2:] != (4, 4) or Ks.shape != (*viewmats.shape[:2], 3, 3):
            raise ValueError(
                f"pose must be viewmats [B, F, 4, 4] and Ks [B, F, 3, 3], got {list(viewmats.shape)} and {list(Ks.shape)}"
            )
        _check_cameras(viewmats, Ks)
        if frames is not None and viewmats.shape[1] != frames:
            raise ValueError(f"the trajectory has {viewmats.shape[1]} poses, but {frames} latent frames are wanted")
    if viewmats.shape[0] not in (1, B):
        raise ValueError(f"pose must be one trajectory or one per prompt ({B}), got {viewmats.shape[0]}")
    return viewmats.expand(B, -1, -1, -1), Ks.expand(B, -1, -1, -1)


def _check_cameras(viewmats: Tensor, Ks: Tensor) -> None:
    """Finite, viewmats rigid, focal lengths positive; a number that is not would turn up in every pixel."""
    R = viewmats[..., :3, :3].double()
    # a comparison with NaN is false
    rigid = ((R @ R.transpose(-1, -2) - torch.eye(3, dtype=R.dtype, device=R.device)).abs() < 1e-2).all(-1).all(-1)
    good = rigid & viewmats.isfinite().all(-1).all(-1) & Ks.isfinite().all(-1).all(-1)
    good &= (Ks[..., 0, 0] > 0) & (Ks[..., 1, 1] > 0)
    if not good.all():
        frame = int((~good).any(0).nonzero()[0])
        raise ValueError(
            f"pose: the camera of frame {frame} must be a rotation and a shift, with positive focal lengths, in finite numbers"
        )


def _latent_plane(backbone: Any, condition: Any, settings: Settings) -> tuple[int, int]:
    plane = []
    ph, pw = backbone.patch
    for name, pixels, patch_size in (("height", settings.height, ph), ("width", settings.width, pw)):
        unit = condition.spatial_stride * patch_size
        if pixels % unit:
            raise ValueError(f"{name} must be a multiple of {unit} pixels for this model, got {pixels}")
        plane.append(pixels // condition.spatial_stride)
    return plane[0], plane[1]
