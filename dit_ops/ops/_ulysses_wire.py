"""What crosses the wire of the Ulysses exchange: who holds what, the order of the values, and the collective.

A video is R rows of S tokens (R = halves * F frames, S = H * W). Every row is split over the P ranks, and so are the heads;
where P does not divide, the first ranks hold one more. A rank holds [B, R * S_r, N] tokens of all heads before the exchange
and [B, R * S, N_r] after it. Its tokens are R rows of S_r: tables of a row per frame (modulation, cameras) stay as they are.

The wire of T tensors per token, flat, one block per other rank and no padding:
  tokens to heads  to rank d: my tokens of its heads  [B, R * S_r, T, N_d, D]
  heads to tokens  to rank d: its tokens of my heads  [B, prefix + R * S_d, T, N_r, D], behind a prefix that all ranks get
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def split(n: int, ranks: int) -> list[int]:
    """n things over the ranks as torch.tensor_split does: the first n % ranks hold one more."""
    return [n // ranks + (rank < n % ranks) for rank in range(ranks)]


def first_of(n: int, ranks: int, rank: int) -> int:
    """The first of the things that a rank holds."""
    return rank * (n // ranks) + min(rank, n % ranks)


def heads_to_wire_ref(x: Tensor, ranks: int) -> Tensor:
    """[B, L, T, N, D], one rank's tokens of all heads -> flat"""
    return torch.cat([part.reshape(-1) for part in x.split(split(x.shape[3], ranks), 3)])


def heads_from_wire_ref(flat: Tensor, B: int, L: int, T: int, N: int, D: int, ranks: int) -> Tensor:
    """flat -> [B, L, T, N, D]"""
    heads = split(N, ranks)
    parts = flat.split([B * L * T * n * D for n in heads])
    return torch.cat([p.view(B, L, T, n, D) for p, n in zip(parts, heads, strict=True)], 3)


def tokens_to_wire_ref(x: Tensor, rows: int, ranks: int, prefix: int = 0) -> Tensor:
    """[B, prefix + R * S, T, n, D], all tokens of one rank's heads -> flat"""
    text, video = x[:, :prefix], x[:, prefix:].unflatten(1, (rows, -1))
    parts = video.split(split(video.shape[2], ranks), 2)
    return torch.cat([torch.cat((text, part.flatten(1, 2)), 1).reshape(-1) for part in parts])


def tokens_from_wire_ref(flat: Tensor, B: int, rows: int, S: int, T: int, n: int, D: int, ranks: int) -> Tensor:
    """flat -> [B, R * S, T, n, D]"""
    sizes = split(S, ranks)
    parts = flat.split([B * rows * s * T * n * D for s in sizes])
    return torch.cat([p.view(B, rows, s, T, n, D) for p, s in zip(parts, sizes, strict=True)], 2).flatten(1, 2)


Finish = Callable[[], Tensor]


def start_exchange(flat: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Finish:
    """Starts one all-to-all of a flat tensor, in blocks of these sizes per rank; the result waits for it.

    Backward sends every gradient back to where its value came from: it starts where the forward waited and waits where that
    started, so what lay between the two in the forward overlaps in the backward as well.
    """
    pending: Pending = []
    out = _Start.apply(flat, list(sent), list(received), group, pending)
    return lambda: _Wait.apply(out, list(sent), list(received), group, pending)


def exchange(flat: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    return start_exchange(flat, sent, received, group)()


Pending = list[tuple[Tensor, dist.Work]]  # what an all-to-all under way writes to


def _all_to_all(flat: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, pending: Pending) -> Tensor:
    out = flat.new_empty(sum(received))
    pending.append((out, dist.all_to_all_single(out, flat.contiguous(), received, sent, group=group, async_op=True)))
    return out


def _wait(pending: Pending) -> Tensor:
    out, work = pending.pop()
    work.wait()
    return out


class _Start(torch.autograd.Function):
    """Its backward returns what the backward of _Wait started: the gradient that passes between the two only orders them."""

    @staticmethod
    def forward(ctx, flat, sent, received, group, pending):
        ctx.pending = pending
        return _all_to_all(flat, sent, received, group, pending)

    @staticmethod
    def backward(ctx, _):
        return _wait(ctx.pending), None, None, None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, sent, received, group, pending):
        ctx.rest = (received, sent, group, pending)
        _wait(pending)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout):
        _all_to_all(dout, *ctx.rest)
        return dout, None, None, None, None
