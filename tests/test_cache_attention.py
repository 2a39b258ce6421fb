"""Attention of one chunk after another over the cache, against one attention over all frames with the mask written out."""

import pytest
import torch

import dit_ops
from dit_ops.cache import KVCache
from dit_ops.camera import intrinsics_matrix, parse_trajectory, projective_cameras
from dit_ops.masks import Intervals
from dit_ops.rope import Rope3D

B, N, D, H, W = 2, 2, 16, 2, 1
T = H * W
TEXT = (3, 1)  # tokens of the two samples: the second one has two tokens of padding in front
CHUNKS = (1, 3, 2, 3, 1, 3, 3)
WINDOWS = [(None, 0), (3, 0), (4, 1), (5, 1), (7, 3)]  # with 3 frames at once, some of the chunks wrap around the ring


class Stream:
    """Queries, keys and values of all frames, as projections give them and as attention reads them, and of a text."""

    def __init__(self, cameras: bool):
        F = sum(CHUNKS)
        self.q, self.k, self.v = torch.randn(3, B, F * T, N, D)
        self.weights = torch.randn(2, N * D)
        self.rope = Rope3D(D, splits=(8, 4, 4))
        viewmats = torch.stack([parse_trajectory(f"{name}*{F - 1}") for name in ("l", "w")])
        self.cameras = projective_cameras(viewmats, intrinsics_matrix(0.6, 0.8).expand(B, F, 3, 3)) if cameras else None
        self.turned = self.turn(0, F)
        self.text = torch.randn(2, B, max(TEXT), N, D)  # keys and values, of one path
        for b, length in enumerate(TEXT):
            self.text[:, b, : max(TEXT) - length] = torch.nan  # nobody may read the padding

    def turn(self, first: int, last: int, **options):
        """Queries, keys and values of frames [first, last) through the operator."""
        q, k, v = (t[:, first * T : last * T] for t in (self.q, self.k, self.v))
        where = (self.rope.tables(last, H, W), (last - first, H, W))
        options["start_frame"] = first
        if self.cameras is None:
            v_in = v if "v_out" in options else None
            return *dit_ops.qk_norm_rope(q, k, *self.weights, *where, v=v_in, **options), options.get("v_out", v)
        cameras = (M[:, first:last] for M in self.cameras)
        return dit_ops.qk_norm_rope_prope(q, k, v, *self.weights, *where, *cameras, **options)

    def begin(self, cache: KVCache, first: int, frames: int) -> None:
        P_inv = None if self.cameras is None else self.cameras[1][:, first : first + frames]
        cache.begin(first, frames, T, rope=self.rope, size=(H, W), P_inv=P_inv)

    def text_heads(self, paths: int) -> torch.Tensor:
        return self.text.repeat(1, 1, 1, paths, 1)

    @property
    def paths(self) -> int:
        return 1 if self.cameras is None else 2


def cached_chunk(stream: Stream, cache: KVCache, first: int, frames: int, text: bool) -> torch.Tensor:
    """Attention of a chunk, whose keys and values the operator writes into the cache."""
    with torch.no_grad():
        stream.begin(cache, first, frames)
    heads = stream.paths * N if cache.rotated else N
    if text and cache.prefix_of(0) is None:
        cache.write_prefix(0, *stream.text_heads(heads // N))
    slots = cache.slots(0, stream.k[:, : frames * T], heads)
    k_out, v_out = slots or torch.full((2, B, frames * T, heads, D), torch.nan)
    q, *_ = stream.turn(first, first + frames, k_out=k_out, v_out=v_out, turn_keys=cache.rotated)
    if slots is None:
        cache.write(0, k_out, v_out)
    k, v = cache.visible(0)
    cache.commit()
    padding = [max(TEXT) - length if text else 0 for length in TEXT]
    return torch.cat([dit_ops.attention(q[b, None], k[b, None, n:], v[b, None, n:]) for b, n in enumerate(padding)])


def expected(stream: Stream, window: int | None, sink: int, text: bool) -> torch.Tensor:
    """All frames at once: `[text | frames]`, a chunk sees its sample's text, the sink, and the last frames of the window."""
    q, k, v = stream.turned
    if text:
        k, v = (torch.cat([t, u], 1) for t, u in zip(stream.text_heads(stream.paths), (k, v), strict=True))
    outs, n = [], max(TEXT) if text else 0
    for b in range(B):
        rows, first = [], 0
        for frames in CHUNKS:
            last = first + frames
            recent = 0 if window is None else max(min(sink, last), last - (window - sink))
            seen = [(n - TEXT[b], n)] if text else []
            seen += [(n + f * T, n + (f + 1) * T) for f in (*range(min(sink, recent)), *range(recent, last))]
            rows.append((first * T, last * T, joined(seen)))
            first = last
        mask = Intervals(tuple(rows), q.shape[1], k.shape[1])
        outs.append(dit_ops.attention(q[b, None], k[b, None], v[b, None], mask))
    return torch.cat(outs)


def joined(ranges):
    out = []
    for first, last in ranges:
        if out and out[-1][1] == first:
            out[-1] = (out[-1][0], last)
        else:
            out.append((first, last))
    return tuple(out)


@pytest.mark.parametrize("text", [False, True], ids=["frames", "text and frames"])
@pytest.mark.parametrize("cameras", [False, True], ids=["rope", "rope and prope"])
@pytest.mark.parametrize("window, sink", WINDOWS)
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "unrotated"])
def test_chunk_by_chunk_is_one_attention_with_a_mask(rotated, window, sink, cameras, text):
    """Every chunk runs on other values and cameras first, which its second run overwrites."""
    stream, other = Stream(cameras), Stream(cameras)
    other.text, first, outs = stream.text, 0, []
    if cameras:
        other.cameras = tuple(M.flip(0) for M in stream.cameras)
    cache = KVCache(1, window_frames=window, sink_frames=sink, prefix=4 if text else 0, rotated=rotated)
    for frames in CHUNKS:
        for values in (other, stream):
            out = cached_chunk(values, cache, first, frames, text)
        outs.append(out)
        first += frames
    torch.testing.assert_close(torch.cat(outs, 1), expected(stream, window, sink, text), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cameras", [False, True], ids=["rope", "rope and prope"])
@pytest.mark.parametrize("window, sink", WINDOWS)
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "unrotated"])
def test_the_past_of_a_chunk_with_gradient(rotated, window, sink, cameras):
    """Text with a gradient of its own, the past, and the chunk's own keys: the same attention, and the past has no gradient."""
    stream, first, outs = Stream(cameras), 0, []
    cache = KVCache(1, window_frames=window, sink_frames=sink, rotated=rotated)
    for frames in CHUNKS:
        stream.begin(cache, first, frames)
        q, k, v = (t[:, first * T : (first + frames) * T] for t in stream.turned)
        past = cache.past(0)
        assert (past is None) == (first == 0) or window == frames
        if past is not None:
            assert not any(t.requires_grad for t in past)
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        outs.append(dit_ops.attention(q, k, v))
        cached_chunk(stream, cache, first, frames, False)
        first += frames
    torch.testing.assert_close(torch.cat(outs, 1), expected(stream, window, sink, False), rtol=0, atol=1e-5)


