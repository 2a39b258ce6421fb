"""Exponential moving average of a model's parameters."""

import torch
from torch import Tensor

from dit_ops import _library as lib


@torch.no_grad()
def ema_update_(shadow: list[Tensor], params: list[Tensor], decay: float, *, backend: str | None = None) -> None:
    """shadow <- decay * shadow + (1 - decay) * param, in place and in shadow's dtype; shadow is fp32, params of any dtype.

    DTensors, such as FSDP2's parameters, are updated shard by shard: shadow and param are placed alike, no rank communicates.
    """
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
        if placement(s) != placement(p):
            raise ValueError(f"{op}: shadow[{i}] must be placed as params[{i}], {placement(p)}, got {placement(s)}")
    shadow, params = [local(t) for t in shadow], [local(t) for t in params]
    backend = lib.choose(op, backend, REFUSES, shadow, params)
    if backend == "reference":
        ema_update_ref(shadow, params, decay)
    elif shadow:
        _ema_update(shadow, params, decay, backend)


def placement(tensor: Tensor) -> tuple | None:
    """Mesh and placements of a DTensor; None for a plain tensor."""
    mesh = getattr(tensor, "device_mesh", None)
    return None if mesh is None else (mesh, tensor.placements)  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if placement(tensor) is not None else tensor  # type: ignore[attr-defined]


def ema_update_ref(shadow: list[Tensor], params: list[Tensor], decay: float) -> None:
    same = [(s, p) for s, p in zip(shadow, params, strict=True) if s.dtype == p.dtype]
    if same:
        torch._foreach_lerp_([s for s, _ in same], [p for _, p in same], 1 - decay)
    for s, p in zip(shadow, params, strict=True):
        if s.dtype != p.dtype:
            s.lerp_(p.to(s.dtype), 1 - decay)


def _triton_refuses(shadow: list[Tensor], params: list[Tensor]) -> str | None:
    """The kernel reads addresses: every tensor is a plain, contiguous one on one device."""
    if not shadow:
        return lib.MISSING["triton"]
    for i, t in enumerate((*shadow, *params)):
        name = f"shadow[{i}]" if i < len(shadow) else f"params[{i - len(shadow)}]"
        refused = lib.refuses("triton", t)
        if refused:
            return f"{name}: {refused}"
        if type(t) not in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
            return f"{name} is a {type(t).__name__}"
        if not t.is_contiguous():
            return f"{name} is not contiguous"
        if t.device != shadow[0].device:
            return f"{name} is on {t.device}, shadow[0] on {shadow[0].device}"
    return None


REFUSES = {"triton": _triton_refuses}


def _update(shadow, params, decay, backend):
    lib.kernel(backend, "ema_update", "ema_update")(shadow, params, decay)


def _update_fake(shadow, params, decay, backend):
    return None


_ema_update = lib.define(
    "ema_update_(Tensor(a!)[] shadow, Tensor[] params, float decay, str backend) -> ()", _update, _update_fake
)
