"""Gradients of attention over key intervals, from o and lse: no atomics, the same bits every run.

p = 2^(log2(e) (scale q k^T - lse))    delta = sum_d do o - dlse    ds = p (do v^T - delta)
dv = p^T do    dk = scale ds^T q    dq = scale ds k

Three kernels: delta; dk and dv, a tile of keys per program, which walks the query intervals that see the tile; dq, a tile of
queries per program, which walks its key intervals as the forward does. Both compute p again: 7 products for 5, and nothing is
added up between programs. Shapes as in kernels/attention.py; do: [B, Lq, N, D], any strides with unit stride over D.
"""

import triton
import triton.language as tl

from dit_ops.kernels._attention_common import LN2, LOG2E, find_unit, load_tile


@triton.jit
def attention_delta_kernel(
    o, do, dlse, delta, do_b, do_t, do_n, N, Lq,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """sum_d do o - dlse of BM queries of one head; o: contiguous"""
    i_h, i_q = tl.program_id(1), tl.program_id(0).to(tl.int64) * BM
    i_b, i_n = (i_h // N).to(tl.int64), (i_h % N).to(tl.int64)
    n_q = (Lq - i_q).to(tl.int32)
    b_o = load_tile(o + ((i_b * Lq + i_q) * N + i_n) * D, N * D, n_q, BM, D, BD, True)
    b_do = load_tile(do + i_b * do_b + i_q * do_t + i_n * do_n, do_t, n_q, BM, D, BD, True)
    o_m = tl.arange(0, BM)
    i_row = i_h.to(tl.int64) * Lq + i_q
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + i_row + o_m, mask=o_m < n_q, other=0.0)
    tl.store(delta + i_row + o_m, b_delta, mask=o_m < n_q)


@triton.jit
def dkdv_block(
    b_k, b_v, b_dk, b_dv, q, do, lse, delta, q_t, do_t, n, qk_scale,
    BL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One block of queries, with keys as rows: s [BM, BL]. A query that is not there has q, do, lse and delta 0: it adds 0."""
    m_l = tl.arange(0, BL) < n
    b_q = load_tile(q, q_t, n, BL, D, BD, True).to(DOT)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    b_lse = tl.load(lse + tl.arange(0, BL), mask=m_l, other=0.0)
    b_p = tl.exp2(b_s * qk_scale - (b_lse * LOG2E)[None, :])
    b_do = load_tile(do, do_t, n, BL, D, BD, True).to(DOT)
    b_delta = tl.load(delta + tl.arange(0, BL), mask=m_l, other=0.0)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dv = tl.dot(b_p.to(DOT), b_do, b_dv, input_precision="ieee")
    b_dk = tl.dot(b_ds.to(DOT), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def attention_dkdv_kernel(
    do, q, k, v, dk, dv, lse, delta, table, do_b, do_t, do_n, q_b, q_t, q_n, k_b, k_t, k_n, v_b, v_t, v_n,
    N, Lq, Lk, heads, qk_scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dk and dv of BM keys, in steps of BN queries. Every step masks its loads; nothing else of it needs a mask."""
    job, i_h = find_unit(table, heads)
    i_b, i_n = (i_h // N).to(tl.int64), (i_h % N).to(tl.int64)
    i_k, n_k, n_pairs = tl.load(job).to(tl.int64), tl.load(job + 1), tl.load(job + 3)
    n_k -= i_k.to(tl.int32)
    pair = table + tl.load(job + 2)
    do += i_b * do_b + i_n * do_n
    q += i_b * q_b + i_n * q_n
    lse += i_h.to(tl.int64) * Lq
    delta += i_h.to(tl.int64) * Lq
    b_k = load_tile(k + i_b * k_b + i_k * k_t + i_n * k_n, k_t, n_k, BM, D, BD, True).to(DOT)
    b_v = load_tile(v + i_b * v_b + i_k * v_t + i_n * v_n, v_t, n_k, BM, D, BD, True).to(DOT)
    b_dk = tl.zeros([BM, BD], dtype=tl.float32)
    b_dv = tl.zeros([BM, BD], dtype=tl.float32)

    for i_pair in range(n_pairs):
        i_q, i_end = tl.load(pair + 2 * i_pair), tl.load(pair + 2 * i_pair + 1)
        for i in range(i_q, i_end, BN):
            b_dk, b_dv = dkdv_block(
                b_k, b_v, b_dk, b_dv, q + tl.cast(i, tl.int64) * q_t, do + tl.cast(i, tl.int64) * do_t, lse + i, delta + i,
                q_t, do_t, i_end - i, qk_scale, BN, D, BD, DOT,
            )  # fmt: skip

    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    i_out = ((i_b * Lk + i_k) * N + i_n) * D + o_m[:, None] * (N * D) + o_d[None, :]
    m_out = (o_m < n_k)[:, None] & (o_d < D)[None, :]
    tl.store(dk + i_out, (b_dk * (qk_scale * LN2)).to(dk.dtype.element_ty), mask=m_out)
    tl.store(dv + i_out, b_dv.to(dv.dtype.element_ty), mask=m_out)


@triton.jit
def dq_block(
    b_q, b_do, b_dq, b_lse, b_delta, k, v, k_t, v_t, n, qk_scale,
    BL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys; b_lse: base 2. A key that is not there has p = 0: 2^(0 - lse) may be inf."""
    b_k = load_tile(k, k_t, n, BL, D, BD, MASKED).to(DOT)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BL]
    b_p = tl.exp2(b_s * qk_scale - b_lse[:, None])
    if MASKED:
        b_p = tl.where((tl.arange(0, BL) < n)[None, :], b_p, 0.0)
    b_v = load_tile(v, v_t, n, BL, D, BD, MASKED).to(DOT)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(DOT), b_k, b_dq, input_precision="ieee")


@triton.jit
def attention_dq_kernel(
    do, q, k, v, dq, lse, delta, table, do_b, do_t, do_n, q_b, q_t, q_n, k_b, k_t, k_n, v_b, v_t, v_n,
    N, Lq, heads, qk_scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    job, i_h = find_unit(table, heads)
    i_b, i_n = (i_h // N).to(tl.int64), (i_h % N).to(tl.int64)
    i_q, n_q, n_pairs = tl.load(job).to(tl.int64), tl.load(job + 1), tl.load(job + 3)
    n_q -= i_q.to(tl.int32)
    pair = table + tl.load(job + 2)
    k += i_b * k_b + i_n * k_n
    v += i_b * v_b + i_n * v_n
    b_q = load_tile(q + i_b * q_b + i_q * q_t + i_n * q_n, q_t, n_q, BM, D, BD, True).to(DOT)
    b_do = load_tile(do + i_b * do_b + i_q * do_t + i_n * do_n, do_t, n_q, BM, D, BD, True).to(DOT)
    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    i_row = i_h.to(tl.int64) * Lq + i_q
    b_lse = tl.load(lse + i_row + o_m, mask=o_m < n_q, other=float("inf")) * LOG2E
    b_delta = tl.load(delta + i_row + o_m, mask=o_m < n_q, other=0.0)
    b_dq = tl.zeros([BM, BD], dtype=tl.float32)

    for i_pair in range(n_pairs):
        i_k, i_end = tl.load(pair + 2 * i_pair), tl.load(pair + 2 * i_pair + 1)
        i_rest = i_end - (i_end - i_k) % BN
        for i in range(i_k, i_rest, BN):
            b_dq = dq_block(
                b_q, b_do, b_dq, b_lse, b_delta, k + tl.cast(i, tl.int64) * k_t, v + tl.cast(i, tl.int64) * v_t, k_t, v_t, BN,
                qk_scale, BN, D, BD, DOT, False,
            )  # fmt: skip
        for i in range(i_rest, i_end, BT):
            b_dq = dq_block(
                b_q, b_do, b_dq, b_lse, b_delta, k + tl.cast(i, tl.int64) * k_t, v + tl.cast(i, tl.int64) * v_t, k_t, v_t,
                i_end - i, qk_scale, BT, D, BD, DOT, True,
            )  # fmt: skip

    p_dq = dq + ((i_b * Lq + i_q) * N + i_n) * D + o_m[:, None] * (N * D) + o_d[None, :]
    tl.store(p_dq, (b_dq * (qk_scale * LN2)).to(dq.dtype.element_ty), mask=(o_m < n_q)[:, None] & (o_d < D)[None, :])
