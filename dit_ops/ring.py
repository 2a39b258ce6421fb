"""Which frames of a stream are kept, and in which slot: `[sink | ring of the latest frames]`. Host integers only."""

from dit_ops.masks import check_window

FIRST_FRAMES = 8  # first allocation without a window; it doubles from there


class Ring:
    """A frame's slot follows from its number; a new frame takes the slot of the one that leaves.

    window_frames   frames visible at once, sink and the current chunk included; None = all, a frame's slot is its number
    sink_frames     first frames, which never leave
    """

    def __init__(self, window_frames: int | None, sink_frames: int):
        check_window("KVCache", window_frames, sink_frames)
        if window_frames is None and sink_frames:
            raise ValueError(f"KVCache: sink_frames = {sink_frames} needs window_frames, got None (nothing is evicted)")
        self.window_frames, self.sink_frames = window_frames, sink_frames

    def check(self, first: int, last: int) -> None:
        """A chunk may start in the sink; the rest of it must fit into the ring."""
        if self.window_frames is None:
            return
        if last - max(first, self.sink_frames) > self.window_frames - self.sink_frames:
            raise ValueError(
                f"a chunk of {last - first} frames does not fit: window_frames = {self.window_frames}, "
                f"sink_frames = {self.sink_frames}"
            )

    def slot(self, frame: int) -> int:
        if self.window_frames is None or frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % (self.window_frames - self.sink_frames)

    def oldest(self, last: int) -> int:
        """The first frame behind the sink that is visible when the chunk ends before frame `last`."""
        if self.window_frames is None:
            return 0
        return max(self.sink_frames, last - (self.window_frames - self.sink_frames))

    def visible(self, first: int, last: int) -> list[int]:
        """Frames below `first` that a chunk ending before frame `last` sees, in slot order; first = last: its own, too."""
        return sorted({*range(min(self.sink_frames, first)), *range(self.oldest(last), first)}, key=self.slot)

    def filled(self, last: int) -> int:
        """Slots in use when the chunk ends before frame `last`: the first ones."""
        return last if self.window_frames is None else min(last, self.window_frames)

    def capacity(self, last: int) -> int:
        """Slots that buffers are made for."""
        return self.window_frames or max(FIRST_FRAMES, 1 << (last - 1).bit_length())

    def runs(self, frames: list[int] | range) -> list[tuple[int, int]]:
        """Their slots as contiguous ranges, in the frames' order."""
        return runs([self.slot(f) for f in frames])


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ranges [first, last) of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and found[-1][1] == n:
            found[-1] = (found[-1][0], n + 1)
        else:
            found.append((n, n + 1))
    return found
