import pytest
import torch
from op_cases import CASES, DTYPES, Case, kernel_backends, tensors
from torch.library import opcheck

import dit_ops
from dit_ops.testing import check_backend

TABLES = ("gate", "scale", "shift")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_within_rounding(case, dtype, device):
    for backend in kernel_backends(device, "cuda", "triton", "cpu"):
        if backend == "cuda" and case.C % 8:
            continue
        args = tensors(case, dtype, device, TABLES, branches=("x", "y"))
        cotangents = [torch.randn_like(args["x"]) for _ in range(2)]
        check_backend(dit_ops.gated_residual_adaln, args, cotangents, backend, norm=case.norm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("C", [1536, 2048, 5120, 8192])
def test_widths_of_real_models(C, dtype, device):
    args = tensors(Case(2, 3 * 37, C, 3, "layer", True), dtype, device, TABLES, branches=("x", "y"))
    for backend in kernel_backends(device, "cuda", "triton"):
        check_backend(dit_ops.gated_residual_adaln, args, [torch.randn_like(args["x"]) for _ in range(2)], backend)


@pytest.mark.parametrize("absent", ["gate", "scale", "shift"])
def test_any_table_may_be_absent(absent, device):
    case = Case(2, 6, 96, 3, "layer", True)
    for backend in kernel_backends(device, "cuda", "triton", "cpu"):
        args = tensors(case, torch.float32, device, TABLES, branches=("x", "y")) | {absent: None}
        check_backend(dit_ops.gated_residual_adaln, args, [torch.randn_like(args["x"]) for _ in range(2)], backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_gated_residual_then_adaln(dtype, device):
    args = tensors(CASES[2], dtype, device, TABLES, branches=("x", "y"))
    for backend in (*kernel_backends(device, "triton", "cpu"), "reference"):
        x_new, h = dit_ops.gated_residual_adaln(**args, backend=backend)
        want = dit_ops.gated_residual(args["x"], args["y"], args["gate"], backend=backend)
        norm = {name: args[name] for name in ("scale", "shift", "weight", "bias")}
        torch.testing.assert_close(x_new, want, rtol=0, atol=0)
        torch.testing.assert_close(h, dit_ops.adaln(want, **norm, backend=backend), rtol=0, atol=0)


def test_reference_gradients():
    args = tensors(CASES[2], torch.float64, "cpu", TABLES, branches=("x", "y"))
    leaves = [t[..., :3].double().clone().requires_grad_() for t in args.values()]
    fn = lambda *a: dit_ops.gated_residual_adaln(*a[:5], weight=a[5], bias=a[6])
    assert torch.autograd.gradcheck(fn, leaves)


def test_gradient_flows_through_either_output_alone(device):
    args = tensors(CASES[2], torch.float32, device, TABLES, branches=("x", "y"))
    for output in (0, 1):
        grads = []
        for backend in (*kernel_backends(device, "cuda", "triton", "cpu"), "reference"):
            x = args["x"].clone().requires_grad_()
            out = dit_ops.gated_residual_adaln(**args | {"x": x}, backend=backend)[output]
            grads.append(torch.autograd.grad(out.square().sum(), x)[0])
        torch.testing.assert_close(grads[0], grads[1])


def test_zero_tokens(device):
    for backend in (*kernel_backends(device, "cuda", "triton", "cpu"), "reference"):
        x, gate = torch.randn(2, 0, 8, device=device, requires_grad=True), torch.randn(2, 8, device=device, requires_grad=True)
        x_new, h = dit_ops.gated_residual_adaln(x, x, gate, gate, gate, backend=backend)
        dx, dgate = torch.autograd.grad((x_new + h).sum(), (x, gate))
        assert dx.shape == h.shape == (2, 0, 8) and not dgate.count_nonzero()


def test_backward_gives_the_same_bits_twice(device):
    args = tensors(CASES[1], torch.float32, device, TABLES, branches=("x", "y"))
    leaves = {name: t if t is None else t.requires_grad_() for name, t in args.items()}
    present = [t for t in leaves.values() if t is not None]
    cotangents = [torch.randn_like(leaves["x"]) for _ in range(2)]
    for backend in kernel_backends(device, "cuda", "triton", "cpu"):
        outputs = [dit_ops.gated_residual_adaln(**leaves, backend=backend) for _ in range(2)]
        first, second = (torch.autograd.grad(out, present, cotangents) for out in outputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_op_is_well_registered_and_compiles(device):
    x, rows = (torch.randn(2, n, 48, device=device, requires_grad=True) for n in (6, 3))
    weight = torch.randn(48, device=device, requires_grad=True)
    op = torch.ops.dit_ops.gated_residual_adaln.default
    compiled = torch.compile(dit_ops.gated_residual_adaln, fullgraph=True, backend="aot_eager")
    for backend in kernel_backends(device, "cuda", "triton", "cpu"):
        opcheck(op, (x, x, rows, rows, rows, weight, weight, False, 1e-6, backend))
        opcheck(op, (x, x, None, None, None, weight, weight, True, 1e-6, backend))
        args = (x, x, rows, rows, rows)
        torch.testing.assert_close(compiled(*args, backend=backend), dit_ops.gated_residual_adaln(*args))


def test_errors_name_argument_expected_and_got():
    x = torch.randn(2, 6, 8)
    with pytest.raises(ValueError, match=r"gated_residual_adaln: y must be \[B, L, C\] = \[2, 6, 8\], got \[2, 6, 7\]"):
        dit_ops.gated_residual_adaln(x, x[..., 1:])
    with pytest.raises(ValueError, match=r"gated_residual_adaln: gate must be .* got \[3, 8\]"):
        dit_ops.gated_residual_adaln(x, x, torch.randn(3, 8))
    with pytest.raises(NotImplementedError, match="all fp32 or all bf16 is written"):
        dit_ops.gated_residual_adaln(x, x.bfloat16(), backend="cpu")
    assert "x and y alike" in dit_ops.explain(dit_ops.gated_residual_adaln, x, x.bfloat16()).refused["cuda"]
