"""Videos with captions and poses -> latent data sets: rendered rooms, or a folder of mp4 files."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_ops import rooms
from dit_ops.actions import action_labels
from dit_ops.camera import (
    DEFAULT_INTRINSICS,
    intrinsics_matrix,
    parse_trajectory,
    trajectory_frames,
    trajectory_from_json,
)
from dit_ops.conditions import Condition, load
from dit_ops.conditions.arguments import per_sample
from dit_ops.conditions.linear import LinearCondition
from dit_ops.draws import Draws
from dit_ops.training.data import DatasetWriter, LatentDataset
from dit_ops.training.join import join_parts, parts_folder
from dit_ops.video import iterate_mp4

Progress = Callable[[int, int], None]  # called with (finished, total)
FIT_VIDEOS = 64  # what a codec is fitted to: its 16 components need no more


def make_rooms(
    directory: str | Path,
    *,
    prompts: Sequence[str] = rooms.PROMPTS,
    count: int = 512,
    frames: int = 8,
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    split: str | None = "train",
    poses: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    condition: Condition | None = None,
    patch: int = 8,
    fps: float = 8,
    mode: Literal["create", "overwrite", "resume"] = "create",
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> LatentDataset:
    """Film `count` room videos and write them as a data set; sample i is a pure function of (seed, i).

    Prompts take turns. Poses are random trajectories of `frames` frames that are none of `exclude`, or `poses` in turn, each
    with every prompt. condition: None is the data set's own (mode "resume"), else a LinearCondition fitted to the first videos.
    """
    if not prompts or count < 1:
        raise ValueError(f"make_rooms: needs at least one prompt and count >= 1 but got {len(prompts)} prompts, count {count}")
    height, width = (size, size) if isinstance(size, int) else size
    K = intrinsics_matrix(*rooms.INTRINSICS)

    def pose_of(i: int) -> str:
        if poses is not None:
            return poses[i // len(prompts) % len(poses)]
        return rooms.random_trajectory(Draws(seed, (i,)), frames, exclude=exclude)

    def video_of(i: int) -> Tensor:
        return rooms.render(prompts[i % len(prompts)], parse_trajectory(pose_of(i)), K, (height, width), device=device)

    for pose in poses or ():
        if trajectory_frames(pose) != frames:
            raise ValueError(f"make_rooms: pose {pose!r} has {trajectory_frames(pose)} frames but frames is {frames}")
    saved = Path(directory) / "condition"
    if condition is None and mode == "resume" and saved.is_dir():
        condition = load(saved)
    if condition is None:
        condition = LinearCondition.fit(torch.stack([video_of(i) for i in range(min(count, FIT_VIDEOS))]), patch)
    condition = condition.to(device)
    text = dict(zip(prompts, per_sample(condition.encode_text(list(prompts))), strict=True))
    negative = per_sample(condition.encode_text([""]))[0]
    with DatasetWriter(directory, fps=fps, negative=negative, condition=condition.summary(), mode=mode) as writer:
        if isinstance(condition, LinearCondition):
            condition.save_pretrained(saved)
        for i in range(count):
            id = f"{split or 'rooms'}-{i:06d}"
            if id not in writer.done:
                prompt, pose = prompts[i % len(prompts)], pose_of(i)
                viewmats = parse_trajectory(pose)
                latents = condition.encode_to_latent(video_of(i)[None])[0]
                writer.add(
                    id,
                    latents=latents,
                    condition=text[prompt],
                    viewmats=viewmats,
                    Ks=K.expand(len(latents), 3, 3),
                    prompt=prompt,
                    pose=pose,
                    height=height,
                    width=width,
                    split=split,
                )
            if progress is not None:
                progress(i + 1, count)
    return LatentDataset(directory, split)


@dataclass(frozen=True)
class Clip:
    """One video file, what belongs to it, and what its header says; its id is the file's stem."""

    path: Path
    caption: str
    pose: str | Path  # a pose string, or a pose JSON file
    fps: float
    frames: int
    height: int
    width: int

    @property
    def id(self) -> str:
        return self.path.stem


