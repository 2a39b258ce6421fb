"""The Triton kernels of adaln in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import pytest
import torch
from op_cases import CASES, tensors

import dit_ops
from dit_ops import _library as lib
from dit_ops.testing import check_backend

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.B * case.L <= 14], ids=str)
def test_kernels_are_within_rounding(case, dtype):
    args = tensors(case, dtype, "cpu", ("scale", "shift"))
    factor = 4 if dtype == torch.bfloat16 else 2  # the interpreter truncates to bf16, a GPU rounds
    check_backend(dit_ops.adaln, args, [torch.randn_like(args["x"])], "triton", norm=case.norm, factor=factor)


def test_backward_sums_over_several_programs():
    x, dy = torch.randn(2, 2, 36, 24)
    scale = torch.randn(2, 24)
    args = {"x": x, "scale": scale, "shift": scale}
    check_backend(dit_ops.adaln, args, [dy], "triton")


def test_strided_modulation():
    x, packed = torch.randn(2, 6, 16), torch.randn(2, 3, 6, 16)
    want = dit_ops.adaln(x, packed[:, :, 1], packed[:, :, 0], backend="reference")
    torch.testing.assert_close(dit_ops.adaln(x, packed[:, :, 1], packed[:, :, 0], backend="triton"), want)


def test_triton_comes_first_here():
    assert dit_ops.explain("adaln", torch.randn(1, 2, 8)).backend == "triton"
    with pytest.raises(NotImplementedError, match="one row of at most 8192 must fit in registers"):
        dit_ops.adaln(torch.randn(1, 1, 8193), backend="triton")
