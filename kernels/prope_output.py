"""P o in groups of 4 channels; the backward is the same with P^T.

o: [B, L, N, D], the C = N * D channels of a token side by side, tokens at any stride    P: [B, F, 4, 4], any strides
One program per BE channels of one frame, whose tokens follow one another.
"""

import triton
import triton.language as tl
from torch import Tensor

from dit_ops.kernels.qk_norm_rope import join_pairs, load_camera, project, split_pairs


@triton.jit(do_not_specialize=("F", "S", "NE"))
def prope_output_kernel(o, P, out, o_b, o_l, P_b, P_f, P_r, P_c, F, S, NE, C: tl.constexpr, BE: tl.constexpr):
    i_b, i_r, i_n = tl.program_id(1).to(tl.int64), (tl.program_id(0) // NE).to(tl.int64), tl.program_id(0) % NE
    i_e = i_n.to(tl.int64) * BE
    o_e = tl.arange(0, BE)[None, :]
    m_e = o_e < S.to(tl.int64) * C - i_e
    ALIGNED: tl.constexpr = min(C & -C, BE)  # a power of two that divides C
    o_c = tl.multiple_of((i_e % C).to(tl.int32), ALIGNED) + o_e  # channels from the first one of token i_e // C on
    p_o = o + i_b * o_b + (i_r * S + i_e // C + o_c // C) * o_l + o_c % C
    b_o = tl.load(p_o, mask=m_e, other=0.0).to(tl.float32)
    b_even, b_odd = split_pairs(b_o)
    b_even, b_odd = project(b_even, b_odd, load_camera(P + i_b * P_b + i_r % F * P_f, P_r, P_c))
    i_row = i_b * (tl.num_programs(0) // NE) + i_r
    p_out = out + i_row * S * C + i_e
    tl.store(p_out + o_e, join_pairs(b_even, b_odd).to(out.dtype.element_ty), mask=m_e)


TILE = {"BE": 2048, "num_warps": 4}  # 16 values per thread


def prope_output_fwd(o: Tensor, P: Tensor, halves: int) -> Tensor:
    B, L, N, D = o.shape
    F = P.shape[1]
    S = L // (halves * F)
    NE = triton.cdiv(S * N * D, TILE["BE"])
    out = o.new_empty(o.shape)
    prope_output_kernel[(halves * F * NE, B)](
        o, P, out, *o.stride()[:2], *P.stride(), F, S, NE, C=N * D, **TILE
    )  # fmt: skip
    return out
