"""Checkpoints from one layout to another: original, diffusers (ours), training checkpoints, minWM's model.pt."""

import importlib
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dit_ops.files import atomic_path, read_weights
from dit_ops.registry import BACKBONES, backbone_class, load_backbone
from dit_ops.training.lora import add_lora, merge_lora


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
    """Writes minWM's model.pt of a backbone: {"generator": {"model.<original name>": tensor}}, our branches included."""
    module = f"{type(backbone).__module__}_original"
    if find_spec(module) is None:
        known = ", ".join(name for _, name in BACKBONES.values())
        raise ValueError(f"model.pt can be written of {known}, got {type(backbone).__name__}")
    branches = {name: getattr(backbone, name).state_dict() for name in backbone.branches if getattr(backbone, name) is not None}
    state = importlib.import_module(module).to_original(backbone.transformer.state_dict(), branches)
    tensors = {f"model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(path) as temporary:
        torch.save({"generator": tensors}, temporary)
