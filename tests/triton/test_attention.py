"""The Triton kernels of attention in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import math

import pytest
import torch
from torch import Tensor

import dit_ops
from dit_ops import _library as lib
from dit_ops.layout import VideoLayout
from dit_ops.masks import BlockCausal, Full, TeacherForcing
from dit_ops.testing import assert_within_rounding

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from dit_ops.kernels import _attention_schedule as schedule  # noqa: E402
from dit_ops.kernels.attention import Blocks, attention_bwd, attention_fwd  # noqa: E402

SMALL = Blocks(32, 32, 16, 4, 1)
LAYOUT = VideoLayout(5, 3, 3, block_frames=2)  # blocks of 18, 18 and 9 tokens
MASKS = {
    "full": Full(45, 45).intervals(),
    "queries and keys of different length": Full(37, 70).intervals(),
    "one frame": BlockCausal(VideoLayout(1, 3, 3)).intervals(),
    "block causal": BlockCausal(LAYOUT).intervals(),
    "window and sink": BlockCausal(VideoLayout(7, 3, 3, block_frames=1), window_frames=3, sink_frames=1).intervals(),
    "text prefix": BlockCausal(VideoLayout(3, 3, 5, block_frames=1, prefix=7)).intervals(),
    "teacher forcing": TeacherForcing(VideoLayout(4, 3, 3, block_frames=2, halves=2)).intervals(),
    "teacher forcing with a prefix": TeacherForcing(VideoLayout(3, 3, 3, block_frames=1, halves=2, prefix=5)).intervals(),
    "ring": ((0, 18, ((0, 5), (9, 13), (40, 90))),),
    "rows without keys": ((0, 7, ()), (7, 40, ((3, 50), (60, 61))), (40, 45, ()), (45, 45, ((0, 9),))),
}


def flat(rows) -> list[int]:
    return [i for q0, q1, pairs in rows for i in (q0, q1, len(pairs), *(edge for pair in pairs for edge in pair))]


def sizes(rows) -> tuple[int, int]:
    return rows[-1][1], max(pair[1] for row in rows for pair in row[2]) + 2


def tensors(rows, B: int = 1, N: int = 1, D: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, do and dlse; two of the keys are seen by nobody."""
    Lq, Lk = sizes(rows)
    shapes = [(B, Lq, N, D), (B, Lk, N, D), (B, Lk, N, D), (B, Lq, N, D)]
    return [*(torch.randn(shape).to(dtype) for shape in shapes), torch.randn(B, N, Lq)]


def seen_by(rows, queries: int, keys: int) -> Tensor:
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for q0, q1, pairs in rows:
        for k0, k1 in pairs:
            mask[q0:q1, k0:k1] = True
    return mask


def exact_results(q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, rows, scale: float) -> dict[str, Tensor]:
    """One softmax over all keys in fp64, and autograd of sum(o do) + sum(lse dlse) over the queries that see a key."""
    q, k, v, do, dlse = (t.detach().double() for t in (q, k, v, do, dlse))
    mask = seen_by(rows, q.shape[1], k.shape[1])
    seen = mask.any(1)
    leaves = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    s = (torch.einsum("bqnd,bknd->bnqk", q, k) * scale)[:, :, seen].masked_fill(~mask[seen], -math.inf)
    o = torch.zeros_like(q)
    o[:, seen], lse = torch.einsum("bnqk,bknd->bqnd", s.softmax(-1), v), s.logsumexp(-1)
    dq, dk, dv = torch.autograd.grad((o * do).sum() + (lse * dlse[..., seen]).sum(), leaves)
    return {name: t.detach() for name, t in (("o", o), ("lse", lse), ("dq", dq), ("dk", dk), ("dv", dv))}


def plain_results(q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, rows, scale: float) -> dict[str, Tensor]:
    """The formulas of flash attention in fp32, with operands of products rounded to the inputs' dtype; p from lse in base 2."""
    dtype, mask = q.dtype, seen_by(rows, q.shape[1], k.shape[1])
    q, k, v, do = (t.float() for t in (q, k, v, do))
    s = (torch.einsum("bqnd,bknd->bnqk", q, k) * (scale / math.log(2))).masked_fill(~mask, -math.inf)
    lse = (s * math.log(2)).logsumexp(-1)
    p = (s - (lse / math.log(2)).masked_fill(~mask.any(1), 0)[..., None]).exp2()
    o = torch.einsum("bnqk,bknd->bqnd", p.to(dtype).float(), v).to(dtype)
    delta = torch.einsum("bqnd,bqnd->bnq", o.float(), do) - dlse
    ds = (p * (torch.einsum("bqnd,bknd->bnqk", do, v) - delta[..., None])).to(dtype).float()
    dq, dk = torch.einsum("bnqk,bknd->bqnd", ds, k) * scale, torch.einsum("bnqk,bqnd->bknd", ds, q) * scale
    dv = torch.einsum("bnqk,bqnd->bknd", p.to(dtype).float(), do)
    return {"o": o, "lse": lse[..., mask.any(1)], "dq": dq.to(dtype), "dk": dk.to(dtype), "dv": dv.to(dtype)}


