"""An interval mask as dense problems: which slices of queries meet which slices of keys, in forward and in backward.

Costs are counted in tokens read or written, one token being its N·D values in the inputs' dtype; `call` is what starting one
dense kernel costs, in the same unit. What all tilings share (the products themselves, reading q, writing o) is left out.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

Range = tuple[int, int]
Row = tuple[int, int, tuple[Range, ...]]


class Rectangle(NamedTuple):
    """Queries [q0, q1) and, side by side, the keys of `keys`: a slice in place if it is one interval, else a copy."""

    q0: int
    q1: int
    keys: tuple[Range, ...]

    @property
    def size(self) -> int:
        return sum(b - a for a, b in self.keys)

    @property
    def copied(self) -> int:
        """Tokens of k and v that are read and written to put the keys side by side."""
        return 4 * self.size if len(self.keys) > 1 else 0


def flatten(rows: Sequence[Row]) -> list[int]:
    """q_start, q_end, n, then n pairs k_start, k_end; and again."""
    return [i for q0, q1, ranges in rows for i in (q0, q1, len(ranges), *(edge for pair in ranges for edge in pair))]


def parse(rows: Sequence[int]) -> list[Row]:
    """The inverse of flatten; rows without queries and intervals without keys are dropped."""
    out, at = [], 0
    while at < len(rows):
        q0, q1, n = rows[at : at + 3]
        edges = rows[at + 3 : at + 3 + 2 * n]
        if q0 < q1:
            out.append((q0, q1, tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)))
        at += 3 + 2 * n
    return out


def joined(rows: list[Row]) -> list[Row]:
    """Intervals that touch become one, and so do neighbouring rows that see the same keys."""
    out: list[Row] = []
    for q0, q1, ranges in rows:
        keys: list[Range] = []
        for a, b in ranges:
            if keys and keys[-1][1] == a:
                keys[-1] = (keys[-1][0], b)
            else:
                keys.append((a, b))
        if out and out[-1][1] == q0 and out[-1][2] == tuple(keys):
            out[-1] = (out[-1][0], q1, tuple(keys))
        else:
            out.append((q0, q1, tuple(keys)))
    return out


def partitions(row: Row) -> list[list[Rectangle]]:
    """Ways to compute a row: every interval apart, all side by side, or the longest apart and the others side by side."""
    q0, q1, keys = row
    if len(keys) < 2:
        return [[Rectangle(q0, q1, keys)] if keys else []]
    longest = max(keys, key=lambda pair: pair[1] - pair[0])
    others = tuple(pair for pair in keys if pair != longest)
    ways: list[list[tuple[Range, ...]]] = [[(pair,) for pair in keys], [keys], [(longest,), others]]
    return [[Rectangle(q0, q1, part) for part in way] for way in ways]


def forward_cost(way: list[Rectangle], call: float) -> float:
    """k parts of n queries are written and read once more than one whole: 2 (k - 1) n; then the copied keys."""
    merged = 2 * (len(way) - 1) * (way[0].q1 - way[0].q0) if way else 0
    return merged + sum(rectangle.copied + call for rectangle in way)


def backward_cost(way: Sequence[Rectangle], call: float) -> float:
    """Adding a 16-bit part to an fp32 sum moves five tokens: for dq of every query, for dk and dv of every key."""
    return sum(5 * (r.q1 - r.q0) + 10 * r.size + r.copied + call for r in way)


@functools.lru_cache(maxsize=256)
def forward_plan(rows: tuple[int, ...], call: float) -> tuple[tuple[int, int, tuple[Rectangle, ...]], ...]:
    """(q0, q1, its rectangles) for every row: no rectangle = no keys, several = to be merged."""
    plan = []
    for row in joined(parse(rows)):
        way = min(partitions(row), key=lambda way: forward_cost(way, call))
        plan.append((row[0], row[1], tuple(way)))
    return tuple(plan)


@functools.lru_cache(maxsize=256)
def backward_plan(rows: tuple[int, ...], call: float) -> tuple[Rectangle, ...]:
    """Rectangles that cover every visible pair once: by rows of queries or by columns of keys, whichever moves less."""
    lines = joined(parse(rows))
    by_rows = [r for row in lines for r in min(partitions(row), key=lambda way: backward_cost(way, call))]
    by_columns = columns(lines)
    return tuple(by_rows if backward_cost(by_rows, call) <= backward_cost(by_columns, call) else by_columns)


def columns(rows: list[Row]) -> list[Rectangle]:
    """The mask cut at every edge of a key interval; below it, runs of queries that see the same column."""
    edges = sorted({edge for _, _, keys in rows for pair in keys for edge in pair})
    out: list[Rectangle] = []
    for a, b in zip(edges, edges[1:], strict=False):
        runs: list[Range] = []
        for q0, q1, keys in rows:
            if any(k0 <= a and b <= k1 for k0, k1 in keys):
                if runs and runs[-1][1] == q0:
                    runs[-1] = (runs[-1][0], q1)
                else:
                    runs.append((q0, q1))
        out += [Rectangle(q0, q1, ((a, b),)) for q0, q1 in runs]
    return out


def join(ranges: list[Range]) -> list[Range]:
    """Sorted and disjoint: ranges that overlap or touch become one."""
    out: list[Range] = []
    for a, b in sorted(ranges):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], b))
        else:
            out.append((a, b))
    return out


def cut(span: Range, ranges: list[Range]) -> list[Range]:
    """The span cut at the edges of the ranges."""
    edges = sorted({*span, *(edge for pair in ranges for edge in pair if span[0] < edge < span[1])})
    return [*zip(edges, edges[1:], strict=False)]
