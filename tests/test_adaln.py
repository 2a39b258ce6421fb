import pytest
import torch
import torch.nn.functional as tf
from op_cases import CASES, DTYPES, kernel_backends, tensors
from torch.library import opcheck

import dit_ops
from dit_ops import _library as lib
from dit_ops.ops.adaln import adaln_ref
from dit_ops.testing import check_backend

TABLES = ("scale", "shift")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_within_rounding(case, dtype, device):
    for backend in kernel_backends(device, "cuda", "triton", "cpu"):
        if backend == "cuda" and case.C % 8:
            continue
        args = tensors(case, dtype, device, TABLES)
        check_backend(dit_ops.adaln, args, [torch.randn_like(args["x"])], backend, norm=case.norm)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_reference_gradients(norm):
    x, scale, shift = (torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True) for n in (6, 3, 3))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: adaln_ref(*a[:3], norm, *a[3:], 1e-6), (x, scale, shift, weight, bias))


def test_is_the_formula(device):
    x, scale, shift = torch.randn(2, 4, 8, device=device), torch.randn(2, 8, device=device), torch.randn(2, 8, device=device)
    weight, bias = torch.randn(2, 8, device=device)
    layer = tf.layer_norm(x, (8,), weight, bias, 1e-3) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(dit_ops.adaln(x, scale, shift, weight=weight, bias=bias, eps=1e-3), layer)
    rms = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight + shift[:, None]
    torch.testing.assert_close(dit_ops.adaln(x, None, shift, norm="rms", weight=weight, eps=1e-3), rms)
    torch.testing.assert_close(dit_ops.adaln(x, scale, norm="rms"), dit_ops.adaln(x, scale, 0 * shift, norm="rms"))


def test_rows_per_sample_per_frame_and_per_token_agree(device):
    x, scale, shift = torch.randn(2, 6, 16, device=device), *torch.randn(2, 2, 16, device=device)
    per_sample = dit_ops.adaln(x, scale, shift)
    for F in (1, 3, 6):
        rows = (t[:, None].expand(2, F, 16) for t in (scale, shift))
        torch.testing.assert_close(dit_ops.adaln(x, *rows), per_sample, rtol=0, atol=0)


@pytest.mark.parametrize("C", [1536, 5120])
@pytest.mark.parametrize("mean", [0, 1, 3])
def test_large_mean_keeps_fp32_accuracy(C, mean, device):
    x = torch.randn(1, 8, C, device=device) + mean
    exact = dit_ops.adaln(x.double(), backend="reference")
    for backend in (*kernel_backends(device, "cuda", "triton", "cpu"), "reference"):
        error = (dit_ops.adaln(x, backend=backend).double() - exact).norm() / exact.norm()
        assert error < 1e-6, backend


def test_modulation_of_another_F_runs_on_the_reference(device):
    x, scale, shift = (torch.randn(1, n, 8, device=device) for n in (6, 3, 2))
    want = tf.layer_norm(x, (8,), eps=1e-6) * (1 + scale.repeat_interleave(2, 1)) + shift.repeat_interleave(3, 1)
    torch.testing.assert_close(dit_ops.adaln(x, scale, shift), want)
    assert dit_ops.explain(dit_ops.adaln, x, scale, shift).backend == "reference"


@pytest.mark.parametrize("shape", [(1, 0, 16), (0, 4, 16)], ids=str)
def test_zero_tokens(shape, device):
    for backend in (*kernel_backends(device, "cuda", "triton", "cpu"), "reference"):
        x, scale = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape[0], 16, device=device)
        scale.requires_grad_()
        y = dit_ops.adaln(x, scale, scale, backend=backend)
        dx, dscale = torch.autograd.grad(y.sum(), (x, scale))
        assert y.shape == dx.shape == shape and not dscale.count_nonzero()


def test_views_are_read_as_they_are(device):
    """x transposed, modulation chunked out of a packed [B, F, 6, C] table."""
    x = torch.randn(2, 16, 6, device=device).transpose(1, 2)
    packed = torch.randn(2, 3, 6, 16, device=device)
    want = dit_ops.adaln(x.contiguous(), packed[:, :, 1].contiguous(), packed[:, :, 0].contiguous(), backend="reference")
    for backend in kernel_backends(device, "cuda", "triton", "cpu"):
        torch.testing.assert_close(dit_ops.adaln(x, packed[:, :, 1], packed[:, :, 0], backend=backend), want)


