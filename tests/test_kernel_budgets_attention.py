"""Attention's schedule, and its Triton kernels compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, tensor cores,
128-bit accesses."""

import re
import sys
from pathlib import Path

import pytest
import torch

from dit_ops import _library as lib
from dit_ops.kernels import _attention_schedule as schedule
from dit_ops.layout import VideoLayout
from dit_ops.masks import BlockCausal, Full, TeacherForcing

sys.path.append(str(Path(__file__).resolve().parents[1]))

COMPILES = pytest.mark.skipif(
    bool(lib.MISSING["triton"]) or lib.INTERPRETED, reason=lib.MISSING["triton"] or "the interpreter compiles nothing"
)
BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32
SHARED = {80: 99, 90: 227, 100: 227}  # KiB a program may use; the blocks of sm_80 serve sm_86, sm_89 and sm_120 as well
SMS = 132
MASKS = {
    "full": Full(10, 23),
    "block causal": BlockCausal(VideoLayout(7, 2, 3, block_frames=2)),
    "window, sink and prefix": BlockCausal(VideoLayout(7, 2, 3, block_frames=1, prefix=5), window_frames=3, sink_frames=1),
    "teacher forcing": TeacherForcing(VideoLayout(5, 2, 3, block_frames=2, halves=2)),
}


def parsed(mask) -> list[schedule.Tile]:
    rows = ((q0, q1, len(pairs), *(edge for pair in pairs for edge in pair)) for q0, q1, pairs in mask.intervals())
    return schedule.parse([i for row in rows for i in row])


def matrix(tiles: list[schedule.Tile], rows: int, columns: int) -> torch.Tensor:
    seen = torch.zeros(rows, columns, dtype=torch.int32)
    for tile in tiles:
        for a, b in tile.pairs:
            seen[tile.start : tile.end, a:b] += 1
    return seen


def unpacked(table: schedule.Table) -> list[schedule.Tile]:
    records = [table.values[i : i + schedule.RECORD] for i in range(0, table.jobs * schedule.RECORD, schedule.RECORD)]
    edges = [table.values[at : at + 2 * n] for _, _, at, n, *_ in records]
    pairs = [tuple(zip(e[::2], e[1::2], strict=True)) for e in edges]
    return [schedule.Tile(r[0], r[1], p, r[6]) for r, p in zip(records, pairs, strict=True)]


