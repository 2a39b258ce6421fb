"""Speed for stock diffusers models: their blocks run through our operators, inside their own pipelines."""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

# the stock block: our module with BLOCKS and PARTS {stock class: ours} and register_cache_hooks(), imported when needed
FUSED = {
    "diffusers.models.transformers.transformer_wan.WanTransformerBlock": "dit_ops.backbones.wan_fused",
    "diffusers.models.transformers.transformer_hunyuan_video15.HunyuanVideo15TransformerBlock": (
        "dit_ops.backbones.hunyuan_video15_fused"
    ),
}


def fuse(model: nn.Module) -> nn.Module:
    """Runs a stock diffusers transformer through our operators, in place, and returns it; `unfuse` undoes it.

    Parameters, names, config and arguments stay, so the pipeline, LoRA, gradient checkpointing, compile_repeated_blocks, FSDP
    and save_pretrained go on working. Call it after loading and before what wraps the blocks: cache hooks, fully_shard.
    Hooks on the norms of a block no longer run, so layers cannot be offloaded one by one; blocks and models can.
    """
    _backbone("fuse", model).register_cache_hooks()
    return _swap("fuse", model, forth=True)


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every part of a fused model its stock class back, in place, and returns the model."""
    return _swap("unfuse", model, forth=False)


def _backbone(op: str, model: nn.Module) -> Any:
    """Our module for the model's blocks. Only those whose stock module is loaded come into question."""
    found = {type(block) for block in _blocks(model)}
    loaded = [importlib.import_module(ours) for block, ours in FUSED.items() if block.rpartition(".")[0] in sys.modules]
    for backbone in loaded:
        if found and found <= backbone.BLOCKS.keys() | set(backbone.BLOCKS.values()):
            return backbone
    known = {cls for backbone in loaded for cls in (*backbone.BLOCKS, *backbone.BLOCKS.values())}
    got = f"blocks of {', '.join(sorted(map(_path, found - known or found)))}" if found else "no list of blocks"
    raise ValueError(f"{op}: model must consist of {' or '.join(FUSED)}, got {_path(type(model))} with {got}")


def _swap(op: str, model: nn.Module, *, forth: bool) -> nn.Module:
    backbone = _backbone(op, model)
    pairs = backbone.BLOCKS | backbone.PARTS
    _check(op, model, pairs)
    new = pairs if forth else {ours: stock for stock, ours in pairs.items()}
    for part in _parts(model):
        if type(part) in new:
            vars(part).pop("forward", None)  # a removed hook leaves the bound method there
            part.__class__ = new[type(part)]
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)] if isinstance(model, nn.Module) else []
    return [block for blocks_of_one in lists for block in blocks_of_one]


def _parts(model: nn.Module) -> Iterator[Any]:
    """The modules and their attention processors."""
    for module in model.modules():
        yield module
        if getattr(module, "processor", None) is not None:
            yield module.processor


def _check(op: str, model: nn.Module, pairs: dict[type, type]) -> None:
    """Refuses everything that would be left half done."""
    known = pairs.keys() | set(pairs.values())
    for part in (part for block in _blocks(model) for part in _parts(block)):
        if not isinstance(part, nn.Module) and type(part) not in known:
            names = ", ".join(_path(stock) for stock in pairs if not issubclass(stock, nn.Module))
            raise ValueError(f"{op}: attention processors must be {names}, got {_path(type(part))}")
    for part in _parts(model):
        own = vars(part).get("forward") if type(part) in known else None
        if own is not None and getattr(own, "__func__", None) is not type(part).forward:
            raise ValueError(
                f"{op}: hooks replaced the forward of {_path(type(part))}: {op} before adding or after removing them"
            )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
