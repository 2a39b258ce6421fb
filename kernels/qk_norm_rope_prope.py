"""Queries, keys and values of the RoPE and the ProPE path: heads [0, N) turned, heads [N, 2N) P^T q, P^-1 k, P^-1 v.

One program per token (backward: per chunk of tokens of a frame) and tensor: kernels/qk_norm_rope.py with cameras.
P, P_inv: [B, F, 4, 4], any strides
"""

import triton
import triton.language as tl
from torch import Tensor

from dit_ops.kernels.qk_norm_rope import (
    RUNTIME,
    axes,
    heads_bwd,
    heads_fwd,
    is_per_head,
    new_rstd,
    new_sums,
    tile,
    tokens_per_program,
)


@triton.jit(do_not_specialize=RUNTIME[:-1])
def qk_norm_rope_prope_fwd_kernel(
    q, k, v, q_weight, k_weight, q2, k2, v2, q_rstd, k_rstd, rope_t, rope_h, rope_w, P, P_inv,
    q_b, q_l, k_b, k_l, v_b, v_l, out_b, P_b, P_f, P_r, P_c, I_b, I_f, I_r, I_c, L, F, H, W, start_frame, eps,
    Q_N: tl.constexpr, K_N: tl.constexpr, V_N: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        heads_fwd(
            q, q_weight, q2, q_rstd, rope_t, rope_h, rope_w, P, q_b, q_l, out_b, 2 * N * D, P_b, P_f, P_c, P_r,
            L, F, H, W, start_frame, eps, Q_N, D, N, D, AT, AH, Q_HEAD, BN, BD,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        heads_fwd(
            k, k_weight, k2, k_rstd, rope_t, rope_h, rope_w, P_inv, k_b, k_l, out_b, 2 * N * D, I_b, I_f, I_r, I_c,
            L, F, H, W, start_frame, eps, K_N, D, N, D, AT, AH, K_HEAD, BN, BD,
        )  # fmt: skip
    else:
        heads_fwd(
            v, None, v2, None, None, None, None, P_inv, v_b, v_l, out_b, 2 * N * D, I_b, I_f, I_r, I_c,
            L, F, H, W, start_frame, eps, V_N, D, N, D, AT, AH, False, BN, BD,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def qk_norm_rope_prope_bwd_kernel(
    dq2, dk2, dv2, q, k, v, q_weight, k_weight, q_rstd, k_rstd, dq, dk, dv, dq_weight, dk_weight,
    rope_t, rope_h, rope_w, P, P_inv,
    q_b, q_l, k_b, k_l, v_b, v_l, P_b, P_f, P_r, P_c, I_b, I_f, I_r, I_c, L, F, H, W, start_frame, NL,
    Q_N: tl.constexpr, K_N: tl.constexpr, V_N: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    AT: tl.constexpr, AH: tl.constexpr, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr,
    BL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        heads_bwd(
            dq2, q, q_weight, q_rstd, dq, dq_weight, rope_t, rope_h, rope_w, P, q_b, q_l, P_b, P_f, P_r, P_c,
            L, F, H, W, start_frame, NL, Q_N, N, D, AT, AH, Q_HEAD, BL, BN, BD,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        heads_bwd(
            dk2, k, k_weight, k_rstd, dk, dk_weight, rope_t, rope_h, rope_w, P_inv, k_b, k_l, I_b, I_f, I_c, I_r,
            L, F, H, W, start_frame, NL, K_N, N, D, AT, AH, K_HEAD, BL, BN, BD,
        )  # fmt: skip
    else:
        heads_bwd(
            dv2, v, None, None, dv, None, None, None, None, P_inv, v_b, v_l, I_b, I_f, I_c, I_r,
            L, F, H, W, start_frame, NL, V_N, N, D, AT, AH, False, BL, BN, BD,
        )  # fmt: skip


def qk_norm_rope_prope_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    rope_t: Tensor, rope_h: Tensor, rope_w: Tensor, P: Tensor, P_inv: Tensor,
    F: int, H: int, W: int, eps: float, start_frame: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, L, N, D = q.shape
    q2, k2, v2 = (t.new_empty(B, L, 2 * N, D) for t in (q, k, v))
    q_rstd, k_rstd = new_rstd(q, q_weight), new_rstd(k, k_weight)
    qk_norm_rope_prope_fwd_kernel[(L, 3, B)](
        q, k, v, q_weight, k_weight, q2, k2, v2, q_rstd, k_rstd, rope_t, rope_h, rope_w, P, P_inv,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], L * 2 * N * D, *P.stride(), *P_inv.stride(),
        L, F, H, W, start_frame, eps, Q_N=q.stride(2), K_N=k.stride(2), V_N=v.stride(2), N=N, D=D,
        **axes(rope_t, rope_h), Q_HEAD=is_per_head(q_weight, D), K_HEAD=is_per_head(k_weight, D), **tile(N, D, 16),
    )  # fmt: skip
    return q2, k2, v2, q_rstd, k_rstd


def backward_tile(N: int, D: int, per_head: bool) -> dict[str, int]:
    """Half the warps, with twice the registers, where a row of statistics per head would spill."""
    return tile(N, D, 32 if per_head and N * D > 4096 else 16)


def qk_norm_rope_prope_bwd(
    dq2: Tensor, dk2: Tensor, dv2: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    q_rstd: Tensor, k_rstd: Tensor, rope_t: Tensor, rope_h: Tensor, rope_w: Tensor, P: Tensor, P_inv: Tensor,
    F: int, H: int, W: int, start_frame: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, L, N, D = q.shape
    BL = tokens_per_program(B * L)
    NL = triton.cdiv(H * W, BL)
    chunks = L // (H * W) * NL
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    dq_weight, dk_weight = new_sums(q, q_weight, B * chunks), new_sums(k, k_weight, B * chunks)
    qk_norm_rope_prope_bwd_kernel[(chunks, 3, B)](
        dq2, dk2, dv2, q, k, v, q_weight, k_weight, q_rstd, k_rstd, dq, dk, dv, dq_weight, dk_weight,
        rope_t, rope_h, rope_w, P, P_inv,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *P.stride(), *P_inv.stride(), L, F, H, W, start_frame, NL,
        Q_N=q.stride(2), K_N=k.stride(2), V_N=v.stride(2), N=N, D=D, **axes(rope_t, rope_h),
        Q_HEAD=is_per_head(q_weight, D), K_HEAD=is_per_head(k_weight, D), BL=BL,
        **backward_tile(N, D, is_per_head(q_weight, D)),
    )  # fmt: skip
    return dq, dk, dv, dq_weight.sum(0), dk_weight.sum(0)
