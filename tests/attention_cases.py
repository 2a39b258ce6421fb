"""Masks and the definition of attention, shared by the tests of attention."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from dit_ops.layout import VideoLayout
from dit_ops.masks import BlockCausal, Full, Intervals, TeacherForcing


@dataclass
class Rows:
    """A mask made of literal rows."""

    rows: tuple

    def intervals(self) -> tuple:
        return self.rows


def causal(
    frames: int, block: int | None, prefix: int = 0, window: int | None = None, sink: int = 0, size: int = 3
) -> BlockCausal:
    return BlockCausal(VideoLayout(frames, size, 1, block_frames=block, prefix=prefix), window_frames=window, sink_frames=sink)


def teacher(frames: int, block: int, prefix: int = 0, size: int = 3) -> TeacherForcing:
    return TeacherForcing(VideoLayout(frames, size, 1, block_frames=block, halves=2, prefix=prefix))


MASKS = {
    "full": Full(15, 15),
    "full, fewer queries": Full(7, 22),
    "full, fewer keys": Full(19, 5),
    "one frame": causal(1, None),
    "block causal, last block shorter": causal(5, 2),
    "block causal, text": causal(4, 1, prefix=5),
    "window": causal(7, 2, window=3),
    "window, sink": causal(7, 1, window=3, sink=1),
    "window, sink, text": causal(6, 1, prefix=2, window=3, sink=1),
    "teacher forcing, last block shorter": teacher(5, 2),
    "teacher forcing, text": teacher(3, 1, prefix=4),
    "teacher forcing, one frame": teacher(1, 1),
    "no keys": Intervals(((0, 4, ()), (4, 9, ((2, 5), (6, 7))), (9, 11, ())), 11, 8),
}


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask, scale: float) -> tuple[Tensor, Tensor]:
    """The definition: one softmax over all keys, and its log-sum-exp."""
    logits = torch.einsum("bqnd,bknd->bnqk", q, k) * scale
    if mask is None:
        return torch.einsum("bnqk,bknd->bqnd", logits.softmax(-1), v), logits.logsumexp(-1)
    seen = mask.dense(q.device)
    empty = ~seen.any(1, keepdim=True)  # a row of -inf has neither softmax nor gradient
    logits = logits.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0)
    p = logits.softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bnqk,bknd->bqnd", p, v), logits.logsumexp(-1).masked_fill(empty[:, 0], -math.inf)


def qkv(mask, dtype: torch.dtype, B: int = 2, N: int = 3, D: int = 16, device: str = "cpu") -> list[Tensor]:
    shapes = [(B, n, N, D) for n in (mask.queries, mask.keys, mask.keys)]
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def gradients(outs, leaves: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outs, leaves, cotangents, allow_unused=True, materialize_grads=True)


@st.composite
def interval_masks(draw) -> Intervals:
    """Any rows over any sorted, disjoint intervals, rows without keys and intervals that touch among them."""
    queries, keys = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    cuts = sorted({0, queries, *draw(st.lists(st.integers(0, queries), max_size=4))})
    rows = []
    for q0, q1 in zip(cuts, cuts[1:], strict=False):
        edges = sorted(draw(st.sets(st.integers(0, keys), max_size=6)))
        pairs = list(zip(edges[::2], edges[1::2], strict=False))
        rows.append((q0, q1, tuple(pairs)))
    return Intervals(tuple(rows), queries, keys)
