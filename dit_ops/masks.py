"""Attention masks in closed form: every block of queries sees a few intervals of keys.

A mask is `intervals()`: rows `(q_start, q_end, ((k_start, k_end), ...))` of host integers that cover all queries in order,
with key intervals sorted, disjoint and not empty. `dense()` is the same as a boolean matrix, for tests.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_ops.layout import VideoLayout

Range = tuple[int, int]
Row = tuple[int, int, tuple[Range, ...]]


class Mask:
    """Base of the masks: needs `intervals()`, `queries` and `keys`."""

    queries: int
    keys: int

    def intervals(self) -> tuple[Row, ...]:
        raise NotImplementedError

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """Boolean `[queries, keys]`, True where a query sees a key."""
        seen = torch.zeros(self.queries, self.keys, dtype=torch.bool, device=device)
        for q0, q1, key_ranges in self.intervals():
            for k0, k1 in key_ranges:
                seen[q0:q1, k0:k1] = True
        return seen

    def pairs(self) -> int:
        """Visible (query, key) pairs: attention's useful FLOPs are 4 · pairs · C forward."""
        return sum((q1 - q0) * sum(k1 - k0 for k0, k1 in ranges) for q0, q1, ranges in self.intervals())


def merge(ranges: list[Range]) -> tuple[Range, ...]:
    """Sorts, drops empty ranges and joins those that touch."""
    out: list[Range] = []
    for k0, k1 in sorted(r for r in ranges if r[0] < r[1]):
        if out and k0 <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], k1))
        else:
            out.append((k0, k1))
    return tuple(out)


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    queries: int
    keys: int

    def intervals(self) -> tuple[Row, ...]:
        return ((0, self.queries, merge([(0, self.keys)])),) if self.queries else ()


@dataclass(frozen=True)
class Intervals(Mask):
    """A mask given by its rows, such as the text of one sample and the frames of a cache without the padding in between.

    rows must cover the queries in order, with key intervals sorted, disjoint and not empty.
    """

    rows: tuple[Row, ...]
    queries: int  # type: ignore[misc]
    keys: int  # type: ignore[misc]

    def __post_init__(self):
        at = 0
        for q0, q1, ranges in self.rows:
            if q0 != at or q1 <= q0:
                raise ValueError(f"Intervals: rows must cover the queries in order, got [{q0}, {q1}) after query {at}")
            if merge(list(ranges)) != tuple(ranges) or any(k0 < 0 or k1 > self.keys for k0, k1 in ranges):
                raise ValueError(
                    f"Intervals: rows must hold sorted, disjoint, non-empty key intervals in [0, {self.keys}), got {ranges}"
                )
            at = q1
        if at != self.queries:
            raise ValueError(f"Intervals: rows must cover {self.queries} queries, got {at}")

    def intervals(self) -> tuple[Row, ...]:
        return self.rows


class _VideoMask(Mask):
    """Queries and keys are the same sequence; the text prefix sees itself, everyone sees the prefix."""

    layout: VideoLayout

    @property
    def queries(self) -> int:  # type: ignore[override]
        return self.layout.total

    @property
    def keys(self) -> int:  # type: ignore[override]
        return self.layout.total

    def _prefix_rows(self) -> list[Row]:
        p = self.layout.prefix
        return [(0, p, ((0, p),))] if p else []


@dataclass(frozen=True)
class BlockCausal(_VideoMask):
    """Block i sees blocks 0 … i, or of them the first `sink_frames` and the last ones.

    window_frames counts every frame that a query sees, sink and its own block included; the window ends with the last frame
    of the query's block. None = no limit.
    """

    layout: VideoLayout
    window_frames: int | None = None
    sink_frames: int = 0

    def __post_init__(self):
        check_window("BlockCausal", self.window_frames, self.sink_frames)
        if self.layout.halves != 1:
            raise ValueError(f"BlockCausal: layout must have 1 half, got {self.layout.halves}")

    def intervals(self) -> tuple[Row, ...]:
        at, prefix, rows = self.layout.token_range, (0, self.layout.prefix), self._prefix_rows()
        for first, last in self.layout.blocks:
            recent = 0 if self.window_frames is None else max(0, last - (self.window_frames - self.sink_frames))
            sink = min(self.sink_frames, last)
            rows.append((*at((first, last)), merge([prefix, at((0, sink)), at((recent, last))])))
        return tuple(rows)


@dataclass(frozen=True)
class TeacherForcing(_VideoMask):
    """`[clean | noisy]`: clean block i sees clean 0 … i, noisy block i sees clean 0 … i−1 and itself."""

    layout: VideoLayout

    def __post_init__(self):
        if self.layout.halves != 2:
            raise ValueError(f"TeacherForcing: layout must have 2 halves, got {self.layout.halves}")

    def intervals(self) -> tuple[Row, ...]:
        at, prefix, rows = self.layout.token_range, (0, self.layout.prefix), self._prefix_rows()
        for first, last in self.layout.blocks:
            rows.append((*at((first, last), 0), merge([prefix, at((0, last), 0)])))
        for first, last in self.layout.blocks:
            rows.append((*at((first, last), 1), merge([prefix, at((0, first), 0), at((first, last), 1)])))
        return tuple(rows)


def check_window(what: str, window_frames: int | None, sink_frames: int) -> None:
    if sink_frames < 0:
        raise ValueError(f"{what}: sink_frames must not be negative, got {sink_frames}")
    if window_frames is not None and window_frames <= sink_frames:
        raise ValueError(f"{what}: window_frames must exceed sink_frames = {sink_frames}, got {window_frames}")
