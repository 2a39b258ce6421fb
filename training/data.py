"""Latent data sets: safetensors shards + index.jsonl, read by mmap, written so that a killed writer leaves no readable half.

index.jsonl            one object per sample: id, shard, prompt, frames (latent), height, width (pixels), fps, pose, [split]
shard-00000.safetensors  "<id>.latents" [F, Cz, h, w]  "<id>.condition.<name>"  ["<id>.viewmats" [F, 4, 4]  "<id>.Ks" [F, 3, 3]]
                       and for ODE data "<id>.trajectory" [S, F, Cz, h, w]
dataset.json           format version, fps, summary of the condition side
negative.safetensors   "<name>", the unconditional prompt
condition/             the condition side that made it, where it is small

A condition's names are keyword arguments of the backbone's forward. Format 1 had one, encoder_hidden_states, as "text".
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

from dit_ops.files import atomic_path, read_safetensors

FORMAT = 2
TENSORS = ("latents", "viewmats", "Ks", "trajectory")
CAMERA = ("viewmats", "Ks")


class DatasetWriter:
    """Collects samples and writes them shard by shard; index.jsonl, without which nothing reads the folder, appears last.

    mode: "create" refuses a finished data set, "overwrite" replaces it, "resume" keeps its samples, finished or not
    shard_bytes: a shard is written when its samples reach this size; at most this much work is lost when the writer is killed
    dtype: of stored latents, trajectories and floating conditions (None: as given); cameras are fp32.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        fps: float,
        negative: Mapping[str, Tensor],
        condition: Mapping[str, Any] | None = None,
        mode: Literal["create", "overwrite", "resume"] = "create",
        shard_bytes: int = 64 << 20,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in ("create", "overwrite", "resume"):
            raise ValueError(f"mode must be 'create', 'overwrite' or 'resume' but got {mode!r}")
        self.directory = Path(directory)
        self.fps, self.shard_bytes, self.dtype = fps, shard_bytes, dtype
        self._negative, self._mode = {name: self._copy(value, dtype) for name, value in negative.items()}, mode
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
            save_file(self._negative, temporary)
        return self

    def _check_same_meta(self) -> None:
        old = json.loads((self.directory / "dataset.json").read_text(encoding="utf-8"))
        for key, value in self._meta.items():
            if json.loads(json.dumps(value)) != old.get(key):
                raise ValueError(f"{self.directory} cannot be resumed: {key} was {old.get(key)!r} and is now {value!r}")

    @staticmethod
    def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """On the CPU and with memory of its own: safetensors refuses tensors that share memory."""
        dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)

    def add(
        self,
        id: str,
        *,
        latents: Tensor,
        condition: Mapping[str, Tensor],
        prompt: str,
        pose: str,
        height: int,
        width: int,
        viewmats: Tensor | None = None,
        Ks: Tensor | None = None,
        trajectory: Tensor | None = None,
        split: str | None = None,
    ) -> None:
        """Append one sample, shapes as above; what `negative` has too must have its shape.

        ValueError: a known id, a wrong name or shape, or a value that is not finite.
        """
        if id in self._ids:
            raise ValueError(f"id {id!r} is already in {self.directory}")
        if latents.dim() != 4:
            raise ValueError(f"sample {id!r}: latents must have shape [F, Cz, h, w] but got {list(latents.shape)}")
        frames = latents.shape[0]
        if missing := sorted(self._negative.keys() - condition.keys()):
            raise ValueError(
                f"sample {id!r}: condition must have {', '.join(missing)} as the negative but has {sorted(condition)}"
            )
        expected = {f"condition.{name}": value.shape for name, value in self._negative.items()}
        tensors = {"latents": latents} | {f"condition.{name}": value for name, value in condition.items()}
        for name, tensor, shape in (
            ("viewmats", viewmats, (frames, 4, 4)),
            ("Ks", Ks, (frames, 3, 3)),
            ("trajectory", trajectory, None if trajectory is None else (*trajectory.shape[:1], *latents.shape)),
        ):
            if tensor is not None and shape is not None:
                tensors[name], expected[name] = tensor, torch.Size(shape)
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise ValueError(f"sample {id!r}: {name} must have shape {list(shape)} but got {list(tensors[name].shape)}")
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"sample {id!r}: {name} must be finite but has NaN or infinite values")
        entry = {"id": id, "prompt": prompt, "frames": frames, "height": height, "width": width, "fps": self.fps, "pose": pose}
        for name, tensor in tensors.items():
            copy = self._copy(tensor, torch.float32 if name in CAMERA else self.dtype)
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
    """Random access to a finished data set: [i] -> dict of latents, condition, [viewmats, Ks, trajectory], prompt, pose, id.

    meta: the content of dataset.json; negative: the unconditional prompt's condition, without a batch axis
    condition_directory: where the condition side was saved, or None
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
        if self.meta.get("format") not in (1, FORMAT):
            raise ValueError(
                f"{self.directory / 'dataset.json'}: format must be 1 or {FORMAT} but is {self.meta.get('format')!r}"
            )
        entries = read_index(index)
        self.entries = [entry for entry in entries if split is None or entry.get("split") == split]
        if not self.entries:
            splits = sorted({str(entry.get("split")) for entry in entries})
            raise ValueError(f"{self.directory} has no sample of split {split!r}; its splits: {', '.join(splits)}")
        negative = read_safetensors(self.directory / "negative.safetensors")
        self.negative = {_condition_name(name): value for name, value in negative.items()}
        condition = self.directory / "condition"
        self.condition_directory = condition if condition.is_dir() else None
        self._shards: dict[str, Any] = {}
        self._contents: dict[str, dict[str, list[str]]] = {}
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
        prefix = f"{entry['id']}."
        sample: dict[str, Any] = {key: entry[key] for key in ("id", "prompt", "pose")} | {"condition": {}}
        for name in self._names(entry["shard"]).get(entry["id"], ()):
            tensor = shard.get_tensor(prefix + name)
            if name in TENSORS:
                sample[name] = tensor
            else:
                sample["condition"][_condition_name(name.removeprefix("condition."))] = tensor
        wanted = ["latents", *(CAMERA if sample.keys() & set(CAMERA) else ())]
        lacking = [name for name in wanted if name not in sample]
        lacking += [f"condition.{name}" for name in self.negative if name not in sample["condition"]]
        if lacking:
            raise ValueError(f"{self.directory / entry['shard']} lacks {prefix + lacking[0]!r}, which index.jsonl names")
        return sample

    @property
    def intrinsics(self) -> tuple[float, ...] | None:
        """fx/W, fy/H, cx/W, cy/H of the first frame; None in data without cameras."""
        K = self[0].get("Ks")
        return None if K is None else tuple(round(float(K[0, i, j]), 7) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))

    def _names(self, shard: str) -> dict[str, list[str]]:
        """Sample id -> names of its tensors. Names have no dot besides that of "condition.<name>", ids may have some."""
        if shard not in self._contents:
            contents: dict[str, list[str]] = {}
            for key in list(self._open(shard).keys()):
                id, dot, name = key.rpartition(".condition.")
                id, name = (id, f"condition.{name}") if dot else (key.rpartition(".")[0], key.rpartition(".")[2])
                contents.setdefault(id, []).append(name)
            self._contents[shard] = contents
        return self._contents[shard]


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples -> batch: tensors stacked on a new first axis, strings in lists. ValueError: shapes differ (all are named)."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in ("id", "prompt", "pose")}
    ids = batch["id"]
    for name in TENSORS:
        _stack(batch, name, [sample.get(name) for sample in samples], ids)
    conditions = [sample.get("condition", {}) for sample in samples]
    batch["condition"] = {}
    for name in sorted(set().union(*conditions)):
        _stack(batch["condition"], name, [condition.get(name) for condition in conditions], ids)
    return batch


def _stack(batch: dict[str, Any], name: str, tensors: list[Tensor | None], ids: list[str]) -> None:
    shapes = {id: None if tensor is None else list(tensor.shape) for id, tensor in zip(ids, tensors, strict=True)}
    if len({str(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"one batch needs equal shapes of {name} but got {shapes}")
    given = [tensor for tensor in tensors if tensor is not None]
    if given:
        batch[name] = torch.stack(given)


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors, also those inside its dictionaries, on a device; the rest as it is."""
    moved: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Mapping):
            moved[key] = to_device(value, device)
        else:
            moved[key] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
    return moved


def _condition_name(name: str) -> str:
    return "encoder_hidden_states" if name == "text" else name
