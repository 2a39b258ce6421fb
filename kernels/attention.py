"""Flash attention over key intervals: o = softmax(scale q k^T) v over the keys a query sees, lse = log sum exp of them.

q, o: [B, Lq, N, D]    k, v: [B, Lk, N, D], any strides with unit stride over D    lse: [B, N, Lq] fp32
A program computes one tile of queries of one head: it walks the key intervals of its tile (_attention_schedule.py), so nothing
outside of them is loaded, and only the last block of an interval is masked. Softmax runs in base 2 with fp32 statistics. Where
whole tiles leave the last wave of SMs half empty, some of them are split over their keys and a second kernel merges the partial
results in a fixed order. No atomics: the same bits every run. The backward's kernels are in _attention_backward.py.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_ops.kernels import _attention_backward as backward
from dit_ops.kernels import _attention_schedule as schedule
from dit_ops.kernels._attention_common import LN2, LOG2E, find_unit, load_tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BR, DELTA_BM = 32, 64  # rows of a program that merges, and of one that computes delta
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
TableOnDevice = tuple[schedule.Table, Tensor]
_tables: dict[tuple, TableOnDevice] = {}


class Blocks(NamedTuple):
    """A program's tile has BM rows; it walks the intervals in steps of BN, and their ends in steps of BT."""

    BM: int
    BN: int
    BT: int
    num_warps: int
    num_stages: int


