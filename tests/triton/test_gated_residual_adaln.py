"""The Triton kernels of gated_residual_adaln in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import pytest
import torch
from op_cases import CASES, Case, tensors

import dit_ops
from dit_ops import _library as lib
from dit_ops.testing import check_backend

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

TABLES = ("gate", "scale", "shift")
SMALL = [case for case in CASES if case.B * case.L <= 14] + [Case(1, 3, 1536, 0, "layer", False)]
FULL = Case(2, 6, 100, 3, "layer", True)


def branches(case: Case, dtype: torch.dtype = torch.float32) -> dict:
    return tensors(case, dtype, "cpu", TABLES, branches=("x", "y"))


def check(args: dict, **kwargs) -> None:
    check_backend(dit_ops.gated_residual_adaln, args, [torch.randn_like(args["x"]) for _ in range(2)], "triton", **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_kernels_are_within_rounding(case, dtype):
    # the interpreter truncates to bf16, a GPU rounds
    check(branches(case, dtype), norm=case.norm, factor=4 if dtype == torch.bfloat16 else 2)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("present", [(), ("gate",), ("scale",), ("shift",), ("scale", "shift"), ("gate", "shift")], ids=str)
def test_any_table_may_be_absent(present, norm):
    check(branches(FULL) | {name: None for name in TABLES if name not in present}, norm=norm)


def test_backward_sums_over_several_programs():
    check(branches(Case(2, 36, 24, 2, "layer", True)))  # two frames of 16 + 2 tokens


@pytest.mark.parametrize("gated", [True, False])
def test_fp32_rows_that_fill_the_registers(gated):
    """Beyond 16 KB a row, gate and norm of the backward are two launches."""
    case = branches(Case(1, 6, 4104, 2, "layer", True))
    check(case if gated else case | {"gate": None})


def test_branch_of_another_dtype():
    args = branches(FULL, torch.float16)
    check(args | {"y": args["y"].float(), "scale": args["scale"].half()})


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_is_gated_residual_then_adaln(dtype, norm):
    """The norm sees x' as it was rounded to x's dtype."""
    args = branches(FULL, dtype)
    x_new, h = dit_ops.gated_residual_adaln(**args, norm=norm, backend="triton")
    want = dit_ops.gated_residual(args["x"], args["y"], args["gate"], backend="triton")
    tables = {name: args[name] for name in ("scale", "shift", "weight", "bias")}
    torch.testing.assert_close(x_new, want, rtol=0, atol=0)
    torch.testing.assert_close(h, dit_ops.adaln(want, **tables, norm=norm, backend="triton"), rtol=0, atol=0)


def test_strided_modulation_is_read_in_place(monkeypatch):
    x, y, packed = torch.randn(2, 6, 16), torch.randn(2, 6, 16), torch.randn(2, 3, 6, 16)
    rows = packed[:, :, 2], packed[:, :, 4], packed[:, :, 3]
    want = dit_ops.gated_residual_adaln(x, y, *rows, backend="reference")
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("copied") if not t.is_contiguous() else t)
    torch.testing.assert_close(dit_ops.gated_residual_adaln(x, y, *rows, backend="triton"), want)


def test_padding_rows_are_safe():
    args = branches(FULL)
    args["x"][:, 4:] = args["y"][:, 4:] = 0
    check(args)


def test_zero_tokens():
    x, gate = torch.randn(2, 0, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    x_new, h = dit_ops.gated_residual_adaln(x, x, gate, gate, gate, backend="triton")
    dx, dgate = torch.autograd.grad((x_new + h).sum(), (x, gate))
    assert dx.shape == h.shape == (2, 0, 8) and not dgate.count_nonzero()


def test_backward_gives_the_same_bits_twice():
    args = {name: t.requires_grad_() for name, t in branches(Case(2, 36, 24, 2, "layer", True)).items()}
    cotangents = list(torch.randn(2, 2, 36, 24))
    runs = [
        torch.autograd.grad(dit_ops.gated_residual_adaln(**args, backend="triton"), list(args.values()), cotangents)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_triton_comes_first_here_and_refuses_with_a_reason():
    x = torch.randn(1, 6, 8)
    assert dit_ops.explain("gated_residual_adaln", x, x).backend == "triton"
    refused = dit_ops.explain("gated_residual_adaln", x, x, torch.randn(1, 2, 8), torch.randn(1, 3, 8)).refused
    assert refused["triton"] == "modulation with different F: [2, 3]"
    for C, dtype, reason in ((8193, torch.float32, "one row of at most 8192"), (8, torch.float64, "dtype is torch.float64")):
        x = torch.randn(1, 1, C)
        with pytest.raises(NotImplementedError, match=reason):
            dit_ops.gated_residual_adaln(x, x.to(dtype), backend="triton")