@pytest.mark.parametrize("splits", [(0, 1), (1, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_tables_hold_every_visible_pair_once(name, splits):
    mask = MASKS[name]
    queries = schedule.pack(schedule.cut(parsed(mask), 4), 3, splits)
    assert torch.equal(matrix(unpacked(queries), mask.queries, mask.keys), mask.dense().int())
    keys = schedule.pack(schedule.cut(schedule.transpose(parsed(mask), mask.keys + 3), 4), 3)
    seen = matrix(unpacked(keys), mask.keys + 3, mask.queries).T
    assert torch.equal(seen[:, : mask.keys], mask.dense().int()) and not seen[:, mask.keys :].count_nonzero()


@pytest.mark.parametrize("name", MASKS)
def test_heavy_jobs_come_first_and_groups_are_of_equal_work(name):
    tiles = schedule.cut(parsed(MASKS[name]), 4)
    table = schedule.pack(tiles, 3)
    works = [schedule.blocks(tile.pairs, 3) for tile in unpacked(table)]
    assert works == sorted(works, reverse=True) and table.jobs == len(tiles)
    for i in range(table.jobs):
        first, size = table.values[i * schedule.RECORD + 4 : i * schedule.RECORD + 6]
        assert first <= i < first + size and works[first : first + size] == [works[i]] * works.count(works[i])


def test_pieces_of_a_tile_cover_its_blocks_in_order():
    pairs = ((0, 10), (12, 13), (20, 41))
    for count in (1, 2, 3, 5):
        parts = schedule.pieces(pairs, 4, count)
        assert [i for part in parts for a, b in part for i in range(a, b)] == [i for a, b in pairs for i in range(a, b)]
        works = [schedule.blocks(part, 4) for part in parts]
        assert sum(works) == schedule.blocks(pairs, 4) and max(works) - min(works) <= 1


@pytest.mark.parametrize(
    "heads, whole", [(12, 0.84), (6, 0.84), (3, 0.84), (16, 0.90), (8, 0.75), (4, 0.56), (2, 0.56), (40, 0.93)]
)
def test_splits_fill_the_last_wave(heads, whole):
    """One chunk of 4680 queries over 32760 keys in blocks of 128 on 132 SMs: busy share of the SMs without and with splits."""
    works = [256] * 37
    ideal = 37 * 256 * heads / SMS
    tiles, count = schedule.choose_splits(works, heads, SMS)
    costs = works[tiles:] + [(i + 1) * 256 // count - i * 256 // count for i in range(count)] * tiles
    assert ideal / schedule.makespan(works, heads, SMS) == pytest.approx(whole, abs=0.01)
    assert ideal / schedule.makespan(costs, heads, SMS) >= 0.96


def test_what_is_short_or_even_is_not_split():
    assert schedule.choose_splits([7] * 37, 12, SMS) == (0, 1)  # short: a piece would be smaller than its overhead
    assert schedule.choose_splits([256] * 33, 12, SMS) == (0, 1)  # three full waves
    assert schedule.choose_splits([256] * 512, 12, SMS) == (0, 1)  # many waves
    assert schedule.choose_splits([], 12, SMS) == (0, 1)


def kernels(capability: int, D: int, N: int):
    """(name, compiled kernel): a chunk's queries in packed QKV, keys and values in a ring."""
    from dit_ops.kernels import _attention_backward as backward
    from dit_ops.kernels import attention

    fwd, dkdv, dq = attention.BLOCKS[capability, D]
    C, Lq, Lk, heads = N * D, 4680, 32760, N
    q, kv, do = (3 * C * Lq, 3 * C, D), (C * Lk, C, D), (C * Lq, C, D)
    options = attention.constants(D, BF16) | {"grid": (1,)}
    four, shared = [BF16] * 4, {"D": D, "BD": options["BD"], "grid": (1,)}
    kernel = attention.attention_fwd_kernel
    yield "forward", kernel.warmup(*four, *[FP32] * 3, INT32, *q, *kv, *kv, N, Lq, heads, 0.1, **fwd._asdict(), **options)
    kernel = attention.attention_merge_kernel
    yield "merge", kernel.warmup(FP32, FP32, BF16, FP32, INT32, N, Lq, heads, BM=fwd.BM, BR=attention.BR, **shared)
    kernel = backward.attention_delta_kernel
    yield "delta", kernel.warmup(BF16, BF16, FP32, FP32, *do, N, Lq, BM=attention.DELTA_BM, **shared)
    step = {name: value for name, value in dkdv._asdict().items() if name != "BT"}
    tables, strides = [FP32, FP32, INT32], (*do, *q, *kv, *kv)
    kernel = backward.attention_dkdv_kernel
    yield "dk and dv", kernel.warmup(*four, BF16, BF16, *tables, *strides, N, Lq, Lk, heads, 0.1, **step, **options)
    kernel = backward.attention_dq_kernel
    yield "dq", kernel.warmup(*four, BF16, *tables, *strides, N, Lq, heads, 0.1, **dq._asdict(), **options)


@COMPILES
@pytest.mark.parametrize("D, N", [(128, 12), (64, 1)])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_kernels(capability, D, N):
    from tools.offline_triton import offline_driver, report

    with offline_driver(capability):
        for name, kernel in kernels(capability, D, N):
            assert kernel.metadata.target.arch == capability
            used = report(kernel)
            assert used["stack"] == used["LDL"] == used["STL"] == 0, f"{name} spills: {used}"
            assert used["registers"] * used["warps"] * 32 <= 65536, f"{name}: a program fits an SM: {used}"
            assert used["shared"] <= SHARED[capability] * 1024, f"{name}: {used}"
            assert used["LDG.E.128"] + used["LDGSTS"] and (name == "delta" or used["STG.E.128"]), f"{name}: {used}"
            assert not re.search(r"(ld|st)\.global\S*\.b16", kernel.asm["ptx"]), f"{name} has 16-bit accesses"
            if name not in ("merge", "delta"):
                products = {80: "HMMA", 90: "HGMMA"}.get(capability)
                assert used[products] if products else "tcgen05.mma" in kernel.asm["ptx"], f"{name}: {used}"