@triton.jit
def fwd_block(
    b_q, b_acc, b_m, b_l, k, v, k_t, v_t, n, qk_scale,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: m' = max(m, max s), l' = l 2^(m - m') + sum p, acc' = acc 2^(m - m') + p v, p = 2^(s - m')."""
    b_k = load_tile(k, k_t, n, BN, D, BD, MASKED).to(DOT)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
    if MASKED:
        b_s = tl.where((tl.arange(0, BN) < n)[None, :], b_s, -float("inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * qk_scale)
    b_p = tl.exp2(b_s * qk_scale - b_m_new[:, None])
    b_alpha = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_v = load_tile(v, v_t, n, BN, D, BD, MASKED).to(DOT)
    b_acc = tl.dot(b_p.to(DOT), b_v, b_acc * b_alpha[:, None], input_precision="ieee")
    return b_acc, b_m_new, b_l


@triton.jit
def attention_fwd_kernel(
    q, k, v, o, lse, o_part, lse_part, table, q_b, q_t, q_n, k_b, k_t, k_n, v_b, v_t, v_n, N, Lq, heads, qk_scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    job, i_h = find_unit(table, heads)
    i_b, i_n = (i_h // N).to(tl.int64), (i_h % N).to(tl.int64)
    i_q, n_q, n_pairs, slot = tl.load(job).to(tl.int64), tl.load(job + 1), tl.load(job + 3), tl.load(job + 6)
    n_q -= i_q.to(tl.int32)
    pair = table + tl.load(job + 2)
    k += i_b * k_b + i_n * k_n
    v += i_b * v_b + i_n * v_n
    b_q = load_tile(q + i_b * q_b + i_q * q_t + i_n * q_n, q_t, n_q, BM, D, BD, True).to(DOT)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    b_m = tl.full([BM], -float("inf"), tl.float32)
    b_l = tl.zeros([BM], dtype=tl.float32)

    for i_pair in range(n_pairs):
        i_k, i_end = tl.load(pair + 2 * i_pair), tl.load(pair + 2 * i_pair + 1)
        i_rest = i_end - (i_end - i_k) % BN
        for i in range(i_k, i_rest, BN):
            b_acc, b_m, b_l = fwd_block(
                b_q, b_acc, b_m, b_l, k + tl.cast(i, tl.int64) * k_t, v + tl.cast(i, tl.int64) * v_t, k_t, v_t, BN, qk_scale,
                BN, D, BD, DOT, False,
            )  # fmt: skip
        for i in range(i_rest, i_end, BT):
            b_acc, b_m, b_l = fwd_block(
                b_q, b_acc, b_m, b_l, k + tl.cast(i, tl.int64) * k_t, v + tl.cast(i, tl.int64) * v_t, k_t, v_t, i_end - i,
                qk_scale, BT, D, BD, DOT, True,
            )  # fmt: skip

    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    b_l = tl.where(b_l > 0, b_l, 1.0)  # without keys o = 0 and lse = m = -inf
    b_acc /= b_l[:, None]
    b_lse = b_m * LN2 + tl.log(b_l)
    if slot < 0:
        p_o = o + ((i_b * Lq + i_q) * N + i_n) * D + o_m[:, None] * (N * D) + o_d[None, :]
        tl.store(p_o, b_acc.to(o.dtype.element_ty), mask=(o_m < n_q)[:, None] & (o_d < D)[None, :])
        tl.store(lse + i_h.to(tl.int64) * Lq + i_q + o_m, b_lse, mask=o_m < n_q)
    else:
        i_part = (slot.to(tl.int64) * heads + i_h) * BM
        tl.store(o_part + i_part * BD + o_m[:, None] * BD + o_d[None, :], b_acc)
        tl.store(lse_part + i_part + o_m, b_lse)


@triton.jit
def attention_merge_kernel(
    o_part, lse_part, o, lse, merges, N, Lq, heads,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """o = sum_i e^(lse_i - lse) o_i over the pieces of a tile, in order; rows [BR] of one head."""
    i_u, i_r = tl.program_id(0), tl.program_id(1) * BR
    job, i_h = merges + i_u // heads * 4, i_u % heads
    i_b, i_n = (i_h // N).to(tl.int64), (i_h % N).to(tl.int64)
    i_q, i_end, slot, pieces = tl.load(job).to(tl.int64) + i_r, tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
    o_r, o_d = tl.arange(0, BR), tl.arange(0, BD)
    b_acc = tl.zeros([BR, BD], dtype=tl.float32)
    b_m = tl.full([BR], -float("inf"), tl.float32)
    b_l = tl.zeros([BR], dtype=tl.float32)
    for i in range(pieces):
        i_part = ((slot + i).to(tl.int64) * heads + i_h) * BM + i_r
        b_lse = tl.load(lse_part + i_part + o_r)
        b_m_new = tl.maximum(b_m, b_lse)
        b_alpha, b_w = tl.exp(b_m - b_m_new), tl.exp(b_lse - b_m_new)
        b_o = tl.load(o_part + i_part * BD + o_r[:, None] * BD + o_d[None, :])
        b_acc = b_acc * b_alpha[:, None] + b_o * b_w[:, None]
        b_l = b_l * b_alpha + b_w
        b_m = b_m_new
    m_r = i_q + o_r < i_end
    p_o = o + ((i_b * Lq + i_q) * N + i_n) * D + o_r[:, None] * (N * D) + o_d[None, :]
    tl.store(p_o, (b_acc / b_l[:, None]).to(o.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])
    tl.store(lse + i_h.to(tl.int64) * Lq + i_q + o_r, b_m + tl.log(b_l), mask=m_r)


# By compute capability and head size: forward; dk and dv (BM keys, steps of BN queries); dq. All compile without spills.
BLOCKS = {
    (80, 64): (Blocks(128, 64, 32, 8, 3), Blocks(128, 32, 32, 8, 3), Blocks(128, 64, 32, 8, 2)),
    (80, 128): (Blocks(128, 64, 32, 8, 3), Blocks(64, 64, 64, 8, 2), Blocks(128, 64, 32, 8, 2)),
    (90, 64): (Blocks(128, 128, 64, 8, 3), Blocks(128, 64, 64, 8, 2), Blocks(128, 128, 64, 8, 2)),
    (90, 128): (Blocks(128, 128, 64, 8, 2), Blocks(128, 64, 64, 8, 2), Blocks(128, 128, 64, 8, 2)),
    (100, 64): (Blocks(128, 64, 16, 8, 2), Blocks(128, 64, 64, 8, 2), Blocks(128, 64, 32, 8, 2)),
    (100, 128): (Blocks(128, 64, 16, 8, 2), Blocks(64, 64, 64, 8, 2), Blocks(128, 32, 32, 8, 2)),
}
EXACT = (Blocks(32, 32, 32, 8, 1),) * 3  # fp32 products are exact and use no tensor cores: for checks, not for speed


def blocks_of(q: Tensor) -> tuple[Blocks, Blocks, Blocks]:
    if q.dtype == torch.float32 or not q.is_cuda:
        return EXACT
    capability, size = 10 * torch.cuda.get_device_capability(q.device)[0], 64 if q.shape[-1] <= 64 else 128
    return BLOCKS[(capability if (capability, size) in BLOCKS else 80), size]


def places(q: Tensor) -> int:
    """SMs: one program each."""
    return torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1


def constants(D: int, dtype: torch.dtype) -> dict:
    """D, its power of two, and the dtype of products: the interpreter multiplies no bf16."""
    dot = tl.float32 if INTERPRETED and dtype == torch.bfloat16 else DTYPES[dtype]
    return {"D": D, "BD": max(16, triton.next_power_of_2(D)), "DOT": dot}


def on_device(table: schedule.Table, q: Tensor) -> TableOnDevice:
    """The copy does not wait for the GPU; it is ordered on the current stream alone."""
    values = torch.tensor(table.values, dtype=torch.int32)
    return table, values.pin_memory().to(q.device, non_blocking=True) if q.is_cuda else values


def query_table(q: Tensor, rows: Sequence[int], blocks: Blocks, splits: tuple[int, int] | None) -> TableOnDevice:
    """Kept for good: a captured graph reads it at every replay. A table is a few kilobytes."""
    heads = q.shape[0] * q.shape[2]
    key = ("queries", tuple(rows), blocks.BM, blocks.BN, heads, splits, q.device)
    if key not in _tables:
        tiles = schedule.cut(schedule.parse(rows), blocks.BM)
        if splits is None:
            works = sorted((schedule.blocks(tile.pairs, blocks.BN) for tile in tiles), reverse=True)
            splits = schedule.choose_splits(works, heads, places(q))
        _tables[key] = on_device(schedule.pack(tiles, blocks.BN, splits), q)
    return _tables[key]


def key_table(q: Tensor, keys: int, rows: Sequence[int], blocks: Blocks) -> TableOnDevice:
    key = ("keys", tuple(rows), blocks.BM, blocks.BN, keys, q.device)
    if key not in _tables:
        tiles = schedule.cut(schedule.transpose(schedule.parse(rows), keys), blocks.BM)
        _tables[key] = on_device(schedule.pack(tiles, blocks.BN), q)
    return _tables[key]


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Sequence[int],
    scale: float,
    *,
    blocks: Blocks | None = None,
    splits: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, lse) in new memory. rows: q_start, q_end, n, then n pairs k_start, k_end; and again.

    The first call with new rows copies their table to the device; later calls, and graphs captured from them, only launch.
    blocks, splits: other than those of the device and shape, for tests and tuning
    """
    B, Lq, N, D = q.shape
    blocks = blocks or blocks_of(q)[0]
    check(scale, q=q, k=k, v=v)
    o = q.new_empty(B, Lq, N, D)
    lse = q.new_empty(B, N, Lq, dtype=torch.float32)
    if not o.numel():
        return o, lse
    table, values = query_table(q, rows, blocks, splits)
    heads, BM, options = B * N, blocks.BM, constants(D, q.dtype)
    o_part = q.new_empty(table.slots * heads, BM, options["BD"], dtype=torch.float32)
    lse_part = q.new_empty(table.slots * heads, BM, dtype=torch.float32)
    attention_fwd_kernel[(table.jobs * heads,)](
        q, k, v, o, lse, o_part, lse_part, values, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        N, Lq, heads, scale * LOG2E.value, **blocks._asdict(), **options,
    )  # fmt: skip
    if table.merges:
        attention_merge_kernel[(table.merges * heads, triton.cdiv(BM, BR))](
            o_part, lse_part, o, lse, values[table.merges_at :], N, Lq, heads, D=D, BD=options["BD"], BM=BM, BR=min(BM, BR)
        )
    return o, lse


def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rows: Sequence[int],
    scale: float,
    deterministic: bool,
    dlse: Tensor | None = None,
    *,
    blocks: tuple[Blocks, Blocks] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in new memory from o and lse of `attention_fwd`; the same bits every run, whatever `deterministic` says.

    dlse: [B, N, Lq], gradient of lse    blocks: of dk and dv, and of dq; other than those of the device, for tests and tuning
    """
    B, Lq, N, D = q.shape
    Lk, heads, options = k.shape[1], B * N, constants(D, q.dtype)
    of_keys, of_queries = blocks or blocks_of(q)[1:]
    do = do if do.stride(-1) == 1 else do.contiguous()
    check(scale, do=do, q=q, k=k, v=v)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    o, lse, delta, qk_scale = o.contiguous(), lse.contiguous(), lse.new_empty(B, N, Lq), scale * LOG2E.value
    strides = [stride for t in (do, q, k, v) for stride in t.stride()[:3]]
    if dq.numel():
        backward.attention_delta_kernel[(triton.cdiv(Lq, DELTA_BM), heads)](
            o, do, None if dlse is None else dlse.contiguous(), delta, *strides[:3], N, Lq, D=D, BD=options["BD"], BM=DELTA_BM
        )
        table, values = query_table(q, rows, of_queries, (0, 1))
        backward.attention_dq_kernel[(table.jobs * heads,)](
            do, q, k, v, dq, lse, delta, values, *strides, N, Lq, heads, qk_scale, **of_queries._asdict(), **options
        )
    if dk.numel():
        table, values = key_table(q, Lk, rows, of_keys)
        backward.attention_dkdv_kernel[(table.jobs * heads,)](
            do, q, k, v, dk, dv, lse, delta, values, *strides, N, Lq, Lk, heads, qk_scale,
            BM=of_keys.BM, BN=of_keys.BN, num_warps=of_keys.num_warps, num_stages=of_keys.num_stages, **options,
        )  # fmt: skip
    return dq, dk, dv


def check(scale: float, **tensors: Tensor) -> None:
    if scale < 0:
        raise ValueError(f"attention: scale must not be negative, got {scale}")
    for name, t in tensors.items():
        if t.shape[-1] > 128:
            raise ValueError(f"attention: {name} must have heads of at most 128 values, got {t.shape[-1]}")
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(f"attention: {name} must have unit stride over D, got strides {t.stride()}")
        if t.stride(1) >= 1 << 23:
            raise ValueError(f"attention: {name} must have tokens less than 2^23 values apart, got {t.stride(1)}")
