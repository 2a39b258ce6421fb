"""The reference of attention, the op around its backends, and what it refuses."""

import math

import pytest
import torch
from attention_cases import Rows, dense_attention

import dit_ops
from dit_ops.layout import VideoLayout
from dit_ops.masks import BlockCausal, Full, TeacherForcing
from dit_ops.ops import _attention_dense
from dit_ops.ops import _dense_kernels as kernels
from dit_ops.ops.attention import _attention, attention_ref
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


def qkv(dtype: torch.dtype = torch.float64, Lk: int = 10) -> list[torch.Tensor]:
    return [torch.randn(2, n, 3, 8, dtype=dtype, requires_grad=True) for n in (10, Lk, Lk)]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_are_those_of_the_dense_mask(name, return_lse):
    q, k, v = qkv()
    want, want_lse = dense_attention(q, k, v, MASKS[name], 0.3)
    got = dit_ops.attention(q, k, v, MASKS[name], scale=0.3, return_lse=return_lse, backend="reference")
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
    assert_within_rounding("o", dit_ops.attention(*args, mask, backend="reference"), exact, plain)


def test_queries_and_keys_of_different_length():
    q, k, v = qkv(Lk=7)
    torch.testing.assert_close(dit_ops.attention(q, k, v), dense_attention(q, k, v, None, 8**-0.5)[0])


@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_rows_without_keys_are_zero(backend):
    q, k, v = qkv()
    mask = Rows(((0, 4, ()), (4, 10, ((2, 5),))))
    out, lse = dit_ops.attention(q, k, v, mask, return_lse=True, backend=backend)
    assert not out[:, :4].count_nonzero() and (lse[..., :4] == -math.inf).all()
    torch.testing.assert_close(out[:, 4:], dense_attention(q[:, 4:], k[:, 2:5], v[:, 2:5], None, 8**-0.5)[0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    none = dit_ops.attention(q, k[:, :0], v[:, :0], backend=backend)
    assert not none.count_nonzero() and not torch.autograd.grad(none.sum(), q)[0].count_nonzero()
    assert dit_ops.attention(q[:, :0], k, v, backend=backend).shape == (2, 0, 3, 8)
    assert dit_ops.attention(q[:0], k[:0], v[:0], backend=backend).shape == (0, 10, 3, 8)


def test_batch_of_two_is_two_batches_of_one():
    q, k, v = qkv(torch.float32)
    both = dit_ops.attention(q, k, v, MASKS["block causal"])
    alone = [dit_ops.attention(*(t[b : b + 1] for t in (q, k, v)), MASKS["block causal"]) for b in (0, 1)]
    torch.testing.assert_close(both, torch.cat(alone))


def test_gradients_of_the_reference():
    rows = (*MASKS["window and sink"].intervals()[:2], (8, 10, ()))
    leaves = [torch.randn(1, 10, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for return_lse in (False, True):
        keep = lambda *t, lse=return_lse: attention_ref(*t, rows, 0.5, lse)[0]
        assert torch.autograd.gradcheck(keep, leaves)
    assert torch.autograd.gradcheck(lambda *t: attention_ref(*t, rows[:2], 0.5, True)[1], leaves)


@pytest.mark.parametrize("name", ["teacher forcing", "window and sink"])
def test_op_is_well_formed(name):
    """Schema, fake, autograd, and tracing with shapes as symbols."""
    leaves = qkv(torch.float32)
    rows = [i for q0, q1, r in MASKS[name].intervals() for i in (q0, q1, len(r), *(e for pair in r for e in pair))]
    torch.library.opcheck(_attention, (*leaves, rows, 0.3, False, "dense"))
    sliced = [torch.randn(2, 10, 5, 8)[:, :, 1:4] for _ in range(3)]
    torch.library.opcheck(_attention, (*sliced, [0, 10, 1, 2, 7], 0.3, True, "dense"))


@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_compiles_without_graph_break(backend):
    q, k, v = qkv(torch.float32)
    mask = MASKS["window and sink"]
    fn = lambda *a: dit_ops.attention(*a, mask, return_lse=True, backend=backend)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    want, got = fn(q, k, v), compiled(q, k, v)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad([y.square().sum() for y in out], (q, k, v)) for out in (got, want))
    torch.testing.assert_close(*grads)


def test_compiles_once_for_every_length():
    compiled = torch.compile(lambda *a: dit_ops.attention(*a), fullgraph=True, dynamic=True, backend="aot_eager")
    for Lq, Lk in ((4, 6), (7, 9), (12, 5)):
        q, k, v = (torch.randn(2, n, 3, 8, requires_grad=True) for n in (Lq, Lk, Lk))
        with torch._dynamo.config.patch(error_on_recompile=Lq > 4):
            got = compiled(q, k, v)
        want, _ = dense_attention(q, k, v, None, 8**-0.5)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), (q, k, v)) for y in (got, want)))


