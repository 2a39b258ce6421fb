"""Gated residual: out = x + gate * y.

x, y, out: [B, L, C]    gate: [B, F, C], token l uses row l // S, S = L / F
One program per chunk of tokens of one gate row and block of BC channels. Backward sums dout * y over its tokens, the chunks
are summed after it, so the bits are the same every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_ops.kernels.adaln import strides

BC = 512  # channels per program: a divisor of the C of most models, so that few lanes idle


@triton.jit
def gated_residual_fwd_kernel(
    x, y, gate, out, gate_b, gate_f, L, C, S, NL, NC,
    BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_b, i_p = tl.program_id(1).to(tl.int64), tl.program_id(0) // NC
    i_f, o_s = i_p // NL, i_p % NL * BL + tl.arange(0, BL)
    o_c = tl.program_id(0) % NC * BC + tl.arange(0, BC)
    o_x = (i_b * L + i_f * S + o_s)[:, None] * C + o_c  # [BL, BC]
    m_c = o_c < C
    m_x = (o_s < S)[:, None] & m_c

    b_gate = tl.load(gate + i_b * gate_b + i_f * gate_f + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_out = b_x + b_gate * tl.load(y + o_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(out + o_x, b_out.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def gated_residual_bwd_kernel(
    dout, y, gate, dy, dgate, gate_b, gate_f, L, C, S, NL, NC,
    NT: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_b, i_p = tl.program_id(1).to(tl.int64), tl.program_id(0) // NC
    i_f, i_n = i_p // NL, i_p % NL
    o_c = tl.program_id(0) % NC * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_gate = tl.load(gate + i_b * gate_b + i_f * gate_f + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_dgate = tl.zeros([BL, BC], dtype=tl.float32)

    for o_l in range(i_n * NT * BL, min((i_n + 1) * NT * BL, S), BL):
        o_s = o_l + tl.arange(0, BL)
        o_x = (i_b * L + i_f * S + o_s)[:, None] * C + o_c  # [BL, BC]
        m_x = (o_s < S)[:, None] & m_c
        b_dout = tl.load(dout + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dgate += b_dout * tl.load(y + o_x, mask=m_x, other=0.0).to(tl.float32)
        tl.store(dy + o_x, (b_dout * b_gate).to(dy.dtype.element_ty), mask=m_x)

    i_sum = (i_b * (tl.num_programs(0) // NC) + i_p) * C
    tl.store(dgate + i_sum + o_c, tl.sum(b_dgate, 0), mask=m_c)


def tile(S: int) -> int:
    """Tokens per tile: 16 values of each tensor per thread of 4 warps, or as many tokens as the rows of a small frame have."""
    return min(4, triton.next_power_of_2(S))


def gated_residual_fwd(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    B, L, C = x.shape
    S = L // gate.shape[1]
    BL = tile(S)
    NL, NC = triton.cdiv(S, BL), triton.cdiv(C, BC)
    out = torch.empty_like(x)
    gated_residual_fwd_kernel[(gate.shape[1] * NL * NC, B)](
        x, y, gate, out, *strides(gate), L, C, S, NL, NC, BL=BL, BC=BC, num_warps=4
    )
    return out


def gated_residual_bwd(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    B, L, C = y.shape
    F = gate.shape[1]
    S, BL = L // F, tile(L // F)
    NT = 16  # tiles per program: at 64 tokens the partial sums are 2 % of the traffic
    NL, NC = triton.cdiv(S, NT * BL), triton.cdiv(C, BC)
    dy = torch.empty_like(y)
    dgate = torch.empty(B, F, NL, C, dtype=torch.float32, device=y.device)
    gated_residual_bwd_kernel[(F * NL * NC, B)](
        dout, y, gate, dy, dgate, *strides(gate), L, C, S, NL, NC, NT=NT, BL=BL, BC=BC, num_warps=4
    )
    return dy, dgate.sum(2)
