"""What the forward and the backward kernels of attention share: finding a program's tile, and loading rows."""

import math

import triton
import triton.language as tl

from dit_ops.kernels import _attention_schedule as schedule

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
RECORD = tl.constexpr(schedule.RECORD)


@triton.jit
def find_unit(table, heads):
    """(job record, head): within jobs of equal work the tiles of one head come one after the other."""
    i_u = tl.program_id(0)
    job = table + i_u // heads * RECORD
    first, size = tl.load(job + 4), tl.load(job + 5)
    i_local = i_u - first * heads
    return table + (first + i_local % size) * RECORD, i_local // size


@triton.jit
def load_tile(x, x_t, n, BL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """[BL, BD]: n rows from x on, x_t apart; zeros outside [n, D]. Without MASKED all BL rows are there."""
    o_l, o_d = tl.arange(0, BL), tl.arange(0, BD)
    p_x = x + o_l[:, None] * x_t + o_d[None, :]
    if MASKED:
        b_x = tl.load(p_x, mask=(o_l < n)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BD:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    return b_x
