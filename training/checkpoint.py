"""What a run leaves on disk: checkpoints that a kill cannot break, and the exported model directory.

A checkpoint is written under a hidden name, flushed to the disk and then renamed, so a checkpoint that can be seen is complete.
Rank 0 makes and renames folders; tensors are written by all ranks (torch.distributed.checkpoint).
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dit_ops.files import atomic_folder

PIPELINES = {
    "bidirectional": "BidirectionalPipeline",
    "teacher_forcing": "AutoregressivePipeline",
    "causal_ode": "FewStepPipeline",
    "consistency": "FewStepPipeline",
    "dmd": "FewStepPipeline",
}
META = "trainer.json"


def is_writer() -> bool:
    """Whether this process writes what is not sharded."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint in the folder, rising."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in names if match)


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
    """tensors: nested dicts of tensors; meta: JSON. Only the newest `keep` checkpoints stay."""
    target = checkpoint_path(folder, step)
    partial = folder / f".{target.name}.partial"
    if is_writer():
        clean_partial(folder)
        partial.mkdir(parents=True)
    barrier()
    with _quiet():
        dcp.save(tensors, checkpoint_id=partial, no_dist=not dist.is_initialized())
    if is_writer():
        (partial / META).write_text(json.dumps(meta))
        _fsync(partial / META)
        _fsync(partial)
        os.rename(partial, target)
        _fsync(folder)
        for old in checkpoint_steps(folder)[:-keep]:
            aside = folder / f".step-{old:06d}.old"
            os.rename(checkpoint_path(folder, old), aside)
            shutil.rmtree(aside)
    barrier()
    return target


def load_meta(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / META).read_text())


def load_checkpoint(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Fills the tensors in place; names and shapes must be those that were saved."""
    with _quiet():
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=not dist.is_initialized())


def clean_partial(folder: Path) -> None:
    """Removes what a killed save or removal left behind."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def export_model(directory: Path, backbone: Any, *, stage: str, sampler: dict[str, Any], condition: Path | None = None) -> Path:
    """Writes a model directory for the pipelines: model_index.json, transformer/ and, if given, condition/.

    sampler     what the pipeline's settings shall be by default
    condition   a small condition side is copied; a diffusers model directory, gigabytes of text encoder, is linked
    """
    if is_writer():
        with atomic_folder(directory) as folder:
            backbone.save_pretrained(folder / "transformer")
            index: dict[str, Any] = {"_class_name": PIPELINES[stage], "transformer": ["dit_ops", type(backbone).__name__]}
            if condition is not None and (condition / "condition.json").is_file():
                shutil.copytree(condition, folder / "condition")
                index["condition"] = ["dit_ops", json.loads((condition / "condition.json").read_text())["class"]]
            elif condition is not None:
                (folder / "condition").symlink_to(condition.resolve(strict=True), target_is_directory=True)
                index["condition"] = ["dit_ops", "WanCondition"]
            index |= {key: value for key, value in sampler.items() if value is not None}
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    barrier()
    return directory


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
