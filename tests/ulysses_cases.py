"""A Ulysses exchange of several ranks in one process, for tests without processes."""

import torch
from torch import Tensor

from dit_ops.ops import _ulysses_output, _ulysses_qkv
from dit_ops.ops._ulysses_wire import split


class Rank:
    """What the pieces ask of a process group."""

    def __init__(self, rank: int, ranks: int):
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks


def local(x: Tensor, rows: int, ranks: int, rank: int) -> Tensor:
    """A rank's part of every row of [B, rows * S, ...]."""
    x = x.unflatten(1, (rows, -1))
    return x.split(split(x.shape[2], ranks), 2)[rank].flatten(1, 2)


def all_to_all(wires: list[Tensor], sent: list[list[int]]) -> list[Tensor]:
    """What every rank receives; sent[r][d] values go from rank r to rank d."""
    parts = [wire.split(sizes) for wire, sizes in zip(wires, sent, strict=True)]
    return [torch.cat([parts[source][rank] for source in range(len(wires))]) for rank in range(len(wires))]


def scatter(q, k, v, weights, rope, grid, cameras, halves, ranks, backend, *, before=False, start_frame=0) -> list[tuple]:
    """q, k, v of every rank after the exchange, from those of the whole video [B, L, N, D]."""
    (B, _, _, D), (F, H, W) = q.shape, grid
    rows, heads, parts = halves * F, split(q.shape[2], ranks), split(H * W, ranks)
    paths = 1 if cameras[0] is None or not before else 2
    tables = [None] * 3 if rope is None else list(rope)
    wires = []
    for rank in range(ranks):
        mine = [local(x, rows, ranks, rank) for x in (q, k, v)]
        if backend == "reference":
            first = (rope, *cameras) if before else (None, None, None)
            wires.append(_ulysses_qkv.pack_ref(*mine, *weights, *first, ranks, rank, grid, halves, 1e-6, start_frame))
        else:
            first = (*tables, *cameras) if before else [None] * 5
            wires.append(_ulysses_qkv.pack(*mine, *weights, *first, ranks, rank, *grid, 1e-6, start_frame, backend)[0])
    sent = [[B * rows * part * 3 * paths * n * D for n in heads] for part in parts]
    wires = all_to_all(wires, sent)
    out = []
    for wire, n in zip(wires, heads, strict=True):
        sizes = (B, n * paths, D, ranks)
        if backend == "reference":
            then = (None, None, None) if before else (rope, *cameras)
            out.append(_ulysses_qkv.unpack_ref([wire], *then, *sizes, grid, halves, start_frame))
        else:
            then = [None] * 5 if before else [*tables, *cameras]
            out.append(_ulysses_qkv.unpack(wire, None, None, *then, *sizes, *grid, halves, start_frame, backend))
    return out


def gather(os: list[Tensor], N: int, grid, P, halves, ranks, backend, prefix=0) -> list[Tensor]:
    """[B, prefix + L_r, paths, N, D] of every rank, from the outputs of attention of every rank's heads."""
    F, H, W = grid
    B, _, _, D = os[0].shape
    paths = 1 if P is None else 2
    heads, tokens = split(N, ranks), [prefix + halves * F * part for part in split(H * W, ranks)]
    args = (P, F, halves, prefix, ranks)
    if backend == "reference":
        wires = [_ulysses_output.pack_output_ref(o, *args) for o in os]
    else:
        wires = [_ulysses_output.pack_output(o, *args, backend) for o in os]
    wires = all_to_all(wires, [[B * t * paths * n * D for t in tokens] for n in heads])
    out = []
    for wire, t in zip(wires, tokens, strict=True):
        if backend == "reference":
            out.append(_ulysses_output.unpack_output_ref(wire, B, t, paths, N, D, ranks))
        else:
            out.append(_ulysses_output.unpack_output(wire, B, t, paths, N, D, ranks, backend))
    return out
