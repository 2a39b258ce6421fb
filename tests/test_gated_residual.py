import pytest
import torch
from op_cases import CASES, DTYPES, Case, kernel_backends, tensors
from torch.library import opcheck

import dit_ops
from dit_ops.testing import check_backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.rows is not None], ids=str)
def test_kernels_are_within_rounding(case, dtype, device):
    for backend in kernel_backends(device, "triton", "cpu"):
        args = tensors(case, dtype, device, ("gate",), branches=("x", "y"))
        check_backend(dit_ops.gated_residual, args, [torch.randn_like(args["x"])], backend)


@pytest.mark.gpu
@pytest.mark.parametrize("C", [1536, 2048, 5120, 8192])
def test_widths_of_real_models(C, device):
    args = tensors(Case(2, 3 * 37, C, 3, "layer", False), torch.bfloat16, device, ("gate",), branches=("x", "y"))
    check_backend(dit_ops.gated_residual, args, [torch.randn_like(args["x"])], "triton")


@pytest.mark.parametrize("gate", [None, (2, 4), (2, 3, 4)], ids=str)
def test_is_the_formula_and_its_gradient(gate, device):
    x, y = (torch.randn(2, 6, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    rows = None if gate is None else torch.randn(gate, dtype=torch.float64, device=device, requires_grad=True)
    per_token = 1 if gate is None else rows.view(2, -1, 4).repeat_interleave(6 // rows.view(2, -1, 4).shape[1], 1)
    torch.testing.assert_close(dit_ops.gated_residual(x, y, rows), x + per_token * y)
    assert torch.autograd.gradcheck(dit_ops.gated_residual, (x, y, rows))


def test_half_precision_rounds_once(device):
    x, y = torch.randn(2, 1, 64, 32, device=device).bfloat16()
    gate = torch.randn(1, 32, device=device)
    torch.testing.assert_close(
        dit_ops.gated_residual(x, y, gate), (x.double() + gate[:, None].double() * y.double()).bfloat16(), rtol=0, atol=0
    )


def test_zero_tokens(device):
    for backend in (*kernel_backends(device, "triton", "cpu"), "reference"):
        x, gate = torch.randn(2, 0, 8, device=device, requires_grad=True), torch.randn(2, 8, device=device, requires_grad=True)
        dx, dgate = torch.autograd.grad(dit_ops.gated_residual(x, x, gate, backend=backend).sum(), (x, gate))
        assert dx.shape == (2, 0, 8) and not dgate.count_nonzero()


def test_backward_gives_the_same_bits_twice(device):
    x, y, dout = torch.randn(3, 2, 130, 32, device=device)
    leaves = [x.requires_grad_(), y.requires_grad_(), torch.randn(2, 32, device=device, requires_grad=True)]
    for backend in kernel_backends(device, "triton", "cpu"):
        outputs = [dit_ops.gated_residual(*leaves, backend=backend) for _ in range(2)]
        first, second = (torch.autograd.grad(out, leaves, dout) for out in outputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_op_is_well_registered_and_compiles(device):
    x, gate = (torch.randn(2, n, 48, device=device, requires_grad=True) for n in (6, 3))
    compiled = torch.compile(dit_ops.gated_residual, fullgraph=True, backend="aot_eager")
    for backend in kernel_backends(device, "triton", "cpu"):
        opcheck(torch.ops.dit_ops.gated_residual.default, (x, x, gate, backend))
        torch.testing.assert_close(compiled(x, x, gate, backend=backend), dit_ops.gated_residual(x, x, gate))


def test_errors_and_refusals():
    x = torch.randn(2, 6, 8)
    with pytest.raises(ValueError, match=r"gated_residual: y must be \[B, L, C\] = \[2, 6, 8\], got \[2, 5, 8\]"):
        dit_ops.gated_residual(x, x[:, :5])
    with pytest.raises(ValueError, match=r"gate must be \[B, C\] = \[2, 8\] or .*, got \[2, 4, 8\]"):
        dit_ops.gated_residual(x, x, torch.randn(2, 4, 8))
    assert "one addition needs no kernel" in dit_ops.explain(dit_ops.gated_residual, x, x).refused["cpu"]
