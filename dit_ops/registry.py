"""Backbones by the `_class_name` of a diffusers `config.json`, imported only when asked for."""

import importlib
import json
from pathlib import Path
from typing import Any

BACKBONES = {"WanTransformer3DModel": ("dit_ops.backbones.wan", "WanBackbone")}  # diffusers class: (module, our class)


def backbone_class(name: str) -> Any:
    """Our class for a diffusers transformer class."""
    if name not in BACKBONES:
        raise ValueError(f"no backbone for {name!r}; known are {', '.join(BACKBONES)} (CONTRIBUTING.md says how to add one)")
    module, attribute = BACKBONES[name]
    return getattr(importlib.import_module(module), attribute)


def load_backbone(path: str | Path, **options: Any) -> Any:
    """Loads a transformer folder, or the `transformer/` of a pipeline folder; options go to `from_pretrained`."""
    path = Path(path)
    folder = path if (path / "config.json").is_file() else path / "transformer"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model at {path}: expected config.json or transformer/config.json")
    config = json.loads((folder / "config.json").read_text())
    return backbone_class(config.get("_class_name", "")).from_pretrained(folder, **options)
