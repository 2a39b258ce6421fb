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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dit_ops import conditions
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


def agreed(value: Any) -> Any:
    """Rank 0's value, on every rank: what ranks read from a shared file system may differ for a while."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint in the folder, rising."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in names if match)


@dataclass
class Save:
    """A checkpoint that is being written: `finish` it."""

    folder: Path
    step: int
    meta: dict[str, Any]
    keep: int
    written: Any = None  # a Future of the background thread

    @property
    def partial(self) -> Path:
        return self.folder / f".{checkpoint_path(self.folder, self.step).name}.partial"

    def finish(self) -> Path:
        """Waits for the tensors, then makes the checkpoint visible and removes those that are too many. Collective."""
        target, partial = checkpoint_path(self.folder, self.step), self.partial
        if self.written is not None:
            self.written.result()
        barrier()
        if is_writer():
            (partial / META).write_text(json.dumps(self.meta))
            _fsync(partial / META)
            _fsync(partial)
            os.rename(partial, target)
            _fsync(self.folder)
            for old in checkpoint_steps(self.folder)[: -self.keep]:
                aside = self.folder / f".step-{old:06d}.old"
                os.rename(checkpoint_path(self.folder, old), aside)
                shutil.rmtree(aside)
        barrier()
        return target


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
    """tensors: nested dicts of tensors; meta: JSON. Only the newest `keep` checkpoints stay."""
    save = _prepared(Save(folder, step, meta, keep))
    with _quiet():
        dcp.save(tensors, checkpoint_id=save.partial, no_dist=not dist.is_initialized())
    return save.finish()


def start_checkpoint(
    folder: Path, step: int, tensors: dict[str, Any], meta: dict[str, Any], keep: int, group: dist.ProcessGroup | None
) -> Save:
    """As save_checkpoint, but only copies the tensors to host memory; a thread writes them.

    group   a gloo group of its own: the thread's collectives must not meet those of the training
    """
    save = _prepared(Save(folder, step, meta, keep))
    with _quiet():
        save.written = dcp.async_save(
            tensors, checkpoint_id=save.partial, process_group=group, no_dist=not dist.is_initialized()
        )
    return save


def _prepared(save: Save) -> Save:
    if is_writer():
        clean_partial(save.folder)
        save.partial.mkdir(parents=True)
    barrier()
    return save


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
    """Writes a model directory for the pipelines: model_index.json, transformer/ and, if given, condition/. Collective.

    backbone    a plain module; only rank 0's is used
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
                index["condition"] = ["dit_ops", type(conditions.load(condition)).__name__]
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
