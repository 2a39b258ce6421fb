"""The Ulysses exchange: tokens split over ranks <-> heads split over ranks, as one all-to-all."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ops import _library as lib


def ulysses_scatter_heads(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    tokens: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    halves: int = 1,
    backend: str | None = None,
) -> Tensor:
    """This rank's tokens of all heads -> all tokens of this rank's heads; one all-to-all; backward is the gather.

    x: [B, L_r, N, D] -> [B, L, N_r, D], ranks in order; with halves = 2 every rank holds [clean | noisy] and so does the result
    tokens: L_r of every rank (None: all as here)    heads: N_r of every rank (None: N / ranks)
    group None or of one rank: x itself
    """
    op = "ulysses_scatter_heads"
    lib.check_tensor(op, "x", x, "B, L, N, D")
    lib.choose(op, backend, {}, x)
    if group is None or group.size() == 1:
        return x
    B, _, N, D = x.shape
    ranks, rank = group.size(), group.rank()
    tokens = check_split(op, "tokens", tokens if tokens is not None else [x.shape[1]] * ranks, ranks, None, halves)
    heads = check_split(op, "heads", heads if heads is not None else even_split(op, N, ranks), ranks, N)
    lib.check_shape(op, "x", x, "B, tokens[rank], N, D", (B, tokens[rank], N, D))
    parts = [part.reshape(-1) for part in x.split(heads, 2)]
    sizes = [B * t * heads[rank] * D for t in tokens]
    received = AllToAll.apply(torch.cat(parts), [p.numel() for p in parts], sizes, group)
    blocks = [part.view(B, halves, t // halves, heads[rank], D) for part, t in zip(received.split(sizes), tokens, strict=True)]
    return torch.cat(blocks, 2).flatten(1, 2)


def ulysses_gather_heads(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    tokens: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    halves: int = 1,
    backend: str | None = None,
) -> Tensor:
    """All tokens of this rank's heads -> this rank's tokens of all heads: the inverse of ulysses_scatter_heads.

    x: [B, L, N_r, D] -> [B, L_r, N, D]
    tokens: L_r of every rank (None: L / ranks)    heads: N_r of every rank (None: all as here)
    group None or of one rank: x itself
    """
    op = "ulysses_gather_heads"
    lib.check_tensor(op, "x", x, "B, L, N, D")
    lib.choose(op, backend, {}, x)
    if group is None or group.size() == 1:
        return x
    B, L, _, D = x.shape
    ranks, rank = group.size(), group.rank()
    tokens = check_split(op, "tokens", tokens if tokens is not None else even_split(op, L, ranks), ranks, L, halves)
    heads = check_split(op, "heads", heads if heads is not None else [x.shape[2]] * ranks, ranks, None)
    lib.check_shape(op, "x", x, "B, L, heads[rank], D", (B, L, heads[rank], D))
    parts = [part.reshape(-1) for part in x.unflatten(1, (halves, L // halves)).split([t // halves for t in tokens], 2)]
    sizes = [B * tokens[rank] * n * D for n in heads]
    received = AllToAll.apply(torch.cat(parts), [p.numel() for p in parts], sizes, group)
    blocks = [part.view(B, tokens[rank], n, D) for part, n in zip(received.split(sizes), heads, strict=True)]
    return torch.cat(blocks, 2)


class AllToAll(torch.autograd.Function):
    """all_to_all_single of a flat tensor; its backward sends every gradient back to where its value came from."""

    @staticmethod
    def forward(ctx, flat: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = flat.new_empty(sum(received))
        dist.all_to_all_single(out, flat, received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        return AllToAll.apply(dout.contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


def even_split(op: str, n: int, ranks: int) -> list[int]:
    if n % ranks:
        raise ValueError(f"{op}: {n} does not split evenly over {ranks} ranks; pass the sizes of every rank")
    return [n // ranks] * ranks


def check_split(op: str, name: str, sizes: Sequence[int], ranks: int, total: int | None, halves: int = 1) -> list[int]:
    sizes = list(sizes)
    if len(sizes) != ranks or any(s < 0 or s % halves for s in sizes) or (total is not None and sum(sizes) != total):
        multiple = f"multiples of {halves}" if halves > 1 else "at least 0"
        total_is = f", with sum {total}" if total is not None else ""
        raise ValueError(f"{op}: {name} must be {ranks} sizes, {multiple}{total_is}, got {sizes}")
    return sizes
