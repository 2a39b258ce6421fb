"""Queries, keys and values around the Ulysses exchange: pack (norm) -> all-to-all -> unpack (RoPE and ProPE).

Pack can apply RoPE and ProPE as well: then two tensors travel for one, and unpack copies. _ulysses_wire.py has the layout.
One program per token and tensor; pack's backward: one per chunk of BL tokens, which sums its share of the weight's gradient.
"""

import triton
import triton.language as tl
from torch import Tensor

from dit_ops.kernels._ulysses_wire import first_of, load_at, store_at, wire_by_head, wire_row
from dit_ops.kernels.qk_norm_rope import (
    axes,
    heads_fwd,
    is_per_head,
    join_pairs,
    load_angles,
    load_camera,
    load_heads,
    load_weight,
    new_rstd,
    new_sums,
    project,
    rstd_offsets,
    split_pairs,
    store_heads,
    sum_norm,
    tile,
    tokens_per_program,
)


@triton.jit
def turned_back(
    b_dn, b_dprope, rope_t, rope_h, rope_w, M, M_r, M_c, i_s, i_t, H, W,
    D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient before RoPE and ProPE; M is the transpose of the forward's matrix."""
    b_even, b_odd = split_pairs(b_dn)
    if rope_t is not None:
        b_cos, b_sin = load_angles(rope_t, rope_h, rope_w, i_s, i_t, H, W, D, AT, AH, BD)
        b_turned = b_even * b_cos + b_odd * b_sin
        b_odd = b_odd * b_cos - b_even * b_sin
        b_even = b_turned
    if M is not None:
        b_even_prope, b_odd_prope = split_pairs(b_dprope)
        b_even_prope, b_odd_prope = project(b_even_prope, b_odd_prope, load_camera(M, M_r, M_c))
        b_even += b_even_prope
        b_odd += b_odd_prope
    return join_pairs(b_even, b_odd)


@triton.jit
def pack_heads(
    x, weight, wire, rstd, rope_t, rope_h, rope_w, M, x_b, x_l, M_b, M_f, M_r, M_c,
    i_x, B, L, F, H, W, i_rank, start_frame, eps,
    T: tl.constexpr, PATHS: tl.constexpr, X_N: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    AT: tl.constexpr, AH: tl.constexpr, HEAD: tl.constexpr, RANKS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One token of tensor i_x: n = x * rstd * weight, turned if there is rope; with M, M n as a second path."""
    i_b, i_l = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64)
    i_row = i_b * L + i_l
    b_n = load_heads(x + i_b * x_b + i_l * x_l, N, D, X_N, BN, BD)
    if weight is not None:
        SPAN: tl.constexpr = D if HEAD else N * D
        b_rstd = 1 / tl.sqrt(sum_norm(b_n * b_n, HEAD) / SPAN + eps)
        p_rstd, m_rstd = rstd_offsets(rstd, i_row, HEAD, N, BN)
        tl.store(p_rstd, b_rstd, mask=m_rstd)
        b_n = b_n * b_rstd * load_weight(weight, HEAD, N, D, BN, BD)
    p_wire = wire_by_head(wire, B * L, i_row, i_x * PATHS, T * PATHS, N, D, RANKS, BN)
    if rope_t is None:
        store_at(p_wire, b_n, N, D, BN, BD)
    if PATHS == 2 or rope_t is not None:
        o_first = first_of(i_rank, H * W, RANKS)
        tokens = first_of(i_rank + 1, H * W, RANKS) - o_first
        i_f, i_s = i_l // tokens % F, o_first + i_l % tokens
        b_even, b_odd = split_pairs(b_n)
        if rope_t is not None:
            b_cos, b_sin = load_angles(rope_t, rope_h, rope_w, i_s, start_frame + i_f, H, W, D, AT, AH, BD)
            b_turned = join_pairs(b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin)
            store_at(p_wire, b_turned, N, D, BN, BD)
        if PATHS == 2:
            b_even, b_odd = project(b_even, b_odd, load_camera(M + i_b * M_b + i_f * M_f, M_r, M_c))
            p_prope = wire_by_head(wire, B * L, i_row, i_x * PATHS + 1, T * PATHS, N, D, RANKS, BN)
            store_at(p_prope, join_pairs(b_even, b_odd), N, D, BN, BD)


@triton.jit
def unpack_grads_of_pack(
    wire, x, weight, rstd, dx, dweight, rope_t, rope_h, rope_w, M, x_b, x_l, M_b, M_f, M_r, M_c,
    i_x, B, L, F, H, W, i_rank, start_frame,
    T: tl.constexpr, PATHS: tl.constexpr, X_N: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    AT: tl.constexpr, AH: tl.constexpr, HEAD: tl.constexpr, RANKS: tl.constexpr,
    BL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A chunk of tokens of tensor i_x; M is the transpose of the forward's matrix."""
    i_b, i_p = tl.program_id(2).to(tl.int64), tl.program_id(0)
    SPAN: tl.constexpr = D if HEAD else N * D
    if weight is not None:
        b_weight = load_weight(weight, HEAD, N, D, BN, BD)
        b_dweight = tl.zeros([BN, BD], dtype=tl.float32)
    o_first = first_of(i_rank, H * W, RANKS)
    tokens = first_of(i_rank + 1, H * W, RANKS) - o_first

    for i_token in range(i_p * BL, min((i_p + 1) * BL, L)):
        i_row = i_b * L + i_token
        i_l = i_row - i_b * L  # 64 bits
        i_f, i_s = i_token // tokens % F, o_first + i_token % tokens
        b_dx = load_at(wire_by_head(wire, B * L, i_row, i_x * PATHS, T * PATHS, N, D, RANKS, BN), N, D, BN, BD)
        if PATHS == 2:
            p_prope = wire_by_head(wire, B * L, i_row, i_x * PATHS + 1, T * PATHS, N, D, RANKS, BN)
            b_dprope = load_at(p_prope, N, D, BN, BD)
            b_dx = turned_back(
                b_dx, b_dprope, rope_t, rope_h, rope_w, M + i_b * M_b + i_f * M_f, M_r, M_c,
                i_s, start_frame + i_f, H, W, D, AT, AH, BD,
            )  # fmt: skip
        elif rope_t is not None:
            b_dx = turned_back(b_dx, b_dx, rope_t, rope_h, rope_w, None, 0, 0, i_s, start_frame + i_f, H, W, D, AT, AH, BD)
        if weight is not None:
            # g = dn * weight, dx = rstd * (g - xhat * mean(g * xhat)), dweight = sum of dn * xhat
            p_rstd, m_rstd = rstd_offsets(rstd, i_row, HEAD, N, BN)
            b_rstd = tl.load(p_rstd, mask=m_rstd, other=0.0)
            b_xhat = load_heads(x + i_b * x_b + i_l * x_l, N, D, X_N, BN, BD) * b_rstd
            b_dweight += b_dx * b_xhat
            b_dx *= b_weight
            b_dx = (b_dx - b_xhat * (sum_norm(b_dx * b_xhat, HEAD) / SPAN)) * b_rstd
        store_heads(dx + i_row * (N * D), b_dx, N, D, D, BN, BD)

    if weight is not None:
        p_sum = dweight + (i_b * tl.num_programs(0) + i_p) * SPAN
        if HEAD:
            store_heads(p_sum, tl.sum(b_dweight, 0, keep_dims=True), 1, D, D, 1, BD)
        else:
            store_heads(p_sum, b_dweight, N, D, D, BN, BD)


@triton.jit(do_not_specialize=("B", "L", "F", "H", "W", "i_rank", "start_frame"))
def pack_fwd_kernel(
    q, k, v, q_weight, k_weight, wire, q_rstd, k_rstd, rope_t, rope_h, rope_w, P, P_inv,
    q_b, q_l, k_b, k_l, v_b, v_l, P_b, P_f, P_r, P_c, I_b, I_f, I_r, I_c, B, L, F, H, W, i_rank, start_frame, eps,
    T: tl.constexpr, PATHS: tl.constexpr, Q_N: tl.constexpr, K_N: tl.constexpr, V_N: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr,
    RANKS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """T = 1: q alone."""
    if tl.program_id(1) == 0:
        pack_heads(
            q, q_weight, wire, q_rstd, rope_t, rope_h, rope_w, P, q_b, q_l, P_b, P_f, P_c, P_r,
            0, B, L, F, H, W, i_rank, start_frame, eps, T, PATHS, Q_N, N, D, AT, AH, Q_HEAD, RANKS, BN, BD,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        if T > 1:
            pack_heads(
                k, k_weight, wire, k_rstd, rope_t, rope_h, rope_w, P_inv, k_b, k_l, I_b, I_f, I_r, I_c,
                1, B, L, F, H, W, i_rank, start_frame, eps, T, PATHS, K_N, N, D, AT, AH, K_HEAD, RANKS, BN, BD,
            )  # fmt: skip
    else:
        if T > 1:
            pack_heads(
                v, None, wire, None, None, None, None, P_inv, v_b, v_l, I_b, I_f, I_r, I_c,
                2, B, L, F, H, W, i_rank, start_frame, eps, T, PATHS, V_N, N, D, AT, AH, False, RANKS, BN, BD,
            )  # fmt: skip


@triton.jit(do_not_specialize=("B", "L", "F", "H", "W", "i_rank", "start_frame"))
def pack_bwd_kernel(
    wire, q, k, q_weight, k_weight, q_rstd, k_rstd, dq, dk, dv, dq_weight, dk_weight, rope_t, rope_h, rope_w, P, P_inv,
    q_b, q_l, k_b, k_l, P_b, P_f, P_r, P_c, I_b, I_f, I_r, I_c, B, L, F, H, W, i_rank, start_frame,
    T: tl.constexpr, PATHS: tl.constexpr, Q_N: tl.constexpr, K_N: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr,
    RANKS: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        unpack_grads_of_pack(
            wire, q, q_weight, q_rstd, dq, dq_weight, rope_t, rope_h, rope_w, P, q_b, q_l, P_b, P_f, P_r, P_c,
            0, B, L, F, H, W, i_rank, start_frame, T, PATHS, Q_N, N, D, AT, AH, Q_HEAD, RANKS, BL, BN, BD,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        if T > 1:
            unpack_grads_of_pack(
                wire, k, k_weight, k_rstd, dk, dk_weight, rope_t, rope_h, rope_w, P_inv, k_b, k_l, I_b, I_f, I_c, I_r,
                1, B, L, F, H, W, i_rank, start_frame, T, PATHS, K_N, N, D, AT, AH, K_HEAD, RANKS, BL, BN, BD,
            )  # fmt: skip
    else:
        if T > 1:
            unpack_grads_of_pack(
                wire, None, None, None, dv, None, None, None, None, P_inv, 0, 0, I_b, I_f, I_c, I_r,
                2, B, L, F, H, W, i_rank, start_frame, T, PATHS, D, N, D, AT, AH, False, RANKS, BL, BN, BD,
            )  # fmt: skip


@triton.jit(do_not_specialize=("B", "L", "F", "H", "W", "R", "start_frame"))
def unpack_fwd_kernel(
    q_wire, k_wire, v_wire, q, k, v, rope_t, k_rope_t, rope_h, rope_w, P, P_inv, V_inv,
    q_b, q_l, k_b, k_l, v_b, v_l, P_b, P_f, P_r, P_c, I_b, I_f, I_r, I_c, B, L, F, H, W, R, start_frame,
    T: tl.constexpr, Q_N: tl.constexpr, K_N: tl.constexpr, V_N: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    AT: tl.constexpr, AH: tl.constexpr, RANKS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """k_rope_t, P_inv absent: keys are not turned, not projected; so are values without V_inv, the same matrix."""
    row = wire_row(tl.program_id(2).to(tl.int64), tl.program_id(0), B, R, H * W, 0, RANKS) * (T * N * D)
    if tl.program_id(1) == 0:
        heads_fwd(
            q_wire + row, None, q, None, rope_t, rope_h, rope_w, P, 0, 0, q_b, q_l, P_b, P_f, P_c, P_r,
            L, F, H, W, start_frame, 0.0, D, Q_N, N, D, AT, AH, False, BN, BD,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        heads_fwd(
            k_wire + row, None, k, None, k_rope_t, rope_h, rope_w, P_inv, 0, 0, k_b, k_l, I_b, I_f, I_r, I_c,
            L, F, H, W, start_frame, 0.0, D, K_N, N, D, AT, AH, False, BN, BD,
        )  # fmt: skip
    else:
        heads_fwd(
            v_wire + row, None, v, None, None, None, None, V_inv, 0, 0, v_b, v_l, I_b, I_f, I_r, I_c,
            L, F, H, W, start_frame, 0.0, D, V_N, N, D, AT, AH, False, BN, BD,
        )  # fmt: skip


@triton.jit
def unpack_heads_bwd(
    dx, wire, rope_t, rope_h, rope_w, M, M_b, M_f, M_r, M_c, B, L, F, H, W, R, start_frame,
    T: tl.constexpr, N: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr, RANKS: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, i_l, S = tl.program_id(2).to(tl.int64), tl.program_id(0), H * W
    i_f, i_s = i_l // S % F, i_l % S
    PATHS: tl.constexpr = 1 if M is None else 2
    p_dx = dx + (i_b * L + i_l) * (PATHS * N * D)
    b_dx = load_heads(p_dx, N, D, D, BN, BD)
    if M is not None:
        b_dprope = load_heads(p_dx + N * D, N, D, D, BN, BD)
        b_dx = turned_back(
            b_dx, b_dprope, rope_t, rope_h, rope_w, M + i_b * M_b + i_f * M_f, M_r, M_c,
            i_s, start_frame + i_f, H, W, D, AT, AH, BD,
        )  # fmt: skip
    elif rope_t is not None:
        b_dx = turned_back(b_dx, b_dx, rope_t, rope_h, rope_w, None, 0, 0, i_s, start_frame + i_f, H, W, D, AT, AH, BD)
    store_heads(wire + wire_row(i_b, i_l, B, R, S, 0, RANKS) * (T * N * D), b_dx, N, D, D, BN, BD)


@triton.jit(do_not_specialize=("B", "L", "F", "H", "W", "R", "start_frame"))
def unpack_bwd_kernel(
    dq, dk, dv, q_wire, k_wire, v_wire, rope_t, rope_h, rope_w, P, P_inv,
    P_b, P_f, P_r, P_c, I_b, I_f, I_r, I_c, B, L, F, H, W, R, start_frame,
    T: tl.constexpr, N: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr,
    RANKS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        unpack_heads_bwd(
            dq, q_wire, rope_t, rope_h, rope_w, P, P_b, P_f, P_r, P_c, B, L, F, H, W, R, start_frame,
            T, N, D, AT, AH, RANKS, BN, BD,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        unpack_heads_bwd(
            dk, k_wire, rope_t, rope_h, rope_w, P_inv, I_b, I_f, I_c, I_r, B, L, F, H, W, R, start_frame,
            T, N, D, AT, AH, RANKS, BN, BD,
        )  # fmt: skip
    else:
        unpack_heads_bwd(
            dv, v_wire, None, None, None, P_inv, I_b, I_f, I_c, I_r, B, L, F, H, W, R, start_frame,
            T, N, D, AT, AH, RANKS, BN, BD,
        )  # fmt: skip


def cameras(P: Tensor | None, P_inv: Tensor | None) -> tuple[int, ...]:
    """Strides of both; zeros where there are none."""
    return tuple(s for M in (P, P_inv) for s in ((0,) * 4 if M is None else M.stride()))


def rope_axes(rope_t: Tensor | None, rope_h: Tensor | None) -> dict[str, int]:
    return {"AT": 0, "AH": 0} if rope_t is None or rope_h is None else axes(rope_t, rope_h)


def ulysses_pack_fwd(
    q: Tensor, k: Tensor | None, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    rope_t: Tensor | None, rope_h: Tensor | None, rope_w: Tensor | None, P: Tensor | None, P_inv: Tensor | None,
    ranks: int, rank: int, F: int, H: int, W: int, eps: float, start_frame: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, L, N, D = q.shape
    T, PATHS = 1 if k is None else 3, 1 if P is None else 2
    k, v = q if k is None else k, q if v is None else v
    wire = q.new_empty(B * L * T * PATHS * N * D)
    q_rstd, k_rstd = new_rstd(q, q_weight), new_rstd(k, k_weight)
    pack_fwd_kernel[(L, T, B)](
        q, k, v, q_weight, k_weight, wire, q_rstd, k_rstd, rope_t, rope_h, rope_w, P, P_inv,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *cameras(P, P_inv), B, L, F, H, W, rank, start_frame, eps,
        T=T, PATHS=PATHS, Q_N=q.stride(2), K_N=k.stride(2), V_N=v.stride(2), N=N, D=D, **rope_axes(rope_t, rope_h),
        Q_HEAD=is_per_head(q_weight, D), K_HEAD=is_per_head(k_weight, D), RANKS=ranks, **tile(N, D, 16),
    )  # fmt: skip
    return wire, q_rstd, k_rstd


def ulysses_pack_bwd(
    dwire: Tensor, q: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    q_rstd: Tensor, k_rstd: Tensor, rope_t: Tensor | None, rope_h: Tensor | None, rope_w: Tensor | None,
    P: Tensor | None, P_inv: Tensor | None, ranks: int, rank: int, F: int, H: int, W: int, start_frame: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, L, N, D = q.shape
    T, PATHS, BL = 1 if k is None else 3, 1 if P is None else 2, tokens_per_program(B * L)
    chunks = triton.cdiv(L, BL)
    dq = q.new_empty(q.shape)
    dk, dv = (q.new_empty(q.shape if T > 1 else 0) for _ in range(2))
    k = q if k is None else k
    dq_weight, dk_weight = new_sums(q, q_weight, B * chunks), new_sums(k, k_weight, B * chunks)
    pack_bwd_kernel[(chunks, T, B)](
        dwire, q, k, q_weight, k_weight, q_rstd, k_rstd, dq, dk, dv, dq_weight, dk_weight, rope_t, rope_h, rope_w, P, P_inv,
        *q.stride()[:2], *k.stride()[:2], *cameras(P, P_inv), B, L, F, H, W, rank, start_frame,
        T=T, PATHS=PATHS, Q_N=q.stride(2), K_N=k.stride(2), N=N, D=D, **rope_axes(rope_t, rope_h),
        Q_HEAD=is_per_head(q_weight, D), K_HEAD=is_per_head(k_weight, D), RANKS=ranks, BL=BL, **tile(N, D, 16),
    )  # fmt: skip
    return dq, dk, dv, dq_weight.sum(0), dk_weight.sum(0)


def ulysses_unpack_fwd(
    q_wire: Tensor, k_wire: Tensor | None, v_wire: Tensor | None, rope_t: Tensor | None, rope_h: Tensor | None,
    rope_w: Tensor | None, P: Tensor | None, P_inv: Tensor | None, B: int, N: int, D: int,
    ranks: int, F: int, H: int, W: int, halves: int, start_frame: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = (q_wire.new_empty(B, halves * F * H * W, N if P is None else 2 * N, D) for _ in range(3))
    launch_unpack(
        q_wire, k_wire, v_wire, q, k, v, rope_t, rope_h, rope_w, P, P_inv,
        B, N, D, ranks, F, H, W, halves, start_frame, True,
    )  # fmt: skip
    return q, k, v


def ulysses_unpack_into_fwd(
    q_wire: Tensor, k_wire: Tensor | None, v_wire: Tensor | None, rope_t: Tensor | None, rope_h: Tensor | None,
    rope_w: Tensor | None, P: Tensor | None, P_inv: Tensor | None, k: Tensor, v: Tensor, B: int, N: int, D: int,
    ranks: int, F: int, H: int, W: int, halves: int, start_frame: int, turn_keys: bool,
) -> Tensor:  # fmt: skip
    q = q_wire.new_empty(B, halves * F * H * W, N if P is None else 2 * N, D)
    launch_unpack(
        q_wire, k_wire, v_wire, q, k, v, rope_t, rope_h, rope_w, P, P_inv,
        B, N, D, ranks, F, H, W, halves, start_frame, turn_keys,
    )  # fmt: skip
    return q


def wires(q_wire: Tensor, k_wire: Tensor | None, v_wire: Tensor | None, step: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """T, and q, k and v of the first token: one wire with three tensors per token, or three wires."""
    if k_wire is None or v_wire is None:
        return 3, q_wire, q_wire[step:], q_wire[2 * step :]
    return 1, q_wire, k_wire, v_wire


def launch_unpack(
    q_wire, k_wire, v_wire, q, k, v, rope_t, rope_h, rope_w, P, P_inv, B, N, D, ranks, F, H, W, halves, start_frame, turn_keys
):
    T, q_wire, k_wire, v_wire = wires(q_wire, k_wire, v_wire, N * D)
    M = P_inv if turn_keys else None
    unpack_fwd_kernel[(q.shape[1], 3, B)](
        q_wire, k_wire, v_wire, q, k, v, rope_t, rope_t if turn_keys else None, rope_h, rope_w, P, M, M,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *cameras(P, P_inv),
        B, q.shape[1], F, H, W, halves * F, start_frame,
        T=T, Q_N=q.stride(2), K_N=k.stride(2), V_N=v.stride(2), N=N, D=D, **rope_axes(rope_t, rope_h),
        RANKS=ranks, **tile(N, D, 16),
    )  # fmt: skip


def ulysses_unpack_bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, rope_t: Tensor | None, rope_h: Tensor | None, rope_w: Tensor | None,
    P: Tensor | None, P_inv: Tensor | None, one_wire: bool, N: int, ranks: int,
    F: int, H: int, W: int, halves: int, start_frame: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, L, _, D = dq.shape
    out = [dq.new_empty(n * B * L * N * D) for n in ((3, 0, 0) if one_wire else (1, 1, 1))]
    others = (None, None) if one_wire else (out[1], out[2])
    T, q_wire, k_wire, v_wire = wires(out[0], others[0], others[1], N * D)
    unpack_bwd_kernel[(L, 3, B)](
        dq, dk, dv, q_wire, k_wire, v_wire, rope_t, rope_h, rope_w, P, P_inv,
        *cameras(P, P_inv), B, L, F, H, W, halves * F, start_frame,
        T=T, N=N, D=D, **rope_axes(rope_t, rope_h), RANKS=ranks, **tile(N, D, 16),
    )  # fmt: skip
    return out[0], out[1], out[2]
