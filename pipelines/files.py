"""Requests to files: one mp4 and a JSON side-car per item, under names that are safe and unique; finished items are skipped."""

import functools
import hashlib
import json
import os
import re
import resource
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_ops.camera import parse_segments, trajectory_frames
from dit_ops.files import atomic_path
from dit_ops.pipelines.base import Pipeline
from dit_ops.pipelines.inputs import READABLE, deal_poses, names_pose_file, read_image, read_pose, read_video
from dit_ops.pipelines.request import validate
from dit_ops.pipelines.settings import Settings
from dit_ops.pipelines.stages import write_videos

OTHER_VIDEOS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mpg", ".webm")


@dataclass(frozen=True)
class Item:
    """One video that is wanted; pose is a pose string or the path of a pose JSON file.

    image, video   paths of a known first frame, or of known first frames
    """

    prompt: str
    pose: str | None = None
    seed: int = 0
    image: str | None = None
    video: str | None = None

    def check(self) -> None:
        """ValueError or OSError for what can be known to be wrong before a model is loaded."""
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")
        for name in ("pose", "image", "video"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be a string, got {value!r}")
        if isinstance(self.pose, str) and not names_pose_file(self.pose):
            parse_segments(self.pose)
        for name, path in self.files().items():
            if not Path(path).is_file():
                raise FileNotFoundError(f"no such file: {path}")
            READABLE[name](path)

    def files(self) -> dict[str, str]:
        """Paths of the files that the item names."""
        given = {"pose": self.pose, "image": self.image, "video": self.video}
        return {name: path for name, path in given.items() if path is not None and (name != "pose" or names_pose_file(path))}


def read_items(path: str | Path, **given: Any) -> list[Item]:
    """A JSONL file of {"prompt": …, "pose": …, "seed": …, "image": …, "video": …}; `given` are their defaults.

    A pose that is given may be a trajectory file, see `deal_poses`.
    """
    entries, items = [], []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text ({error.reason})") from error
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at characters that JSON allows in strings
        if not line.strip():
            continue
        at = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{at}: not valid JSON ({error.msg})") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f"{at}: expected an object with a prompt, got {line[:80]}")
        known = list(Item.__dataclass_fields__)
        if unknown := entry.keys() - set(known):
            raise ValueError(f"{at}: unknown keys {sorted(unknown)}; known: {', '.join(known)}")
        entries.append((at, entry))
    if not entries:
        raise ValueError(f"{path} holds no prompts")
    for (at, entry), pose in zip(entries, deal_poses(given.get("pose"), len(entries)), strict=True):
        item = Item(**{**given, "pose": pose, **entry})
        try:
            item.check()
        except (ValueError, OSError) as error:
            raise ValueError(f"{at}: {error}") from error
        items.append(item)
    return items


def fingerprint(model: str | Path, **how: Any) -> dict[str, Any]:
    """Names a model directory and how it is run, so that a model trained again counts as another one.

    how   what else changes the result, such as mode, dtype, and the directory of a condition (a Path)
    """
    parts = [Path(model), *(value for value in how.values() if isinstance(value, Path))]
    state = [entry for part in parts for entry in _listing(part)]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    given = {name: str(value) if isinstance(value, Path) else value for name, value in how.items()}
    return {"path": str(model), "weights": digest, **given}


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change) of every file below a folder, links followed, hidden ones left out."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if path.is_file():
                found.append((str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns))
    return sorted(found)


def request(item: Item, model: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Everything that determines the video: the item, what its files hold, the model and the sampler options given."""
    wanted: dict[str, Any] = {"prompt": item.prompt, "pose": item.pose, "seed": item.seed, **item.files()}
    if item.files():
        wanted["sha256"] = {name: _sha256(path, Path(path).stat().st_mtime_ns) for name, path in item.files().items()}
    return {**wanted, "model": model, "options": {k: v for k, v in options.items() if v is not None}}


@functools.cache
def _sha256(path: str, changed: int) -> str:
    """Of a file's content; read once for all items that name it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def file_stem(wanted: dict[str, Any]) -> str:
    """`a-red-room_w-4-l-3_seed0_1a2b3c4d5e6f`: readable words, then a hash of the whole request, which keeps names apart.

    ASCII, in lower case, below 130 characters. Only the model's weights are not in the hash: a model that was trained further
    overwrites its own earlier video.
    """
    words = [_slug(wanted["prompt"], 48), _slug(wanted["pose"] or "", 32), _slug(f"seed{wanted['seed']}", 24)]
    named = wanted | {"model": {key: value for key, value in wanted["model"].items() if key != "weights"}}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:12]
    return "_".join([word for word in words if word] + [digest])


def _slug(text: str, length: int) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()  # é becomes e
    return re.sub(r"[^a-z0-9]+", "-", plain.lower())[:length].strip("-")


def output_paths(output: Path, wanted: Sequence[dict[str, Any]]) -> list[Path]:
    """One path per request: `output` itself if it names an mp4 file (of a single request), else a file in that folder."""
    if output.suffix.lower() in OTHER_VIDEOS and not output.is_dir():
        raise ValueError(f"output must be a folder, or a file with the suffix .mp4, got {output}")
    if output.suffix.lower() != ".mp4" or output.is_dir():
        return [output / f"{file_stem(w)}.mp4" for w in wanted]
    if len(wanted) != 1:
        raise ValueError(f"output must be a folder for {len(wanted)} videos, got the file name {output}")
    return [output]


def check_writable(video: Path) -> None:
    """ValueError where its folder, which may still have to be made, can have no new files."""
    folder = next(place for place in (video.parent, *video.absolute().parent.parents) if place.exists())
    if not folder.is_dir():
        raise ValueError(f"output must be in a folder, {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output must be in a folder that can be written to, {folder} cannot")


