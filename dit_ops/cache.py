"""Ring cache of keys and values for causal streaming.

One buffer per layer holds `[text | sink frames | ring of the latest frames]`. A frame's slot follows from its number, so
writing a frame evicts the oldest one and nothing ever moves: softmax does not care about the order of keys. All cursors are
host integers: no `.item()`, no synchronisation. What changes from chunk to chunk is in these cursors, or in small tables of
fixed address that `begin` fills: chunks of one `phase` run the same kernels on the same memory, so a CUDA graph of one serves
the others.
"""

from collections.abc import Hashable

import torch
from torch import Tensor

from dit_ops.ops.qk_norm_rope import Rope
from dit_ops.ops.qk_norm_rope_prope import turn_keys_values
from dit_ops.ring import Ring, runs
from dit_ops.rope import Rope3D

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

    `begin` → per layer `slots` or `write`, then `visible` (no gradient), or `past` (gradient) → `commit`. Without gradient the
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
        self.ring = Ring(window_frames, sink_frames)
        if prefix < 0:
            raise ValueError(f"KVCache: prefix must not be negative, got {prefix}")
        self.window_frames, self.sink_frames = window_frames, sink_frames
        self.layers, self.prefix, self.rotated = layers, prefix, rotated
        self.reset()

    def reset(self) -> None:
        """Forgets every frame and the text; the buffers of a windowed cache are kept, until a longer text needs more room."""
        if not hasattr(self, "_buffers") or self.window_frames is None:
            self._buffers: list[Pair | None] = [None] * self.layers
            self._turned: tuple[Tensor, Tensor | None] | None = None  # rotated = False: what attention reads, of one layer
            self._tables: dict[str, Tensor] = {}  # a row per frame of the chunk, or with rotated = False per slot
            self._plane: tuple[Tensor, Tensor] | None = None  # RoPE of height and width
        self._blank = True  # nothing has been written since
        self.end_frame = 0  # frames [0, end_frame) have been written
        self._last = (0, 0)  # the chunk written last: it may be run again
        self._chunk = (0, 0)
        self._with_gradient = False  # how the chunk was announced
        self._rope: Rope | None = None
        self._turning: tuple[Tensor, Tensor | None, tuple[int, int, int]] | None = None  # rotated = False
        self._tokens_per_frame: int | None = None
        self._has_cameras: bool | None = None
        self._forget_text()

    def _forget_text(self, *states: Tensor | None) -> None:
        self._text_states = states
        self.text: list[tuple[Tensor, ...] | None] = [None] * self.layers
        self.text_lengths: tuple[int, ...] | None = None  # tokens of every sample, where the prefix has them
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
        rope: Rope3D | None = None,
        size: tuple[int, int] | None = None,
        P_inv: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Announces a chunk: the next frames of the stream, or the chunk written last once more.

        rope, size = (height, width) in tokens, device: for the tables that `announced` gives. With rotated = False they are
        needed, and where there are cameras the P⁻¹ [B, frames, 4, 4] of the chunk. Nothing is read from the device.
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
        self.ring.check(*chunk)
        if not self.rotated:
            self._check_unrotated(tokens_per_frame, rope, size, P_inv)
        self._chunk, self._tokens_per_frame, self._with_gradient = chunk, tokens_per_frame, torch.is_grad_enabled()
        if rope is not None and size is not None:
            self._rope = self._rope_of(rope, size, device)
            if not self.rotated:
                self._turning = self._turning_of(rope, size, P_inv, device)

    def announced(self, frames: int) -> Rope:
        """RoPE tables of the announced chunk, whose first frame has row 0; frames: those that the caller is about to run.

        Without gradient the rows of the frames are in a buffer of fixed address, with gradient they are a tensor of their own.
        """
        first, last = self._chunk
        if self._rope is None:
            raise RuntimeError("KVCache: begin() with rope and size comes before a chunk is run")
        if frames != last - first:
            raise ValueError(f"latents must have the {last - first} frames of the announced chunk, got {frames}")
        if torch.is_grad_enabled() != self._with_gradient:
            how = "with" if self._with_gradient else "without"
            raise ValueError(f"the chunk was announced {how} gradient and must be run so")
        return self._rope

    @property
    def phase(self) -> Hashable:
        """Where the announced chunk is: (its slot runs, the visible token range); equal ones use the same memory."""
        text = self.prefix - self._text_tokens
        return tuple(self.ring.runs(range(*self._chunk))), (text, self._tokens(0, self.ring.filled(self._end)).stop)

    @property
    def full(self) -> bool:
        """With the announced chunk every slot holds a frame: from the next one on phases repeat."""
        return self.window_frames is not None and self._end >= self.window_frames

    @property
    def _end(self) -> int:
        """Frames [0, _end) have been written once the announced chunk has."""
        return max(self.end_frame, self._chunk[1])

    def commit(self) -> None:
        """The announced chunk has been written in every layer."""
        self._last, self.end_frame = self._chunk, max(self.end_frame, self._chunk[1])

    def slots(self, layer: int, like: Tensor, heads: int) -> Pair | None:
        """Views `[B, L, heads, D]` of the announced chunk's slots, to write keys and values into; None where the ring wraps.

        like: the chunk's keys `[B, L, ·, D]`    heads: as stored, of both paths where rotated keys have cameras
        """
        k, v = self._reserve(layer, like, heads)
        slots = self.ring.runs(range(*self._chunk))
        if len(slots) != 1:
            return None
        at = self._tokens(*slots[0])
        return k[:, at], v[:, at]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Copies the chunk's keys and values `[B, L, heads, D]` into their slots."""
        T, done = self._frame_tokens, 0
        k_buffer, v_buffer = self._reserve(layer, k, k.shape[2])
        for s0, s1 in self.ring.runs(range(*self._chunk)):
            part = slice(done * T, (done + s1 - s0) * T)
            k_buffer[:, self._tokens(s0, s1)] = k[:, part]
            v_buffer[:, self._tokens(s0, s1)] = v[:, part]
            done += s1 - s0

    def make_room(self, tokens: int) -> None:
        """Room for a text of so many tokens, which a cache can make before the first chunk only, also of another video."""
        if self._blank and tokens > self.prefix:
            self.prefix, self._buffers = tokens, [None] * self.layers
        if tokens > self.prefix:
            room = f"the cache has room for {self.prefix} (text_tokens of new_cache)"
            raise ValueError(f"the text has {tokens} tokens, but {room}")

    def write_prefix(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores the text's keys and values `[B, T, heads, D]`, T up to `prefix`, with as many heads as the frames' are stored.

        A shorter text of a batch has its padding in front, so that every sample sees one run of keys.
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
        filled = self.ring.filled(self._end)
        frames, text = self._tokens(0, filled), slice(self.prefix - self._text_tokens, self.prefix)
        seen = slice(text.start, frames.stop)
        if self.rotated:
            return k[:, seen], v[:, seen]
        k_out, v_out = self._reserve_turned(k)
        self._turn(k[:, frames], v[:, frames], k_out[:, frames], None if v_out is None else v_out[:, frames], False)
        for stored, out in ((k, k_out), (v, v_out)):
            if self._text_tokens and out is not None:  # text has no position and no camera: both paths see it as it is
                out[:, text].unflatten(2, (2 if self._has_cameras else 1, k.shape[2])).copy_(stored[:, text, None])
        return k_out[:, seen], (v if v_out is None else v_out)[:, seen]

    def past(self, layer: int) -> Pair | None:
        """A constant copy of the keys and values of the frames that the chunk sees besides its own; None at the start."""
        slots = self.ring.runs(self.ring.visible(*self._chunk))
        if not slots:
            return None
        k, v = (torch.cat([b[:, self._tokens(*run)] for run in slots], dim=1) for b in self._buffer(layer))
        if self.rotated:
            return k, v
        k_out, v_out = self._new_turned(k)
        with torch.no_grad():
            self._turn(k, v, k_out, v_out, True)
        return k_out, v if v_out is None else v_out

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers and tables, what the layers share included."""
        pairs = [t for pair in (*self._buffers, self._turned) if pair is not None for t in pair]
        return sum(t.nbytes for t in (*pairs, *self._tables.values()) if t is not None)

    # tables of the announced chunk

    def _rope_of(self, rope: Rope3D, size: tuple[int, int], device: torch.device | str) -> Rope:
        """The chunk's rows; height and width from the same tables for ever, which a graph may have taken the address of."""
        rows = rope.rows(*self._chunk, device)
        if self._plane is None or any(table.shape[0] < n for table, n in zip(self._plane, size, strict=True)):
            self._plane = rope.tables(1, *size, device)[1:]
        if not self._with_gradient:  # autograd would keep a buffer that the next chunk overwrites
            rows = self._keep("chunk", rows, 0, [(0, len(rows))])[: len(rows)]
        return rows, *self._plane

    def _keep(self, name: str, new: Tensor, axis: int, slots: list[tuple[int, int]]) -> Tensor:
        """Copies `new` into these slots of a table that has one per frame along `axis`; it stays where it is, as buffers do."""
        table, capacity = self._tables.get(name), self.ring.capacity(self._end)
        if table is None or table.shape[axis] < capacity:
            shape = (*new.shape[:axis], capacity, *new.shape[axis + 1 :])
            self._tables[name] = table = _grown(table, new.new_empty(shape), axis)
        for part, (s0, s1) in zip(new.split([s1 - s0 for s0, s1 in slots], axis), slots, strict=True):
            table.narrow(axis, s0, s1 - s0).copy_(part)
        return table

    # rotated = False

    def _check_unrotated(
        self, tokens_per_frame: int, rope: Rope3D | None, size: tuple[int, int] | None, P_inv: Tensor | None
    ) -> None:
        if rope is None or size is None or size[0] * size[1] != tokens_per_frame:
            raise ValueError(
                f"begin: rotated = False needs rope and size = (height, width) of {tokens_per_frame} tokens, got size = {size}"
            )
        if self._has_cameras not in (None, P_inv is not None):
            raise ValueError(f"P_inv must be given for every chunk or for none, got {'one' if P_inv is not None else 'None'}")
        self._has_cameras = P_inv is not None

    def _turning_of(
        self, rope: Rope3D, size: tuple[int, int], P_inv: Tensor | None, device: torch.device | str
    ) -> tuple[Tensor, Tensor | None, tuple[int, int, int]] | None:
        """RoPE rows, P⁻¹ and the grid of the frames that the chunk sees, in slot order; with gradient those of the past."""
        if not self._with_gradient:
            frames = self.ring.visible(self._end, self._end)
            table = self._keep("slots", torch.cat([rope.rows(*run, device) for run in runs(frames)]), 0, [(0, len(frames))])
            if P_inv is not None:
                P_inv = self._keep("P_inv", P_inv, 1, self.ring.runs(range(*self._chunk)))[:, : len(frames)]
            return table[: len(frames)], P_inv, (len(frames), *size)
        frames = self.ring.visible(*self._chunk)
        if not frames:
            return None
        if P_inv is not None:
            P_inv = torch.cat([self._tables["P_inv"][:, s0:s1] for s0, s1 in self.ring.runs(frames)], 1)
        return torch.cat([rope.rows(*run, device) for run in runs(frames)]), P_inv, (len(frames), *size)

    def _turn(self, k: Tensor, v: Tensor, k_out: Tensor, v_out: Tensor | None, past: bool) -> None:
        """k, v `[B, L, N, D]` of the past or of all visible frames, as attention reads them; without cameras k alone."""
        if self._turning is None or self._plane is None or past != self._with_gradient:
            how = "with" if past else "without"
            raise RuntimeError(f"KVCache: begin() {how} gradient comes before this read of a cache with rotated = False")
        rows, P_inv, grid = self._turning
        turn_keys_values(k, None if v_out is None else v, (rows, *self._plane), grid, P_inv, k_out, v_out)

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

    def _tokens(self, s0: int, s1: int) -> slice:
        """The buffer's tokens of slots [s0, s1)."""
        return slice(self.prefix + s0 * self._frame_tokens, self.prefix + s1 * self._frame_tokens)

    def _reserve(self, layer: int, like: Tensor, heads: int) -> Pair:
        self._blank = False
        B, _, _, D = like.shape
        pair, filled = self._buffers[layer], self.ring.filled(self._end)
        if pair is not None:
            k = pair[0]
            if (k.shape[0], *k.shape[2:], k.dtype, k.device) != (B, heads, D, like.dtype, like.device):
                raise ValueError(
                    f"the cache holds [B, L, N, D] = {list(k.shape)} in {k.dtype} on {k.device}, "
                    f"got {[B, like.shape[1], heads, D]} in {like.dtype} on {like.device}"
                )
        if pair is None or pair[0].shape[1] < self._tokens(0, filled).stop:
            tokens = self._tokens(0, self.ring.capacity(self._end)).stop
            old = pair or (None, None)
            k, v = (_grown(b, like.new_empty(B, tokens, heads, D)) for b in old)
            self._buffers[layer] = pair = k, v
        return pair

    def _buffer(self, layer: int) -> Pair:
        pair = self._buffers[layer]
        if pair is None:
            raise RuntimeError(f"KVCache: layer {layer} was never written")
        return pair


def _grown(old: Tensor | None, new: Tensor, axis: int = 1) -> Tensor:
    """new, which begins with what old holds."""
    if old is not None:
        new.narrow(axis, 0, old.shape[axis]).copy_(old)
    return new
