"""Sequence parallelism (Ulysses): the ranks that share one video, what each of them holds, and how the result comes together.

Every frame's S tokens are split over the ranks, so a rank holds [B, R * S_r] tokens of the R = halves * frames rows: its tables
of a row per frame (modulation, cameras) are those of the whole video. Between the two exchanges of a block it holds all tokens
of its heads. Where the ranks do not divide, the first ones hold one more: nothing is padded.
Every rank computes the same loss; the backward of gather_tokens sums over the group; so the mean of the gradients over the
joint mesh (data × sequence) is the exact gradient.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ops.layout import VideoLayout
from dit_ops.ops._ulysses_wire import exchange, first_of, split


class SequenceParallel:
    """The ranks of a process group share one video. A group of one rank communicates and copies nothing."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def heads(self, N: int) -> list[int]:
        """Heads of every rank between the exchanges."""
        return split(N, self.size)

    def tokens(self, layout: VideoLayout) -> list[int]:
        """Video tokens of every rank, all halves, without the prefix."""
        return [layout.halves * layout.frames * part for part in split(layout.tokens_per_frame, self.size)]

    def local_tokens(self, x: Tensor, layout: VideoLayout) -> Tensor:
        """This rank's part of every frame: [B, R * S, C] -> a view [B, R, S_r, C], flattened to [B, R * S_r, C]."""
        if self.size == 1:
            return x
        S = layout.tokens_per_frame
        start, end = first_of(S, self.size, self.rank), first_of(S, self.size, self.rank + 1)
        return x.unflatten(1, (-1, S))[:, :, start:end].flatten(1, 2)

    def gather_tokens(self, x: Tensor, layout: VideoLayout, halves: int | None = None) -> Tensor:
        """[B, R * S_r, C] of every rank -> [B, R * S, C] on all of them; call it outside of checkpointed functions.

        halves: those that x has, R = halves * frames (None: the layout's)
        One all-to-all with the sizes that host integers give; its backward sums the gradients of all ranks, in rank order.
        """
        if self.size == 1:
            return x
        B, _, C = x.shape
        parts = split(layout.tokens_per_frame, self.size)
        rows = layout.frames * (halves or layout.halves)
        copies = x.expand(self.size, *x.shape).reshape(-1)
        received = [B * rows * part * C for part in parts]
        flat = exchange(copies, [x.numel()] * self.size, received, self.group)
        blocks = [f.view(B, rows, part, C) for f, part in zip(flat.split(received), parts, strict=True)]
        return torch.cat(blocks, 2).flatten(1, 2)
