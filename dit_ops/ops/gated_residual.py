"""The residual sum of a DiT block, with the branch scaled by a gate."""

import torch
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.ops.adaln import check_rows, cpu_refuses, kernel_tables, split_rows


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x + gate * y, computed in fp32; differentiable in every tensor.

    x, y: [B, L, C]    gate: [B, C] or [B, F, C], F dividing L; None = 1    returns [B, L, C] in x's dtype
    """
    lib.check_tensor("gated_residual", "x", x, "B, L, C")
    lib.check_shape("gated_residual", "y", y, "B, L, C", tuple(x.shape))
    gate = check_rows("gated_residual", "gate", gate, x)
    backend = lib.choose("gated_residual", backend, REFUSES, x, y, gate)
    if backend == "reference" or gate is None:
        return gated_residual_ref(x, y, gate)
    return _gated_residual(x.contiguous(), y.contiguous(), *kernel_tables(backend, x, gate), backend)


def gated_residual_ref(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """gate: [B, F, C] or None."""
    if gate is None:
        return (x + y).to(x.dtype)  # PyTorch adds in fp32 and rounds once
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_rows, rows = split_rows(x.to(dtype), gate, gate.to(dtype))
    return torch.addcmul(x_rows, y.to(dtype).view(x_rows.shape), rows).flatten(1, 2).to(x.dtype)


NO_GATE = "gate is None: one addition needs no kernel"


def _triton_refuses(x: Tensor, y: Tensor, gate: Tensor | None) -> str | None:
    return NO_GATE if gate is None else lib.refuses("triton", x) or lib.refuses("triton", y)


def _cpu_refuses(x: Tensor, y: Tensor, gate: Tensor | None) -> str | None:
    return NO_GATE if gate is None else cpu_refuses(x, y)


REFUSES = {"triton": _triton_refuses, "cpu": _cpu_refuses}


def _fwd(x, y, gate, backend):
    if x.numel() == 0:
        return torch.empty_like(x)
    return lib.kernel(backend, "gated_residual", "gated_residual_fwd")(x, y, gate)


def _fwd_fake(x, y, gate, backend):
    return torch.empty_like(x)


def _bwd(dout, y, gate, backend):
    if y.numel() == 0:
        return torch.empty_like(y), gate.new_zeros(gate.shape, dtype=torch.float32)
    return lib.kernel(backend, "gated_residual", "gated_residual_bwd")(dout, y, gate)


def _bwd_fake(dout, y, gate, backend):
    return torch.empty_like(y), gate.new_empty(gate.shape, dtype=torch.float32)


_gated_residual = lib.define("gated_residual(Tensor x, Tensor y, Tensor gate, str backend) -> Tensor", _fwd, _fwd_fake)
_gated_residual_bwd = lib.define(
    "gated_residual_bwd(Tensor dout, Tensor y, Tensor gate, str backend) -> (Tensor dy, Tensor dgate)", _bwd, _bwd_fake
)


def _setup_context(ctx, inputs, output):
    _, y, gate, ctx.backend = inputs
    ctx.save_for_backward(y, gate)


def _backward(ctx, dout):
    y, gate = ctx.saved_tensors
    dy, dgate = _gated_residual_bwd(dout.contiguous(), y, gate, ctx.backend)
    return dout, dy, dgate.to(gate.dtype), None


lib.define_backward("gated_residual", _backward, _setup_context)
