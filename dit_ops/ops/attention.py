"""Attention whose mask is a few key intervals per block of queries."""

import math
from collections.abc import Sequence
from typing import Literal, Protocol, overload

import torch
import torch.nn.functional as tf
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.ops._dense_kernels import choose_dense
from dit_ops.ops._rectangles import Row, flatten


class IntervalMask(Protocol):
    def intervals(self) -> tuple[Row, ...]:
        """(q_start, q_end, ((k_start, k_end), ...)) in host integers: all queries in order, key intervals sorted, disjoint."""
        ...


Masks = IntervalMask | Sequence[IntervalMask] | None


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Masks = None,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Masks = None,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    deterministic: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Masks = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the keys that the mask lets a query see; differentiable in q, k and v, and so is lse.

    q: [B, Lq, N, D]    k, v: [B, Lk, N, D], read in place if they have unit stride over D    scale: default 1 / sqrt(D)
    mask: None = every key; anything with intervals(); or a sequence of B of them, one per sample
    returns [B, Lq, N, D] in q's dtype, with return_lse also log sum exp [B, N, Lq] in fp32 (fp64 for fp64);
    a query without keys gives zeros and -inf, and has no gradient
    deterministic: the gradients have the same bits every time, at the price of a slower dense kernel on a GPU; so they have
    inside torch.use_deterministic_algorithms(True)
    Under autocast q, k and v are cast to its dtype, as for PyTorch's own attention.
    """
    lib.check_tensor("attention", "q", q, "B, Lq, N, D")
    lib.check_tensor("attention", "k", k, "B, Lk, N, D")
    B, Lq, N, D = q.shape
    Lk = k.shape[1]
    lib.check_shape("attention", "k", k, "B, Lk, N, D", (B, Lk, N, D))
    lib.check_shape("attention", "v", v, "B, Lk, N, D", (B, Lk, N, D))
    groups = _groups(mask, B, Lq, Lk)
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    chosen = lib.choose("attention", backend, REFUSES, q, k, v, deterministic, describe=_describe)
    scale = 1 / math.sqrt(D) if scale is None else scale
    if len(groups) == 1:
        out, lse = _attention_of(q, k, v, groups[0][1], scale, return_lse, deterministic, chosen)
    else:
        qs, ks, vs = (t.split([n for n, _ in groups]) for t in (q, k, v))
        parts = [
            _attention_of(qs[i], ks[i], vs[i], rows, scale, return_lse, deterministic, chosen)
            for i, (_, rows) in enumerate(groups)
        ]
        out, lse = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
    return (out, lse) if return_lse else out


def _groups(mask: Masks, B: int, Lq: int, Lk: int) -> list[tuple[int, tuple[Row, ...]]]:
    """(samples, their rows): neighbouring samples of equal rows are one group."""
    if mask is None:
        return [(B, ((0, Lq, ((0, Lk),)),))]
    if not isinstance(mask, Sequence):
        rows = mask.intervals()
        _check_rows(rows, Lq, Lk)
        return [(B, rows)]
    if len(mask) != B:
        raise ValueError(f"attention: mask must be one mask, or one per sample of B = {B}, got {len(mask)}")
    groups: list[tuple[int, tuple[Row, ...]]] = []
    for sample in mask:
        rows = sample.intervals()
        if groups and groups[-1][1] == rows:
            groups[-1] = (groups[-1][0] + 1, rows)
        else:
            _check_rows(rows, Lq, Lk)
            groups.append((1, rows))
    return groups or [(0, ((0, Lq, ((0, Lk),)),))]


def _attention_of(
    q: Tensor, k: Tensor, v: Tensor, rows: tuple[Row, ...], scale: float, return_lse: bool, deterministic: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return attention_ref(q, k, v, rows, scale, return_lse)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _attention(q, k, v, flatten(rows), scale, deterministic, backend)


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, rows: tuple[Row, ...], scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """One dense problem per row of the mask; lse is empty unless asked for."""
    outs, lses = [], []
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, N, L, D]
    for q0, q1, ranges in rows:
        block = q[:, :, q0:q1]
        keys, values = (_slices(t, ranges) for t in (k, v))
        if keys.shape[2] == 0:
            outs.append(block.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0))  # its gradient is zero
            lses.append(block.new_full(block.shape[:3], -math.inf, dtype=_wide(q)))
        elif return_lse:
            logits = block.to(_wide(q)) @ keys.to(_wide(q)).mT * scale
            lses.append(logits.logsumexp(-1))
            outs.append(((logits - lses[-1][..., None]).exp() @ values.to(_wide(q))).to(q.dtype))
        else:
            outs.append(tf.scaled_dot_product_attention(block, keys, values, scale=scale))
    if not outs:
        return q.transpose(1, 2), q.new_empty(q.shape[:3], dtype=_wide(q))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    return out.transpose(1, 2), torch.cat(lses, 2) if return_lse else q.new_empty(0)


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _slices(t: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    if len(ranges) == 1:
        return t[:, :, ranges[0][0] : ranges[0][1]]
    return torch.cat([t[:, :, k0:k1] for k0, k1 in ranges], 2) if ranges else t[:, :, :0]


def _check_rows(rows: tuple[Row, ...], Lq: int, Lk: int) -> None:
    at = 0
    for q0, q1, ranges in rows:
        if q0 != at or q1 < q0:
            raise ValueError(f"attention: mask must cover the queries in order, got a row [{q0}, {q1}) after query {at}")
        edges = [edge for pair in ranges for edge in pair]
        if edges != sorted(edges) or any(not 0 <= edge <= Lk for edge in edges):
            raise ValueError(f"attention: mask must hold sorted, disjoint key intervals inside [0, {Lk}], got {ranges}")
        at = q1
    if at != Lq:
        raise ValueError(f"attention: mask must cover Lq = {Lq} queries, got {at}")


def _differ(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.dtype == k.dtype == v.dtype:
        return None
    return f"q, k and v differ in dtype: {q.dtype}, {k.dtype} and {v.dtype}"


def _dense_refuses(q: Tensor, k: Tensor, v: Tensor, deterministic: bool) -> str | None:
    reason = _differ(q, k, v)
    if reason:
        return reason
    try:
        choose_dense(q.device, q.dtype, q.shape[-1], deterministic)
    except NotImplementedError as error:
        return str(error)
    return None


def _triton_refuses(q: Tensor, k: Tensor, v: Tensor, deterministic: bool) -> str | None:
    if q.shape[-1] > 128:
        return f"D = {q.shape[-1]}: a tile of queries must fit in registers, D at most 128"
    return _differ(q, k, v) or lib.refuses("triton", q)


REFUSES = {"dense": _dense_refuses, "triton": _triton_refuses}


def _describe(backend: str, q: Tensor, k: Tensor, v: Tensor, deterministic: bool) -> str:
    """The dense kernel, and the one of the backward if it is another."""
    if backend != "dense":
        return ""
    forward, backward = (choose_dense(q.device, q.dtype, q.shape[-1], d).name for d in (False, deterministic))
    return forward if forward == backward else f"{forward}, backward on {backward}"


def _fwd(q, k, v, rows, scale, deterministic, backend):
    if q.numel() == 0 or k.numel() == 0:
        o, lse = _fwd_fake(q, k, v, rows, scale, deterministic, backend)
        return o.zero_(), lse.fill_(-math.inf)
    return lib.kernel(backend, "attention", "attention_fwd")(q, k, v, rows, scale)


def _fwd_fake(q, k, v, rows, scale, deterministic, backend):
    B, Lq, N, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, N, Lq, dtype=_wide(q))


def _bwd(do, q, k, v, o, lse, dlse, rows, scale, deterministic, backend):
    if q.numel() == 0 or k.numel() == 0:
        return tuple(t.zero_() for t in _bwd_fake(do, q, k, v, o, lse, dlse, rows, scale, deterministic, backend))
    deterministic = deterministic or torch.get_deterministic_debug_mode() == 2
    launch = lib.kernel(backend, "attention", "attention_bwd")
    return launch(do, q, k, v, o, lse, rows, scale, deterministic, dlse)


def _bwd_fake(do, q, k, v, o, lse, dlse, rows, scale, deterministic, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_attention = lib.define(
    "attention(Tensor q, Tensor k, Tensor v, SymInt[] rows, float scale, bool deterministic, str backend)"
    " -> (Tensor o, Tensor lse)",
    _fwd,
    _fwd_fake,
)
_attention_bwd = lib.define(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? dlse, SymInt[] rows, float scale,"
    " bool deterministic, str backend) -> (Tensor dq, Tensor dk, Tensor dv)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # a None for lse, which few callers differentiate, spares its share of the backward
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, do, dlse):
    q, k, v, o, lse = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    do = do if do.stride(-1) == 1 else do.contiguous()
    return *_attention_bwd(do, q, k, v, o, lse, dlse, *ctx.rest), *[None] * 4


lib.define_backward("attention", _backward, _setup_context)
