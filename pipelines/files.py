"""Requests to files: one mp4 and a JSON side-car per item, under names that are safe and unique; finished items are skipped."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_ops.camera import trajectory_from_json
from dit_ops.files import atomic_path
from dit_ops.pipelines.base import Pipeline
from dit_ops.pipelines.stages import Cameras, write_videos


@dataclass(frozen=True)
class Item:
    """One video that is wanted; pose is a pose string or the path of a pose JSON file, image that of a known first frame."""

    prompt: str
    pose: str | None = None
    seed: int = 0
    image: str | None = None


def read_items(path: str | Path, pose: str | None = None, seed: int = 0, image: str | None = None) -> list[Item]:
    """A JSONL file of {"prompt": …, "pose": …, "seed": …, "image": …}; all but the prompt default to what is given here."""
    items = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f"{path}, line {number}: expected an object with a prompt, got {line[:80]}")
        if unknown := entry.keys() - {"prompt", "pose", "seed", "image"}:
            raise ValueError(f"{path}, line {number}: unknown keys {sorted(unknown)}; known: prompt, pose, seed, image")
        items.append(Item(entry["prompt"], entry.get("pose", pose), entry.get("seed", seed), entry.get("image", image)))
    if not items:
        raise ValueError(f"{path} holds no prompts")
    return items


def fingerprint(model: str | Path, mode: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Names a model directory and how it is run, so that a model trained again counts as another one."""
    weights = sorted(path for path in Path(model, "transformer").glob("*") if path.is_file())
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    return {"path": str(model), "weights": digest, "mode": mode, "dtype": dtype}


def request(item: Item, model: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Everything that determines the video: the item, the model and the sampler options that were given."""
    wanted = {name: value for name, value in asdict(item).items() if name != "image" or value is not None}
    return {**wanted, "model": model, "options": {k: v for k, v in options.items() if v is not None}}


def file_stem(wanted: dict[str, Any]) -> str:
    """`a-red-room_w-4-l-3_seed0_1a2b3c4d`: readable words, then a hash of the whole request, which keeps names apart.

    Only the model's weights are not in the hash: a model that was trained further overwrites its own earlier video.
    """
    words = [_slug(wanted["prompt"], 48), _slug(wanted["pose"] or "", 32), f"seed{wanted['seed']}"]
    named = wanted | {"model": {key: value for key, value in wanted["model"].items() if key != "weights"}}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
    return "_".join([word for word in words if word] + [digest])


def _slug(text: str, length: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:length].strip("-")


def is_finished(video: Path, wanted: dict[str, Any]) -> bool:
    """Whether video and side-car are there and were made for this very request; the side-car is written last."""
    sidecar = video.with_suffix(".json")
    return video.is_file() and sidecar.is_file() and json.loads(sidecar.read_text(encoding="utf-8")).get("request") == wanted


def generate_file(
    pipeline: Pipeline, item: Item, video: Path, wanted: dict[str, Any], *, on_step: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Generates one item, writes the mp4 as its chunks come and then the side-car, whose content is returned."""
    started = time.perf_counter()
    first: list[float] = []

    def timed(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        for chunk in chunks:
            if chunk.is_cuda:
                torch.cuda.synchronize(chunk.device)
            first.append(time.perf_counter() - started)
            yield chunk

    options = wanted["options"]
    settings = pipeline.settings.override({k: v for k, v in options.items() if k != "frames"})
    image = None if item.image is None else read_image(item.image, settings.height, settings.width)
    given: dict[str, Any] = {"pose": read_pose(item.pose), "image": image, "seed": item.seed}
    chunks = pipeline.stream(item.prompt, **given, on_step=on_step, **options)
    frames = write_videos(timed(chunks), [video], settings.fps)
    record = {
        "request": wanted,
        "pipeline": type(pipeline).__name__,
        "settings": settings.as_dict(),
        "pixel_frames": frames,
        "chunks": len(first),
        "first_chunk_seconds": round(first[0], 3),
        "seconds": round(time.perf_counter() - started, 3),
        "device": str(pipeline.backbone.device),
        "torch": torch.__version__,
    }
    with atomic_path(video.with_suffix(".json")) as file:
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def read_pose(pose: str | None) -> str | Cameras | None:
    """A pose string as it is; the trajectory of a `.json` file."""
    return trajectory_from_json(pose) if pose is not None and pose.endswith(".json") else pose


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """A picture scaled to cover height × width and cropped at the centre → [3, H, W] in [−1, 1]."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            picture = ImageOps.fit(file.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that can be read") from None
    levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return levels.permute(2, 0, 1) / 127.5 - 1


def output_paths(output: Path, wanted: Sequence[dict[str, Any]]) -> list[Path]:
    """One path per request: `output` itself if it names an mp4 file (of a single request), else a file in that folder."""
    if output.suffix != ".mp4":
        return [output / f"{file_stem(w)}.mp4" for w in wanted]
    if len(wanted) != 1:
        raise ValueError(f"output must be a folder for {len(wanted)} videos, got the file name {output}")
    return [output]
