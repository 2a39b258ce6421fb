"""Original checkpoints: the state dict in a file, without what wrappers and trainers put around it."""

import re
from pathlib import Path

from torch import Tensor

from dit_ops.files import read_weights

PREFIX = re.compile(r"^(model\.)?(_fsdp_wrapped_module\.)?")
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def original_state(weights: dict | str | Path, ema: bool | None) -> dict[str, Tensor]:
    """The one state dict to load from original weights or a training checkpoint of several, without wrappers' prefixes.

    ema: True takes `generator_ema`, False `generator`, None the EMA where the file has one.
    """
    state: dict = weights if isinstance(weights, dict) else read_weights(weights)
    if ema is True and "generator_ema" not in state:
        raise ValueError(f"ema=True, but the file has no 'generator_ema'; it has {sorted(state)[:5]}")
    for key in ("generator_ema",) * (ema is not False) + ("generator", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    return {WRAPPERS.sub("", PREFIX.sub("", name, count=1)): tensor for name, tensor in state.items()}
