import math
from dataclasses import dataclass

import pytest
import torch

import dit_ops
from dit_ops.layout import VideoLayout
from dit_ops.masks import BlockCausal, Full, TeacherForcing
from dit_ops.testing import assert_within_rounding

LAYOUT = VideoLayout(5, 2, 1, block_frames=2)  # blocks of 2, 2 and 1 frames
MASKS = {
    "none": None,
    "full": Full(10, 10),
    "block causal": BlockCausal(LAYOUT),
    "window and sink": BlockCausal(LAYOUT, window_frames=3, sink_frames=1),
    "text prefix": BlockCausal(VideoLayout(4, 2, 1, block_frames=1, prefix=2)),
    "teacher forcing": TeacherForcing(VideoLayout(5, 1, 1, block_frames=2, halves=2)),
}


@dataclass
class Rows:
    """A mask made of literal rows."""

    rows: tuple

    def intervals(self) -> tuple:
        return self.rows


def dense_attention(q, k, v, mask, scale):
    """The definition, in one softmax over all keys."""
    logits = torch.einsum("bqnd,bknd->bnqk", q, k) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask.dense(), -math.inf)
    return torch.einsum("bnqk,bknd->bqnd", logits.softmax(-1), v), logits.logsumexp(-1)


def qkv(dtype: torch.dtype = torch.float64, Lk: int = 10) -> list[torch.Tensor]:
    return [torch.randn(2, n, 3, 8, dtype=dtype, requires_grad=True) for n in (10, Lk, Lk)]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_are_those_of_the_dense_mask(name, return_lse):
    q, k, v = qkv()
    want, want_lse = dense_attention(q, k, v, MASKS[name], 0.3)
    got = dit_ops.attention(q, k, v, MASKS[name], scale=0.3, return_lse=return_lse)
    got, want = (got, (want, want_lse)) if return_lse else ((got,), (want,))
    cotangents = [torch.randn_like(t) for t in want]
    torch.testing.assert_close(got, want)
    for grad, exact in zip(*(torch.autograd.grad(t, (q, k, v), cotangents) for t in (got, want)), strict=True):
        torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_within_rounding_of_fp64(dtype):
    args = [t.detach().to(dtype) for t in qkv(torch.float32)]
    mask = MASKS["teacher forcing"]
    exact, _ = dense_attention(*(t.double() for t in args), mask, 8**-0.5)
    plain, _ = dense_attention(*args, mask, 8**-0.5)
    assert_within_rounding("o", dit_ops.attention(*args, mask), exact, plain)


def test_queries_and_keys_of_different_length():
    q, k, v = qkv(Lk=7)
    torch.testing.assert_close(dit_ops.attention(q, k, v), dense_attention(q, k, v, None, 8**-0.5)[0])


def test_rows_without_keys_are_zero():
    q, k, v = qkv()
    mask = Rows(((0, 4, ()), (4, 10, ((2, 5),))))
    out, lse = dit_ops.attention(q, k, v, mask, return_lse=True)
    assert not out[:, :4].count_nonzero() and (lse[..., :4] == -math.inf).all()
    torch.testing.assert_close(out[:, 4:], dense_attention(q[:, 4:], k[:, 2:5], v[:, 2:5], None, 8**-0.5)[0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    assert not dit_ops.attention(q, k[:, :0], v[:, :0]).count_nonzero()
    assert dit_ops.attention(q[:, :0], k, v).shape == (2, 0, 3, 8)


def test_noisy_blocks_see_no_later_clean_block():
    layout = VideoLayout(5, 1, 1, block_frames=2, halves=2)
    q, k, v = (t.detach() for t in qkv())
    before = dit_ops.attention(q, k, v, TeacherForcing(layout))
    k, v = k.clone(), v.clone()
    k[:, 2:5] += 1  # clean blocks 1 and 2
    v[:, 2:5] -= 1
    after = dit_ops.attention(q, k, v, TeacherForcing(layout))
    assert torch.equal(before[:, 5:9], after[:, 5:9])  # noisy blocks 0 and 1
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_batch_of_two_is_two_batches_of_one():
    q, k, v = qkv(torch.float32)
    both = dit_ops.attention(q, k, v, MASKS["block causal"])
    alone = [dit_ops.attention(*(t[b : b + 1] for t in (q, k, v)), MASKS["block causal"]) for b in (0, 1)]
    torch.testing.assert_close(both, torch.cat(alone))


def test_compiles_without_graph_break():
    q, k, v = qkv(torch.float32)
    mask = MASKS["window and sink"]
    compiled = torch.compile(lambda *a: dit_ops.attention(*a, mask), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), dit_ops.attention(q, k, v, mask))


def test_errors_name_argument_expected_and_got():
    q, k, v = qkv(Lk=7)
    with pytest.raises(ValueError, match=r"attention: v must be \[B, Lk, N, D\] = \[2, 7, 3, 8\], got \[2, 10, 3, 8\]"):
        dit_ops.attention(q, k, q)
    with pytest.raises(ValueError, match="mask must cover Lq = 10 queries, got 5"):
        dit_ops.attention(q, k, v, Rows(((0, 5, ((0, 7),)),)))
    with pytest.raises(ValueError, match=r"mask must cover the queries in order, got a row \[6, 10\) after query 5"):
        dit_ops.attention(q, k, v, Rows(((0, 5, ()), (6, 10, ()))))
    with pytest.raises(ValueError, match=r"sorted, disjoint key intervals inside \[0, 7\], got \(\(0, 8\),\)"):
        dit_ops.attention(q, k, v, Rows(((0, 10, ((0, 8),)),)))
