"""The ring cache against the frames that a windowed block-causal mask says are visible, and where a chunk is in it."""

from math import gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_ops.cache import KVCache
from dit_ops.layout import VideoLayout
from dit_ops.masks import BlockCausal

T = 2  # tokens per frame


def frame_values(first, last):
    """Keys whose value is the frame number: `[1, L, 1, 1]`."""
    return torch.arange(first, last).repeat_interleave(T).view(1, -1, 1, 1).float()


@given(st.lists(st.integers(1, 3), min_size=1, max_size=9), st.sampled_from([None, 3, 4, 5, 7]), st.integers(0, 2))
def test_visible_frames_are_those_of_the_mask(chunks, window, sink):
    sink = 0 if window is None else min(sink, window - 1)
    if window is not None and max(chunks) > window - sink:
        return
    cache, start = KVCache(1, window_frames=window, sink_frames=sink), 0
    for frames in chunks:
        end = start + frames
        k = frame_values(start, end)
        for _ in range(2):  # a chunk may be run again
            cache.begin(start, frames, T)
            past = cache.past(0)
            cache.write(0, k, k)
            seen, _ = cache.visible(0)
            cache.commit()
        recent = 0 if window is None else max(0, end - (window - sink))
        expected = sorted({*range(min(sink, end)), *range(recent, end)})
        assert seen.flatten().unique().tolist() == expected
        assert seen.shape[1] == len(expected) * T
        assert sorted(cache.ring.visible(end, end)) == expected
        before = [] if past is None else past[0].flatten().unique().tolist()
        assert before == [f for f in expected if f < start]
        start = end


def test_same_rule_as_the_block_causal_mask():
    layout = VideoLayout(8, 1, T, block_frames=2)
    mask = BlockCausal(layout, window_frames=5, sink_frames=1).dense()
    cache = KVCache(1, window_frames=5, sink_frames=1)
    for first, last in layout.blocks:
        cache.begin(first, last - first, T)
        cache.write(0, frame_values(first, last), frame_values(first, last))
        seen, _ = cache.visible(0)
        cache.commit()
        row = mask[first * T].view(-1, T)[:, 0].nonzero().flatten().tolist()
        assert seen.flatten().unique().tolist() == row


def test_unused_slots_are_never_visible():
    """Slots hold NaN until written (memory is poisoned in tests)."""
    cache = KVCache(1, window_frames=6)
    cache.begin(0, 2, T)
    cache.write(0, frame_values(0, 2), frame_values(0, 2))
    seen, _ = cache.visible(0)
    assert torch.isfinite(seen).all()


def test_memory_of_a_windowed_cache_is_constant_and_the_buffer_never_moves():
    cache, pointers = KVCache(1, window_frames=4, sink_frames=1), set()
    for frame in range(20):
        cache.begin(frame, 1, T)
        cache.write(0, frame_values(frame, frame + 1), frame_values(frame, frame + 1))
        seen, _ = cache.visible(0)
        cache.commit()
        pointers.add(seen.data_ptr())
    assert len(pointers) == 1
    assert cache.nbytes == 2 * 4 * T * 4  # k and v, 4 frames, T tokens, fp32


@pytest.mark.parametrize("block, window, sink", [(4, 20, 0), (3, 5, 0), (2, 7, 3), (3, 7, 1), (4, 4, 0), (1, 5, 2), (4, 10, 4)])
def test_phases_repeat_when_the_ring_is_full(block, window, sink):
    """After lcm(block, ring) / block chunks; equal phases are at equal addresses, and others at others."""
    ring = window - sink
    period = block * ring // gcd(block, ring) // block
    cache, phases, places = KVCache(1, window_frames=window, sink_frames=sink), [], {}
    k = torch.zeros(1, block * 2, 1, 4)
    for first in range(0, 4 * window * block, block):
        cache.begin(first, block, 2)
        assert cache.full == (first + block >= window)
        slots = cache.slots(0, k, 1)
        cache.write(0, k, k)
        visible = cache.visible(0)
        place = [(t.data_ptr(), t.shape) for t in (*(slots or ()), *visible)]
        if cache.full and first >= sink:
            phases.append(cache.phase)
            assert places.setdefault(cache.phase, place) == place
        cache.commit()
        before = cache.phase
        cache.begin(first, block, 2)  # the same chunk again
        assert cache.phase == before
    assert len(places) == len(set(phases)) == period
    assert all(phases[i] == phases[i + period] for i in range(len(phases) - period))


def test_a_growing_cache_is_never_full_and_no_phase_comes_twice():
    cache, phases = KVCache(1), set()
    for first in range(0, 40, 2):
        cache.begin(first, 2, 3)
        phases.add(cache.phase)
        cache.write(0, *torch.zeros(2, 1, 6, 1, 4))
        cache.commit()
        assert not cache.full
    assert len(phases) == 20


def test_the_past_is_a_copy():
    cache = KVCache(1, window_frames=2)
    for frame in (0, 1):
        cache.begin(frame, 1, T)
        cache.write(0, frame_values(frame, frame + 1), frame_values(frame, frame + 1))
        cache.commit()
    cache.begin(2, 1, T)
    k, _ = cache.past(0)
    cache.write(0, frame_values(2, 3), frame_values(2, 3))
    cache.commit()
    cache.begin(3, 1, T)
    cache.write(0, frame_values(3, 4), frame_values(3, 4))
    assert k.unique().tolist() == [1]


def test_reset_forgets_everything():
    cache = KVCache(1, window_frames=3)
    for _ in range(2):
        cache.begin(0, 2, T)
        cache.write(0, frame_values(0, 2), frame_values(0, 2))
        seen, _ = cache.visible(0)
        cache.commit()
        assert seen.shape[1] == 2 * T
        cache.reset()
    assert cache.end_frame == 0


def test_errors():
    cache = KVCache(1, window_frames=4, sink_frames=2)
    with pytest.raises(ValueError, match=r"start_frame must be 0 \(the next frame\)"):
        cache.begin(3, 1, T)
    with pytest.raises(ValueError, match="a chunk of 5 frames does not fit"):
        cache.begin(0, 5, T)
    cache.begin(0, 4, T)  # two sink frames and a full ring
    cache.write(0, frame_values(0, 4), frame_values(0, 4))
    cache.commit()
    with pytest.raises(ValueError, match="frames of 2 tokens, got 3"):
        cache.begin(4, 1, 3)
    cache.begin(4, 1, T)
    with pytest.raises(ValueError, match="the cache holds"):
        cache.write(0, frame_values(4, 5).expand(2, -1, 1, 1), frame_values(4, 5).expand(2, -1, 1, 1))
    with pytest.raises(ValueError, match="window_frames must exceed sink_frames = 4, got 4"):
        KVCache(1, window_frames=4, sink_frames=4)