def test_backward_gives_the_same_bits_twice_and_on_any_number_of_threads(device):
    x, dy = torch.randn(2, 2, 200, 96, device=device)
    scale = torch.randn(2, 96, device=device, requires_grad=True)
    threads = torch.get_num_threads()
    for backend in kernel_backends(device, "cuda", "triton", "cpu"):
        runs = []
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            leaf = x.clone().requires_grad_()
            runs.append(torch.autograd.grad(dit_ops.adaln(leaf, scale, scale, backend=backend), (leaf, scale), dy))
        torch.set_num_threads(threads)
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_op_is_well_registered(device):
    x, scale = (torch.randn(2, n, 48, device=device, requires_grad=True) for n in (6, 3))
    weight = torch.randn(48, device=device, requires_grad=True)
    for backend in kernel_backends(device, "cuda", "triton", "cpu"):
        opcheck(torch.ops.dit_ops.adaln.default, (x, scale, scale, weight, weight, False, 1e-6, backend))
        opcheck(torch.ops.dit_ops.adaln.default, (x, None, None, None, None, True, 1e-6, backend))


def test_compiles_without_graph_break(device):
    x, scale = torch.randn(2, 6, 48, device=device), torch.randn(2, 3, 48, device=device)
    for backend in (*kernel_backends(device, "cuda", "triton", "cpu"), "reference"):

        def run(f, backend=backend):
            leaves = [t.clone().requires_grad_() for t in (x, scale)]
            y = f(leaves[0], leaves[1], leaves[1], backend=backend)
            return y, *torch.autograd.grad(y.square().sum(), leaves)

        torch.testing.assert_close(run(torch.compile(dit_ops.adaln, fullgraph=True, backend="aot_eager")), run(dit_ops.adaln))


@pytest.mark.slow
def test_compiles_with_inductor_and_dynamic_shapes(device):
    def block(x, scale):
        return dit_ops.adaln(x * 2, scale, scale).sin()

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for L in (6, 10):
        x, scale = torch.randn(2, L, 48, device=device, requires_grad=True), torch.randn(2, 48, device=device)
        torch.testing.assert_close(compiled(x, scale), block(x, scale))
        grads = [torch.autograd.grad(f(x, scale).sum(), x)[0] for f in (compiled, block)]
        torch.testing.assert_close(*grads)


def test_errors_name_argument_expected_and_got():
    x, scale = torch.randn(2, 5, 48), torch.randn(2, 48)
    with pytest.raises(ValueError, match=r"adaln: scale must be \[B, C\] = \[2, 48\], got \[2, 47\]"):
        dit_ops.adaln(x, scale[:, 1:], scale)
    with pytest.raises(ValueError, match=r"shift must be \[B, C\] = \[2, 48\] or .* F dividing L = 5, got \[2, 2, 48\]"):
        dit_ops.adaln(x, scale, torch.randn(2, 2, 48))
    with pytest.raises(ValueError, match=r"adaln: weight must be \[C\] = \[48\], got \[5\]"):
        dit_ops.adaln(x, weight=torch.randn(5))
    with pytest.raises(ValueError, match="adaln: norm must be one of layer, rms, got 'batch'"):
        dit_ops.adaln(x, norm="batch")
    with pytest.raises(ValueError, match="adaln: x must be floating point, got torch.int64"):
        dit_ops.adaln(x.long())


def test_fp16_on_a_cpu_is_the_reference_and_the_kernels_say_so():
    x = torch.randn(1, 8, 2, 16).half()
    tokens, P = x.flatten(2), torch.eye(4).expand(1, 2, 4, 4)
    calls = {
        dit_ops.adaln: (tokens,),
        dit_ops.gated_residual: (tokens, tokens, tokens[:, :1]),
        dit_ops.gated_residual_adaln: (tokens, tokens),
        dit_ops.prope_output: (x, P),
    }
    for op, args in calls.items():
        explained = dit_ops.explain(op, *args)
        assert explained.refused["cpu"] == "dtype is torch.float16; all fp32 or all bf16 is written"
        assert lib.INTERPRETED or explained.backend == "reference"
        with pytest.raises(NotImplementedError, match="dtype is torch.float16; all fp32 or all bf16 is written"):
            op(*args, backend="cpu")


def test_refusals_say_why(device):
    x = torch.randn(2, 5, 48, device=device)
    for backend in kernel_backends(device, "cuda", "triton", "cpu"):
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run this call: dtype is torch.float64"):
            dit_ops.adaln(x.double(), backend=backend)
    for backend in ("cuda", "triton"):
        with pytest.raises(NotImplementedError, match="one row of at most 8192 must fit in registers"):
            dit_ops.adaln(torch.randn(1, 1, 8200, device=device), backend=backend)
