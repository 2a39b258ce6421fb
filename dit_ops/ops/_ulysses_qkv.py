"""Queries, keys and values around the Ulysses exchange: `pack` writes the wire, `unpack` reads it. See _ulysses_wire.py."""

import torch
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.ops._ulysses_wire import first_of, heads_to_wire_ref, tokens_from_wire_ref
from dit_ops.ops.prope_output import project_ref
from dit_ops.ops.qk_norm_rope import (
    Grid,
    Rope,
    dweight_fake,
    rms_norm_ref,
    rope_factors_ref,
    rotate_ref,
    rstd_fake,
    weight_gradients,
)


def pack_ref(
    q: Tensor, k: Tensor | None, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    rope: Rope | None, P: Tensor | None, P_inv: Tensor | None,
    ranks: int, rank: int, grid: Grid, halves: int, eps: float, start_frame: int,
) -> Tensor:  # fmt: skip
    """RMS norm of q and k; with rope (and P) what unpack would do, before the exchange; k, v None: q alone travels."""
    F, H, W = grid
    factors = None
    if rope is not None:
        table = rope_factors_ref(rope, grid, start_frame, halves, torch.promote_types(q.dtype, torch.float32))
        mine = slice(first_of(H * W, ranks, rank), first_of(H * W, ranks, rank + 1))
        factors = table.unflatten(1, (halves * F, H * W))[:, :, mine].flatten(1, 2)
    paths = []
    cameras = None if P is None else P.mT, P_inv, P_inv
    for x, weight, M, turns in zip((q, k, v), (q_weight, k_weight, None), cameras, (True, True, False), strict=True):
        if x is None:
            continue
        n = rms_norm_ref(x, weight, eps)
        paths.append((rotate_ref(n, factors) if factors is not None and turns else n).to(q.dtype))
        if M is not None:
            paths.append(project_ref(n, M, halves).to(q.dtype))
    return heads_to_wire_ref(torch.stack(paths, 2), ranks)


