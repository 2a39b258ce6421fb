"""The Triton kernels of gated_residual in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import pytest
import torch
from op_cases import CASES, Case, tensors

import dit_ops
from dit_ops import _library as lib
from dit_ops.testing import check_backend

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

GATED = [case for case in CASES if case.B * case.L <= 14 and case.rows is not None] + [
    Case(2, 6, 36, 2, "layer", False),  # frames of 3 tokens in tiles of 4
    Case(1, 7, 36, 0, "layer", False),
    Case(1, 3, 600, 3, "layer", False),  # two blocks of channels, the second one part full; a frame of one token
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GATED, ids=str)
def test_kernels_are_within_rounding(case, dtype):
    args = tensors(case, dtype, "cpu", ("gate",), branches=("x", "y"))
    factor = 4 if dtype == torch.bfloat16 else 2  # the interpreter truncates to bf16, a GPU rounds
    check_backend(dit_ops.gated_residual, args, [torch.randn_like(args["x"])], "triton", factor=factor)


def test_backward_sums_over_several_programs():
    x, y, dout = torch.randn(3, 2, 69, 24)  # 64 + 5 tokens
    check_backend(dit_ops.gated_residual, {"x": x, "y": y, "gate": torch.randn(2, 24)}, [dout], "triton")


@pytest.mark.parametrize("dtypes", [("float32", "float16", "float32"), ("float16", "float32", "float16")], ids=str)
def test_branch_and_gate_of_other_dtypes(dtypes):
    args = {
        name: torch.randn(2, n, 24).to(getattr(torch, dtype))
        for name, n, dtype in zip(("x", "y", "gate"), (6, 6, 3), dtypes, strict=True)
    }
    check_backend(dit_ops.gated_residual, args, [torch.randn_like(args["x"])], "triton")


def test_strided_gate_is_read_in_place(monkeypatch):
    x, y, packed = torch.randn(2, 6, 16), torch.randn(2, 6, 16), torch.randn(2, 3, 6, 16)
    want = dit_ops.gated_residual(x, y, packed[:, :, 2], backend="reference")
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("copied") if not t.is_contiguous() else t)
    torch.testing.assert_close(dit_ops.gated_residual(x, y, packed[:, :, 2], backend="triton"), want)


def test_zero_tokens():
    x, gate = torch.randn(2, 0, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    dx, dgate = torch.autograd.grad(dit_ops.gated_residual(x, x, gate, backend="triton").sum(), (x, gate))
    assert dx.shape == (2, 0, 8) and not dgate.count_nonzero()


def test_backward_gives_the_same_bits_twice():
    x, y, dout = torch.randn(3, 2, 69, 24)
    gate = torch.randn(2, 24, requires_grad=True)
    leaves = [t.requires_grad_() for t in (x, y, gate)]
    runs = [torch.autograd.grad(dit_ops.gated_residual(*leaves, backend="triton"), leaves, dout) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_triton_comes_first_here_and_refuses_with_a_reason():
    x, gate = torch.randn(1, 2, 8), torch.randn(1, 8)
    assert dit_ops.explain("gated_residual", x, x, gate).backend == "triton"
    assert dit_ops.explain("gated_residual", x, x).refused["triton"] == "gate is None: one addition needs no kernel"
    with pytest.raises(NotImplementedError, match="dtype is torch.float64"):
        dit_ops.gated_residual(x, x.double(), gate, backend="triton")
