"""Data sets that several processes wrote, each its own part, joined to one."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from dit_ops.files import atomic_folder
from dit_ops.training.data import read_index


def parts_folder(directory: Path) -> Path:
    """Where the parts of a data set grow, beside it."""
    return directory.with_name(f"{directory.name}.parts")


def join_parts(directory: Path, n: int) -> bool:
    """Makes `directory` of its n parts once all are finished; False: some are not, or another process is joining them.

    ValueError: the parts were made by different condition sides, or one id is in two of them.
    """
    folder = parts_folder(directory)
    parts = [folder / f"{i:05d}-of-{n:05d}" for i in range(n)]
    if not all((part / "index.jsonl").is_file() for part in parts):
        return False
    claimed = folder.with_name(f"{folder.name}.joining")
    try:
        os.rename(folder, claimed)  # only one process can
    except FileNotFoundError:
        return False
    try:
        join([claimed / part.name for part in parts], directory)
    except BaseException:
        os.rename(claimed, folder)
        raise
    shutil.rmtree(claimed)
    return True


def join(parts: list[Path], directory: Path) -> None:
    """A data set of the samples of finished data sets, in one atomic step. Shards are linked or copied, not rewritten."""
    metas = [(part / "dataset.json").read_text(encoding="utf-8") for part in parts]
    for part, meta in zip(parts, metas, strict=True):
        if meta != metas[0]:
            raise ValueError(f"{part} cannot be joined with {parts[0]}: their dataset.json differ")
    entries: list[dict[str, Any]] = []
    shards: list[Path] = []
    for part in parts:
        names: dict[str, str] = {}
        for entry in read_index(part / "index.jsonl"):
            if entry["shard"] not in names:
                names[entry["shard"]] = f"shard-{len(shards):05d}.safetensors"
                shards.append(part / entry["shard"])
            entries.append(entry | {"shard": names[entry["shard"]]})
    ids = [entry["id"] for entry in entries]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{directory}: id {next(id for id in ids if ids.count(id) > 1)!r} is in two parts")
    with atomic_folder(directory) as folder:
        for number, shard in enumerate(shards):
            _link(shard, folder / f"shard-{number:05d}.safetensors")
        for name in ("dataset.json", "negative.safetensors", "config.yaml"):
            if (parts[0] / name).is_file():
                _link(parts[0] / name, folder / name)
        if (parts[0] / "condition").is_dir():
            shutil.copytree(parts[0] / "condition", folder / "condition")
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in sorted(entries, key=lambda e: e["id"]))
        (folder / "index.jsonl").write_text(text, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
