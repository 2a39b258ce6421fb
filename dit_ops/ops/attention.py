"""Attention whose mask is a few key intervals per block of queries."""

import math
from typing import Literal, Protocol, overload

import torch
import torch.nn.functional as tf
from torch import Tensor

from dit_ops import _library as lib

Row = tuple[int, int, tuple[tuple[int, int], ...]]


class IntervalMask(Protocol):
    def intervals(self) -> tuple[Row, ...]:
        """(q_start, q_end, ((k_start, k_end), ...)) in host integers: all queries in order, key intervals sorted, disjoint."""
        ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the keys that the mask lets a query see; differentiable in q, k and v.

    q: [B, Lq, N, D]    k, v: [B, Lk, N, D]    mask: None = every key    scale: default 1 / sqrt(D)
    returns [B, Lq, N, D] in q's dtype, with return_lse also log sum exp [B, N, Lq] in fp32 (fp64 for fp64);
    a query without keys gives zeros and -inf
    """
    lib.check_tensor("attention", "q", q, "B, Lq, N, D")
    lib.check_tensor("attention", "k", k, "B, Lk, N, D")
    B, Lq, N, D = q.shape
    Lk = k.shape[1]
    lib.check_shape("attention", "k", k, "B, Lk, N, D", (B, Lk, N, D))
    lib.check_shape("attention", "v", v, "B, Lk, N, D", (B, Lk, N, D))
    rows: tuple[Row, ...] = ((0, Lq, ((0, Lk),)),) if mask is None else mask.intervals()
    _check_rows(rows, Lq, Lk)
    lib.choose("attention", backend, {}, q, k)
    out, lse = attention_ref(q, k, v, rows, 1 / math.sqrt(D) if scale is None else scale, return_lse)
    return (out, lse) if return_lse else out


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
            outs.append(torch.zeros_like(block))
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
