"""Backbones by the `_class_name` of a diffusers `config.json`, imported only when asked for."""

import importlib
import json
from pathlib import Path
from typing import Any

BACKBONES = {  # diffusers class: (module, our class)
    "WanTransformer3DModel": ("dit_ops.backbones.wan", "WanBackbone"),
    "HunyuanVideo15Transformer3DModel": ("dit_ops.backbones.hunyuan_video15", "HunyuanVideo15Backbone"),
}
# (diffusers class, in_channels): a model of that class that takes its conditions in another way
VARIANTS: dict[tuple[str, Any], tuple[str, str]] = {
    ("WanTransformer3DModel", 48): ("dit_ops.backbones.wan_ti2v", "WanTI2VBackbone"),
}
RECIPE = "docs/adding_a_backbone.md"


def backbone_class(name: str, config: dict[str, Any] | None = None) -> Any:
    """Our class for a diffusers transformer class and a config of it."""
    if name not in BACKBONES:
        raise ValueError(f"no backbone for {name!r}; known are {', '.join(BACKBONES)} ({RECIPE} says how to add one)")
    module, attribute = VARIANTS.get((name, (config or {}).get("in_channels")), BACKBONES[name])
    return getattr(importlib.import_module(module), attribute)


def load_backbone(path: str | Path, **options: Any) -> Any:
    """Loads a transformer folder, or the `transformer/` of a pipeline folder; options go to `from_pretrained`."""
    path = Path(path)
    folder = path if (path / "config.json").is_file() else path / "transformer"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model at {path}: expected config.json or transformer/config.json")
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'}: not a complete JSON file ({error})") from None
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{folder / 'config.json'}: expected '_class_name', the diffusers class, got {name!r}")
    return backbone_class(name, config).from_pretrained(folder, **options)
