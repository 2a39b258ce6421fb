"""adaLN, the modulated norm of every DiT block."""

import torch
import torch.nn.functional as tf
from torch import Tensor

from dit_ops import _library as lib

NORMS = ("layer", "rms")


def adaln(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """(norm(x) * weight + bias) * (1 + scale) + shift, computed in fp32; differentiable in every tensor.

    x: [B, L, C]    scale, shift: [B, C] or [B, F, C], F dividing L: token l uses row l // (L / F)
    weight, bias: [C]    returns [B, L, C] in x's dtype
    """
    check_norm("adaln", x, norm, weight, bias)
    scale, shift = check_rows("adaln", "scale", scale, x), check_rows("adaln", "shift", shift, x)
    backend = lib.choose("adaln", backend, REFUSES, x, scale, shift)
    if backend == "reference":
        return adaln_ref(x, scale, shift, norm, weight, bias, eps)
    tables = kernel_tables(backend, x, scale, shift, weight, bias)
    return _adaln(x.contiguous(), *tables, norm == "rms", eps, backend)[0]


def adaln_ref(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """scale, shift: [B, F, C] or None."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    C = x.shape[-1]
    weight, bias, scale, shift = (None if t is None else t.to(dtype) for t in (weight, bias, scale, shift))
    if norm == "layer":
        y = tf.layer_norm(x.to(dtype), (C,), weight, bias, eps)
    else:
        y = tf.rms_norm(x.to(dtype), (C,), weight, eps)
        y = y if bias is None else y + bias
    return modulate_ref(y, scale, shift).to(x.dtype)


def modulate_ref(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """y * (1 + scale) + shift with rows [B, F, C] spread over the tokens of y [B, L, C]."""
    if scale is not None and shift is not None and scale.shape == shift.shape:
        rows, gain, offset = split_rows(y, scale, 1 + scale, shift)
        return torch.addcmul(offset, rows, gain).flatten(1, 2)
    if scale is not None:
        rows, gain = split_rows(y, scale, 1 + scale)
        y = (rows * gain).flatten(1, 2)
    if shift is not None:
        rows, offset = split_rows(y, shift, shift)
        y = (rows + offset).flatten(1, 2)
    return y


def split_rows(y: Tensor, rows: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """y [B, L, C] as [B, F, L / F, C], and tables [B, F, C] as [B, F, 1, C]."""
    B, F, C = rows.shape
    return y.view(B, F, y.shape[1] // F, C), *(t[:, :, None] for t in tables)


def check_norm(op: str, x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None) -> None:
    lib.check_tensor(op, "x", x, "B, L, C")
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            lib.check_shape(op, name, t, "C", (x.shape[-1],))


def check_rows(op: str, name: str, rows: Tensor | None, x: Tensor) -> Tensor | None:
    """Modulation rows [B, C] or [B, F, C] as [B, F, C]."""
    if rows is None:
        return None
    B, L, C = x.shape
    if rows.ndim == 2:
        lib.check_shape(op, name, rows, "B, C", (B, C))
        return rows[:, None]
    if rows.ndim != 3 or rows.shape[0] != B or rows.shape[2] != C or rows.shape[1] < 1 or L % rows.shape[1]:
        raise ValueError(f"{op}: {name} must be [B, C] = {[B, C]} or [B, F, C] with F dividing L = {L}, got {list(rows.shape)}")
    return rows


def rows_refuse(*rows: Tensor | None) -> str | None:
    """Modulation with several numbers of rows, which the kernels of adaln and its relatives cannot take."""
    counts = sorted({r.shape[1] for r in rows if r is not None})
    return f"modulation with different F: {counts}" if len(counts) > 1 else None


def kernel_tables(backend: str, x: Tensor, *tables: Tensor | None) -> list[Tensor | None]:
    """As the kernels read them: unit stride over C; for cuda all in x's dtype or all in fp32; for cpu fp32 and contiguous."""
    if backend == "cpu":
        return [None if t is None else t.float().contiguous() for t in tables]
    if backend == "cuda" and any(t is not None and t.dtype != x.dtype for t in tables):
        tables = tuple(None if t is None else t.float() for t in tables)
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tables]


def gpu_refuses(backend: str, x: Tensor, *rows: Tensor | None) -> str | None:
    """What the Triton and CUDA kernels of adaln and its relatives cannot take."""
    if x.shape[-1] > 8192:
        return f"C = {x.shape[-1]}: one row of at most 8192 must fit in registers"
    return lib.refuses(backend, x) or rows_refuse(*rows)


def cuda_refuses(x: Tensor, *rows: Tensor | None) -> str | None:
    """What the CUDA kernels of adaln and gated_residual_adaln cannot take."""
    vector = 16 // x.element_size()
    refused = gpu_refuses("cuda", x, *rows)
    if refused is None and x.shape[-1] % vector:
        return f"C = {x.shape[-1]}: 16-byte accesses need a multiple of {vector}"
    return refused


def _cuda_refuses(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> str | None:
    return cuda_refuses(x, scale, shift)


def _triton_refuses(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> str | None:
    return gpu_refuses("triton", x, scale, shift)


def _cpu_refuses(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> str | None:
    return cpu_refuses(x) or rows_refuse(scale, shift)


def cpu_refuses(*tensors: Tensor) -> str | None:
    """What the C++ kernels of adaln and its relatives cannot take."""
    dtypes = {t.dtype for t in tensors}
    if torch.float16 in dtypes or len(dtypes) > 1:
        return f"dtype is {', '.join(sorted(map(str, dtypes)))}; all fp32 or all bf16 is written"
    return lib.refuses("cpu", tensors[0])


REFUSES = {"cuda": _cuda_refuses, "triton": _triton_refuses, "cpu": _cpu_refuses}


def _fwd(x, scale, shift, weight, bias, rms, eps, backend):
    if x.numel() == 0:
        return _fwd_fake(x, scale, shift, weight, bias, rms, eps, backend)
    return lib.kernel(backend, "adaln", "adaln_fwd")(x, scale, shift, weight, bias, rms, eps)


def _fwd_fake(x, scale, shift, weight, bias, rms, eps, backend):
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _bwd(dy, x, scale, weight, mean, rstd, F, rms, backend):
    if x.numel() == 0:
        sums = x.new_zeros(x.shape[0], F, x.shape[2], dtype=torch.float32)
        return torch.empty_like(x), sums, sums.clone()
    return lib.kernel(backend, "adaln", "adaln_bwd")(dy, x, scale, weight, mean, rstd, F, rms)


def _bwd_fake(dy, x, scale, weight, mean, rstd, F, rms, backend):
    sums = x.new_empty(x.shape[0], F, x.shape[2], dtype=torch.float32)
    return torch.empty_like(x), sums, torch.empty_like(sums)


_adaln = lib.define(
    "adaln(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, bool rms, float eps, str backend)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _fwd,
    _fwd_fake,
)
_adaln_bwd = lib.define(
    "adaln_bwd(Tensor dy, Tensor x, Tensor? scale, Tensor? weight, Tensor mean, Tensor rstd, SymInt F, bool rms, str backend)"
    " -> (Tensor dx, Tensor dy_xhat, Tensor dy_sum)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx, inputs, output):
    x, scale, shift, weight, bias, ctx.rms, _, ctx.backend = inputs
    ctx.F = next((t.shape[1] for t in (scale, shift) if t is not None), 1)
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(x, scale, weight, bias, *output[1:])


def _backward(ctx, dy, _dmean, _drstd):
    x, scale, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dy_xhat, dy_sum = _adaln_bwd(dy.contiguous(), x, scale, weight, mean, rstd, ctx.F, ctx.rms, ctx.backend)
    return (
        dx,
        *table_gradients(ctx.needs_input_grad[1:5], dy_xhat, dy_sum, scale, weight, bias, ctx.shift_dtype),
        None,
        None,
        None,
    )


def table_gradients(
    needed: tuple[bool, ...],
    dy_xhat: Tensor,
    dy_sum: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift_dtype: torch.dtype | None,
) -> list[Tensor | None]:
    """Gradients of scale, shift, weight and bias from the sums of dy * xhat and of dy over the tokens of a row, each [B, F, C].

    dscale = weight * dy_xhat + bias * dy_sum, dshift = dy_sum, dweight = sum of (1 + scale) * dy_xhat, dbias likewise
    """
    dscale = dshift = dweight = dbias = None
    if needed[0] and scale is not None:
        dscale = dy_xhat if weight is None else dy_xhat * weight.float()
        dscale = (dscale if bias is None else dscale + dy_sum * bias.float()).to(scale.dtype)
    if needed[1]:
        dshift = dy_sum.to(shift_dtype)
    gain = None if scale is None else 1 + scale.float()
    if needed[2] and weight is not None:
        dweight = (dy_xhat if gain is None else dy_xhat * gain).sum((0, 1)).to(weight.dtype)
    if needed[3] and bias is not None:
        dbias = (dy_sum if gain is None else dy_sum * gain).sum((0, 1)).to(bias.dtype)
    return [dscale, dshift, dweight, dbias]


lib.define_backward("adaln", _backward, _setup_context)
