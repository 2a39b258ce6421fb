"""Speed for stock diffusers models: their blocks run through our operators, inside their own pipelines."""

import importlib
from collections.abc import Iterator
from typing import Any

from torch import nn

FUSED = ("dit_ops.backbones.wan_fused",)  # BLOCKS and PARTS {stock class: ours}, register_cache_hooks()


def fuse(model: nn.Module) -> nn.Module:
    """Runs a stock diffusers transformer through our operators, in place, and returns it; `unfuse` undoes it.

    Parameters, names, config and arguments stay, so the pipeline, LoRA, gradient checkpointing, compile_repeated_blocks, FSDP
    and save_pretrained go on working. Call it after loading and before what wraps the blocks: cache hooks, fully_shard.
    Hooks on the norms of a block no longer run, so layers cannot be offloaded one by one; blocks and models can.
    """
    for backbone in _backbones():
        backbone.register_cache_hooks()
    return _swap("fuse", model, forth=True)


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every part of a fused model its stock class back, in place, and returns the model."""
    return _swap("unfuse", model, forth=False)


def _backbones() -> list[Any]:
    return [importlib.import_module(name) for name in FUSED]


def _swap(op: str, model: nn.Module, *, forth: bool) -> nn.Module:
    blocks = {stock: ours for backbone in _backbones() for stock, ours in backbone.BLOCKS.items()}
    pairs = blocks | {stock: ours for backbone in _backbones() for stock, ours in backbone.PARTS.items()}
    _check(op, model, blocks, pairs)
    new = pairs if forth else {ours: stock for stock, ours in pairs.items()}
    for part in _parts(model):
        if type(part) in new:
            vars(part).pop("forward", None)  # a removed hook leaves the bound method there
            part.__class__ = new[type(part)]
    return model


def _parts(model: nn.Module) -> Iterator[Any]:
    """The modules and their attention processors."""
    for module in model.modules():
        yield module
        if getattr(module, "processor", None) is not None:
            yield module.processor


def _check(op: str, model: nn.Module, blocks: dict[type, type], pairs: dict[type, type]) -> None:
    """Refuses everything that would be left half done."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)] if isinstance(model, nn.Module) else []
    found = [block for blocks_of_one in lists for block in blocks_of_one]
    foreign = {type(block) for block in found} - blocks.keys() - set(blocks.values())
    if foreign or not found:
        got = f"blocks of {', '.join(sorted(map(_path, foreign)))}" if found else "no list of blocks"
        raise ValueError(f"{op}: model must consist of {', '.join(map(_path, blocks))}, got {_path(type(model))} with {got}")
    known = pairs.keys() | set(pairs.values())
    for part in _parts(model):
        if not isinstance(part, nn.Module) and type(part) not in known:
            names = ", ".join(_path(c) for c in pairs.keys() - blocks.keys() if not issubclass(c, nn.Module))
            raise ValueError(f"{op}: attention processors must be {names}, got {_path(type(part))}")
        own = vars(part).get("forward") if type(part) in known else None
        if own is not None and getattr(own, "__func__", None) is not type(part).forward:
            raise ValueError(
                f"{op}: hooks replaced the forward of {_path(type(part))}: {op} before adding or after removing them"
            )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
