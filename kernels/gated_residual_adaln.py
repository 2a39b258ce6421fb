"""Gated residual and the next norm: x' = x + gate * y in x's dtype, then h = adaln of that x'.

x, y, x', h: [B, L, C]    gate, scale, shift: [B, F, C], token l uses row l // S, S = L / F    weight, bias: [C]
mean, rstd: [B, L] fp32
Forward: one program per token, whole row in registers. Backward: one program per chunk of BL tokens of one modulation row;
it sums d * y, dh * xhat and dh over its tokens, the chunks are summed after it, so the bits are the same every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_ops.kernels.adaln import load_gain, load_row, norm_bwd, store_adaln, strides, tokens_per_program, warps, warps_backward
from dit_ops.kernels.gated_residual import gated_residual_bwd


@triton.jit
def gated_residual_adaln_fwd_kernel(
    x, y, gate, scale, shift, weight, bias, x_new, h, mean, rstd,
    gate_b, gate_f, scale_b, scale_f, shift_b, shift_f, L, C, S, eps,
    RMS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_b, i_l = tl.program_id(1).to(tl.int64), tl.program_id(0)
    i_f, i_row = i_l // S, i_b * L + i_l
    o_c = tl.arange(0, BC)
    m_c = o_c < C

    b_x = tl.load(x + i_row * C + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BC]
    b_y = tl.load(y + i_row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    if gate is not None:
        b_y *= load_row(gate, gate_b, gate_f, i_b, i_f, o_c, m_c)
    b_x_new = (b_x + b_y).to(x_new.dtype.element_ty)
    tl.store(x_new + i_row * C + o_c, b_x_new, mask=m_c)
    store_adaln(
        b_x_new.to(tl.float32), scale, shift, weight, bias, h, mean, rstd,
        scale_b, scale_f, shift_b, shift_f, i_b, i_f, i_row, C, o_c, m_c, eps, RMS,
    )  # fmt: skip


@triton.jit
def gated_residual_adaln_bwd_kernel(
    dx_new, dh, x_new, y, gate, scale, weight, mean, rstd, dx, dy, dgate, dh_xhat, dh_sum,
    gate_b, gate_f, scale_b, scale_f, L, C, S, NL,
    RMS: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_b, i_p = tl.program_id(1).to(tl.int64), tl.program_id(0)
    i_f, i_n = i_p // NL, i_p % NL
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_dh_xhat = tl.zeros([BC], dtype=tl.float32)
    b_dh_sum = tl.zeros([BC], dtype=tl.float32)
    if gate is not None:
        b_dgate = tl.zeros([BC], dtype=tl.float32)

    for i_l in range(i_f * S + i_n * BL, i_f * S + min((i_n + 1) * BL, S)):
        i_row = i_b * L + i_l
        i_x = i_row * C
        # all loads of tokens before the first sum over the row, whose barrier no load crosses
        b_dh = tl.load(dh + i_x + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_x = tl.load(x_new + i_x + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_dx_new = tl.load(dx_new + i_x + o_c, mask=m_c, other=0.0)
        if gate is not None:
            b_y = tl.load(y + i_x + o_c, mask=m_c, other=0.0)
        b_rstd = tl.load(rstd + i_row)
        b_xhat = (b_x - tl.load(mean + i_row)) * b_rstd
        # gain and gate come from L1 every time: the three sums leave no registers for them at 16 values per thread
        b_gain = load_gain(weight, scale, scale_b, scale_f, i_b, i_f, o_c, m_c, BC)
        b_dh_xhat += b_dh * b_xhat
        b_dh_sum += b_dh
        # d = dx' + gradient of the norm; dx = d, dy = gate * d, dgate = sum of d * y
        b_d = b_dx_new.to(tl.float32) + norm_bwd(b_dh, b_xhat, b_gain, b_rstd, C, RMS)
        tl.store(dx + i_x + o_c, b_d.to(dx.dtype.element_ty), mask=m_c)
        if gate is not None:
            b_gate = load_row(gate, gate_b, gate_f, i_b, i_f, o_c, m_c)
            tl.store(dy + i_x + o_c, (b_d * b_gate).to(dy.dtype.element_ty), mask=m_c)
            b_dgate += b_d * b_y.to(tl.float32)

    i_sum = (i_b * tl.num_programs(0) + i_p) * C
    tl.store(dh_xhat + i_sum + o_c, b_dh_xhat, mask=m_c)
    tl.store(dh_sum + i_sum + o_c, b_dh_sum, mask=m_c)
    if gate is not None:
        tl.store(dgate + i_sum + o_c, b_dgate, mask=m_c)


def too_wide_for_the_gate(x: Tensor) -> bool:
    """A row of 32 KB: three sums of it and four rows of a token do not fit in registers, so gate and norm are two launches."""
    return triton.next_power_of_2(x.shape[-1]) * x.element_size() > 16384


def max_registers(BC: int) -> int | None:
    """Per thread of the backward: 80 let three programs of at most 8 warps share an SM, and one loads while another sums."""
    return 80 if BC <= 2048 else None


def gated_residual_adaln_fwd(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, C = x.shape
    F = next((t.shape[1] for t in (gate, scale, shift) if t is not None), 1)
    x_new, h = torch.empty_like(x), torch.empty_like(x)
    mean = torch.empty(B, L, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    BC = triton.next_power_of_2(C)
    gated_residual_adaln_fwd_kernel[(L, B)](
        x, y, gate, scale, shift, weight, bias, x_new, h, mean, rstd,
        *strides(gate), *strides(scale), *strides(shift), L, C, L // F, eps,
        RMS=rms, BC=BC, num_warps=warps(BC),
    )  # fmt: skip
    return x_new, h, mean, rstd


def gated_residual_adaln_bwd(
    dx_new: Tensor,
    dh: Tensor,
    x_new: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    F: int,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Without a gate dy is dx, and the dy and dgate returned are empty."""
    if gate is not None and too_wide_for_the_gate(x_new):
        dx, _, _, dh_xhat, dh_sum = gated_residual_adaln_bwd(dx_new, dh, x_new, y, None, scale, weight, mean, rstd, F, rms)
        dy, dgate = gated_residual_bwd(dx, y, gate)
        return dx, dy, dgate, dh_xhat, dh_sum
    B, L, C = x_new.shape
    S, BL = L // F, tokens_per_program(B * L)
    NL = triton.cdiv(S, BL)
    dx = torch.empty_like(x_new)
    dh_xhat = torch.empty(B, F, NL, C, dtype=torch.float32, device=x_new.device)
    dh_sum = torch.empty_like(dh_xhat)
    dy, dgate = (y.new_empty(0), dh_sum.new_empty(0)) if gate is None else (torch.empty_like(y), torch.empty_like(dh_sum))
    BC = triton.next_power_of_2(C)
    gated_residual_adaln_bwd_kernel[(F * NL, B)](
        dx_new, dh, x_new, y, gate, scale, weight, mean, rstd, dx, dy, dgate, dh_xhat, dh_sum,
        *strides(gate), *strides(scale), L, C, S, NL,
        RMS=rms, BL=BL, BC=BC, num_warps=warps_backward(BC, x_new.element_size()), maxnreg=max_registers(BC),
    )  # fmt: skip
    return dx, dy, dgate if gate is None else dgate.sum(2), dh_xhat.sum(2), dh_sum.sum(2)
