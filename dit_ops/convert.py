"""Checkpoints from one layout to another: original, diffusers (ours), training checkpoints, minWM's model.pt."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dit_ops.backbones.wan_original import rename
from dit_ops.files import atomic_path, read_weights
from dit_ops.registry import BACKBONES, backbone_class, load_backbone
from dit_ops.training.lora import add_lora, merge_lora

# (pattern of a diffusers name, original name): the inverse of wan_original.RENAMES
ORIGINAL: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"condition_embedder\.time_embedder\.linear_([12])\.", lambda m: f"time_embedding.{2 * int(m[1]) - 2}."),
    (r"condition_embedder\.time_proj\.", "time_projection.1."),
    (r"condition_embedder\.text_embedder\.linear_([12])\.", lambda m: f"text_embedding.{2 * int(m[1]) - 2}."),
    (r"condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"proj_out\.", "head.head."),
    (r"scale_shift_table$", "head.modulation"),
    (r"(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    (r"(blocks\.\d+)\.attn1\.to_out\.0\.", r"\1.self_attn.o."),
    (r"(blocks\.\d+)\.attn1\.to_([qkv])\.", r"\1.self_attn.\2."),
    (r"(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"(blocks\.\d+)\.attn2\.to_out\.0\.", r"\1.cross_attn.o."),
    (r"(blocks\.\d+)\.attn2\.to_([qkv])\.", r"\1.cross_attn.\2."),
    (r"(blocks\.\d+)\.attn2\.add_([kv])_proj\.", r"\1.cross_attn.\2_img."),
    (r"(blocks\.\d+)\.attn2\.norm_added_k\.", r"\1.cross_attn.norm_k_img."),
    (r"(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
]


def from_original(weights: Path, config_file: Path, **options: Any) -> Any:
    """A backbone of original weights; the original config tells which: Wan's has `dim`, HunyuanVideo 1.5's `hidden_size`."""
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_file} is not JSON: {error}") from None
    kinds = {"dim": "WanTransformer3DModel", "hidden_size": "HunyuanVideo15Transformer3DModel"}
    found = [name for key, name in kinds.items() if key in config]
    if len(found) != 1:
        raise ValueError(f"{config_file} must be the original config.json of Wan ('dim') or HunyuanVideo 1.5 ('hidden_size')")
    try:
        return backbone_class(found[0]).from_original(weights, config, **options)
    except RuntimeError as error:  # torch's word for a shape that differs
        raise ValueError(f"{weights} does not fit {config_file}: {error}") from None


def from_checkpoint(checkpoint: Path, role: str = "generator", *, ema: bool | None = None) -> Any:
    """The backbone of a role from a training checkpoint (`<run>/checkpoints/step-…`), however many ranks wrote it.

    ema: True its average, False its raw weights, None the average where there is one. ValueError: no such role.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    meta_file = checkpoint / "trainer.json"
    if not meta_file.is_file():
        raise FileNotFoundError(f"{checkpoint} is not a training checkpoint: it has no trainer.json")
    config = json.loads(meta_file.read_text(encoding="utf-8"))["config"]
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        dcp_to_torch_save(checkpoint, Path(folder) / "state.pt")
        state = read_weights(Path(folder) / "state.pt")
    averages = state.get("ema", {})
    if ema is True and role not in averages:
        raise ValueError(f"{checkpoint} has no average of {role!r}; it has {', '.join(averages) or 'none'}")
    models = averages if role in averages and ema is not False else state.get("model", {})
    if role not in models:
        raise ValueError(f"{checkpoint} has no role {role!r}; it has {', '.join(models)}")
    backbone = _empty(config, role, checkpoint)
    if config["model"].get("lora") is None:
        backbone.load_state_dict(models[role])
        return backbone
    add_lora(backbone, **config["model"]["lora"])  # the checkpoint holds what was trained, over the base that it started from
    if {name for name, p in backbone.named_parameters() if p.requires_grad} != models[role].keys():
        raise ValueError(f"{checkpoint}: the adapters do not fit the base that its config names")
    backbone.load_state_dict(models[role], strict=False)
    merge_lora(backbone)
    return backbone


def _empty(config: dict[str, Any], role: str, checkpoint: Path) -> Any:
    """The architecture that a run's config describes."""
    model, init = config["model"], config["init"].get(role)
    if init is not None:
        backbone = load_backbone(init)
    elif model.get("config"):
        torch.manual_seed(config["seed"])  # the weights that the run started from: under adapters they are still its base
        backbone = backbone_class(model["class_name"], model["config"]).from_config(model["config"])
    else:
        raise ValueError(f"{checkpoint}: its config has neither init.{role} nor model.config")
    if model.get("camera"):
        backbone.add_camera()
    if model.get("block_frames") is not None and role == "generator":
        backbone.block_frames = model["block_frames"]
    return backbone


def to_minwm(backbone: Any, path: Path) -> None:
    """Writes minWM's model.pt of a Wan backbone: {"generator": {"model.<original name>": tensor}}, camera branch included."""
    if type(backbone).__name__ != "WanBackbone":
        raise ValueError(
            f"model.pt can be written of {BACKBONES['WanTransformer3DModel'][1]} only, got {type(backbone).__name__}"
        )
    state = {f"model.{original(name)}": value for name, value in backbone.transformer.state_dict().items()}
    for name, value in (backbone.camera.state_dict() if backbone.camera is not None else {}).items():
        layer, _, rest = name.partition(".")
        state[f"model.blocks.{layer}.self_attn.prope_o.{rest}"] = value
    with atomic_path(path) as temporary:
        torch.save({"generator": {name: value.detach().cpu().contiguous() for name, value in state.items()}}, temporary)


def original(name: str) -> str:
    """The original Wan name of a diffusers name. ValueError: it has none."""
    candidate = name
    for pattern, replacement in ORIGINAL:
        if re.match(pattern, name):
            candidate = re.sub(pattern, replacement, name, count=1)
            break
    if rename(candidate) != name:
        raise ValueError(f"{name!r} has no name in the original Wan layout")
    return candidate
