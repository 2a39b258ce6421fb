"""Attention over key intervals as dense rectangles, each on the best dense kernel of the machine.

Forward: parts of one row are merged by their log-sum-exp, o = sum_i exp(lse_i - lse) o_i with lse = log sum_i exp lse_i, in
fp32. Backward: the dense backward of a rectangle, handed the row's final o and lse, gives the rectangle's exact share of dq, dk
and dv; shares of one token are added up in fp32 (fp64 for fp64) and rounded once.
"""

import torch
import torch.nn.functional as tf
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.ops._dense_kernels import Gradients, choose_dense
from dit_ops.ops._rectangles import Range, Rectangle, backward_plan, cut, forward_plan, join

MOST_PARTS = 4  # that the Triton kernel of the merge takes
CALL_BYTES = {"cpu": 1 << 22, "cuda": 1 << 24}  # what memory moves in the time that a further call and its merge take


def wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def call_cost(q: Tensor) -> float:
    """CALL_BYTES in tokens."""
    token = q.shape[0] * q.shape[2] * q.shape[3] * q.element_size()
    return CALL_BYTES.get(q.device.type, 0) / max(1, token)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, rows: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """o [B, Lq, N, D] and lse [B, N, Lq] in fp32 (fp64 for fp64), both contiguous; zeros and -inf where a query sees no key."""
    B, Lq, N, D = q.shape
    plan = forward_plan(tuple(rows), call_cost(q))
    kernel = choose_dense(q.device, q.dtype, D, False)
    if len(plan) == 1 and len(plan[0][2]) == 1:
        keys = plan[0][2][0].keys
        o, lse = kernel.forward(q, side_by_side(k, keys), side_by_side(v, keys), scale)
        return o.contiguous(), lse.contiguous()
    o, lse = q.new_empty(B, Lq, N, D), q.new_empty(B, N, Lq, dtype=wide(q))
    for q0, q1, rectangles in plan:
        block = q[:, q0:q1]
        parts = [kernel.forward(block, *(side_by_side(t, r.keys) for t in (k, v)), scale) for r in rectangles]
        merge(parts, o[:, q0:q1], lse[:, :, q0:q1])
    return o, lse


def side_by_side(t: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """The tokens of the ranges: one range is a view, several are a copy."""
    parts = [t[:, a:b] for a, b in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def merge(parts: list[tuple[Tensor, Tensor]], o: Tensor, lse: Tensor) -> None:
    """Writes the merged parts ([B, n, N, D], [B, N, n]) into o and lse; no part gives zeros and -inf."""
    if not parts:
        o.zero_()
        lse.fill_(-torch.inf)
        return
    if len(parts) == 1:
        o.copy_(parts[0][0])
        lse.copy_(parts[0][1])
        return
    if o.is_cuda and lib.MISSING["triton"] is None and len(parts) <= MOST_PARTS:
        lib.kernel("triton", "_attention_merge", "attention_merge_parts")(parts, o, lse)  # reads and writes everything once
        return
    lses = torch.stack([part for _, part in parts])
    torch.logsumexp(lses, 0, out=lse)
    weights = (lses - lse).exp().mT[..., None]  # [parts, B, n, N, 1]
    total = parts[0][0] * weights[0]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(part, weight)
    o.copy_(total)


def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rows: list[int],
    scale: float,
    deterministic: bool,
    dlse: Tensor | None = None,
) -> Gradients:
    """dq, dk, dv, contiguous, in the dtype of q; dlse [B, N, Lq]: the gradient of lse.

    ds = p (do v^T - delta + dlse), and the kernels compute delta = rowsum(do o) themselves. So with dlse all heads get eight
    more channels, zero in q, k and v, where do holds -dlse in two roundings and o holds ones: their delta is delta - dlse.
    """
    D = q.shape[-1]
    if dlse is not None:
        minus = -dlse.mT[..., None]  # [B, Lq, N, 1]
        high = minus.to(do.dtype)
        do = tf.pad(torch.cat([do, high, (minus - high).to(do.dtype)], -1), (0, 6))
        o = tf.pad(tf.pad(o, (0, 2), value=1.0), (0, 6))
        q, k, v = (tf.pad(t, (0, 8)) for t in (q, k, v))
    kernel = choose_dense(q.device, q.dtype, q.shape[-1], deterministic)
    plan = backward_plan(tuple(rows), call_cost(q))
    sums: tuple[Tensor, ...]
    shares = ((r, kernel.backward(*_slices(r, do, q, k, v, o, lse), scale, deterministic)) for r in plan)
    if len(plan) == 1 and covers(plan[0], q.shape[1], k.shape[1]):
        sums = next(shares)[1]
    else:
        keys = [pair for r in plan for pair in r.keys]
        totals = Sum(q, [(r.q0, r.q1) for r in plan]), Sum(k, keys), Sum(v, keys)
        for r, (dq, *dkv) in shares:
            totals[0].add((r.q0, r.q1), dq)
            for total, share in zip(totals[1:], dkv, strict=True):
                for pair, part in zip(r.keys, share.split([b - a for a, b in r.keys], 1), strict=True):
                    total.add(pair, part)
        sums = tuple(total.result() for total in totals)
    dq, dk, dv = (t[..., :D].to(q.dtype).contiguous() for t in sums)
    return dq, dk, dv


def _slices(r: Rectangle, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> list[Tensor]:
    do, q, o = (t[:, r.q0 : r.q1] for t in (do, q, o))
    return [do, q, side_by_side(k, r.keys), side_by_side(v, r.keys), o, lse[:, :, r.q0 : r.q1]]


def covers(r: Rectangle, Lq: int, Lk: int) -> bool:
    return (r.q0, r.q1, r.keys) == (0, Lq, ((0, Lk),))


class Sum:
    """Shares of ranges of tokens, added up: in t's own dtype where no token has two shares, wide otherwise.

    The first share of a token is written and the next ones are added, so memory is neither cleared nor read for it before.
    """

    def __init__(self, t: Tensor, ranges: list[Range]):
        ordered = sorted(ranges)
        once = all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:], strict=False))
        self.total = t.new_empty(t.shape, dtype=t.dtype if once else wide(t))
        self.filled: list[Range] = []  # sorted, disjoint

    def add(self, tokens: Range, share: Tensor) -> None:
        start, end = tokens
        for a, b in cut(tokens, self.filled):
            target, part = self.total[:, a:b], share[:, a - start : b - start]
            if any(f0 <= a and b <= f1 for f0, f1 in self.filled):
                target += part
            else:
                target.copy_(part)
        self.filled = join([*self.filled, (start, end)])

    def result(self) -> Tensor:
        for a, b in cut((0, self.total.shape[1]), self.filled):
            if (a, b) not in self.filled:
                self.total[:, a:b].zero_()
        return self.total