def find_clips(source: str | Path) -> list[Clip]:
    """The mp4 files of a folder with what belongs to them, sorted by name.

    Caption: <stem>.txt, or a line {"video": "<stem>.mp4", "caption": "...", "pose": "..."} of captions.jsonl. Pose: that line's
    pose string (or the name of a JSON file beside it), <stem>.pose (a pose string) or <stem>.json.
    ValueError names a clip that has none or two of either, or that is no video.
    """
    source = Path(source)
    videos = sorted(source.glob("*.mp4"))
    if not videos:
        raise ValueError(f"{source} must be a folder with .mp4 files but has none")
    lines = _read_captions(source / "captions.jsonl")
    unknown = sorted(set(lines) - {video.name for video in videos})
    if unknown:
        raise ValueError(f"{source / 'captions.jsonl'} names {unknown[0]!r}, which is not in {source}")
    clips = []
    for video in videos:
        line = lines.get(video.name, {})
        text, words, cameras = (video.with_suffix(suffix) for suffix in (".txt", ".pose", ".json"))
        captions: list[str] = [line["caption"]] if "caption" in line else []
        captions += [text.read_text(encoding="utf-8").strip()] if text.is_file() else []
        poses: list[str | Path] = []
        if "pose" in line:
            poses.append(source / line["pose"] if line["pose"].endswith(".json") else line["pose"])
        poses += [words.read_text(encoding="utf-8").strip()] if words.is_file() else []
        poses += [cameras] if cameras.is_file() else []
        for found, what, names in ((captions, "caption", text.name), (poses, "pose", f"{words.name} or {cameras.name}")):
            if len(found) != 1:
                raise ValueError(f"{video} must have one {what} (in captions.jsonl or {names}) but has {len(found)}")
        clips.append(Clip(video, captions[0], poses[0], *_read_header(video)))
    return clips


def _read_captions(path: Path) -> dict[str, dict[str, Any]]:
    lines = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(line, dict) or not isinstance(line.get("video"), str):
            raise ValueError(f"{path} line {number} must be an object with the file name in 'video' but is {text[:80]!r}")
        if set(line) - {"video", "caption", "pose"}:
            raise ValueError(f"{path} line {number} has unknown keys {sorted(set(line) - {'video', 'caption', 'pose'})}")
        lines[line["video"]] = line
    return lines


def _read_header(path: Path) -> tuple[float, int, int, int]:
    """Frames per second, frames, height and width of a video. ValueError: not a video."""
    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            count = stream.frames or sum(packet.size > 0 for packet in file.demux(stream))
            return float(stream.average_rate), count, stream.height, stream.width
    except (av.error.InvalidDataError, IndexError):
        raise ValueError(f"{path} is not a video that FFmpeg can read") from None


def _covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Scaled height and width that just cover `size`, and the top and left of the centred crop."""
    scale = max(size[0] / height, size[1] / width)
    h, w = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return h, w, (h - size[0]) // 2, (w - size[1]) // 2


def read_frames(path: Path, indices: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Frames `indices` (rising) of a video, scaled to cover `size` and cropped at the centre -> [n, 3, H, W] in [-1, 1]."""
    wanted, frames = set(indices), []
    for i, frame in enumerate(iterate_mp4(path)):
        if i in wanted:
            h, w, top, left = _covering(frame.shape[1], frame.shape[2], size)
            scaled = F.interpolate(frame[None], (h, w), mode="bilinear", antialias=True)[0]
            frames.append(scaled[:, top : top + size[0], left : left + size[1]])
        if len(frames) == len(indices):
            return torch.stack(frames)
    raise ValueError(f"{path} ends before frame {indices[len(frames)]}")


