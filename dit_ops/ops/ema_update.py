"""Exponential moving average of a model's parameters."""

import torch
from torch import Tensor

from dit_ops import _library as lib


@torch.no_grad()
def ema_update_(shadow: list[Tensor], params: list[Tensor], decay: float, *, backend: str | None = None) -> None:
    """shadow <- decay * shadow + (1 - decay) * param, in place and in shadow's dtype; shadow is fp32, params of any dtype."""
    op = "ema_update_"
    if not 0 <= decay <= 1:
        raise ValueError(f"{op}: decay must be in [0, 1], got {decay}")
    if len(shadow) != len(params):
        raise ValueError(f"{op}: shadow must have as many tensors as params, {len(params)}, got {len(shadow)}")
    for i, (s, p) in enumerate(zip(shadow, params, strict=True)):
        if s.shape != p.shape:
            raise ValueError(f"{op}: shadow[{i}] must be shaped as params[{i}] = {list(p.shape)}, got {list(s.shape)}")
        if s.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: shadow[{i}] must be fp32 (a bf16 shadow loses every small update), got {s.dtype}")
    lib.choose(op, backend, {}, *shadow[:1])
    same = [(s, p) for s, p in zip(shadow, params, strict=True) if s.dtype == p.dtype]
    if same:
        torch._foreach_lerp_([s for s, _ in same], [p for _, p in same], 1 - decay)
    for s, p in zip(shadow, params, strict=True):
        if s.dtype != p.dtype:
            s.lerp_(p.to(s.dtype), 1 - decay)