def test_cameras_of_a_chunk_that_is_not_written_stay_out():
    """Frame 3 will take the slot of frame 1; announced and run with gradient, it has not yet."""
    stream = Stream(True)
    cache = KVCache(1, window_frames=3, sink_frames=1, rotated=False)
    for frame in range(3):
        cached_chunk(stream, cache, frame, 1, False)
    before = cache._tables["P_inv"].clone()
    stream.begin(cache, 3, 1)
    cache.past(0)
    assert torch.equal(cache._tables["P_inv"], before)
    cached_chunk(stream, cache, 3, 1, False)
    assert not torch.equal(cache._tables["P_inv"][:, 1], before[:, 1]) and torch.equal(
        cache._tables["P_inv"][:, 2], before[:, 2]
    )


def test_a_cache_that_is_reset_may_go_on_with_cameras_or_without():
    cache = KVCache(1, window_frames=4, rotated=False)
    for with_cameras in (True, False, True):
        stream = Stream(with_cameras)
        cached_chunk(stream, cache, 0, 1, False)
        got = cached_chunk(stream, cache, 1, 3, False)
        q, k, v = (t[:, : 4 * T] for t in stream.turned)
        torch.testing.assert_close(got, dit_ops.attention(q[:, T:], k, v))
        cache.reset()


def test_text_is_written_once_and_forgotten_with_its_states():
    stream, states = Stream(False), torch.zeros(1)
    cache = KVCache(2, prefix=4, window_frames=4)
    assert not cache.text_is(states, None) and cache.text_is(states, None)
    stream.begin(cache, 0, 1)
    cache.write_prefix(0, *stream.text)
    assert torch.equal(cache.prefix_of(0)[0].nan_to_num(), stream.text[0].nan_to_num()) and cache.prefix_of(1) is None
    with pytest.raises(ValueError, match="k must have 3 tokens as in the other layers, got 2"):
        cache.write_prefix(1, *stream.text[:, :, :2])
    with pytest.raises(ValueError, match="k must have 1 to prefix = 4 tokens, got 6"):
        cache.write_prefix(1, *stream.text.repeat(1, 1, 2, 1, 1))
    assert not cache.text_is(states.clone(), None)
    assert cache.prefix_of(0) is None
    with pytest.raises(RuntimeError, match=r"write_prefix\(\) comes before the frames of layer 0"):
        cache.visible(0)


def test_what_an_unrotated_cache_refuses():
    stream = Stream(True)
    cache = KVCache(1, rotated=False)
    with pytest.raises(
        ValueError, match=r"rotated = False needs rope and size = \(height, width\) of 2 tokens, got size = None"
    ):
        cache.begin(0, 1, T)
    stream.begin(cache, 0, 1)
    with pytest.raises(ValueError, match="P_inv must be given for every chunk or for none, got None"):
        cache.begin(0, 1, T, rope=stream.rope, size=(H, W))
    with pytest.raises(ValueError, match="prefix must not be negative, got -1"):
        KVCache(1, prefix=-1)


@pytest.mark.parametrize("cameras", [False, True], ids=["rope", "rope and prope"])
def test_memory_of_wan_1_3b(cameras):
    """480p, 20 frames of 1560 tokens, 30 layers, bf16, on the meta device: 11.5 GB with cameras, or 5.8 + 0.4."""
    like = torch.empty(1, 4 * 1560, 12, 128, dtype=torch.bfloat16, device="meta")
    P_inv = torch.empty(1, 4, 4, 4, device="meta") if cameras else None
    one = 20 * 1560 * 12 * 128 * 2  # keys or values of one layer, one path
    rows = 20 * 44 * 4  # of the frames' RoPE
    for rotated in (True, False):
        cache = KVCache(30, window_frames=20, rotated=rotated)
        with torch.no_grad():
            cache.begin(0, 4, 1560, rope=Rope3D(128), size=(30, 52), P_inv=P_inv, device="meta")
        for layer in range(30):
            cache.slots(layer, like, 24 if rotated and cameras else 12)
            cache.visible(layer)
        if rotated:
            assert cache.nbytes == 30 * 2 * one * (1 + cameras) + rows
        else:
            assert cache.nbytes == 30 * 2 * one + (2 * 2 * one + 20 * 16 * 4 if cameras else one) + 2 * rows
