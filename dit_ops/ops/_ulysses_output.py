"""The outputs of attention around the Ulysses exchange: `pack_output` writes the wire, `unpack_output` reads it."""

import torch
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.ops._ulysses_wire import heads_from_wire_ref, tokens_to_wire_ref
from dit_ops.ops.prope_output import project_ref


def pack_output_ref(o: Tensor, P: Tensor | None, F: int, halves: int, prefix: int, ranks: int) -> Tensor:
    paths = 1 if P is None else 2
    first, *second = o.unflatten(2, (paths, -1)).unbind(2)
    if P is not None:
        (x,) = second
        second = [torch.cat((x[:, :prefix], project_ref(x[:, prefix:], P, halves).to(o.dtype)), 1)]
    return tokens_to_wire_ref(torch.stack((first, *second), 2), halves * F, ranks, prefix)


def unpack_output_ref(wire: Tensor, B: int, L: int, paths: int, N: int, D: int, ranks: int) -> Tensor:
    return heads_from_wire_ref(wire, B, L, paths, N, D, ranks)


def _pack_output(o, P, F, halves, prefix, ranks, backend):
    if o.numel() == 0:
        return _pack_output_fake(o, P, F, halves, prefix, ranks, backend)
    return lib.kernel(backend, "_ulysses_output", "ulysses_pack_output_fwd")(o, P, F, halves, prefix, ranks)


def _pack_output_fake(o, P, F, halves, prefix, ranks, backend):
    B, L, N, D = o.shape
    return o.new_empty(B * (L + (ranks - 1) * prefix) * N * D)


def _pack_output_bwd(dwire, P, B, L, N, D, F, halves, prefix, ranks, backend):
    args = (dwire, P, B, L, N, D, F, halves, prefix, ranks)
    if dwire.numel() == 0:
        return _pack_output_bwd_fake(*args, backend)
    return lib.kernel(backend, "_ulysses_output", "ulysses_pack_output_bwd")(*args)


def _pack_output_bwd_fake(dwire, P, B, L, N, D, F, halves, prefix, ranks, backend):
    return dwire.new_empty(B, L, N if P is None else 2 * N, D)


def _unpack_output(wire, B, L, paths, N, D, ranks, backend):
    if wire.numel() == 0:
        return _unpack_output_fake(wire, B, L, paths, N, D, ranks, backend)
    return lib.kernel(backend, "_ulysses_output", "ulysses_unpack_output_fwd")(wire, B, L, paths, N, D, ranks)


def _unpack_output_fake(wire, B, L, paths, N, D, ranks, backend):
    return wire.new_empty(B, L, paths, N, D)


def _unpack_output_bwd(do, ranks, backend):
    if do.numel() == 0:
        return _unpack_output_bwd_fake(do, ranks, backend)
    return lib.kernel(backend, "_ulysses_output", "ulysses_unpack_output_bwd")(do, ranks)


def _unpack_output_bwd_fake(do, ranks, backend):
    return do.new_empty(do.numel())


pack_output = lib.define(
    "ulysses_pack_output(Tensor o, Tensor? P, SymInt F, SymInt halves, SymInt prefix, SymInt ranks, str backend) -> Tensor",
    _pack_output,
    _pack_output_fake,
)
pack_output_bwd = lib.define(
    "ulysses_pack_output_bwd(Tensor dwire, Tensor? P, SymInt B, SymInt L, SymInt N, SymInt D, SymInt F, SymInt halves,"
    " SymInt prefix, SymInt ranks, str backend) -> Tensor",
    _pack_output_bwd,
    _pack_output_bwd_fake,
)
unpack_output = lib.define(
    "ulysses_unpack_output(Tensor wire, SymInt B, SymInt L, SymInt paths, SymInt N, SymInt D, SymInt ranks, str backend)"
    " -> Tensor",
    _unpack_output,
    _unpack_output_fake,
)
unpack_output_bwd = lib.define(
    "ulysses_unpack_output_bwd(Tensor do, SymInt ranks, str backend) -> Tensor", _unpack_output_bwd, _unpack_output_bwd_fake
)


def _setup_pack_output(ctx, inputs, output):
    o, P, *rest = inputs
    B, L, N, D = o.shape
    ctx.rest = (B, L, N if P is None else N // 2, D, *rest)
    ctx.save_for_backward(P)


def _pack_output_backward(ctx, dwire):
    return pack_output_bwd(dwire.contiguous(), *ctx.saved_tensors, *ctx.rest), *[None] * 6


def _setup_unpack_output(ctx, inputs, output):
    ctx.rest = inputs[-2:]


def _unpack_output_backward(ctx, do):
    return unpack_output_bwd(do.contiguous(), *ctx.rest), *[None] * 7


lib.define_backward("ulysses_pack_output", _pack_output_backward, _setup_pack_output)
lib.define_backward("ulysses_unpack_output", _unpack_output_backward, _setup_unpack_output)
