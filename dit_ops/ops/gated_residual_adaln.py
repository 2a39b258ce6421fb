"""The seam between two branches of a DiT block: residual sum, then the next branch's modulated norm."""

import torch
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.ops.adaln import (
    adaln_ref,
    check_norm,
    check_rows,
    cpu_refuses,
    cuda_refuses,
    gpu_refuses,
    kernel_tables,
    rows_refuse,
    table_gradients,
)
from dit_ops.ops.gated_residual import gated_residual_ref


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate * y; h = (norm(x') * weight + bias) * (1 + scale) + shift: gated_residual, then adaln of its result.

    x, y: [B, L, C]    gate, scale, shift: [B, C] or [B, F, C], F dividing L    weight, bias: [C]
    returns (x', h), each [B, L, C] in x's dtype; differentiable in every tensor
    """
    op = "gated_residual_adaln"
    check_norm(op, x, norm, weight, bias)
    lib.check_shape(op, "y", y, "B, L, C", tuple(x.shape))
    gate, scale, shift = (check_rows(op, name, t, x) for name, t in (("gate", gate), ("scale", scale), ("shift", shift)))
    backend = lib.choose(op, backend, REFUSES, x, y, gate, scale, shift)
    if backend == "reference":
        return gated_residual_adaln_ref(x, y, gate, scale, shift, norm, weight, bias, eps)
    tables = kernel_tables(backend, x, gate, scale, shift, weight, bias)
    x_new, h, _, _ = _gated_residual_adaln(x.contiguous(), y.contiguous(), *tables, norm == "rms", eps, backend)
    return x_new, h


def gated_residual_adaln_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """gate, scale, shift: [B, F, C] or None."""
    x_new = gated_residual_ref(x, y, gate)
    return x_new, adaln_ref(x_new, scale, shift, norm, weight, bias, eps)


def _cuda_refuses(x: Tensor, y: Tensor, *rows: Tensor | None) -> str | None:
    if y.dtype != x.dtype:
        return f"dtypes are {x.dtype} and {y.dtype}: x and y alike is written"
    return cuda_refuses(x, *rows)


def _triton_refuses(x: Tensor, y: Tensor, *rows: Tensor | None) -> str | None:
    return gpu_refuses("triton", x, *rows) or lib.refuses("triton", y)


def _cpu_refuses(x: Tensor, y: Tensor, *rows: Tensor | None) -> str | None:
    return cpu_refuses(x, y) or rows_refuse(*rows)


REFUSES = {"cuda": _cuda_refuses, "triton": _triton_refuses, "cpu": _cpu_refuses}


def _fwd(x, y, gate, scale, shift, weight, bias, rms, eps, backend):
    if x.numel() == 0:
        return _fwd_fake(x, y, gate, scale, shift, weight, bias, rms, eps, backend)
    launch = lib.kernel(backend, "gated_residual_adaln", "gated_residual_adaln_fwd")
    return launch(x, y, gate, scale, shift, weight, bias, rms, eps)


def _fwd_fake(x, y, gate, scale, shift, weight, bias, rms, eps, backend):
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), mean, torch.empty_like(mean)


def _bwd(dx_new, dh, x_new, y, gate, scale, weight, mean, rstd, F, rms, backend):
    if x_new.numel() == 0:
        grads = _bwd_fake(dx_new, dh, x_new, y, gate, scale, weight, mean, rstd, F, rms, backend)
        return *grads[:2], *(g.zero_() for g in grads[2:])
    launch = lib.kernel(backend, "gated_residual_adaln", "gated_residual_adaln_bwd")
    return launch(dx_new, dh, x_new, y, gate, scale, weight, mean, rstd, F, rms)


def _bwd_fake(dx_new, dh, x_new, y, gate, scale, weight, mean, rstd, F, rms, backend):
    sums = x_new.new_empty(x_new.shape[0], F, x_new.shape[2], dtype=torch.float32)
    dy, dgate = (x_new.new_empty(0), sums.new_empty(0)) if gate is None else (torch.empty_like(y), torch.empty_like(sums))
    return torch.empty_like(x_new), dy, dgate, sums, torch.empty_like(sums)


_gated_residual_adaln = lib.define(
    "gated_residual_adaln(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias,"
    " bool rms, float eps, str backend) -> (Tensor x_new, Tensor h, Tensor mean, Tensor rstd)",
    _fwd,
    _fwd_fake,
)
_gated_residual_adaln_bwd = lib.define(
    "gated_residual_adaln_bwd(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor? gate, Tensor? scale, Tensor? weight,"
    " Tensor mean, Tensor rstd, SymInt F, bool rms, str backend)"
    " -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dh_xhat, Tensor dh_sum)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx, inputs, output):
    _, y, gate, scale, shift, weight, bias, ctx.rms, _, ctx.backend = inputs
    x_new, _, mean, rstd = output
    ctx.F = next((t.shape[1] for t in (gate, scale, shift) if t is not None), 1)
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(x_new, None if gate is None else y, gate, scale, weight, bias, mean, rstd)


def _backward(ctx, dx_new, dh, _dmean, _drstd):
    x_new, y, gate, scale, weight, bias, mean, rstd = ctx.saved_tensors
    y = x_new if y is None else y  # without a gate y is not read
    dx, dy, dgate, dh_xhat, dh_sum = _gated_residual_adaln_bwd(
        dx_new.contiguous(), dh.contiguous(), x_new, y, gate, scale, weight, mean, rstd, ctx.F, ctx.rms, ctx.backend
    )
    needed = ctx.needs_input_grad[3:7]
    tables = table_gradients(needed, dh_xhat, dh_sum, scale, weight, bias, ctx.shift_dtype)
    if gate is None:
        return dx, dx, None, *tables, None, None, None
    return dx, dy, dgate.to(gate.dtype), *tables, None, None, None


lib.define_backward("gated_residual_adaln", _backward, _setup_context)
