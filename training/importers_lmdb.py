"""minWM's Wan data, an LMDB of latents, prompts and cameras, as a data set of ours (`pip install dit-ops[lmdb]`).

`<name>_shape` is the ASCII shape, samples first; `<name>_<i>_data` the raw bytes of sample i:
training data       latents f16 [F, Cz, h, w]      prompts UTF-8   intrinsics f32 [4]   poses f32 [F, 7] world-to-camera
ODE trajectories    latents f16 [S, F, Cz, h, w]   prompts UTF-8   viewmats f32 [F, 4, 4]   Ks f32 [F, 3, 3]
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_ops.camera import align_to_first, intrinsics_matrix, quaternion_poses_to_viewmats
from dit_ops.conditions import Condition
from dit_ops.conditions.arguments import per_sample
from dit_ops.training.data import DatasetWriter, LatentDataset
from dit_ops.training.preprocess import Progress

DTYPES = {"latents": np.float16, "intrinsics": np.float32, "poses": np.float32, "viewmats": np.float32, "Ks": np.float32}


def import_lmdb(
    source: str | Path,
    directory: str | Path,
    condition: Condition,
    *,
    fps: float = 16,
    negative_prompt: str = "",
    split: str | None = None,
    progress: Progress | None = None,
) -> LatentDataset:
    """One LMDB, or a folder of them (its shards, by name). Prompts are encoded here; poses start at the identity.

    The trajectories of ODE data are kept; their last state, the ground truth, is the sample's latents.
    """
    folders = shards(Path(source))
    negative = per_sample(condition.encode_text([negative_prompt]))[0]
    with DatasetWriter(directory, fps=fps, negative=negative, condition=condition.summary(), mode="resume") as writer:
        total = sum(_count(folder) for folder in folders)
        done = 0
        for folder in folders:
            for i, row in enumerate(rows(folder)):
                id = f"{folder.name}-{i:06d}"
                if id not in writer.done:
                    writer.add(id, **sample(row, condition), pose="poses", split=split)
                done += 1
                if progress is not None:
                    progress(done, total)
    return LatentDataset(directory, split)


def shards(source: Path) -> list[Path]:
    """The LMDB folders at `source`. FileNotFoundError: none."""
    if (source / "data.mdb").is_file():
        return [source]
    found = sorted(path.parent for path in source.glob("*/data.mdb"))
    if not found:
        raise FileNotFoundError(f"{source} must be an LMDB folder with data.mdb, or a folder of such folders, and is neither")
    return found


def sample(row: dict[str, Any], condition: Condition) -> dict[str, Any]:
    """DatasetWriter.add's arguments of one row: what it lacks is a ValueError."""
    states = row["latents"].float()
    camera: tuple[Tensor, Tensor]
    if "poses" in row:
        viewmats = align_to_first(quaternion_poses_to_viewmats(row["poses"]))
        camera = viewmats, intrinsics_matrix(*row["intrinsics"].tolist()).expand(len(viewmats), 3, 3)
    else:
        camera = align_to_first(row["viewmats"]), row["Ks"]
    stride = condition.spatial_stride
    return {
        "latents": states if states.dim() == 4 else states[-1],
        "trajectory": None if states.dim() == 4 else states,
        "condition": per_sample(condition.encode_text([row["prompts"]]))[0],
        "viewmats": camera[0],
        "Ks": camera[1],
        "prompt": row["prompts"],
        "height": states.shape[-2] * stride,
        "width": states.shape[-1] * stride,
    }


def _open(folder: Path) -> Any:
    try:
        import lmdb
    except ModuleNotFoundError:
        raise ValueError("reading an LMDB needs the package lmdb: pip install dit-ops[lmdb]") from None
    try:
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError(f"{folder} is not an LMDB that can be read ({error})") from None


def _shape(transaction: Any, folder: Path, name: str) -> list[int] | None:
    text = transaction.get(f"{name}_shape".encode())
    return None if text is None else [int(n) for n in bytes(text).decode().split()]


def _count(folder: Path) -> int:
    with _open(folder) as database, database.begin() as transaction:
        shape = _shape(transaction, folder, "latents")
    if not shape:
        raise ValueError(f"{folder} lacks 'latents_shape'")
    return shape[0]


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensors and the prompt of every sample. ValueError: a name or a sample is missing, or has another size than its shape."""
    with _open(folder) as database, database.begin() as transaction:
        shapes = {name: _shape(transaction, folder, name) for name in DTYPES}
        names = [name for name, shape in shapes.items() if shape]
        if not ({"latents", "poses", "intrinsics"} <= set(names) or {"latents", "viewmats", "Ks"} <= set(names)):
            raise ValueError(f"{folder} must have latents with poses and intrinsics, or with viewmats and Ks, but has {names}")
        for i in range((shapes["latents"] or [0])[0]):
            prompt = transaction.get(f"prompts_{i}_data".encode())
            if prompt is None:
                raise ValueError(f"{folder} lacks 'prompts_{i}_data'")
            row: dict[str, Any] = {"prompts": bytes(prompt).decode()}
            for name in names:
                row[name] = _tensor(transaction, folder, name, i, (shapes[name] or [])[1:])
            yield row


def _tensor(transaction: Any, folder: Path, name: str, i: int, shape: list[int]) -> Tensor:
    data = transaction.get(f"{name}_{i}_data".encode())
    if data is None:
        raise ValueError(f"{folder} lacks '{name}_{i}_data'")
    values = np.frombuffer(data, DTYPES[name]) if len(data) % np.dtype(DTYPES[name]).itemsize == 0 else np.empty(0)
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{folder}: '{name}_{i}_data' must be {shape} of {np.dtype(DTYPES[name])} but has {len(data)} bytes")
    return torch.from_numpy(values.reshape(shape).copy())
