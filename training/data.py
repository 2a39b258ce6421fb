"""Latent data sets: safetensors shards + index.jsonl, read by mmap, written so that a killed writer leaves no readable half.

index.jsonl            one object per sample: id, shard, prompt, frames (latent), height, width (pixels), fps, pose, [split]
shard-00000.safetensors  "<id>.latents" [F, Cz, h, w]  "<id>.text" [T, Dt]  "<id>.viewmats" [F, 4, 4]  "<id>.Ks" [F, 3, 3]
                       and for ODE data "<id>.trajectory" [S, F, Cz, h, w]
dataset.json           format version, fps, summary of the condition side
negative.safetensors   "text" [T, Dt], the unconditional prompt
condition/             the condition side that made it, where it is small
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_ops.draws import Draws
from dit_ops.files import atomic_path, read_safetensors

FORMAT = 1
TENSORS = ("latents", "text", "viewmats", "Ks", "trajectory")


class DatasetWriter:
    """Collects samples and writes them shard by shard; index.jsonl, without which nothing reads the folder, appears last.

    mode: "create" refuses a finished data set, "overwrite" replaces it, "resume" keeps its samples, finished or not
    shard_bytes: a shard is written when its samples reach this size; at most this much work is lost when the writer is killed
    dtype: of stored latents, text and trajectories (None: as given); cameras are fp32.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        fps: float,
        negative_text: Tensor,
        condition: Mapping[str, Any] | None = None,
        mode: Literal["create", "overwrite", "resume"] = "create",
        shard_bytes: int = 64 << 20,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in ("create", "overwrite", "resume"):
            raise ValueError(f"mode must be 'create', 'overwrite' or 'resume' but got {mode!r}")
        self.directory = Path(directory)
        self.fps, self.shard_bytes, self.dtype = fps, shard_bytes, dtype
        self._negative, self._mode = self._copy(negative_text, dtype), mode
        self._meta = {"format": FORMAT, "fps": fps, "condition": dict(condition or {})}
        self._entries: list[dict[str, Any]] = []
        self._pending: list[dict[str, Any]] = []
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._ids: set[str] = set()

    @property
    def done(self) -> set[str]:
        """Ids that are written or waiting for their shard."""
        return set(self._ids)

    @property
    def _index(self) -> Path:
        return self.directory / "index.jsonl"

    @property
    def _partial(self) -> Path:
        return self.directory / "index.jsonl.partial"

    def __enter__(self) -> "DatasetWriter":
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._mode == "create" and self._index.exists():
            raise FileExistsError(f"{self.directory} already holds a data set: mode 'resume' adds, 'overwrite' replaces")
        if self._mode == "resume":
            source = self._partial if self._partial.exists() else self._index
            if source.exists():
                self._check_same_meta()
                self._entries = read_index(source)
                self._ids = {entry["id"] for entry in self._entries}
        else:
            for old in (self._index, self._partial, *self.directory.glob("shard-*.safetensors")):
                old.unlink(missing_ok=True)
            shutil.rmtree(self.directory / "condition", ignore_errors=True)
        _write_text(self.directory / "dataset.json", json.dumps(self._meta, indent=2) + "\n")
        with atomic_path(self.directory / "negative.safetensors") as temporary:
            save_file({"text": self._negative}, temporary)
        return self

    def _check_same_meta(self) -> None:
        old = json.loads((self.directory / "dataset.json").read_text(encoding="utf-8"))
        for key, value in self._meta.items():
            if json.loads(json.dumps(value)) != old.get(key):
                raise ValueError(f"{self.directory} cannot be resumed: {key} was {old.get(key)!r} and is now {value!r}")

    @staticmethod
    def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """On the CPU and with memory of its own: safetensors refuses tensors that share memory."""
        return tensor.detach().to("cpu", dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)

    def add(
        self,
        id: str,
        *,
        latents: Tensor,
        text: Tensor,
        viewmats: Tensor,
        Ks: Tensor,
        prompt: str,
        pose: str,
        height: int,
        width: int,
        trajectory: Tensor | None = None,
        split: str | None = None,
    ) -> None:
        """Append one sample, shapes as above. ValueError: a known id, a wrong shape, or a value that is not finite."""
        if id in self._ids:
            raise ValueError(f"id {id!r} is already in {self.directory}")
        if latents.dim() != 4:
            raise ValueError(f"sample {id!r}: latents must have shape [F, Cz, h, w] but got {list(latents.shape)}")
        frames = latents.shape[0]
        expected = {"text": self._negative.shape, "viewmats": (frames, 4, 4), "Ks": (frames, 3, 3)}
        tensors = {"latents": latents, "text": text, "viewmats": viewmats, "Ks": Ks}
        if trajectory is not None:
            expected["trajectory"] = (*trajectory.shape[:1], *latents.shape)
            tensors["trajectory"] = trajectory
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise ValueError(f"sample {id!r}: {name} must have shape {list(shape)} but got {list(tensors[name].shape)}")
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"sample {id!r}: {name} must be finite but has NaN or infinite values")
        entry = {"id": id, "prompt": prompt, "frames": frames, "height": height, "width": width, "fps": self.fps, "pose": pose}
        for name, tensor in tensors.items():
            copy = self._copy(tensor, torch.float32 if name in ("viewmats", "Ks") else self.dtype)
            self._tensors[f"{id}.{name}"] = copy
            self._bytes += copy.nbytes
        self._pending.append(entry | ({"split": split} if split is not None else {}))
        self._ids.add(id)
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the waiting samples as one shard; after a kill, mode "resume" starts from here."""
        if not self._pending:
            return
        used = {entry["shard"] for entry in self._entries}
        shard = next(name for n in range(len(used) + 1) if (name := f"shard-{n:05d}.safetensors") not in used)
        with atomic_path(self.directory / shard) as temporary:
            save_file(self._tensors, temporary)
        self._entries += [{"id": entry["id"], "shard": shard} | entry for entry in self._pending]
        self._pending, self._tensors, self._bytes = [], {}, 0
        _write_index(self._partial, self._entries)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            return
        self.flush()
        if not self._entries:
            raise ValueError(f"{self.directory}: a data set must have at least one sample")
        _write_index(self._index, self._entries)
        self._partial.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_index(path: Path, entries: list[dict[str, Any]]) -> None:
    _write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def read_index(path: Path) -> list[dict[str, Any]]:
    """The samples of an index file. ValueError: a line that is not JSON or lacks a field."""
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        missing = [key for key in ("id", "shard", "prompt", "frames", "pose") if key not in entry]
        if missing:
            raise ValueError(f"{path} line {number} lacks {', '.join(missing)}")
        entries.append(entry)
    return entries


class LatentDataset:
    """Random access to a finished data set: [i] -> dict of latents, text, viewmats, Ks, [trajectory], prompt, pose, id.

    meta: the content of dataset.json; negative_text: [T, Dt]; condition_directory: where the condition side was saved, or None.
    FileNotFoundError: no finished data set, or a missing shard; ValueError: a damaged file, or a split without samples.
    """

    def __init__(self, directory: str | Path, split: str | None = None) -> None:
        self.directory = Path(directory)
        index = self.directory / "index.jsonl"
        if not index.is_file():
            stopped = (self.directory / "index.jsonl.partial").exists()
            hint = "its writer was stopped early; run it again to finish" if stopped else "no data set was written there"
            raise FileNotFoundError(f"{self.directory} has no index.jsonl: {hint}")
        self.meta = json.loads((self.directory / "dataset.json").read_text(encoding="utf-8"))
        if self.meta.get("format") != FORMAT:
            raise ValueError(f"{self.directory / 'dataset.json'}: format must be {FORMAT} but is {self.meta.get('format')!r}")
        entries = read_index(index)
        self.entries = [entry for entry in entries if split is None or entry.get("split") == split]
        if not self.entries:
            splits = sorted({str(entry.get("split")) for entry in entries})
            raise ValueError(f"{self.directory} has no sample of split {split!r}; its splits: {', '.join(splits)}")
        self.negative_text = read_safetensors(self.directory / "negative.safetensors")["text"]
        condition = self.directory / "condition"
        self.condition_directory = condition if condition.is_dir() else None
        self._shards: dict[str, Any] = {}
        for shard in sorted({entry["shard"] for entry in self.entries}):
            self._open(shard)

    def _open(self, shard: str) -> Any:
        if shard not in self._shards:
            path = self.directory / shard
            if not path.is_file():
                raise FileNotFoundError(f"{path} is named in index.jsonl but missing")
            try:
                self._shards[shard] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or not a safetensors file ({error}); write the data set again") from None
        return self._shards[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> dict[str, Any]:
        entry = self.entries[i]
        shard = self._open(entry["shard"])
        names = set(shard.keys())
        sample: dict[str, Any] = {key: entry[key] for key in ("id", "prompt", "pose")}
        for name in TENSORS:
            key = f"{entry['id']}.{name}"
            if key in names:
                sample[name] = shard.get_tensor(key)
            elif name != "trajectory":
                raise ValueError(f"{self.directory / entry['shard']} lacks {key!r}, which index.jsonl names")
        return sample


class BatchSampler:
    """Batches as a pure function of the step: each epoch is a fresh permutation cut into whole batches, the rest dropped."""

    def __init__(self, dataset_len: int, batch_size: int, seed: int) -> None:
        if not 0 < batch_size <= dataset_len:
            raise ValueError(f"batch_size must be between 1 and the {dataset_len} samples of the data set but got {batch_size}")
        self.dataset_len, self.batch_size, self.seed = dataset_len, batch_size, seed
        self.steps_per_epoch = dataset_len // batch_size
        self._epoch, self._order = -1, [0]

    def indices(self, step: int) -> list[int]:
        """The samples of batch `step`, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, Draws(self.seed, (epoch,)).permutation("sample order", self.dataset_len)
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples -> batch: tensors stacked on a new first axis, strings in lists. ValueError: shapes differ (all are named)."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in ("id", "prompt", "pose")}
    for name in TENSORS:
        tensors = [sample[name] for sample in samples if name in sample]
        if not tensors:
            continue
        shapes = {sample["id"]: list(sample[name].shape) if name in sample else None for sample in samples}
        if len({str(shape) for shape in shapes.values()}) > 1:
            raise ValueError(f"one batch needs equal shapes of {name} but got {shapes}")
        batch[name] = torch.stack(tensors)
    return batch
