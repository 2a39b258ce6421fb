"""Which token is which: the arithmetic between tokens, frames and causal blocks. Host integers only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoLayout:
    """A video as a token sequence, row-major over (frame, height, width): `[prefix | half 0 | half 1]`.

    frames, height, width   token grid of one half (height and width are counted in tokens, not pixels)
    block_frames            frames that see each other (one causal block); None = all of them; the last block may be shorter
    halves                  1, or 2 for teacher forcing: `[clean | noisy]`
    prefix                  text tokens in front of the video
    start_frame             absolute index of the first frame (streaming)
    """

    frames: int
    height: int
    width: int
    block_frames: int | None = None
    halves: int = 1
    prefix: int = 0
    start_frame: int = 0

    def __post_init__(self):
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"VideoLayout: {name} must be at least 1, got {getattr(self, name)}")
        if self.block_frames is not None and self.block_frames < 1:
            raise ValueError(f"VideoLayout: block_frames must be at least 1 or None, got {self.block_frames}")
        if self.halves not in (1, 2):
            raise ValueError(f"VideoLayout: halves must be 1 or 2, got {self.halves}")
        if self.prefix < 0 or self.start_frame < 0:
            raise ValueError(
                f"VideoLayout: prefix and start_frame must not be negative, got {self.prefix} and {self.start_frame}"
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of one half."""
        return self.frames * self.tokens_per_frame

    @property
    def total(self) -> int:
        """Tokens of the whole sequence, prefix and both halves."""
        return self.prefix + self.halves * self.tokens

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Causal blocks as frame ranges [first, last) of this layout."""
        step = self.block_frames or self.frames
        return tuple((f, min(f + step, self.frames)) for f in range(0, self.frames, step))

    def frame_of(self, token: int) -> int:
        """The frame, counted in this layout, of a token of the sequence."""
        if not self.prefix <= token < self.total:
            raise ValueError(f"VideoLayout: token must be a video token in [{self.prefix}, {self.total}), got {token}")
        return (token - self.prefix) % self.tokens // self.tokens_per_frame

    def block_of(self, frame: int) -> int:
        return frame // (self.block_frames or self.frames)

    def token_range(self, frames: tuple[int, int], half: int = 0) -> tuple[int, int]:
        """The token range of a frame range in one half."""
        offset = self.prefix + half * self.tokens
        return offset + frames[0] * self.tokens_per_frame, offset + frames[1] * self.tokens_per_frame
