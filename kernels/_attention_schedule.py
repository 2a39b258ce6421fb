"""Which program computes what: the tiles of an interval mask, in the order in which a GPU should start them.

A tile is a range of queries and the key intervals that all of them see; for the gradients of k and v it is a range of keys and
the query intervals that see all of it. Tiles never cross an edge of the mask, so only the last block of an interval is masked.
Everything here is host integers, made once per mask and shape.

A table for the kernels is flat int32: RECORD integers per job, heavy jobs first, then the pairs they point to.
    start, end      the tile
    pairs, n        where the tile's n intervals (start, end) begin in the table
    first, size     the jobs of equal work around this one: their programs go head by head, so that those which run at the
                    same time read the same keys
    slot            where a piece of a split tile leaves its partial result; -1 = the tile is whole
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

RECORD = 8
# Estimates for an H100, in the time of one block of keys (1.9 us): start and end of a program, store of a partial result,
# launch of the merge, and how many partial results (64 KiB each) the merge reads in that time
PROGRAM, PIECE, MERGE, MERGED = 2, 1, 2, 90
MAX_PIECES, MIN_BLOCKS, MAX_WAVES = 8, 4, 32

Pairs = tuple[tuple[int, int], ...]


class Tile(NamedTuple):
    start: int
    end: int
    pairs: Pairs
    slot: int = -1


@dataclass(frozen=True)
class Table:
    """The int32 table of `jobs` jobs; `merges` records (start, end, first slot, pieces) of split tiles begin at `merges_at`."""

    values: list[int]
    jobs: int
    merges_at: int
    merges: int
    slots: int


def parse(rows: Sequence[int]) -> list[Tile]:
    """q_start, q_end, n, then n pairs k_start, k_end, and again, as rows; empty intervals are dropped."""
    out, at = [], 0
    while at < len(rows):
        start, end, n = rows[at : at + 3]
        edges = rows[at + 3 : at + 3 + 2 * n]
        out.append(Tile(start, end, tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)))
        at += 3 + 2 * n
    return out


def transpose(rows: Iterable[Tile], keys: int) -> list[Tile]:
    """Ranges of keys that cover [0, keys) in order, each with the query intervals that see all of it."""
    rows = [row for row in rows if row.start < row.end]
    edges = sorted({0, keys, *(edge for row in rows for pair in row.pairs for edge in pair)})
    out = []
    for k0, k1 in zip(edges, edges[1:], strict=False):
        seen: list[tuple[int, int]] = []
        for row in rows:
            if not any(a <= k0 and k1 <= b for a, b in row.pairs):
                continue
            if seen and seen[-1][1] == row.start:
                seen[-1] = (seen[-1][0], row.end)
            else:
                seen.append((row.start, row.end))
        out.append(Tile(k0, k1, tuple(seen)))
    return out


def cut(rows: Iterable[Tile], block: int) -> list[Tile]:
    """Rows cut into tiles of at most `block`."""
    return [row._replace(start=at, end=min(at + block, row.end)) for row in rows for at in range(row.start, row.end, block)]


def blocks(pairs: Pairs, block: int) -> int:
    return sum(-(-(b - a) // block) for a, b in pairs)


def pieces(pairs: Pairs, block: int, count: int) -> list[Pairs]:
    """The intervals as `count` lists of intervals with nearly equal numbers of blocks, in order."""
    total, out = blocks(pairs, block), []
    for i in range(count):
        lo, hi, at, part = i * total // count, (i + 1) * total // count, 0, []
        for a, b in pairs:
            n = blocks(((a, b),), block)
            first, last = max(lo - at, 0), min(hi - at, n)
            if first < last:
                part.append((a + first * block, min(a + last * block, b)))
            at += n
        out.append(tuple(part))
    return out


def makespan(costs: Iterable[int], heads: int, places: int) -> int:
    """When the last program ends if `places` of them run at a time, heavy ones first, `heads` of every cost."""
    free = [0] * places
    for cost in sorted(costs, reverse=True):
        for _ in range(heads):
            heapq.heapreplace(free, free[0] + cost)
    return max(free)


def heavy_tiles(works: Sequence[int]) -> int:
    """How many of the descending works are above half of the first."""
    return sum(1 for work in works if 2 * work > works[0])


def choose_splits(works: Sequence[int], heads: int, places: int) -> tuple[int, int]:
    """(tiles, pieces): the last so many of the heavy tiles are each split into so many pieces of their keys; (0, 1) = none.

    works: key blocks per tile, descending    places: programs that run at a time
    Splitting pays where the last wave of equal tiles is not full: whole tiles fill the waves before it, pieces of the others
    fill the last one. The smallest makespan wins, the fewest pieces among equals.
    """
    if not works or works[0] < 2 * MIN_BLOCKS or len(works) * heads > MAX_WAVES * places:
        return 0, 1
    heavy, best, chosen = heavy_tiles(works), makespan((work + PROGRAM for work in works), heads, places), (0, 1)
    waves = heavy * heads // places
    counts = {heavy - wave * places // heads for wave in (waves, waves - 1) if wave > 0} | {heavy}
    for tiles in sorted(counts - {0}):
        for count in range(2, min(MAX_PIECES, works[0] // MIN_BLOCKS) + 1):
            costs = [work + PROGRAM for work in (*works[: heavy - tiles], *works[heavy:])]
            for work in works[heavy - tiles : heavy]:
                costs += [(i + 1) * work // count - i * work // count + PIECE + PROGRAM for i in range(count)]
            time = makespan(costs, heads, places) + MERGE + tiles * count * heads // MERGED
            if time < best:
                best, chosen = time, (tiles, count)
    return chosen


def by_work(tiles: Iterable[Tile], block: int) -> list[Tile]:
    return sorted(tiles, key=lambda tile: -blocks(tile.pairs, block))


def pack(tiles: Iterable[Tile], block: int, splits: tuple[int, int] = (0, 1)) -> Table:
    """The table of the tiles, split as `choose_splits` says."""
    tiles, (split, count) = by_work(tiles, block), splits
    heavy = heavy_tiles([blocks(tile.pairs, block) for tile in tiles])
    jobs, merges = tiles[: heavy - split] + tiles[heavy:], []
    for i, tile in enumerate(tiles[heavy - split : heavy]):
        merges += [tile.start, tile.end, i * count, count]
        parts = enumerate(pieces(tile.pairs, block, count))
        jobs += [tile._replace(pairs=pairs, slot=i * count + j) for j, pairs in parts]
    jobs = by_work(jobs, block)
    works = [blocks(job.pairs, block) for job in jobs]
    sizes, first = Counter(works), {work: i for i, work in reversed([*enumerate(works)])}
    records: list[int] = []
    edges: list[int] = []
    where: dict[Pairs, int] = {}
    for job, work in zip(jobs, works, strict=True):
        if job.pairs not in where:
            where[job.pairs] = len(jobs) * RECORD + len(edges)
            edges += [edge for pair in job.pairs for edge in pair]
        records += [job.start, job.end, where[job.pairs], len(job.pairs), first[work], sizes[work], job.slot, 0]
    values = records + edges
    return Table(values + merges, len(jobs), len(values), len(merges) // 4, split * count)
