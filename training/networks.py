"""The networks of a run: loaded by role, with adapters where a run trains those, and their averages."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_ops.registry import backbone_class, load_backbone
from dit_ops.training.lora import add_lora, merge_lora
from dit_ops.training.ranks import device_of

if TYPE_CHECKING:
    from dit_ops.training.config import RunConfig


def load_backbones(config: "RunConfig") -> dict[str, nn.Module]:
    """One fp32 model per role of config.init; a generator without one is made from config.model.config.

    What will be sharded stays in host memory: the device never holds a whole model.
    """
    model, device = config.model, device_of(config) if config.parallel.fsdp == "none" else torch.device("cpu")
    backbones: dict[str, Any] = {role: load_backbone(path, dtype=torch.float32) for role, path in config.init.items()}
    if "generator" not in backbones:
        if model.config is None:
            raise ValueError("the generator has no weights to start from: give init.generator or model.config")
        torch.manual_seed(config.seed)
        backbones["generator"] = backbone_class(model.class_name, model.config).from_config(model.config)
    if model.block_frames is not None:
        backbones["generator"].block_frames = model.block_frames
    for backbone in backbones.values():
        if model.camera:
            backbone.add_camera()
        for name, value in model.options.items():
            if name not in backbone.options or name == "block_frames":
                known = [option for option in backbone.options if option != "block_frames"]
                raise ValueError(f"model.options: {type(backbone).__name__} has the options {known}, got {name!r}")
            setattr(backbone, name, value)
        backbone.gradient_checkpointing = config.activation_checkpointing
        backbone.to(device)
    return backbones


def add_adapters(trained: dict[str, nn.Module], config: "RunConfig") -> None:
    """LoRA for the trained roles, where the run asks for it: the same on every rank."""
    lora = config.model.lora
    if lora is None:
        return
    for role in sorted(trained):
        torch.manual_seed(config.seed)
        add_lora(trained[role], lora.rank, lora.alpha, lora.targets)


def average(module: nn.Module, config: "RunConfig") -> nn.Module:
    """A copy for a moving average. What is frozen is shared, unless it will be sharded."""
    share = config.parallel.fsdp == "none"
    memo = {id(p): p for p in module.parameters() if share and not p.requires_grad}
    return copy.deepcopy(module, memo).requires_grad_(False).eval()


def merged(module: nn.Module) -> nn.Module:
    """A copy without adapters that computes the same."""
    plain = copy.deepcopy(module)
    merge_lora(plain)
    return plain