def read_sidecar(video: Path) -> dict[str, Any] | None:
    """What is known of a finished video; None if there is no side-car, or a file that is none."""
    try:
        record = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) and "request" in record else None


def is_finished(video: Path, wanted: dict[str, Any]) -> bool:
    """Whether video and side-car are there, whole, and were made for this very request; the side-car is written last."""
    record = read_sidecar(video)
    if record is None or record["request"] != wanted or not video.is_file():
        return False
    return record.get("bytes") == video.stat().st_size


def check_free(video: Path, wanted: dict[str, Any], *, overwrite: bool = False) -> None:
    """ValueError where writing `video` would replace what is not an earlier version of it."""
    sidecar, record = video.with_suffix(".json"), read_sidecar(video)
    if record is None and sidecar.is_file() and file_stem(wanted) != video.stem:
        raise ValueError(f"{sidecar} would be replaced by the side-car of {video.name}, but is none: choose another output")
    if overwrite or not video.exists() or file_stem(wanted) == video.stem:
        return
    raise ValueError(f"{video} is there already, and not from this request; --overwrite replaces it")


def check_request(pipeline: Pipeline, item: Item, wanted: dict[str, Any], *, alone: bool = True) -> None:
    """ValueError for an item that this pipeline refuses, however many frames its video has; nothing large is read.

    alone   there is no other item, so that the message need not say which one it is
    """
    options = wanted["options"]
    settings = settings_of(pipeline, options)
    black = torch.zeros(()).expand(1, 3, settings.height, settings.width)
    image, video = black[0] if item.image else None, black if item.video else None
    ours, frames = (pipeline.backbone, pipeline.condition), options.get("frames")
    try:
        pose = read_pose(item.pose)
        validate(*ours, item.prompt, pose, item.seed, frames, settings, image, video, causal=pipeline.causal)
    except ValueError as error:
        raise error if alone else ValueError(f"the video of {_short(item)}: {error}") from error


def _short(item: Item) -> str:
    text = item.prompt if len(item.prompt) < 60 else item.prompt[:57] + "..."
    return f"{text!r} along {item.pose or 'no pose'}"


def pixel_frames(pipeline: Pipeline, item: Item, options: dict[str, Any]) -> int:
    """Frames that the video of an item will have."""
    pose = read_pose(item.pose)
    if pose is None:
        latent = options.get("frames") or pipeline.settings.frames
    else:
        latent = trajectory_frames(pose) if isinstance(pose, str) else len(pose[0])
    return pipeline.condition.pixel_frames(latent)


def chunks_of(pipeline: Pipeline, item: Item, options: dict[str, Any], **given: Any) -> Iterator[Tensor]:
    """The chunks of one item, with its files read; `given` are further arguments of `stream`."""
    settings = settings_of(pipeline, options)
    known: dict[str, Any] = {"pose": read_pose(item.pose)}
    if item.image is not None:
        known["image"] = read_image(item.image, settings.height, settings.width)
    if item.video is not None:
        stride = pipeline.condition.temporal_stride
        known["video"] = read_video(item.video, settings.height, settings.width, settings.fps, stride)
    return pipeline.stream(item.prompt, seed=item.seed, **known, **options, **given)


def settings_of(pipeline: Pipeline, options: dict[str, Any]) -> Settings:
    return pipeline.settings.override({name: value for name, value in options.items() if name != "frames"})


def generate_file(
    pipeline: Pipeline,
    item: Item,
    video: Path,
    wanted: dict[str, Any],
    *,
    on_chunk: Callable[[Tensor], None] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Generates one item, writes the mp4 as its chunks come and then the side-car, whose content is returned.

    on_chunk   is called with every chunk [1, F, 3, H, W] before it is written
    given      further arguments of `pipeline.stream`, such as on_step
    """
    options, device = wanted["options"], pipeline.backbone.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: list[tuple[float, float, int]] = []  # a chunk's arrival, the end of its writing, its frames
    started = time.perf_counter()

    def timed(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        for chunk in chunks:
            if chunk.is_cuda:
                torch.cuda.current_stream(chunk.device).synchronize()
            arrived = time.perf_counter()
            if on_chunk is not None:
                on_chunk(chunk)
            yield chunk
            times.append((arrived - started, time.perf_counter() - started, chunk.shape[1]))

    settings = settings_of(pipeline, options)
    chunks = timed(chunks_of(pipeline, item, options, **given))
    first = next(chunks)  # nothing is opened for a request that is refused
    frames = write_videos(chain([first], chunks), [video], settings.fps)
    record = {
        "request": wanted,
        "pipeline": type(pipeline).__name__,
        "settings": settings.as_dict(),
        "pixel_frames": frames,
        "chunks": len(times),
        "timings": _timings(times, time.perf_counter() - started),
        "peak_memory_gb": round(_peak_memory(device), 3),
        "device": str(device),
        "torch": torch.__version__,
        "bytes": video.stat().st_size,
    }
    with atomic_path(video.with_suffix(".json")) as file:
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _timings(times: list[tuple[float, float, int]], total: float) -> dict[str, float]:
    """Seconds to the first chunk, in all, and of them for showing and encoding; frames per second after the first chunk."""
    (first, _, opening), (last, _, _) = times[0], times[-1]
    frames = sum(count for _, _, count in times)
    rate = (frames - opening) / (last - first) if last > first else frames / total
    encoding = sum(done - arrived for arrived, done, _ in times)
    seconds = {"first_chunk_seconds": first, "seconds": total, "encode_seconds": encoding, "frames_per_second": rate}
    return {name: round(value, 3) for name, value in seconds.items()}


def _peak_memory(device: torch.device) -> float:
    """GB: of the device since the video was started, or of this process since it was on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
