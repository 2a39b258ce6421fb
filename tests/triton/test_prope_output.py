"""The Triton kernel of prope_output in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import pytest
import torch

import dit_ops
from dit_ops import _library as lib
from dit_ops.testing import check_backend

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 3, 8), (1, 12, 2, 24), (1, 4, 24, 128), (2, 4, 1, 4)], ids=str)
def test_kernel_is_within_rounding(shape, dtype):
    """Two halves of two frames; at 24 heads of 128 channels a frame takes two programs."""
    P = torch.randn(shape[0], 2, 4, 4)
    fn = lambda o, backend: dit_ops.prope_output(o, P, halves=2, backend=backend)
    factor = 4 if dtype == torch.bfloat16 else 2  # the interpreter truncates to bf16, a GPU rounds
    check_backend(fn, {"o": torch.randn(shape).to(dtype)}, [torch.randn(shape).to(dtype)], "triton", factor=factor)


def test_strided_heads_and_cameras():
    """The ProPE heads of both paths in one tensor, and their gradient, both read in place; heads apart are copied."""
    both, P = torch.randn(2, 6, 4, 8, requires_grad=True), torch.randn(2, 3, 4, 4)
    for view, M in ((slice(2, 4), P), (slice(None, None, 2), P.mT), (slice(0, 2), P[:1].expand(2, 3, 4, 4))):
        got, want = (dit_ops.prope_output(both[:, :, view], M, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(got, want)
        dout = torch.randn(2, 6, 4, 8)[:, :, :2]
        torch.testing.assert_close(torch.autograd.grad(got, both, dout), torch.autograd.grad(want, both, dout))


def test_zero_tokens_and_the_gradient_of_cameras():
    P = torch.randn(1, 2, 4, 4)
    assert dit_ops.prope_output(torch.randn(1, 0, 2, 8), P, backend="triton").shape == (1, 0, 2, 8)
    o = torch.randn(1, 4, 2, 8)
    assert dit_ops.explain("prope_output", o, P).backend == "triton"
    with pytest.raises(NotImplementedError, match="the gradient of P is written in the reference only"):
        dit_ops.prope_output(o, P.requires_grad_(), backend="triton")
