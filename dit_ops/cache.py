"""Ring cache of keys and values for causal streaming.

One buffer per layer holds `[sink frames | ring of the latest frames]`. A frame's slot follows from its number, so writing a
frame evicts the oldest one and nothing ever moves: softmax does not care about the order of keys. All cursors are host
integers: no `.item()`, no synchronisation.
"""

import torch
from torch import Tensor

from dit_ops.masks import check_window

FIRST_FRAMES = 8  # first allocation of a cache without a window; it doubles from there


class KVCache:
    """Keys and values of the frames that a new chunk sees, for every layer.

    layers          number of attention layers
    window_frames   latent frames visible at once, sink and the current chunk included; None = all, the buffers then grow
    sink_frames     first frames of the stream that are never evicted

    `begin` → per layer `write` (no gradient) or `past` (gradient) → `commit`. Without gradient the chunk's keys go into their
    slots; the same chunk may be run again and overwrites them. With gradient nothing is written: the past is a constant
    snapshot, so backward gives the exact gradient truncated to the chunk, also under activation checkpointing, and the caller
    reruns the chunk on its clean result without gradient before it goes on.
    """

    def __init__(self, layers: int, *, window_frames: int | None = None, sink_frames: int = 0):
        check_window("KVCache", window_frames, sink_frames)
        if window_frames is None and sink_frames:
            raise ValueError(f"KVCache: sink_frames = {sink_frames} needs window_frames, got None (nothing is evicted)")
        self.window_frames, self.sink_frames = window_frames, sink_frames
        self.layers = layers
        self.reset()

    def reset(self) -> None:
        """Forgets every frame and the text; the buffers of a windowed cache are kept."""
        if not hasattr(self, "_k") or self.window_frames is None:
            self._k: list[Tensor | None] = [None] * self.layers
            self._v: list[Tensor | None] = [None] * self.layers
        self.end_frame = 0  # frames [0, end_frame) have been written
        self._last = (0, 0)  # the chunk written last: it may be run again
        self._chunk = (0, 0)
        self._tokens_per_frame: int | None = None
        self._text_states: Tensor | None = None
        self.text: list[tuple[Tensor, ...] | None] = [None] * self.layers

    def text_is(self, states: Tensor) -> bool:
        """Whether `text` was computed from this very tensor; if not, the entries are dropped."""
        if self._text_states is states:
            return True
        self._text_states, self.text = states, [None] * self.layers
        return False

    def begin(self, start_frame: int, frames: int, tokens_per_frame: int) -> None:
        """Announces a chunk: the next frames of the stream, or the chunk written last once more."""
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
        self._chunk, self._tokens_per_frame = chunk, tokens_per_frame

    def commit(self) -> None:
        """The announced chunk has been written in every layer."""
        self._last, self.end_frame = self._chunk, max(self.end_frame, self._chunk[1])

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the chunk's k and v `[B, L, N, D]` and returns all visible keys and values as views of the buffers."""
        T = self._frame_tokens
        filled = self._filled(max(self.end_frame, self._chunk[1]))
        for buffers, new in ((self._k, k), (self._v, v)):
            buffer = self._reserve(buffers, layer, new, filled)
            done = 0
            for s0, s1 in self._slot_runs(*self._chunk):
                buffer[:, s0 * T : s1 * T] = new[:, done * T : (done + s1 - s0) * T]
                done += s1 - s0
        return self._buffer(self._k, layer)[:, : filled * T], self._buffer(self._v, layer)[:, : filled * T]

    def past(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """A constant copy of the keys and values that the announced chunk sees besides its own; None at the start."""
        first, last = self._chunk
        if first == 0:
            return None
        T = self._frame_tokens
        frames = {*range(min(self.sink_frames, first)), *range(self._oldest(last), first)}
        runs = _runs(sorted(self._slot(f) for f in frames))
        if not runs:
            return None
        k, v = self._buffer(self._k, layer), self._buffer(self._v, layer)
        parts = [torch.cat([b[:, s0 * T : s1 * T] for s0, s1 in runs], dim=1) for b in (k, v)]
        return parts[0], parts[1]

    def visible_frames(self, last: int | None = None) -> list[int]:
        """Frame numbers that a chunk ending before frame `last` sees, in slot order."""
        last = self.end_frame if last is None else last
        frames = [*range(min(self.sink_frames, last)), *range(max(self._oldest(last), min(self.sink_frames, last)), last)]
        return sorted(frames, key=self._slot)

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in (*self._k, *self._v) if b is not None)

    @property
    def _frame_tokens(self) -> int:
        if self._tokens_per_frame is None:
            raise RuntimeError("KVCache: begin() comes before write() and past()")
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

    def _slot_runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """Contiguous slot ranges of frames [first, last), in frame order."""
        return _runs([self._slot(f) for f in range(first, last)])

    def _reserve(self, buffers: list[Tensor | None], layer: int, like: Tensor, filled: int) -> Tensor:
        B, _, N, D = like.shape
        T, buffer = self._frame_tokens, buffers[layer]
        if buffer is not None and (buffer.shape[0], *buffer.shape[2:], buffer.dtype, buffer.device) != (
            B,
            N,
            D,
            like.dtype,
            like.device,
        ):
            raise ValueError(
                f"the cache holds [B, L, N, D] = {list(buffer.shape)} in {buffer.dtype} on {buffer.device}, "
                f"got {list(like.shape)} in {like.dtype} on {like.device}"
            )
        if buffer is None or buffer.shape[1] < filled * T:
            frames = self.window_frames or max(FIRST_FRAMES, 1 << (filled - 1).bit_length())
            grown = like.new_empty(B, frames * T, N, D)
            if buffer is not None:
                grown[:, : buffer.shape[1]] = buffer
            buffers[layer] = buffer = grown
        return buffer

    @staticmethod
    def _buffer(buffers: list[Tensor | None], layer: int) -> Tensor:
        buffer = buffers[layer]
        if buffer is None:
            raise RuntimeError(f"KVCache: layer {layer} was never written")
        return buffer


def _runs(slots: list[int]) -> list[tuple[int, int]]:
    """Ranges [first, last) of consecutive slots."""
    runs: list[tuple[int, int]] = []
    for s in slots:
        if runs and s == runs[-1][1]:
            runs[-1] = (runs[-1][0], s + 1)
        else:
            runs.append((s, s + 1))
    return runs
