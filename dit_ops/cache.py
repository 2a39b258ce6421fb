"""Ring cache of keys and values for causal streaming.

One buffer per layer holds `[text | sink frames | ring of the latest frames]`. A frame's slot follows from its number, so
writing a frame evicts the oldest one and nothing ever moves: softmax does not care about the order of keys. All cursors are
host integers: no `.item()`, no synchronisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_ops.masks import Intervals, check_window
from dit_ops.ops.qk_norm_rope_prope import turn_keys_values

FIRST_FRAMES = 8  # first allocation of a cache without a window; it doubles from there

Pair = tuple[Tensor, Tensor]


class KVCache:
    """Keys and values of the frames that a new chunk sees, for every layer.

    layers          number of attention layers
    window_frames   latent frames visible at once, sink and the current chunk included; None = all, the buffers then grow
    sink_frames     first frames of the stream that are never evicted
    prefix          most text tokens that every chunk sees besides the frames; they are never evicted
    rotated         True: keys and values are stored as attention reads them: turned by RoPE, with cameras both paths, 2N heads
                    False: normed keys and plain values, N heads; they are turned, and projected by the cameras of their frames,
                    into a buffer that all layers share whenever a layer reads them. Half the memory, the same results

    `begin` → per layer `slots` and `visible`, or `write` (no gradient), or `past` (gradient) → `commit`. Without gradient the
    chunk's keys go into their slots; the same chunk may be run again and overwrites them. With gradient nothing is written:
    the past is a constant snapshot, so backward gives the exact gradient truncated to the chunk, also under activation
    checkpointing, and the caller reruns the chunk on its clean result without gradient before it goes on. The text is not
    part of that snapshot: it has a gradient of its own, or `prefix_of` gives what was written.
    """

    def __init__(
        self,
        layers: int,
        *,
        window_frames: int | None = None,
        sink_frames: int = 0,
        prefix: int = 0,
        rotated: bool = True,
    ):
        check_window("KVCache", window_frames, sink_frames)
        if window_frames is None and sink_frames:
            raise ValueError(f"KVCache: sink_frames = {sink_frames} needs window_frames, got None (nothing is evicted)")
        if prefix < 0:
            raise ValueError(f"KVCache: prefix must not be negative, got {prefix}")
        self.window_frames, self.sink_frames = window_frames, sink_frames
        self.layers, self.prefix, self.rotated = layers, prefix, rotated
        self.reset()

    def reset(self) -> None:
        """Forgets every frame and the text; the buffers of a windowed cache are kept."""
        if not hasattr(self, "_buffers") or self.window_frames is None:
            self._buffers: list[Pair | None] = [None] * self.layers
            self._turned: tuple[Tensor, Tensor | None] | None = None  # rotated = False: what attention reads, of one layer
            self._P_inv: Tensor | None = None  # rotated = False: [B, slots, 4, 4]
            self._new_P_inv: Tensor | None = None  # of the announced chunk, not in its slots yet
        self.end_frame = 0  # frames [0, end_frame) have been written
        self._last = (0, 0)  # the chunk written last: it may be run again
        self._chunk = (0, 0)
        self._tokens_per_frame: int | None = None
        self._has_cameras: bool | None = None
        self._forget_text()

    def _forget_text(self, *states: Tensor | None) -> None:
        self._text_states = states
        self.text: list[tuple[Tensor, ...] | None] = [None] * self.layers
        self._text_tokens = 0  # of the longest sample
        self._prefix_layers: set[int] = set()

    def text_is(self, *states: Tensor | None) -> bool:
        """Whether `text` and the prefix were computed from these very tensors; if not, they are dropped."""
        same = len(states) == len(self._text_states) and all(a is b for a, b in zip(states, self._text_states, strict=True))
        if not same:
            self._forget_text(*states)
        return same

    def begin(
        self,
        start_frame: int,
        frames: int,
        tokens_per_frame: int,
        *,
        rope: tuple[Tensor, Tensor, Tensor] | None = None,
        size: tuple[int, int] | None = None,
        P_inv: Tensor | None = None,
    ) -> None:
        """Announces a chunk: the next frames of the stream, or the chunk written last once more.

        A cache with rotated = False also needs what keys are turned by: the RoPE tables of frames [0, start_frame + frames),
        size = (height, width) in tokens, and where there are cameras the P⁻¹ [B, frames, 4, 4] of the chunk.
        """
        chunk = (start_frame, start_frame + frames)
        if start_frame != self.end_frame and chunk != self._last:
            first, last = self._last
            raise ValueError(
                f"start_frame must be {self.end_frame} (the next frame) or {first} with {last - first} frames "
                f"(the last chunk again), got {start_frame} with {frames} frames"
            )
        if self._tokens_per_frame not in (None, tokens_per_frame):
            raise ValueError(f"the cache holds frames of {self._tokens_per_frame} tokens, got {tokens_per_frame}")
        # a chunk may start in the sink; the rest of it must fit into the ring
        ring = None if self.window_frames is None else self.window_frames - self.sink_frames
        if ring is not None and chunk[1] - max(chunk[0], self.sink_frames) > ring:
            raise ValueError(
                f"a chunk of {frames} frames does not fit: window_frames = {self.window_frames}, "
                f"sink_frames = {self.sink_frames}"
            )
        if not self.rotated:
            self._begin_unrotated(tokens_per_frame, rope, size, P_inv)
        self._chunk, self._tokens_per_frame = chunk, tokens_per_frame

    def commit(self) -> None:
        """The announced chunk has been written in every layer."""
        self._last, self.end_frame = self._chunk, max(self.end_frame, self._chunk[1])

    def slots(self, layer: int, like: Tensor, heads: int) -> Pair | None:
        """Views `[B, L, heads, D]` of the announced chunk's slots, to write keys and values into; None where the ring wraps.

        like: the chunk's keys `[B, L, ·, D]`    heads: as stored, of both paths where rotated keys have cameras
        """
        k, v = self._reserve(layer, like, heads)
        self._store_cameras()
        runs = self._slot_runs(*self._chunk)
        if len(runs) != 1:
            return None
        at = self._tokens(*runs[0])
        return k[:, at], v[:, at]

    def write(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        """Copies the chunk's keys and values `[B, L, heads, D]` into their slots and returns all visible ones."""
        T, done = self._frame_tokens, 0
        k_buffer, v_buffer = self._reserve(layer, k, k.shape[2])
        self._store_cameras()
        for s0, s1 in self._slot_runs(*self._chunk):
            part = slice(done * T, (done + s1 - s0) * T)
            k_buffer[:, self._tokens(s0, s1)] = k[:, part]
            v_buffer[:, self._tokens(s0, s1)] = v[:, part]
            done += s1 - s0
        return self.visible(layer)

    def write_prefix(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores the text's keys and values `[B, T, heads, D]`, T up to `prefix`, with as many heads as the frames' are stored.

        A shorter text of a batch has its padding in front, so that every sample sees one run of keys (`masks`).
        """
        n = k.shape[1]
        if not 1 <= n <= self.prefix:
            raise ValueError(f"write_prefix: k must have 1 to prefix = {self.prefix} tokens, got {n}")
        if self._prefix_layers and n != self._text_tokens:
            raise ValueError(f"write_prefix: k must have {self._text_tokens} tokens as in the other layers, got {n}")
        for buffer, new in zip(self._reserve(layer, k, k.shape[2]), (k, v), strict=True):
            buffer[:, self.prefix - n : self.prefix] = new
        self._text_tokens = n
        self._prefix_layers.add(layer)

    def prefix_of(self, layer: int) -> Pair | None:
        """The text's keys and values as they were written, views `[B, T, heads, D]`; None before `write_prefix`."""
        if layer not in self._prefix_layers:
            return None
        k, v = self._buffer(layer)
        text = slice(self.prefix - self._text_tokens, self.prefix)
        return k[:, text], v[:, text]

    def visible(self, layer: int) -> Pair:
        """All keys and values that the announced chunk sees, its own included: `[text | sink | ring]` in slot order.

        Views of the buffers; with rotated = False valid until the next layer reads.
        """
        if self.prefix and layer not in self._prefix_layers:
            raise RuntimeError(f"KVCache: write_prefix() comes before the frames of layer {layer} are read")
        k, v = self._buffer(layer)
        last = max(self.end_frame, self._chunk[1])
        filled = self._filled(last)
        frames, text = self._tokens(0, filled), slice(self.prefix - self._text_tokens, self.prefix)
        seen = slice(text.start, frames.stop)
        if self.rotated:
            return k[:, seen], v[:, seen]
        k_out, v_out = self._reserve_turned(k)
        to = k_out[:, frames], None if v_out is None else v_out[:, frames]
        self._turn(k[:, frames], v[:, frames], *to, self.visible_frames(last), [(0, filled)])
        for stored, out in ((k, k_out), (v, v_out)):
            if self._text_tokens and out is not None:  # text has no position and no camera: both paths see it as it is
                out[:, text].unflatten(2, (2 if self._has_cameras else 1, k.shape[2])).copy_(stored[:, text, None])
        return k_out[:, seen], (v if v_out is None else v_out)[:, seen]

    def past(self, layer: int) -> Pair | None:
        """A constant copy of the keys and values of the frames that the chunk sees besides its own; None at the start."""
        first, last = self._chunk
        if first == 0:
            return None
        frames = {*range(min(self.sink_frames, first)), *range(self._oldest(last), first)}
        in_order = sorted(frames, key=self._slot)
        runs = _runs([self._slot(f) for f in in_order])
        if not runs:
            return None
        k, v = (torch.cat([b[:, self._tokens(*run)] for run in runs], dim=1) for b in self._buffer(layer))
        if self.rotated:
            return k, v
        k_out, v_out = self._new_turned(k)
        with torch.no_grad():
            self._turn(k, v, k_out, v_out, in_order, runs)
        return k_out, v if v_out is None else v_out

    def masks(self, queries: int, text_lengths: Sequence[int]) -> list[Intervals] | None:
        """Which keys of `visible` each sample sees: no padding of its text, which is in front; None where there is no padding.

        queries: tokens of the announced chunk    text_lengths: of every sample, the longest is the T of `write_prefix`
        """
        n = self._text_tokens
        if not all(0 <= length <= n for length in text_lengths):
            raise ValueError(f"masks: text_lengths must be in [0, {n}], got {list(text_lengths)}")
        if all(length == n for length in text_lengths):
            return None
        keys = n + self._filled(max(self.end_frame, self._chunk[1])) * self._frame_tokens
        return [Intervals(((0, queries, ((n - length, keys),)),), queries, keys) for length in text_lengths]

    def visible_frames(self, last: int | None = None) -> list[int]:
        """Frame numbers that a chunk ending before frame `last` sees, in slot order."""
        last = self.end_frame if last is None else last
        frames = [*range(min(self.sink_frames, last)), *range(max(self._oldest(last), min(self.sink_frames, last)), last)]
        return sorted(frames, key=self._slot)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, the one that layers share included."""
        tensors = [self._P_inv, *(t for pair in (*self._buffers, self._turned) if pair is not None for t in pair)]
        return sum(t.nbytes for t in tensors if t is not None)

    # rotated = False

    def _begin_unrotated(self, tokens_per_frame, rope, size, P_inv) -> None:
        if rope is None or size is None or size[0] * size[1] != tokens_per_frame:
            raise ValueError(
                f"begin: rotated = False needs rope and size = (height, width) of {tokens_per_frame} tokens, got size = {size}"
            )
        if self._has_cameras not in (None, P_inv is not None):
            raise ValueError(f"P_inv must be given for every chunk or for none, got {'one' if P_inv is not None else 'None'}")
        self._has_cameras = P_inv is not None
        self._rope, self._size = rope, size
        self._tables: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
        self._new_P_inv = P_inv

    def _store_cameras(self) -> None:
        """The announced chunk's cameras into its slots, once for all layers."""
        P_inv, self._new_P_inv, done = self._new_P_inv, None, 0
        if P_inv is None:
            return
        frames = self._capacity(self._filled(max(self.end_frame, self._chunk[1])))
        if self._P_inv is None or self._P_inv.shape[1] < frames:
            self._P_inv = _grown(self._P_inv, P_inv.new_empty(P_inv.shape[0], frames, 4, 4))
        for s0, s1 in self._slot_runs(*self._chunk):
            self._P_inv[:, s0:s1] = P_inv[:, done : done + s1 - s0]
            done += s1 - s0

    def _turn(
        self, k: Tensor, v: Tensor, k_out: Tensor, v_out: Tensor | None, frames: list[int], runs: list[tuple[int, int]]
    ) -> None:
        """k, v `[B, L, N, D]` of `frames`, which are in the slots `runs`, as attention reads them; without cameras k alone."""
        at = tuple(frames)
        if at not in self._tables:  # once for all layers
            P_inv = None
            if self._has_cameras and self._P_inv is not None:
                P_inv = torch.cat([self._P_inv[:, s0:s1] for s0, s1 in runs], dim=1)
            self._tables[at] = torch.cat([self._rope[0][f0:f1] for f0, f1 in _runs(frames)]), P_inv
        rope_t, P_inv = self._tables[at]
        rope, grid = (rope_t, *self._rope[1:]), (len(frames), *self._size)
        turn_keys_values(k, None if v_out is None else v, rope, grid, P_inv, k_out, v_out)

    def _reserve_turned(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        pair = self._turned
        if pair is None or pair[0].shape[1] < like.shape[1] or (pair[1] is not None) != self._has_cameras:
            self._turned = pair = self._new_turned(like)
        return pair

    def _new_turned(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Room for what attention reads: both paths of keys and values with cameras; without them only keys are turned."""
        B, tokens, N, D = like.shape
        k_out = like.new_empty(B, tokens, 2 * N if self._has_cameras else N, D)
        return k_out, torch.empty_like(k_out) if self._has_cameras else None

    # slots and buffers

    @property
    def _frame_tokens(self) -> int:
        if self._tokens_per_frame is None:
            raise RuntimeError("KVCache: begin() comes before keys and values are written or read")
        return self._tokens_per_frame

    def _slot(self, frame: int) -> int:
        if self.window_frames is None or frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % (self.window_frames - self.sink_frames)

    def _oldest(self, last: int) -> int:
        """First non-sink frame that is visible when the chunk ends before frame `last`."""
        if self.window_frames is None:
            return 0
        return max(self.sink_frames, last - (self.window_frames - self.sink_frames))

    def _filled(self, last: int) -> int:
        return last if self.window_frames is None else min(last, self.window_frames)

    def _capacity(self, filled: int) -> int:
        """Frames that buffers are made for."""
        return self.window_frames or max(FIRST_FRAMES, 1 << (filled - 1).bit_length())

    def _slot_runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """Contiguous slot ranges of frames [first, last), in frame order."""
        return _runs([self._slot(f) for f in range(first, last)])

    def _tokens(self, s0: int, s1: int) -> slice:
        """The buffer's tokens of slots [s0, s1)."""
        return slice(self.prefix + s0 * self._frame_tokens, self.prefix + s1 * self._frame_tokens)

    def _reserve(self, layer: int, like: Tensor, heads: int) -> Pair:
        B, _, _, D = like.shape
        pair, filled = self._buffers[layer], self._filled(max(self.end_frame, self._chunk[1]))
        if pair is not None:
            k = pair[0]
            if (k.shape[0], *k.shape[2:], k.dtype, k.device) != (B, heads, D, like.dtype, like.device):
                raise ValueError(
                    f"the cache holds [B, L, N, D] = {list(k.shape)} in {k.dtype} on {k.device}, "
                    f"got {[B, like.shape[1], heads, D]} in {like.dtype} on {like.device}"
                )
        if pair is None or pair[0].shape[1] < self._tokens(0, filled).stop:
            tokens = self._tokens(0, self._capacity(filled)).stop
            old = pair or (None, None)
            k, v = (_grown(b, like.new_empty(B, tokens, heads, D)) for b in old)
            self._buffers[layer] = pair = k, v
        return pair

    def _buffer(self, layer: int) -> Pair:
        pair = self._buffers[layer]
        if pair is None:
            raise RuntimeError(f"KVCache: layer {layer} was never written")
        return pair


def _grown(old: Tensor | None, new: Tensor) -> Tensor:
    """new, which begins with what old holds."""
    if old is not None:
        new[:, : old.shape[1]] = old
    return new


def _runs(slots: list[int]) -> list[tuple[int, int]]:
    """Ranges [first, last) of consecutive slots."""
    runs: list[tuple[int, int]] = []
    for s in slots:
        if runs and runs[-1][1] == s:
            runs[-1] = (runs[-1][0], s + 1)
        else:
            runs.append((s, s + 1))
    return runs