def crop_intrinsics(Ks: Tensor, source: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Normalised intrinsics [..., 3, 3] of pictures (height, width) = source after read_frames made them `size`."""
    h, w, top, left = _covering(*source, size)
    # u' = (u * w - left) / W and v' = (v * h - top) / H
    change = torch.tensor([[w / size[1], 0, -left / size[1]], [0, h / size[0], -top / size[0]], [0, 0, 1]], dtype=Ks.dtype)
    return change @ Ks


def frame_step(clip: Clip, fps: float) -> float:
    """Frames of the file per frame of the data set."""
    return clip.fps / fps if clip.fps > 1.01 * fps else 1.0


def available_frames(clip: Clip, fps: float) -> int:
    return int((clip.frames - 1) / frame_step(clip, fps) + 1e-6) + 1


def frame_indices(clip: Clip, fps: float, frames: int | None, stride: int) -> list[int]:
    """Source frames to read at `fps`: the first `frames`, or as many as the clip has for whole latent frames."""
    if clip.fps < 0.99 * fps:
        raise ValueError(f"{clip.path} has {clip.fps:g} frames per second, fewer than the {fps:g} asked for")
    step, available = frame_step(clip, fps), available_frames(clip, fps)
    wanted = frames or available - (available - 1) % stride
    if wanted > available:
        raise ValueError(f"{clip.path} has {available} frames at {fps:g} per second, fewer than the {wanted} asked for")
    return [round(i * step) for i in range(wanted)]


def clip_cameras(
    clip: Clip, indices: Sequence[int], stride: int, size: tuple[int, int], intrinsics: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """viewmats [F, 4, 4], the first the identity, and Ks [F, 3, 3] of the latent frames of a clip.

    Poses come one per latent frame, one per frame read, or one per frame of the file; latent frame i is frame i * stride.
    ValueError: another number of poses (the message names both).
    """
    latent = 1 + (len(indices) - 1) // stride
    if isinstance(clip.pose, Path):
        viewmats, Ks = trajectory_from_json(clip.pose)
    else:
        viewmats = parse_trajectory(clip.pose)
        Ks = intrinsics_matrix(*intrinsics).expand(len(viewmats), 3, 3)
    if len(viewmats) == latent:
        keep = list(range(latent))
    elif len(viewmats) == len(indices):
        keep = list(range(0, len(indices), stride))
    elif len(viewmats) == clip.frames:
        keep = list(indices[::stride])
    else:
        raise ValueError(
            f"{clip.path} has {len(viewmats)} poses but {latent} latent frames ({len(indices)} frames read of {clip.frames}); "
            "give one pose per latent frame or one per frame"
        )
    return viewmats[keep], crop_intrinsics(Ks[keep], (clip.height, clip.width), size)


def fit_linear(clips: Sequence[Clip], size: tuple[int, int], patch: int = 8) -> LinearCondition:
    """A LinearCondition fitted to up to FIT_VIDEOS clips, evenly spread, eight frames of each."""
    videos = []
    for clip in clips[:: max(1, len(clips) // FIT_VIDEOS)][:FIT_VIDEOS]:
        n = min(8, clip.frames)
        videos.append(read_frames(clip.path, [i * clip.frames // n for i in range(n)], size))
    return LinearCondition.fit(torch.cat(videos)[None], patch)


def preprocess(
    source: str | Path,
    directory: str | Path,
    condition: Condition | None = None,
    *,
    size: int | tuple[int, int] | Sequence[tuple[int, int]],
    frames: int | Sequence[int] | None = None,
    fps: float | None = None,
    intrinsics: Sequence[float] = DEFAULT_INTRINSICS,
    negative_prompt: str = "",
    image: bool = False,
    action: bool = False,
    split: str | None = None,
    part: tuple[int, int] = (0, 1),
    dtype: torch.dtype | None = None,
    mode: Literal["create", "overwrite", "resume"] = "resume",
    shard_bytes: int = 64 << 20,
    progress: Progress | None = None,
) -> LatentDataset:
    """Encode a folder of mp4 files (see find_clips) into a data set; by default a second run continues where the first stopped.

    size: pixels, one number, (H, W), or a list of such buckets: a clip goes to that of the nearest aspect ratio. Frames are
        scaled to cover it and cropped, and intrinsics follow
    frames: pixel frames read of each clip (None: all that fill latent frames), or a list: the most that the clip has
    fps: of the data set (None: the first clip's); faster clips are thinned out
    intrinsics: fx, fy, cx, cy over width and height of the file's pictures, for poses given as strings
    condition: None is the data set's own, else a LinearCondition fitted to the clips
    image: the first frame of every clip is stored as a condition (image to video)
    action: the action label of every latent frame is stored as one, for backbones with an action branch
    part: (i, n) encodes only every n-th clip, from the i-th; the last of n runs to finish joins the parts to the data set.
        They may run at once, in any order, and each can be stopped and run again
    ValueError names the clip: no caption, no pose, too few frames, or poses that fit neither its latent nor its pixel frames.
    """
    sizes = _sizes(size)
    i, n = part
    if not 0 <= i < n:
        raise ValueError(f"preprocess: part must be (i, n) with 0 <= i < n but is {part}")
    clips = find_clips(source)
    directory = Path(directory)
    if n > 1 and mode == "resume" and (directory / "index.jsonl").is_file():
        return LatentDataset(directory, split)  # the parts were joined before
    target = directory if n == 1 else parts_folder(directory) / f"{i:05d}-of-{n:05d}"
    saved = target / "condition"
    if condition is None:
        condition = load(saved) if mode == "resume" and saved.is_dir() else fit_linear(clips, sizes[0])
    stride = condition.temporal_stride
    for height, width in sizes:
        if height % condition.spatial_stride or width % condition.spatial_stride:
            raise ValueError(f"preprocess: size must be multiples of {condition.spatial_stride} but is {height} x {width}")
    lengths = [frames] if isinstance(frames, int) else sorted(frames or (), reverse=True)
    for length in lengths:
        condition.latent_frames(length)
    fps = fps or clips[0].fps
    # every clip is checked before the first is encoded
    plans = [frame_indices(clip, fps, _longest(clip, fps, lengths), stride) for clip in clips]
    chosen = [nearest_size(clip, sizes) for clip in clips]
    cameras = [clip_cameras(clip, plan, stride, s, intrinsics) for clip, plan, s in zip(clips, plans, chosen, strict=True)]
    work = list(zip(clips, plans, chosen, cameras, strict=True))[i::n]
    if not work:
        raise ValueError(f"preprocess: part must be one of at most {len(clips)} (the clips) but is {part}")
    negative = per_sample(condition.encode_text([negative_prompt]))[0]
    options: dict[str, Any] = {"mode": mode, "dtype": dtype, "shard_bytes": shard_bytes}
    with DatasetWriter(target, fps=fps, negative=negative, condition=condition.summary(), **options) as writer:
        if isinstance(condition, LinearCondition):
            condition.save_pretrained(saved)
        for done, (clip, plan, (height, width), (viewmats, Ks)) in enumerate(work, 1):
            if clip.id not in writer.done:
                encoded = _encoded(condition, clip, plan, (height, width), image)
                if action:
                    encoded["condition"]["action"] = action_labels(viewmats)
                writer.add(
                    clip.id,
                    **encoded,
                    viewmats=viewmats,
                    Ks=Ks,
                    prompt=clip.caption,
                    pose=clip.pose.name if isinstance(clip.pose, Path) else clip.pose,
                    height=height,
                    width=width,
                    split=split,
                )
            if progress is not None:
                progress(done, len(work))
    if n > 1 and not join_parts(directory, n):
        return LatentDataset(target, split)
    return LatentDataset(directory, split)


def _sizes(size: int | tuple[int, int] | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    if isinstance(size, int):
        return [(size, size)]
    return [size] if isinstance(size[0], int) else list(size)  # type: ignore[list-item, arg-type]


def nearest_size(clip: Clip, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest to the clip's, |log| of their quotient; the first of equals."""
    return min(sizes, key=lambda size: abs(math.log(clip.height / clip.width * size[1] / size[0])))


def _longest(clip: Clip, fps: float, lengths: Sequence[int]) -> int | None:
    """The longest of the falling lengths that the clip has; its shortest if none, for frame_indices to refuse."""
    available = available_frames(clip, fps)
    return next((length for length in lengths if length <= available), lengths[-1] if lengths else None)


def _encoded(condition: Condition, clip: Clip, plan: Sequence[int], size: tuple[int, int], image: bool) -> dict[str, Any]:
    """latents and condition of one clip."""
    video = read_frames(clip.path, plan, size)[None]
    values = per_sample(condition.get_condition([clip.caption], video, image=image))[0]
    return {"latents": values.pop("latents"), "condition": values}
