"""Dense rectangles against the definition in fp64: outputs, log-sum-exp and gradients, in every tiling of the mask."""

import math

import pytest
import torch
from attention_cases import MASKS, Rows, causal, dense_attention, gradients, interval_masks, qkv, teacher
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_ops
from dit_ops.masks import Intervals
from dit_ops.ops import _attention_dense as dense
from dit_ops.ops import _rectangles as rectangles
from dit_ops.testing import assert_within_rounding

TILINGS = ("chosen", "apart", "side by side", "longest apart", "columns")


def tile(tiling: str, patch: pytest.MonkeyPatch) -> None:
    """Makes both passes use one tiling, whatever its cost; "columns" is one of the backward alone."""
    if tiling == "chosen":
        return

    def ways(rows):
        for row in rectangles.joined(rectangles.parse(rows)):
            options = rectangles.partitions(row)
            yield row, options[min(max(0, TILINGS.index(tiling) - 1), len(options) - 1) if tiling != "columns" else 0]

    def backward(rows, call):
        if tiling == "columns":
            return tuple(rectangles.columns(rectangles.joined(rectangles.parse(rows))))
        return tuple(r for _, way in ways(rows) for r in way)

    patch.setattr(dense, "forward_plan", lambda rows, call: tuple((row[0], row[1], tuple(way)) for row, way in ways(rows)))
    patch.setattr(dense, "backward_plan", backward)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_in_fp64(name, tiling, monkeypatch):
    tile(tiling, monkeypatch)
    mask, leaves = MASKS[name], qkv(MASKS[name], torch.float64)
    want = dense_attention(*leaves, mask, 0.3)
    cotangents = [torch.randn_like(want[0]), torch.randn_like(want[1])]
    for outs, right in ((slice(0, 1), "o"), (slice(1, 2), "lse"), (slice(0, 2), "o and lse")):
        want = dense_attention(*leaves, mask, 0.3)
        got = dit_ops.attention(*leaves, mask, scale=0.3, return_lse=True, backend="dense")
        torch.testing.assert_close(got, want)
        exact, grads = (gradients(y[outs], leaves, cotangents[outs]) for y in (want, got))
        for name, grad, wanted in zip(("dq", "dk", "dv"), grads, exact, strict=True):
            torch.testing.assert_close(grad, wanted, msg=lambda text, name=name, right=right: f"{name} of {right}: {text}")


