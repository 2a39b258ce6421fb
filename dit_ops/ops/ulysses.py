"""The Ulysses exchange around attention: tokens split over ranks <-> heads split over ranks, two all-to-alls per block.

Only normed q, k and v travel: RoPE and ProPE act on one token and commute with the exchange, so 3 + 2 tensors cross the wire
instead of 8. _ulysses_wire.py says which rank holds what. DeepSpeed Ulysses: arXiv 2309.14509.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.ops import _ulysses_output, _ulysses_qkv
from dit_ops.ops._ulysses_wire import Finish, exchange, split, start_exchange
from dit_ops.ops.adaln import kernel_tables
from dit_ops.ops.prope_output import check_cameras, prope_output
from dit_ops.ops.qk_norm_rope import (
    Grid,
    Rope,
    check_heads,
    check_outputs,
    heads_refuse,
    kernel_heads,
    needs_gradient,
    qk_norm_rope,
)
from dit_ops.ops.qk_norm_rope_prope import qk_norm_rope_prope

Heads = Tensor | Callable[[], Tensor]


def ulysses_scatter_heads(
    q: Heads,
    k: Heads,
    v: Heads,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope,
    grid: Grid,
    P: Tensor | None = None,
    P_inv: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    eps: float = 1e-6,
    start_frame: int = 0,
    halves: int = 1,
    transform: Literal["after", "before"] = "after",
    overlap: bool = False,
    k_out: Tensor | None = None,
    v_out: Tensor | None = None,
    turn_keys: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens of all heads -> qk_norm_rope, or with P qk_norm_rope_prope, of all tokens of this rank's heads.

    q, k, v: [B, L_r, N, D], this rank's part of every frame, L_r = halves * F * S_r; one dtype; or functions that make them
    rope, grid, weights, P, P_inv, eps, start_frame, halves, k_out, v_out, turn_keys: of the whole video, as there
    transform: RoPE and ProPE after the exchange, or before it (with P twice the bytes on the wire)
    overlap: three all-to-alls instead of one: v travels while k is made, k while q is made
    group None or of one rank: no collective and no copy
    returns q, k, v, each [B, L, N_r, D], with P [B, L, 2 N_r, D]; L = halves * F * H * W; differentiable in every tensor
    """
    op = "ulysses_scatter_heads"
    if transform not in ("after", "before"):
        raise ValueError(f"{op}: transform must be 'after' or 'before', got {transform!r}")
    if transform == "before" and (overlap or k_out is not None):
        raise ValueError(f"{op}: transform = 'before' excludes overlap and k_out, got overlap = {overlap}")
    where: dict[str, Any] = {"eps": eps, "start_frame": start_frame, "halves": halves, "backend": backend}
    into: dict[str, Any] = {} if k_out is None else {"k_out": k_out, "v_out": v_out, "turn_keys": turn_keys}
    if group is None or group.size() == 1:
        q, k, v = (x() if callable(x) else x for x in (q, k, v))
        if P is not None and P_inv is not None:
            return qk_norm_rope_prope(q, k, v, q_weight, k_weight, rope, grid, P, P_inv, **where, **into)
        q2, k2 = qk_norm_rope(q, k, q_weight, k_weight, rope, grid, v=v if into else None, **where, **into)
        return q2, k2, v if v_out is None else v_out

    if (P is None) != (P_inv is None):
        raise ValueError(f"{op}: P and P_inv come together, got only {'P' if P_inv is None else 'P_inv'}")
    constants = [] if P is None or P_inv is None else [P, P_inv]

    def pick(*sent: Tensor) -> str:
        check_part(op, sent, (q_weight, k_weight), constants, rope, grid, halves, start_frame, group)
        stored = stand_in(sent[0], halves * grid[0] * grid[1] * grid[2], split(sent[0].shape[2], group.size())[group.rank()])
        paths = 2 if turn_keys and constants else 1
        check_outputs(op, stored, stored if into else None, k_out, v_out, paths, (*sent, q_weight, k_weight))
        return lib.choose(op, backend, REFUSES, *sent, *constants, *rope)

    video = grid, halves, start_frame
    if overlap:
        v = _made(v)
        v_sent = send(pick(v), (v, None, None), (None, None), None, (None, None), video, eps, group)
        k = _made(k)
        k_sent = send(pick(k), (k, None, None), (k_weight, None), None, (None, None), video, eps, group)
        q = _made(q)
        chosen = pick(q, k, v)
        q_sent = send(chosen, (q, None, None), (q_weight, None), None, (None, None), video, eps, group)
        wires = [q_sent(), k_sent(), v_sent()]
    else:
        q, k, v = _made(q), _made(k), _made(v)
        chosen = pick(q, k, v)
        first, cameras = (rope, (P, P_inv)) if transform == "before" else (None, (None, None))
        wires = [send(chosen, (q, k, v), (q_weight, k_weight), first, cameras, video, eps, group)()]
    B, _, N, D = q.shape
    mine = split(N, group.size())[group.rank()]
    if transform == "before":
        return receive(chosen, wires, None, (None, None), video, B, mine * (1 if P is None else 2), D, group)
    return receive(chosen, wires, rope, (P, P_inv), video, B, mine, D, group, k_out, v_out, turn_keys)


