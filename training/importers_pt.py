"""minWM's HunyuanVideo 1.5 data, one `.pt` file per sample and a JSON index, as a data set of ours. No pickled code is run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_ops.camera import align_to_first, intrinsics_matrix, quaternion_poses_to_viewmats
from dit_ops.conditions.arguments import image_condition
from dit_ops.files import read_weights
from dit_ops.training.data import DatasetWriter, LatentDataset
from dit_ops.training.preprocess import Progress

SPATIAL_STRIDE = 16  # of AutoencoderKLHunyuanVideo15
CONDITION = {  # name in the file: argument of the backbone's forward; all with a leading axis of 1
    "prompt_embeds": "encoder_hidden_states",
    "prompt_mask": "encoder_attention_mask",
    "byt5_text_states": "encoder_hidden_states_2",
    "byt5_text_mask": "encoder_attention_mask_2",
    "vision_states": "image_embeds",
}
NEGATIVE = {
    "negative_prompt_embeds": "encoder_hidden_states",
    "negative_prompt_mask": "encoder_attention_mask",
    "byt5_text_states": "encoder_hidden_states_2",
    "byt5_text_mask": "encoder_attention_mask_2",
}


def import_pt(
    index: str | Path,
    directory: str | Path,
    *,
    negative: str | Path,
    negative_byt5: str | Path,
    fps: float = 16,
    split: str | None = None,
    progress: Progress | None = None,
) -> LatentDataset:
    """index: train_index.json, a list of {"latent_path": …}, relative to it or absolute; negative…: the negatives."""
    index = Path(index)
    paths = read_index(index)
    both = read(negative, ("negative_prompt_embeds", "negative_prompt_mask"))
    both |= read(negative_byt5, ("byt5_text_states", "byt5_text_mask"))
    unconditional = named(both, NEGATIVE)
    summary = {"class": "HunyuanVideo15Condition", "spatial_stride": SPATIAL_STRIDE, "temporal_stride": 4}
    with DatasetWriter(directory, fps=fps, negative=unconditional, condition=summary, mode="resume") as writer:
        for done, path in enumerate(paths, 1):
            id = f"{done - 1:06d}-{path.stem}"
            if id not in writer.done:
                writer.add(id, **sample(path), split=split)
            if progress is not None:
                progress(done, len(paths))
    return LatentDataset(directory, split)


def read_index(path: Path) -> list[Path]:
    """Paths of the samples. ValueError: not such an index; FileNotFoundError: a file that it names is missing."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "latent_path" in e for e in entries) or not entries:
        raise ValueError(f'{path} must be a list of {{"latent_path": …}} with at least one entry')
    paths = [path.parent / entry["latent_path"] for entry in entries]
    for file in paths:
        if not file.is_file():
            raise FileNotFoundError(f"{path} names {file}, which does not exist")
    return paths


def read(path: str | Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """The dictionary in a file, read without running code. ValueError: it lacks a needed name."""
    content = read_weights(path)
    missing = [name for name in needed if name not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(content)[:12])}")
    return content


def named(content: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Our names, no leading axis of 1, masks as booleans."""
    found = {ours: content[theirs].squeeze(0) for theirs, ours in names.items() if theirs in content}
    return {name: value.bool() if "mask" in name else value for name, value in found.items()}


def sample(path: Path) -> dict[str, Any]:
    """DatasetWriter.add's arguments. Poses are quaternions, or viewmats and Ks in ODE data; they start at the identity."""
    content = read(path, ("latent", "prompt_embeds", "prompt_mask", "byt5_text_states", "byt5_text_mask"))
    latents = content["latent"].squeeze(0).transpose(0, 1)  # [1, Cz, F, h, w] → [F, Cz, h, w]
    if latents.dim() != 4:
        raise ValueError(f"{path}: latent must be [1, Cz, F, h, w] but is {list(content['latent'].shape)}")
    condition = named(content, CONDITION)
    if "image_cond" in content:
        condition["condition_latents"] = image_condition(content["image_cond"].transpose(1, 2), len(latents))[0]
    if "viewmats" in content:
        viewmats, Ks = (content[name].float().flatten(0, -3) for name in ("viewmats", "Ks"))
        viewmats = align_to_first(viewmats)
    elif "poses" in content and "intrinsics" in content:
        viewmats = align_to_first(quaternion_poses_to_viewmats(content["poses"].float().flatten(0, -2)))
        Ks = intrinsics_matrix(*content["intrinsics"].flatten().tolist()).expand(len(viewmats), 3, 3)
    else:
        raise ValueError(f"{path} lacks its cameras: poses and intrinsics, or viewmats and Ks")
    trajectory = content.get("ode_trajectory")
    if trajectory is not None:
        trajectory = trajectory.squeeze(0).transpose(1, 2)  # [1, S, Cz, F, h, w] → [S, F, Cz, h, w]
    return {
        "latents": latents,
        "trajectory": trajectory,
        "condition": condition,
        "viewmats": viewmats,
        "Ks": Ks,
        "prompt": str(content.get("prompt", content.get("video_id", path.stem))),
        "pose": "poses",
        "height": latents.shape[-2] * SPATIAL_STRIDE,
        "width": latents.shape[-1] * SPATIAL_STRIDE,
    }
