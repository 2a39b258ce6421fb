"""Closed-form masks against the rule written out per (query, key) pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_ops.layout import VideoLayout
from dit_ops.masks import BlockCausal, Full, Intervals, TeacherForcing

layouts = st.builds(
    VideoLayout,
    frames=st.integers(1, 7),
    height=st.integers(1, 3),
    width=st.integers(1, 2),
    block_frames=st.sampled_from([None, 1, 2, 3, 4]),
    prefix=st.integers(0, 3),
)


def by_rule(layout, rule):
    seen = torch.zeros(layout.total, layout.total, dtype=torch.bool)
    place = [
        None if t < layout.prefix else ((t - layout.prefix) // layout.tokens, layout.frame_of(t)) for t in range(layout.total)
    ]
    for q in range(layout.total):
        for k in range(layout.total):
            seen[q, k] = place[k] is None or (place[q] is not None and rule(place[q], place[k]))
    return seen


@settings(deadline=None, max_examples=40)
@given(layouts)
def test_teacher_forcing(layout):
    layout = VideoLayout(layout.frames, layout.height, layout.width, layout.block_frames, 2, layout.prefix)
    block = layout.block_of

    def rule(q, k):
        (q_half, q_frame), (k_half, k_frame) = q, k
        if q_half == 0:
            return k_half == 0 and block(k_frame) <= block(q_frame)
        return block(k_frame) < block(q_frame) if k_half == 0 else block(k_frame) == block(q_frame)

    assert torch.equal(TeacherForcing(layout).dense(), by_rule(layout, rule))


@settings(deadline=None, max_examples=40)
@given(layouts, st.sampled_from([None, 3, 4, 6]), st.integers(0, 2))
def test_block_causal_with_window_and_sink(layout, window, sink):
    def rule(q, k):
        first, last = layout.blocks[layout.block_of(q[1])]
        in_window = window is None or k[1] >= last - (window - sink)
        return k[1] < last and (in_window or k[1] < sink)

    assert torch.equal(BlockCausal(layout, window, sink).dense(), by_rule(layout, rule))


@settings(deadline=None, max_examples=40)
@given(layouts, st.booleans())
def test_rows_cover_queries_and_ranges_are_sorted_and_disjoint(layout, forcing):
    halves = 2 if forcing else 1
    layout = VideoLayout(layout.frames, layout.height, layout.width, layout.block_frames, halves, layout.prefix)
    mask = TeacherForcing(layout) if forcing else BlockCausal(layout, 3, 1)
    end = 0
    for q0, q1, ranges in mask.intervals():
        assert q0 == end < q1
        assert 1 <= len(ranges) <= 3
        assert all(a < b for a, b in ranges) and all(r[1] < s[0] for r, s in zip(ranges, ranges[1:], strict=False))
        end = q1
    assert end == layout.total
    assert mask.pairs() == mask.dense().sum()


def test_full():
    assert Full(3, 5).dense().all() and Full(3, 5).pairs() == 15
    assert Full(0, 5).intervals() == ()
    assert Full(3, 0).intervals() == ((0, 3, ()),)


def test_intervals_are_their_rows():
    rows = ((0, 2, ((1, 3), (4, 6))), (2, 3, ()))
    mask = Intervals(rows, 3, 6)
    assert mask.intervals() == rows and mask.pairs() == 8
    assert mask.dense().tolist() == [[False, True, True, False, True, True]] * 2 + [[False] * 6]
    assert mask == Intervals(rows, 3, 6) and hash(mask) == hash(Intervals(rows, 3, 6))
    assert Intervals(TeacherForcing(VideoLayout(3, 1, 2, 1, halves=2)).intervals(), 12, 12).pairs() == 48


def test_a_shorter_last_block_never_leaks():
    """Five frames in blocks of two: the last clean block must stop at the clean half's end."""
    layout = VideoLayout(5, 1, 1, 2, halves=2)
    seen = TeacherForcing(layout).dense()
    assert not seen[:5, 5:].any()
    assert seen[9].nonzero().flatten().tolist() == [0, 1, 2, 3, 9]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: VideoLayout(0, 1, 1), "frames must be at least 1, got 0"),
        (lambda: VideoLayout(2, 1, 1, halves=3), "halves must be 1 or 2, got 3"),
        (lambda: TeacherForcing(VideoLayout(2, 1, 1)), "layout must have 2 halves, got 1"),
        (lambda: BlockCausal(VideoLayout(2, 1, 1), 2, 2), "window_frames must exceed sink_frames = 2, got 2"),
        (lambda: Intervals(((1, 2, ()),), 2, 4), r"rows must cover the queries in order, got \[1, 2\) after query 0"),
        (
            lambda: Intervals(((0, 0, ()), (0, 2, ())), 2, 4),
            r"rows must cover the queries in order, got \[0, 0\) after query 0",
        ),
        (lambda: Intervals(((0, 1, ()),), 2, 4), "rows must cover 2 queries, got 1"),
        (lambda: Intervals(((0, 1, ((0, 5),)),), 1, 4), r"non-empty key intervals in \[0, 4\), got \(\(0, 5\),\)"),
        (lambda: Intervals(((0, 1, ((2, 3), (0, 1))),), 1, 4), "must hold sorted, disjoint, non-empty key intervals"),
        (lambda: Intervals(((0, 1, ((2, 2),)),), 1, 4), "must hold sorted, disjoint, non-empty key intervals"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