def run(q, k, v, do, dlse, rows, scale, blocks=SMALL, splits=None) -> dict[str, Tensor]:
    o, lse = attention_fwd(q, k, v, flat(rows), scale, blocks=blocks, splits=splits)
    dq, dk, dv = attention_bwd(do, q, k, v, o, lse, flat(rows), scale, True, dlse, blocks=(blocks, blocks))
    seen = lse[0, 0].isfinite()
    assert not o[:, ~seen].count_nonzero() and (lse[..., ~seen] == -math.inf).all() and not dq[:, ~seen].count_nonzero()
    return {"o": o, "lse": lse[..., seen], "dq": dq, "dk": dk, "dv": dv}


def check(args: list[Tensor], rows, scale: float = 0.3, factor: float = 3.0, **options) -> None:
    """3: the kernels round lse in base e and in base 2, and their scores once more than `plain_results`."""
    got = run(*args, rows, scale, **options)
    exact, plain = exact_results(*args, rows, scale), plain_results(*args, rows, scale)
    for name, t in got.items():
        assert_within_rounding(name, t, exact[name], plain[name], factor)


@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_are_within_rounding(name):
    check(tensors(MASKS[name]), MASKS[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, N, D", [(2, 2, 24), (1, 1, 64)])
def test_half_precision_batches_and_head_sizes(B, N, D, dtype):
    factor = 4 if dtype == torch.bfloat16 else 2  # lse is not what errs here; the interpreter truncates to bf16, a GPU rounds
    rows = MASKS["teacher forcing"]
    check(tensors(rows, B, N, D, dtype), rows, D**-0.5, factor, blocks=Blocks(32, 32, 32, 4, 1))


def test_a_batch_of_several_heads_is_each_head_alone():
    rows = MASKS["window and sink"]
    args = tensors(rows, B=2, N=3, D=8)
    together = run(*args, rows, 0.3)
    one = [t[1:, :, 2:3] for t in args[:4]] + [args[4][1:, 2:3]]
    for name, t in run(*one, rows, 0.3).items():
        assert torch.equal(t, together[name][1:, 2:3] if name == "lse" else together[name][1:, :, 2:3]), name


@pytest.mark.parametrize("splits", [(0, 1), (2, 2), (3, 3), (1, 5)], ids=str)
def test_splits_of_the_keys(splits):
    """Tiles split into pieces, with pieces that begin inside an interval and pieces that span several."""
    rows = ((0, 40, ((0, 100), (103, 140), (150, 165))), (40, 80, ((0, 165),)))
    blocks = Blocks(32, 16, 16, 4, 1)
    table = schedule.pack(schedule.cut(schedule.parse(flat(rows)), 32), 16, splits)
    assert table.merges == splits[0] and table.slots == (splits[0] and splits[0] * splits[1])
    args = tensors(rows, N=2)
    q, k, v = args[:3]
    o, lse = attention_fwd(q, k, v, flat(rows), 0.3, blocks=blocks, splits=splits)
    exact, plain = exact_results(*args, rows, 0.3), plain_results(*args, rows, 0.3)
    assert_within_rounding("o", o, exact["o"], plain["o"])
    assert_within_rounding("lse", lse, exact["lse"], plain["lse"])
    again = attention_fwd(q, k, v, flat(rows), 0.3, blocks=blocks, splits=splits)
    assert torch.equal(o, again[0]) and torch.equal(lse, again[1])


def test_the_same_bits_every_run():
    rows = MASKS["teacher forcing with a prefix"]
    args = tensors(rows)
    once, again = (run(*args, rows, 0.3) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_slots_of_a_ring_are_read_in_place_and_unused_ones_never():
    """q is a view of packed QKV, keys and values are slices of heads of a larger buffer, o's gradient is expanded."""
    rows = MASKS["ring"]
    q = torch.randn(2, 18, 3, 2, 16)[:, :, 1]
    k, v = torch.full((2, 2, 95, 4, 16), math.nan)[:, :, 2:, 1:3].unbind()
    for k0, k1 in rows[0][2]:
        k[:, k0:k1], v[:, k0:k1] = torch.randn(2, 2, k1 - k0, 2, 16)
    do, dlse = torch.randn(16).expand(2, 18, 2, 16), torch.randn(2, 2, 18)
    got = run(q, k, v, do, dlse, rows, 0.3)
    clean = [q, k.nan_to_num(0), v.nan_to_num(0), do, dlse]
    exact, plain = exact_results(*clean, rows, 0.3), plain_results(*clean, rows, 0.3)
    for name, t in got.items():
        assert_within_rounding(name, t, exact[name], plain[name])


def test_large_scores_do_not_overflow():
    """All scores far below or above 0: 2^(0 - lse) of a key that is not there may be inf, and must not meet a zero."""
    rows = MASKS["block causal"]
    for sign in (-1, 1):
        q, k, v, do, dlse = tensors(rows)
        k = sign * (q.mean((0, 1, 2)) + 4).expand_as(k) * (1 + torch.rand(k.shape[1]))[:, None, None]
        check([q.abs() * 4, k.contiguous(), v, do, dlse], rows, 1.0)


def test_noisy_blocks_see_no_later_clean_block():
    layout = VideoLayout(3, 3, 3, block_frames=1, halves=2)
    rows = TeacherForcing(layout).intervals()
    q, k, v, *_ = tensors(rows)
    before, _ = attention_fwd(q, k, v, flat(rows), 0.3, blocks=SMALL)
    (first, _), (_, last) = layout.token_range((1, 2)), layout.token_range((2, 3))
    k[:, first:last] += 1
    v[:, first:last] -= 1
    after, _ = attention_fwd(q, k, v, flat(rows), 0.3, blocks=SMALL)
    kept, changed = layout.token_range((0, 2), half=1), layout.token_range((2, 3), half=1)
    assert torch.equal(before[:, slice(*kept)], after[:, slice(*kept)])
    assert (before[:, slice(*changed)] != after[:, slice(*changed)]).any(-1).all()


def test_no_queries_and_no_keys():
    q, k = torch.randn(1, 9, 2, 16), torch.randn(1, 7, 2, 16)
    for rows, a, b in (([0, 9, 0], q, k[:, :0]), ([0, 0, 1, 0, 7], q[:, :0], k), ([], q[:, :0], k)):
        o, lse = attention_fwd(a, b, b, rows, 0.3, blocks=SMALL)
        grads = attention_bwd(torch.ones_like(o), a, b, b, o, lse, rows, 0.3, False, blocks=(SMALL, SMALL))
        assert o.shape == a.shape and lse.shape == (1, 2, a.shape[1]) and (lse == -math.inf).all()
        assert [g.shape for g in grads] == [a.shape, b.shape, b.shape] and not any(g.count_nonzero() for g in (o, *grads))


def test_errors_name_argument_expected_and_got():
    q = torch.randn(1, 9, 2, 16)
    with pytest.raises(ValueError, match="scale must not be negative, got -1"):
        attention_fwd(q, q, q, [0, 9, 1, 0, 9], -1.0)
    with pytest.raises(ValueError, match="k must have unit stride over D"):
        attention_fwd(q, q.mT.contiguous().mT, q, [0, 9, 1, 0, 9], 1.0)
    with pytest.raises(ValueError, match="q must have heads of at most 128 values, got 256"):
        wide = torch.randn(1, 9, 2, 256)
        attention_fwd(wide, wide, wide, [0, 9, 1, 0, 9], 1.0)


def test_the_public_operator_reaches_the_kernels():
    """Blocks of the interpreter's own choice, gradients through autograd, and lse differentiable."""
    mask = TeacherForcing(VideoLayout(3, 3, 3, block_frames=1, halves=2))
    q, k, v, do, dlse = tensors(mask.intervals(), N=2)
    leaves = [t.requires_grad_() for t in (q, k[:, :54], v[:, :54])]
    o, lse = dit_ops.attention(*leaves, mask, scale=0.3, return_lse=True, backend="triton")
    grads = torch.autograd.grad((o, lse), leaves, (do, dlse))
    got = {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    args = [*(t.detach() for t in leaves), do, dlse]
    exact, plain = (results(*args, mask.intervals(), 0.3) for results in (exact_results, plain_results))
    for name, t in got.items():
        assert_within_rounding(name, t.detach(), exact[name], plain[name], 3.0)