@pytest.mark.parametrize("tiling", ["chosen", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "mask, N, D",
    [(teacher(5, 2, prefix=3), 2, 64), (causal(7, 1, prefix=2, window=3, sink=1), 6, 96), (causal(3, 1), 24, 128)],
    ids=["teacher forcing, 64", "window, 96", "2N = 24 heads, 128"],
)
def test_low_precision_is_within_rounding_of_fp64(mask, N, D, dtype, tiling, monkeypatch):
    tile(tiling, monkeypatch)
    leaves, scale = qkv(mask, dtype, N=N, D=D), D**-0.5
    wide = [t.detach().double().requires_grad_() for t in leaves]
    do, dlse = torch.randn(leaves[0].shape).to(dtype), torch.randn(2, N, mask.queries)
    exact, plain = dense_attention(*wide, mask, scale), dense_attention(*leaves, mask, scale)
    got = dit_ops.attention(*leaves, mask, return_lse=True, backend="dense")
    assert_within_rounding("o", got[0], exact[0], plain[0])
    assert_within_rounding("lse", got[1], exact[1], plain[1].float())
    cotangents = (
        [do.double(), dlse.double()],
        [do, dlse.to(dtype)],
        [do, dlse],
    )
    runs = zip((exact, plain, got), (wide, leaves, leaves), cotangents, strict=True)
    exact, plain, got = (gradients(y, x, c) for y, x, c in runs)
    for name, *grads in zip(("dq", "dk", "dv"), got, exact, plain, strict=True):
        assert_within_rounding(name, *grads)


def test_many_shares_are_summed_in_fp32(monkeypatch):
    """400 rows see the same keys, each as a rectangle of its own: a sum of their shares in bf16 stops growing."""
    tile("apart", monkeypatch)
    mask = Intervals(tuple((i, i + 1, ((0, 4), (5, 6)) if i % 2 else ((0, 4),)) for i in range(400)), 400, 6)
    leaves = qkv(mask, torch.bfloat16, B=1, N=1)
    leaves[0].data *= 0.1  # softmax is flat, and all shares of dv have one sign
    wide = [t.detach().double().requires_grad_() for t in leaves]
    do = torch.ones_like(leaves[0])
    exact = gradients(dense_attention(*wide, mask, 0.25)[:1], wide, [do.double()])
    plain = gradients(dense_attention(*leaves, mask, 0.25)[:1], leaves, [do])
    got = gradients([dit_ops.attention(*leaves, mask, backend="dense")], leaves, [do])
    for name, *grads in zip(("dq", "dk", "dv"), got, exact, plain, strict=True):
        assert_within_rounding(name, *grads)


@settings(max_examples=60)
@given(interval_masks(), st.sampled_from(TILINGS))
def test_any_intervals_in_any_tiling(mask, tiling):
    torch.manual_seed(0)
    leaves = qkv(mask, torch.float64, B=1, N=1, D=4)
    want, _ = dense_attention(*leaves, mask, 0.5)
    do = torch.randn_like(want)
    with pytest.MonkeyPatch.context() as patch:
        tile(tiling, patch)
        got = dit_ops.attention(*leaves, mask, backend="dense")
        grads = gradients([got], leaves, [do])
    torch.testing.assert_close(got, want)
    for grad, right in zip(grads, gradients([want], leaves, [do]), strict=True):
        torch.testing.assert_close(grad, right)


def test_keys_that_no_query_sees_are_never_read():
    """Slots of a ring cache that were not written yet hold anything, and their gradient is zero."""
    mask = Rows(((0, 3, ((2, 4), (6, 9))), (3, 5, ((2, 4),))))
    q, k, v = (torch.randn(1, n, 2, 8) for n in (5, 12, 12))
    unused = torch.tensor([0, 1, 4, 5, 9, 10, 11])
    zeros = [t.index_fill(1, unused, 0.0) for t in (k, v)]
    want = dit_ops.attention(q, *zeros, mask, backend="dense")
    leaves = [t.requires_grad_() for t in (q, *(t.index_fill(1, unused, math.nan) for t in (k, v)))]
    got = dit_ops.attention(*leaves, mask, backend="dense")
    assert torch.equal(got, want)
    dq, dk, dv = torch.autograd.grad(got.sum(), leaves)
    assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all()
    assert not dk[:, unused].count_nonzero() and not dv[:, unused].count_nonzero()


@pytest.mark.parametrize("frames, block", [(6, 2), (5, 2)])
def test_noisy_blocks_depend_on_earlier_clean_blocks_only(frames, block):
    """Clean block i and later ones may change: noisy block i and its gradients keep every bit."""
    mask = teacher(frames, block, size=2)
    q, k, v = (t.detach() for t in qkv(mask, torch.float32))
    blocks = [(2 * a, 2 * b) for a, b in mask.layout.blocks]
    for i, (first, last) in enumerate(blocks):
        noisy = slice(mask.layout.tokens + first, mask.layout.tokens + last)
        results = []
        for change in (0.0, 1.0):
            leaves = [t.clone() for t in (q, k, v)]
            for t in leaves:
                t[:, first : mask.layout.tokens] += change
            leaves = [t.requires_grad_() for t in leaves]
            o = dit_ops.attention(*leaves, mask, backend="dense")
            results.append((o[:, noisy].detach(), *torch.autograd.grad(o[:, noisy].sum(), leaves)))
        (before, dq, dk, dv), (after, dq_after, dk_after, dv_after) = results
        assert torch.equal(before, after), i
        assert torch.equal(dq[:, noisy], dq_after[:, noisy])
        for grad, other in ((dk, dk_after), (dv, dv_after)):
            assert torch.equal(grad, other) and not grad[:, first : mask.layout.tokens].count_nonzero(), i


def test_gradients_have_the_same_bits_every_time():
    leaves, mask = qkv(MASKS["window, sink, text"], torch.bfloat16), MASKS["window, sink, text"]
    do = torch.randn_like(leaves[0])
    runs = []
    for _ in range(5):
        o = dit_ops.attention(*leaves, mask, deterministic=True, backend="dense")
        runs.append((o, *gradients([o], leaves, [do])))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


class Pointers(torch.utils._python_dispatch.TorchDispatchMode):
    """Where the k and v that the dense kernels were given lie in memory, and how often anything was copied side by side."""

    def __init__(self):
        super().__init__()
        self.given, self.copies = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "flash_attention_for_cpu" in str(func) and "backward" not in str(func):
            self.given += [t.data_ptr() for t in args[1:3]]
        self.copies += str(func).startswith(("aten.cat", "aten.clone", "aten.copy_", "aten._to_copy"))
        return func(*args, **(kwargs or {}))


def test_a_slice_of_a_ring_cache_is_read_in_place():
    """One visible interval of a larger buffer: no copy of k and v, with heads that are a slice too."""
    q, buffers = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 40, 5, 8)
    k, v = (t[:, 5:25, 1:4] for t in buffers)
    rows = rectangles.flatten(((0, 6, ((3, 17),)),))
    with Pointers() as seen:
        dense.attention_fwd(q, k, v, rows, 0.3)
    assert seen.given == [t[:, 3:].data_ptr() for t in (k, v)]
    assert seen.copies <= 1  # lse, whose heads the kernel leaves innermost


