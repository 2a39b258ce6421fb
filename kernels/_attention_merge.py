"""Parts of one attention, over disjoint keys: o = sum_i exp(lse_i - lse) o_i with lse = log sum_i exp lse_i.

o_i: [B, n, N, D] and lse_i: [B, N, n] contiguous; o and lse may be slices of larger tensors. One pass, sums in fp32.
"""

import triton
import triton.language as tl
from torch import Tensor

MOST = 4  # parts of one launch
BLOCK = 32


@triton.jit
def attention_merge_parts_kernel(
    o0, o1, o2, o3, lse0, lse1, lse2, lse3, o, lse, o_b, o_t, o_n, lse_b, lse_n, n, N,
    D: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    i_l, i_b, i_n = tl.program_id(0) * BL, (tl.program_id(1) // N).to(tl.int64), (tl.program_id(1) % N).to(tl.int64)
    o_l, o_d = i_l + tl.arange(0, BL), tl.arange(0, BD)
    m_l = o_l < n
    m_o = m_l[:, None] & (o_d < D)[None, :]
    o_part = ((i_b * n + o_l[:, None]) * N + i_n) * D + o_d[None, :]  # [BL, BD]
    o_lse = (i_b * N + i_n) * n + o_l  # [BL]
    b_max = tl.load(lse0 + o_lse, mask=m_l, other=0.0)
    for i in tl.static_range(1, PARTS):
        p_lse = lse1 if i == 1 else lse2 if i == 2 else lse3
        b_max = tl.maximum(b_max, tl.load(p_lse + o_lse, mask=m_l, other=0.0))
    b_sum = tl.zeros([BL], dtype=tl.float32)
    b_o = tl.zeros([BL, BD], dtype=tl.float32)
    for i in tl.static_range(PARTS):
        p_lse = lse0 if i == 0 else lse1 if i == 1 else lse2 if i == 2 else lse3
        p_o = o0 if i == 0 else o1 if i == 1 else o2 if i == 2 else o3
        b_weight = tl.exp(tl.load(p_lse + o_lse, mask=m_l, other=0.0) - b_max)
        b_sum += b_weight
        b_o += b_weight[:, None] * tl.load(p_o + o_part, mask=m_o, other=0.0).to(tl.float32)
    p_out = o + i_b * o_b + o_l[:, None].to(tl.int64) * o_t + i_n * o_n + o_d[None, :]
    tl.store(p_out, (b_o / b_sum[:, None]).to(o.dtype.element_ty), mask=m_o)
    tl.store(lse + i_b * lse_b + i_n * lse_n + o_l, b_max + tl.log(b_sum), mask=m_l)


def attention_merge_parts(parts: list[tuple[Tensor, Tensor]], o: Tensor, lse: Tensor) -> None:
    """Writes the merge of two to MOST parts (o_i, lse_i) into o [B, n, N, D] and lse [B, N, n]."""
    B, n, N, D = o.shape
    outs = [part.contiguous() for part, _ in parts]
    lses = [part.contiguous() for _, part in parts]
    spare = MOST - len(parts)
    attention_merge_parts_kernel[(triton.cdiv(n, BLOCK), B * N)](
        *outs, *outs[:1] * spare, *lses, *lses[:1] * spare, o, lse, *o.stride()[:3], *lse.stride()[:2], n, N,
        D=D, BD=triton.next_power_of_2(D), BL=BLOCK, PARTS=len(parts), num_warps=4,
    )  # fmt: skip
