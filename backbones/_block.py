"""Running one block of a transformer: through its own module hooks where it is a shard unit, and recomputed in backward
where asked for. A backbone calls the block's submodules itself, so nothing else would fire the hooks of FSDP2."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]
SAVED = ("dit_ops::attention", "aten::_scaled_dot_product", "aten::_cudnn_attention")  # what "selective" does not compute twice


class ShardUnit(nn.Module):
    """Mixed into a block's class: `block(function, *args)` is `function(*args)` between the block's forward hooks."""

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def make_shard_unit(block: nn.Module) -> None:
    """Changes the class of a block in place; its names, weights and place in the model stay."""
    cls = type(block)
    block.__class__ = type(cls.__name__, (ShardUnit, cls), {"__module__": cls.__module__})


def call_block(block: nn.Module, function: Callable[..., Any], *args: Any, recompute: Recompute | bool = False) -> Any:
    """`function(*args)`, which reads the weights of `block`.

    recompute   "full" (or True): backward runs the function again instead of storing what is inside; "selective": all of it
                but attention, whose output and log-sum-exp are stored
    The recomputation is inside the hooks: the weights are there when backward asks for it, and no hook runs twice.
    """
    if recompute not in (False, "none") and torch.is_grad_enabled():
        context: dict[str, Any] = {"context_fn": _selective} if recompute == "selective" else {}
        function = partial(checkpoint, function, use_reentrant=False, **context)
    return block(function, *args) if isinstance(block, ShardUnit) else function(*args)


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name().startswith(SAVED) else CheckpointPolicy.PREFER_RECOMPUTE