def test_batch_of_masks_is_every_sample_under_its_own():
    masks = [causal(4, 2, size=2), causal(4, 2, size=2), causal(4, 1, size=2)]
    leaves = qkv(masks[0], torch.float64, B=3)
    for backend in ("dense", "reference"):
        got = dit_ops.attention(*leaves, masks, return_lse=True, backend=backend)
        alone = [
            dit_ops.attention(*(t[b : b + 1] for t in leaves), masks[b], return_lse=True, backend=backend) for b in range(3)
        ]
        for i in (0, 1):
            torch.testing.assert_close(got[i], torch.cat([one[i] for one in alone]))
    with pytest.raises(ValueError, match="mask must be one mask, or one per sample of B = 3, got 2"):
        dit_ops.attention(*leaves, masks[:2])


def test_costs_decide_between_copies_and_merges():
    """Few queries over many keys are merged; many queries over few keys read a copy; a long interval stays where it is."""

    def way(*rows):
        return [r.keys for _, _, way in rectangles.forward_plan(tuple(rectangles.flatten(rows)), 0.0) for r in way]

    assert way((0, 10, ((0, 100), (200, 300)))) == [((0, 100),), ((200, 300),)]
    assert way((0, 500, ((0, 10), (20, 30)))) == [((0, 10), (20, 30))]
    assert way((0, 500, ((0, 10), (20, 30), (40, 9000)))) == [((40, 9000),), ((0, 10), (20, 30))]
    assert way((0, 5, ((0, 10), (10, 30))), (5, 9, ((0, 30),))) == [((0, 30),)]  # touching intervals, equal rows
    many = rectangles.forward_plan(tuple(rectangles.flatten([(0, 10, ((0, 100), (200, 300)))])), 1e6)
    assert [r.keys for r in many[0][2]] == [((0, 100), (200, 300))]  # where a call costs more than the copy


@settings(max_examples=100)
@given(interval_masks(), st.sampled_from([0.0, 3.0, 1e6]))
def test_plans_cover_every_visible_pair_once(mask, call):
    rows = tuple(rectangles.flatten(mask.intervals()))
    ways = [r for _, _, way in rectangles.forward_plan(rows, call) for r in way]
    for plan in (ways, rectangles.backward_plan(rows, call), rectangles.columns(rectangles.joined(rectangles.parse(rows)))):
        count = torch.zeros(mask.queries, mask.keys, dtype=torch.int)
        for r in plan:
            for a, b in r.keys:
                count[r.q0 : r.q1, a:b] += 1
        assert torch.equal(count, mask.dense().int())
