"""LoRA (arXiv 2106.09685) through PEFT on the diffusers transformer inside a backbone: train, export, merge.

`W·x → W·x + (alpha / rank)·B·A·x`; B starts at zero. The layout on disk is the one that diffusers' load_lora_adapter reads.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dit_ops.files import atomic_path, read_safetensors

TARGETS = {  # linear layers of a transformer block, by the names of diffusers
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "ffn": ("net.0.proj", "net.2"),
}
FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


def add_lora(backbone: Any, rank: int, alpha: int | None = None, targets: Sequence[str] = ("attention", "ffn")) -> None:
    """Adds adapters to the blocks' layers and freezes the transformer; our own branches (camera, action) stay trainable.

    alpha: None = rank. targets: groups of TARGETS. ValueError: an unknown group, or a backbone that has adapters.
    """
    from peft import LoraConfig

    check_lora(rank, targets)
    check_resident(backbone)
    if has_lora(backbone):
        raise ValueError("lora: this backbone has adapters: merge them first")
    names = "|".join(name.replace(".", r"\.") for target in targets for name in TARGETS[target])
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=rf"(transformer_)?blocks\.\d+\.(.+\.)?({names})")
    backbone.transformer.add_adapter(config, ADAPTER)
    set_trainable(backbone, True)


def check_lora(rank: int, targets: Sequence[str]) -> None:
    if rank < 1:
        raise ValueError(f"lora: rank must be at least 1, got {rank}")
    if not targets or any(target not in TARGETS for target in targets):
        raise ValueError(f"lora: targets must be some of {', '.join(TARGETS)}, got {list(targets)}")


def check_resident(backbone: Any) -> None:
    """PEFT writes weights where nothing sees it: a copy of them on the GPU would stay as it is."""
    if getattr(backbone, "offloaded", False):
        raise ValueError("lora: adapters are added and merged before offload_blocks, got an offloaded backbone")


def has_lora(backbone: Any) -> bool:
    return bool(getattr(getattr(backbone, "transformer", None), "peft_config", None))


def set_trainable(backbone: Any, trained: bool) -> None:
    """requires_grad of all parameters; where there are adapters, not of the transformer's own."""
    backbone.requires_grad_(trained)
    if has_lora(backbone):
        for name, parameter in backbone.transformer.named_parameters():
            parameter.requires_grad_(trained and ".lora_" in name)


def save_lora(backbone: Any, directory: str | Path) -> Path:
    """Writes the adapters; `pipeline.load_lora_weights(directory)` or `transformer.load_lora_adapter(directory)` reads them."""
    from peft import get_peft_model_state_dict

    if not has_lora(backbone):
        raise ValueError("lora: this backbone has no adapters to save")
    config = backbone.transformer.peft_config[ADAPTER].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in plain.items()})}
    state = get_peft_model_state_dict(backbone.transformer, adapter_name=ADAPTER)
    path = Path(directory) / FILE
    with atomic_path(path) as temporary:
        save_file(
            {f"transformer.{name}": value.detach().cpu().contiguous() for name, value in state.items()}, temporary, metadata
        )
    return path


def load_lora(backbone: Any, directory: str | Path) -> None:
    """Reads what save_lora, or diffusers, wrote. ValueError: a damaged file, or adapters of another model."""
    check_resident(backbone)
    path = Path(directory) / FILE if Path(directory).is_dir() else Path(directory)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected LoRA weights")
    names = {name for name, _ in backbone.transformer.named_modules()}
    for name in read_safetensors(path):
        layer = name.removeprefix("transformer.").partition(".lora_")[0]
        if layer not in names:
            raise ValueError(f"{path} has an adapter for {layer!r}, a layer that this model does not have")
    backbone.transformer.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="transformer", adapter_name=ADAPTER)
    set_trainable(backbone, True)


@torch.no_grad()
def merge_lora(backbone: Any) -> None:
    """Adds every adapter's `(alpha / rank)·B·A` to its weight and removes it: the same function, and a stock state dict."""
    check_resident(backbone)
    if not has_lora(backbone):
        raise ValueError("lora: this backbone has no adapters to merge")
    backbone.transformer.fuse_lora()
    backbone.transformer.unload_lora()
    set_trainable(backbone, True)