def test_unused_outputs_cost_no_gradient():
    """None for lse, not zeros: the backward of o alone adds no channels to the heads."""
    q, k, v = qkv(torch.float32)
    o, lse = dit_ops.attention(q, k, v, return_lse=True, backend="dense")
    seen = []
    node = o.grad_fn
    node.register_prehook(lambda grads: seen.append([g is None for g in grads]))
    o.sum().backward()
    assert seen == [[False, True]]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_is_that_of_pytorch(backend):
    """As scaled_dot_product_attention: norms leave q and k in fp32 while v is bf16, and all are cast."""
    q, k, v = (t.detach() for t in qkv(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = dit_ops.attention(q, k, v.bfloat16(), backend=backend)
        assert backend or dit_ops.explain(dit_ops.attention, q, k, v.bfloat16()).backend == "dense"
        assert dit_ops.attention(*(t.double() for t in (q, k, v)), backend=backend).dtype == torch.float64
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, dit_ops.attention(*(t.bfloat16() for t in (q, k, v)), backend=backend))


def test_deterministic_is_asked_of_the_kernels(monkeypatch):
    """By the argument, or by PyTorch's switch; a switch that only warns does not count."""
    asked = []
    choose = kernels.choose_dense
    monkeypatch.setattr(_attention_dense, "choose_dense", lambda *a: asked.append(a[-1]) or choose(*a))
    q, k, v = qkv(torch.float32)
    for deterministic, switch, warn_only in (
        (False, False, False),
        (True, False, False),
        (False, True, True),
        (False, True, False),
    ):
        o = dit_ops.attention(q, k, v, deterministic=deterministic, backend="dense")
        asked.clear()
        torch.use_deterministic_algorithms(switch, warn_only=warn_only)
        torch.autograd.grad(o.sum(), q)
        assert asked == [deterministic or (switch and not warn_only)]


def test_explain_names_the_dense_kernel():
    q, k, v = (t.detach() for t in qkv(torch.float32))
    explained = dit_ops.explain(dit_ops.attention, q, k, v)
    assert explained.backend == "dense" and explained.detail == "torch's CPU flash attention"
    assert "attention runs on 'dense' (torch's CPU flash attention)" in str(explained)
    reference = dit_ops.explain(dit_ops.attention, q, k, v, backend="reference")
    assert reference.backend == "reference" and not reference.detail


def test_refusals_have_reasons():
    q, k, v = (t.detach() for t in qkv(torch.float32))
    with pytest.raises(
        NotImplementedError, match="backend 'dense' cannot run this call: q, k and v differ in dtype: .*float32"
    ):
        dit_ops.attention(q, k.double(), v, backend="dense")
    with pytest.raises(NotImplementedError, match="backend 'cuda' cannot run this call: not written yet"):
        dit_ops.attention(q, k, v, backend="cuda")
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this call: D = 320: .* at most 128"):
        dit_ops.attention(*torch.randn(3, 1, 2, 1, 320), backend="triton")
    meta = [t.to("meta") for t in (q, k, v)]
    with pytest.raises(NotImplementedError, match="no dense kernel takes it .*cuDNN: tensors are on meta"):
        dit_ops.attention(*meta, backend="dense")


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "capability, D, deterministic, packages, chosen",
    [
        ((9, 0), 128, False, (), "cuDNN"),
        ((9, 0), 128, False, ("flash_attn_interface",), "flash-attn 3"),
        ((9, 0), 128, True, ("flash_attn",), "flash-attn 2"),
        ((9, 0), 128, True, (), "torch's FA2"),
        ((9, 0), 136, False, (), "torch's FA2"),
        ((8, 0), 128, False, (), "torch's FA2"),
        ((8, 0), 64, False, ("flash_attn_interface", "flash_attn"), "flash-attn 2"),
        ((10, 0), 128, False, ("flash_attn_interface", "flash_attn"), "cuDNN"),
    ],
)
def test_best_dense_kernel_of_a_gpu(capability, D, deterministic, packages, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "_not_installed", lambda module: None if module in packages else "it is not installed")
    assert kernels.choose_dense(CUDA, torch.bfloat16, D, deterministic).name == chosen


def test_no_dense_kernel_of_a_gpu_takes_everything(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for dtype, D, reason in (
        (torch.float32, 128, "dtype is torch.float32"),
        (torch.float16, 20, "D = 20, and it takes multiples"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            kernels.choose_dense(CUDA, dtype, D, False)


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
