"""adaLN: y = xhat * gain + offset, with xhat = (x - mean) * rstd (mean = 0 for the RMS norm),
gain = weight * (1 + scale), offset = bias * (1 + scale) + shift.

x, y: [B, L, C]    scale, shift: [B, F, C], token l uses row l // S, S = L / F    weight, bias: [C]    mean, rstd: [B, L] fp32
Forward: one program per token, whole row in registers. Backward: one program per chunk of BL tokens of one modulation row;
it sums dy * xhat and dy over its tokens, the chunks are summed after it, so the bits are the same every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_row(table, stride_b, stride_f, i_b, i_f, o_c, m_c):
    return tl.load(table + i_b * stride_b + i_f * stride_f + o_c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def store_adaln(
    b_x, scale, shift, weight, bias, y, mean, rstd,
    scale_b, scale_f, shift_b, shift_f, i_b, i_f, i_row, C, o_c, m_c, eps,
    RMS: tl.constexpr,
):  # fmt: skip
    """adaln of one token, b_x: [BC] fp32, zero outside the mask."""
    if RMS:
        b_mean = 0.0
        b_xc = b_x
    else:
        b_mean = tl.sum(b_x) / C
        b_xc = tl.where(m_c, b_x - b_mean, 0.0)
    b_rstd = 1 / tl.sqrt(tl.sum(b_xc * b_xc) / C + eps)

    b_y = b_xc * b_rstd
    if weight is not None:
        b_y *= tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    if bias is not None:
        b_y += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if scale is not None:
        b_y *= 1 + load_row(scale, scale_b, scale_f, i_b, i_f, o_c, m_c)
    if shift is not None:
        b_y += load_row(shift, shift_b, shift_f, i_b, i_f, o_c, m_c)
    tl.store(y + i_row * C + o_c, b_y.to(y.dtype.element_ty), mask=m_c)
    tl.store(mean + i_row, b_mean)
    tl.store(rstd + i_row, b_rstd)


@triton.jit
def adaln_fwd_kernel(
    x, scale, shift, weight, bias, y, mean, rstd,
    scale_b, scale_f, shift_b, shift_f, L, C, S, eps,
    RMS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_b, i_l = tl.program_id(1).to(tl.int64), tl.program_id(0)
    i_f, i_row = i_l // S, i_b * L + i_l
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_x = tl.load(x + i_row * C + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BC]
    store_adaln(
        b_x, scale, shift, weight, bias, y, mean, rstd,
        scale_b, scale_f, shift_b, shift_f, i_b, i_f, i_row, C, o_c, m_c, eps, RMS,
    )  # fmt: skip


@triton.jit
def load_gain(weight, scale, scale_b, scale_f, i_b, i_f, o_c, m_c, BC: tl.constexpr):
    """weight * (1 + scale)"""
    b_gain = tl.full([BC], 1.0, tl.float32)
    if weight is not None:
        b_gain = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    if scale is not None:
        b_gain *= 1 + load_row(scale, scale_b, scale_f, i_b, i_f, o_c, m_c)
    return b_gain


@triton.jit
def add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def norm_bwd(b_dy, b_xhat, b_gain, b_rstd, C, RMS: tl.constexpr):
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * gain; without mean(g) for the RMS norm"""
    b_g = b_dy * b_gain
    if RMS:
        b_dx = b_g - b_xhat * (tl.sum(b_g * b_xhat) / C)
    else:
        b_g_xhat, b_sum = tl.reduce((b_g * b_xhat, b_g), 0, add_pairs)
        b_dx = b_g - b_xhat * (b_g_xhat / C) - b_sum / C
    return b_dx * b_rstd


@triton.jit
def adaln_bwd_kernel(
    dy, x, scale, weight, mean, rstd, dx, dy_xhat, dy_sum,
    scale_b, scale_f, L, C, S, NL,
    RMS: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_b, i_p = tl.program_id(1).to(tl.int64), tl.program_id(0)
    i_f, i_n = i_p // NL, i_p % NL
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_gain = load_gain(weight, scale, scale_b, scale_f, i_b, i_f, o_c, m_c, BC)
    b_dy_xhat = tl.zeros([BC], dtype=tl.float32)
    b_dy_sum = tl.zeros([BC], dtype=tl.float32)

    for i_l in range(i_f * S + i_n * BL, i_f * S + min((i_n + 1) * BL, S)):
        i_row = i_b * L + i_l
        b_dy = tl.load(dy + i_row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_x = tl.load(x + i_row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_rstd = tl.load(rstd + i_row)
        b_xhat = (b_x - tl.load(mean + i_row)) * b_rstd  # not zero beyond C, where dy and gain are
        b_dy_xhat += b_dy * b_xhat
        b_dy_sum += b_dy
        b_dx = norm_bwd(b_dy, b_xhat, b_gain, b_rstd, C, RMS)
        tl.store(dx + i_row * C + o_c, b_dx.to(dx.dtype.element_ty), mask=m_c)

    i_sum = (i_b * tl.num_programs(0) + i_p) * C
    tl.store(dy_xhat + i_sum + o_c, b_dy_xhat, mask=m_c)
    tl.store(dy_sum + i_sum + o_c, b_dy_sum, mask=m_c)


def warps(BC: int) -> int:
    """8 to 16 values of a row per thread: what the backward's six live rows leave room for."""
    return min(16, max(4, BC // 256))


def warps_backward(BC: int, itemsize: int) -> int:
    """A row of 32 KB spills in 16 warps of 128 registers a thread; 8 warps of 255 fill the same register file and do not."""
    return 8 if BC * itemsize > 16384 else warps(BC)


def tokens_per_program(tokens: int) -> int:
    """Enough programs for two waves of 132 SMs; from 32 tokens on the partial sums are under 5 % of the traffic."""
    return 16 if tokens < 16384 else 32


def strides(rows: Tensor | None) -> tuple[int, int]:
    return (0, 0) if rows is None else (rows.stride(0), rows.stride(1))


def adaln_fwd(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, L, C = x.shape
    F = next((t.shape[1] for t in (scale, shift) if t is not None), 1)
    y = torch.empty_like(x)
    mean = torch.empty(B, L, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    BC = triton.next_power_of_2(C)
    adaln_fwd_kernel[(L, B)](
        x, scale, shift, weight, bias, y, mean, rstd,
        *strides(scale), *strides(shift), L, C, L // F, eps,
        RMS=rms, BC=BC, num_warps=warps(BC),
    )  # fmt: skip
    return y, mean, rstd


def adaln_bwd(
    dy: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, mean: Tensor, rstd: Tensor, F: int, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, L, C = x.shape
    S, BL = L // F, tokens_per_program(B * L)
    NL = triton.cdiv(S, BL)
    dx = torch.empty_like(x)
    dy_xhat = torch.empty(B, F, NL, C, dtype=torch.float32, device=x.device)
    dy_sum = torch.empty_like(dy_xhat)
    BC = triton.next_power_of_2(C)
    adaln_bwd_kernel[(F * NL, B)](
        dy, x, scale, weight, mean, rstd, dx, dy_xhat, dy_sum,
        *strides(scale), L, C, S, NL,
        RMS=rms, BL=BL, BC=BC, num_warps=warps_backward(BC, x.element_size()),
    )  # fmt: skip
    return dx, dy_xhat.sum(2), dy_sum.sum(2)
