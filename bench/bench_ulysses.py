"""python bench/bench_ulysses.py [--device cpu] [--tokens N] -> a JSON line per piece, shape, pass and backend.

The two sides of the exchange alone, as one rank of 2, 4 or 8 runs them: no wire is needed. Peers: torch's stack, permute and
contiguous, without the norm, RoPE and ProPE that our kernels do on the way.
"""

import argparse
import functools

import torch
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.bench.runs import Peer, arguments, bench_op
from dit_ops.bench.shapes import head_shapes
from dit_ops.ops import _ulysses_output, _ulysses_qkv
from dit_ops.ops._ulysses_wire import split

RANKS = {12: (4, 8), 40: (8,), 16: (8,), 4: (2,)}  # by heads of the model; 12 heads on 8 ranks are the uneven case


def backend(*tensors: Tensor) -> str:
    """The one that bench_op forces."""
    refuses = {"triton": lambda *t: lib.refuses("triton", t[0])}
    return lib.choose("ulysses", None, refuses, *tensors)


def pack(q, k, v, q_weight, k_weight, tables, ranks, grid, before) -> Tensor:
    rope, P, P_inv = tables if before else (None, None, None)
    chosen = backend(q)
    if chosen == "reference":
        return _ulysses_qkv.pack_ref(q, k, v, q_weight, k_weight, rope, P, P_inv, ranks, 0, grid, 1, 1e-6, 0)
    constants = (*(rope or [None] * 3), P, P_inv)
    return _ulysses_qkv.pack(q, k, v, q_weight, k_weight, *constants, ranks, 0, *grid, 1e-6, 0, chosen)[0]


def unpack(wire, tables, B, N, D, ranks, grid):
    rope, P, P_inv = tables
    chosen = backend(wire)
    if chosen == "reference":
        return _ulysses_qkv.unpack_ref([wire], rope, P, P_inv, B, N, D, ranks, grid, 1, 0)
    return _ulysses_qkv.unpack(wire, None, None, *rope, P, P_inv, B, N, D, ranks, *grid, 1, 0, chosen)


def pack_output(o, P, frames, ranks) -> Tensor:
    chosen = backend(o)
    if chosen == "reference":
        return _ulysses_output.pack_output_ref(o, P, frames, 1, 0, ranks)
    return _ulysses_output.pack_output(o, P, frames, 1, 0, ranks, chosen)


def unpack_output(wire, B, L, N, D, ranks) -> Tensor:
    chosen = backend(wire)
    if chosen == "reference":
        return _ulysses_output.unpack_output_ref(wire, B, L, 2, N, D, ranks)
    return _ulysses_output.unpack_output(wire, B, L, 2, N, D, ranks, chosen)


def permute_to_heads(ranks: int, q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
    """[B, L, N, D] of three tensors -> [ranks, B, L, 3, N / ranks, D]"""
    return torch.stack((q, k, v), 2).unflatten(3, (ranks, -1)).permute(3, 0, 1, 2, 4, 5).contiguous()


def permute_from_tokens(ranks: int, B: int, frames: int, N: int, D: int, wire: Tensor) -> list[Tensor]:
    """[ranks, B, F, S / ranks, 3, N, D] -> three [B, F, S, N, D]"""
    blocks = wire.view(ranks, B, frames, -1, 3, N, D).permute(4, 1, 2, 0, 3, 5, 6)
    return [block.flatten(2, 3).contiguous() for block in blocks]


def bench_rank(args: argparse.Namespace, name: str, shape: tuple[int, ...], grid, rope, ranks: int) -> None:
    """The first rank, which holds the largest part."""
    (B, L, N, D), frames = shape, grid[0]
    part, mine = frames * split(grid[1] * grid[2], ranks)[0], split(N, ranks)[0]
    even = grid[1] * grid[2] % ranks == 0 and N % ranks == 0
    tensor = lambda *shape: torch.randn(*shape, device=args.device).to(getattr(torch, args.dtype))
    P, P_inv = torch.randn(2, B, frames, 4, 4, device=args.device)
    tables, where = (rope, P, P_inv), f"{name}, {ranks} ranks"

    q, k, v = (tensor(B, part, N, D).requires_grad_() for _ in "qkv")
    weights = [torch.ones(N * D, device=args.device).requires_grad_() for _ in "qk"]
    for form, paths in (("norm", 1), ("norm, rope and prope", 2)):
        fn = functools.partial(pack, tables=tables, ranks=ranks, grid=grid, before=paths == 2)
        moved = [(3 + 3 * paths) * q.nbytes, (3 + 3 * paths + 3 * paths + 5) * q.nbytes]
        peer = Peer(functools.partial(permute_to_heads, ranks) if even else None, "uneven", forward_only=True)
        dwire = [tensor(3 * paths * q.numel())]
        peers = {"torch permute, no norm": peer} if paths == 1 else {}
        bench_op("ulysses", fn, f"pack, {form}: {where}", [q, k, v, *weights], dwire, args, moved, peers)

    wire = tensor(3 * B * L * mine * D).requires_grad_()
    read = functools.partial(unpack, tables=tables, B=B, N=mine, D=D, ranks=ranks, grid=grid)
    outs = [tensor(B, L, 2 * mine, D) for _ in "qkv"]
    permute = functools.partial(permute_from_tokens, ranks, B, frames, mine, D) if even else None
    peers = {"torch permute, no rope and prope": Peer(permute, "uneven", forward_only=True)}
    bench_op("ulysses", read, f"unpack: {where}", [wire], outs, args, [3 * wire.nbytes, 6 * wire.nbytes], peers)

    o = outs[0].requires_grad_()
    back = functools.partial(pack_output, P=P, frames=frames, ranks=ranks)
    bench_op("ulysses", back, f"pack_output: {where}", [o], [tensor(o.numel())], args, [2 * o.nbytes, 4 * o.nbytes])

    wire = tensor(2 * q.numel()).requires_grad_()
    end = functools.partial(unpack_output, B=B, L=part, N=N, D=D, ranks=ranks)
    moved = [2 * wire.nbytes, 4 * wire.nbytes]
    bench_op("ulysses", end, f"unpack_output: {where}", [wire], [tensor(B, part, 2, N, D)], args, moved)


if __name__ == "__main__":
    args = arguments(__doc__)
    for name, shape, grid, rope in head_shapes(args):
        for ranks in RANKS[shape[2]]:
            bench_rank(args, name, shape, grid, rope, ranks)