def ulysses_gather_heads(
    o: Tensor,
    grid: Grid,
    P: Tensor | None = None,
    *,
    heads: int,
    group: dist.ProcessGroup | None = None,
    halves: int = 1,
    prefix: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """All tokens of this rank's heads -> this rank's tokens of all heads, P o for the heads of the ProPE path.

    o: [B, prefix + L, N_r, D], with P [B, prefix + L, 2 N_r, D], heads of ProPE last; L = halves * F * H * W, grid = (F, H, W)
    heads: N, those of all ranks    P: [B, F, 4, 4]
    prefix: tokens in front (text) that every rank gets whole, not projected; their gradients are summed over the ranks
    group None or of one rank: no collective and no copy
    returns one tensor per path, (o,) or (o, P o), each [B, prefix + L_r, N, D], L_r = halves * F * S_r
    """
    op = "ulysses_gather_heads"
    lib.check_tensor(op, "o", o, "B, L, N, D")
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    (B, _, _, D), (F, H, W) = o.shape, grid
    paths, mine = 1 if P is None else 2, split(heads, ranks)[rank]
    lib.check_shape(
        op, "o", o, "B, prefix + halves * F * H * W, paths * N_r, D", (B, prefix + halves * F * H * W, paths * mine, D)
    )
    if P is not None:
        check_cameras(op, {"P": P}, o[:, prefix:], halves)
        lib.check_shape(op, "P", P, "B, F, 4, 4", (B, F, 4, 4))
    if group is None or ranks == 1:
        if P is None:
            return (o,)
        first, second = o.split(heads, 2)
        projected = prope_output(second[:, prefix:], P, halves=halves, backend=backend)
        return first, torch.cat((second[:, :prefix], projected), 1) if prefix else projected

    chosen = lib.choose(op, backend, REFUSES, o, *([] if P is None else [P]))
    if chosen == "reference":
        wire = _ulysses_output.pack_output_ref(o, P, F, halves, prefix, ranks)
    else:
        M = None if P is None else P.float()
        wire = _ulysses_output.pack_output(kernel_heads(chosen, o), M, F, halves, prefix, ranks, chosen)
    rows = [prefix + halves * F * part for part in split(H * W, ranks)]
    sent = [B * tokens * paths * mine * D for tokens in rows]
    received = [B * rows[rank] * paths * n * D for n in split(heads, ranks)]
    wire = exchange(wire, sent, received, group)
    if chosen == "reference":
        out = _ulysses_output.unpack_output_ref(wire, B, rows[rank], paths, heads, D, ranks)
    else:
        out = _ulysses_output.unpack_output(wire, B, rows[rank], paths, heads, D, ranks, chosen)
    return out.unbind(2)


def stand_in(like: Tensor, tokens: int, heads: int) -> Tensor:
    """The shape of the whole video, without its memory."""
    return like.new_empty(1).as_strided((like.shape[0], tokens, heads, like.shape[3]), (0, 0, 0, 0))


def _made(x: Heads) -> Tensor:
    return x() if callable(x) else x


Video = tuple[Grid, int, int]  # grid, halves, start_frame


def send(
    backend: str,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    weights: tuple[Tensor | None, Tensor | None],
    rope: Rope | None,
    cameras: tuple[Tensor | None, Tensor | None],
    video: Video,
    eps: float,
    group: dist.ProcessGroup,
) -> Finish:
    """Packs q, k, v, or one tensor alone, and starts the all-to-all."""
    (F, H, W), halves, start_frame = video
    ranks, rank = group.size(), group.rank()
    if backend == "reference":
        wire = _ulysses_qkv.pack_ref(*tensors, *weights, rope, *cameras, ranks, rank, (F, H, W), halves, eps, start_frame)
    else:
        x, *others = (None if t is None else kernel_heads(backend, t) for t in tensors)
        tables = kernel_tables(backend, tensors[0], *weights, *_tables(rope, cameras))
        wire, _, _ = _ulysses_qkv.pack(x, *others, *tables, ranks, rank, F, H, W, eps, start_frame, backend)
    B, tokens, N, D = tensors[0].shape
    values = B * D * sum(t is not None for t in tensors) * (1 if cameras[0] is None else 2)
    heads = split(N, ranks)
    sent = [values * tokens * n for n in heads]
    received = [values * halves * F * part * heads[rank] for part in split(H * W, ranks)]
    return start_exchange(wire, sent, received, group)


def receive(
    backend: str,
    wires: list[Tensor],
    rope: Rope | None,
    cameras: tuple[Tensor | None, Tensor | None],
    video: Video,
    B: int,
    N: int,
    D: int,
    group: dist.ProcessGroup,
    k_out: Tensor | None = None,
    v_out: Tensor | None = None,
    turn_keys: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unpacks one wire of q, k, v, or three; into k_out and v_out where they are given. N: heads on this rank."""
    grid, halves, start_frame = video
    ranks = group.size()
    if backend == "reference":
        q, k, v = _ulysses_qkv.unpack_ref(wires, rope, *cameras, B, N, D, ranks, grid, halves, start_frame, turn_keys)
        return (q, k, v) if k_out is None or v_out is None else (q, k_out.copy_(k), v_out.copy_(v))
    three = (*wires, None, None)[:3]
    tables = kernel_tables(backend, wires[0], *_tables(rope, cameras))
    if k_out is not None and v_out is not None:
        rest = (B, N, D, ranks, *grid, halves, start_frame, turn_keys, backend)
        return _ulysses_qkv.unpack_into(*three, *tables, k_out, v_out, *rest), k_out, v_out
    return _ulysses_qkv.unpack(*three, *tables, B, N, D, ranks, *grid, halves, start_frame, backend)


def _tables(rope: Rope | None, cameras: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    return [
        *((None,) * 3 if rope is None else (t.contiguous() for t in rope)),
        *(None if M is None else M.float() for M in cameras),
    ]


def check_part(
    op: str,
    tensors: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
    cameras: list[Tensor],
    rope: Rope,
    grid: Grid,
    halves: int,
    start_frame: int,
    group: dist.ProcessGroup,
) -> None:
    """One rank's part of every frame: before anything is sent, so that no rank waits for one that raised."""
    F, H, W = grid
    part = split(H * W, group.size())[group.rank()]
    first = tensors[0]
    lib.check_tensor(op, "q", first, "B, L_r, N, D")
    B, _, N, D = first.shape
    for name, t in zip("qkv", tensors, strict=False):
        lib.check_shape(op, name, t, "B, halves * F * S_r, N, D", (B, halves * F * part, N, D))
        if t.dtype != first.dtype:
            raise ValueError(f"{op}: q, k and v must have one dtype to share the wire, got {first.dtype} and {t.dtype}")
    whole = stand_in(first, halves * F * H * W, N)  # what qk_norm_rope checks on one rank
    check_heads(op, {"q": whole}, {"q_weight": weights[0], "k_weight": weights[1]}, rope, grid, start_frame, halves)
    if cameras:
        check_cameras(op, {"P": cameras[0], "P_inv": cameras[1]}, whole, halves)
        for name, M in zip(("P", "P_inv"), cameras, strict=True):
            lib.check_shape(op, name, M, "B, F, 4, 4", (B, F, 4, 4))


def _triton_refuses(*tensors: Tensor) -> str | None:
    heads = [t for t in tensors if t.ndim == 4 and t.shape[-2:] != (4, 4)]
    return heads_refuse(*heads) or needs_gradient(*(t for t in tensors if not any(t is h for h in heads)))


REFUSES = {"triton": _triton_refuses}