def unpack_ref(
    wires: list[Tensor], rope: Rope | None, P: Tensor | None, P_inv: Tensor | None,
    B: int, N: int, D: int, ranks: int, grid: Grid, halves: int, start_frame: int, turn_keys: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    F, H, W = grid
    whole = [tokens_from_wire_ref(w, B, halves * F, H * W, 3 // len(wires), N, D, ranks) for w in wires]
    q, k, v = torch.cat(whole, 2).unbind(2)
    if rope is None:
        return q, k, v
    factors = rope_factors_ref(rope, grid, start_frame, halves, torch.promote_types(q.dtype, torch.float32))

    def paths(x: Tensor, M: Tensor | None, turns: bool) -> Tensor:
        wide = x.to(factors.dtype)
        turned = rotate_ref(wide, factors).to(x.dtype) if turns else x
        return turned if M is None else torch.cat((turned, project_ref(wide, M, halves).to(x.dtype)), 2)

    M = P_inv if turn_keys else None
    return paths(q, None if P is None else P.mT, True), paths(k, M, turn_keys), paths(v, M, False)


def _pack(q, k, v, q_weight, k_weight, rope_t, rope_h, rope_w, P, P_inv, ranks, rank, F, H, W, eps, start_frame, backend):
    args = (q, k, v, q_weight, k_weight, rope_t, rope_h, rope_w, P, P_inv, ranks, rank, F, H, W, eps, start_frame)
    if q.numel() == 0:
        return _pack_fake(*args, backend)
    return lib.kernel(backend, "ulysses", "ulysses_pack_fwd")(*args)


def _pack_fake(q, k, v, q_weight, k_weight, rope_t, rope_h, rope_w, P, P_inv, ranks, rank, F, H, W, eps, start_frame, backend):
    tensors = (1 if k is None else 3) * (1 if P is None else 2)
    return q.new_empty(tensors * q.numel()), rstd_fake(q, q_weight), rstd_fake(q if k is None else k, k_weight)


def _pack_bwd(
    dwire, q, k, q_weight, k_weight, q_rstd, k_rstd, rope_t, rope_h, rope_w, P, P_inv,
    ranks, rank, F, H, W, start_frame, backend,
):  # fmt: skip
    rest = (q_rstd, k_rstd, rope_t, rope_h, rope_w, P, P_inv, ranks, rank, F, H, W, start_frame)
    if q.numel() == 0:
        return tuple(t.zero_() for t in _pack_bwd_fake(dwire, q, k, q_weight, k_weight, *rest, backend))
    return lib.kernel(backend, "ulysses", "ulysses_pack_bwd")(dwire, q, k, q_weight, k_weight, *rest)


def _pack_bwd_fake(
    dwire, q, k, q_weight, k_weight, q_rstd, k_rstd, rope_t, rope_h, rope_w, P, P_inv,
    ranks, rank, F, H, W, start_frame, backend,
):  # fmt: skip
    others = (q.new_empty(0 if k is None else q.shape) for _ in "kv")
    return q.new_empty(q.shape), *others, dweight_fake(q, q_weight), dweight_fake(q if k is None else k, k_weight)


def _unpack(q_wire, k_wire, v_wire, rope_t, rope_h, rope_w, P, P_inv, B, N, D, ranks, F, H, W, halves, start_frame, backend):
    args = (q_wire, k_wire, v_wire, rope_t, rope_h, rope_w, P, P_inv, B, N, D, ranks, F, H, W, halves, start_frame)
    if q_wire.numel() == 0:
        return _unpack_fake(*args, backend)
    return lib.kernel(backend, "ulysses", "ulysses_unpack_fwd")(*args)


def _unpack_fake(
    q_wire, k_wire, v_wire, rope_t, rope_h, rope_w, P, P_inv, B, N, D, ranks, F, H, W, halves, start_frame, backend
):
    return tuple(q_wire.new_empty(B, halves * F * H * W, N if P is None else 2 * N, D) for _ in "qkv")


def _unpack_into(
    q_wire, k_wire, v_wire, rope_t, rope_h, rope_w, P, P_inv, k, v,
    B, N, D, ranks, F, H, W, halves, start_frame, turn_keys, backend,
):  # fmt: skip
    rest = (k, v, B, N, D, ranks, F, H, W, halves, start_frame, turn_keys)
    args = (q_wire, k_wire, v_wire, rope_t, rope_h, rope_w, P, P_inv, *rest)
    if q_wire.numel() == 0:
        return _unpack_into_fake(*args, backend)
    return lib.kernel(backend, "ulysses", "ulysses_unpack_into_fwd")(*args)


def _unpack_into_fake(
    q_wire, k_wire, v_wire, rope_t, rope_h, rope_w, P, P_inv, k, v,
    B, N, D, ranks, F, H, W, halves, start_frame, turn_keys, backend,
):  # fmt: skip
    return q_wire.new_empty(B, halves * F * H * W, N if P is None else 2 * N, D)


def _unpack_bwd(dq, dk, dv, rope_t, rope_h, rope_w, P, P_inv, one_wire, N, ranks, F, H, W, halves, start_frame, backend):
    args = (dq, dk, dv, rope_t, rope_h, rope_w, P, P_inv, one_wire, N, ranks, F, H, W, halves, start_frame)
    if dq.numel() == 0:
        return _unpack_bwd_fake(*args, backend)
    return lib.kernel(backend, "ulysses", "ulysses_unpack_bwd")(*args)


def _unpack_bwd_fake(dq, dk, dv, rope_t, rope_h, rope_w, P, P_inv, one_wire, N, ranks, F, H, W, halves, start_frame, backend):
    one = dq.shape[0] * dq.shape[1] * N * dq.shape[3]
    return tuple(dq.new_empty(n * one) for n in ((3, 0, 0) if one_wire else (1, 1, 1)))


_TABLES = "Tensor? rope_t, Tensor? rope_h, Tensor? rope_w, Tensor? P, Tensor? P_inv"
_WIRES = f"Tensor q_wire, Tensor? k_wire, Tensor? v_wire, {_TABLES}"
_GRID = "SymInt F, SymInt H, SymInt W"

pack = lib.define(
    f"ulysses_pack(Tensor q, Tensor? k, Tensor? v, Tensor? q_weight, Tensor? k_weight, {_TABLES}, SymInt ranks, SymInt rank,"
    f" {_GRID}, float eps, SymInt start_frame, str backend) -> (Tensor wire, Tensor q_rstd, Tensor k_rstd)",
    _pack,
    _pack_fake,
)
pack_bwd = lib.define(
    "ulysses_pack_bwd(Tensor dwire, Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor q_rstd, Tensor k_rstd,"
    f" {_TABLES}, SymInt ranks, SymInt rank, {_GRID}, SymInt start_frame, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_weight, Tensor dk_weight)",
    _pack_bwd,
    _pack_bwd_fake,
)
unpack = lib.define(
    f"ulysses_unpack({_WIRES}, SymInt B, SymInt N, SymInt D, SymInt ranks, {_GRID}, SymInt halves, SymInt start_frame,"
    " str backend) -> (Tensor q, Tensor k, Tensor v)",
    _unpack,
    _unpack_fake,
)
unpack_into = lib.define(
    f"ulysses_unpack_into({_WIRES}, Tensor(a!) k, Tensor(b!) v, SymInt B, SymInt N, SymInt D, SymInt ranks, {_GRID},"
    " SymInt halves, SymInt start_frame, bool turn_keys, str backend) -> Tensor q",
    _unpack_into,
    _unpack_into_fake,
)
unpack_bwd = lib.define(
    f"ulysses_unpack_bwd(Tensor dq, Tensor dk, Tensor dv, {_TABLES}, bool one_wire, SymInt N, SymInt ranks, {_GRID},"
    " SymInt halves, SymInt start_frame, str backend) -> (Tensor q_wire, Tensor k_wire, Tensor v_wire)",
    _unpack_bwd,
    _unpack_bwd_fake,
)


def _setup_pack(ctx, inputs, output):
    q, k, _, q_weight, k_weight, *tables, ranks, rank, F, H, W, _, start_frame, backend = inputs
    ctx.rest = (ranks, rank, F, H, W, start_frame, backend)
    ctx.save_for_backward(q, k, q_weight, k_weight, *output[1:], *tables)


def _pack_backward(ctx, dwire, _dq_rstd, _dk_rstd):
    saved = ctx.saved_tensors
    dq, dk, dv, *dweights = pack_bwd(dwire.contiguous(), *saved, *ctx.rest)
    alone = saved[1] is None
    return dq, None if alone else dk, None if alone else dv, *weight_gradients(saved[2:4], dweights), *[None] * 13


def _setup_unpack(ctx, inputs, output):
    _, k_wire, _, *tables, _, N, _, ranks, F, H, W, halves, start_frame, backend = inputs
    ctx.rest = (k_wire is None, N, ranks, F, H, W, halves, start_frame, backend)
    ctx.save_for_backward(*tables)


def _unpack_backward(ctx, dq, dk, dv):
    wires = unpack_bwd(dq.contiguous(), dk.contiguous(), dv.contiguous(), *ctx.saved_tensors, *ctx.rest)
    given = (wires[0], None, None) if ctx.rest[0] else wires
    return *given, *[None] * 15


lib.define_backward("ulysses_pack", _pack_backward, _setup_pack)
lib.define_backward("ulysses_unpack", _unpack_backward, _setup_unpack)
