from pathlib import Path

import pytest
import torch
from op_cases import DTYPES, kernel_backends
from safetensors.torch import load_file
from torch.library import opcheck

import dit_ops
from dit_ops.camera import parse_trajectory, projective_cameras
from dit_ops.testing import check_backend, run_with_grads

CASES = Path(__file__).parent / "golden/cases.safetensors"


def test_golden_output():
    golden = load_file(CASES)
    P, _ = projective_cameras(golden["prope.viewmats"], golden["prope.Ks"])
    got = dit_ops.prope_output(golden["prope.o"].transpose(1, 2), P)
    torch.testing.assert_close(got, golden["prope.o_out"].transpose(1, 2), rtol=0, atol=1e-6)  # recorded with fp32 intrinsics


def test_golden_numbers_of_one_camera():
    V = parse_trajectory("l*10,w*5")[-1].view(1, 1, 4, 4)
    P, _ = projective_cameras(V, torch.diag(torch.tensor([0.5050505, 0.89786756, 1.0])).view(1, 1, 3, 3))
    want = torch.tensor([-0.320189, 1.795735, 1.498076, 4, 0.419256, 5.387205, 5.362178, 8])
    torch.testing.assert_close(
        dit_ops.prope_output(torch.arange(1.0, 9).view(1, 1, 1, 8), P).flatten(), want, rtol=0, atol=2e-6
    )


def test_is_the_formula_per_frame_in_both_halves():
    o, P = torch.randn(2, 12, 3, 8, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    groups = o.view(2, 2, 3, 2, 3, 2, 4)  # B, half, frame, token, head, group, channel
    want = torch.einsum("bfij,bzfsngj->bzfsngi", P, groups).reshape(o.shape)
    torch.testing.assert_close(dit_ops.prope_output(o, P, halves=2), want)


def test_identity_is_exact_and_undoes_its_inverse():
    o = torch.randn(2, 6, 2, 8)
    assert torch.equal(dit_ops.prope_output(o, torch.eye(4).expand(2, 3, 4, 4)), o)
    P = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    back = dit_ops.prope_output(dit_ops.prope_output(o.double(), P), torch.linalg.inv(P))
    torch.testing.assert_close(back, o.double())


def test_gradients():
    o = torch.randn(1, 4, 1, 8, dtype=torch.float64, requires_grad=True)
    P = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dit_ops.prope_output, (o, P))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_are_within_rounding(dtype, device):
    """Two halves of three frames of 7 tokens; heads whose channels are no multiple of a vector."""
    P = torch.randn(2, 3, 4, 4, device=device)
    fn = lambda o, backend: dit_ops.prope_output(o, P, halves=2, backend=backend)
    for backend in kernel_backends(device, "triton", "cpu"):
        o, dout = torch.randn(2, 2, 42, 3, 12, device=device).to(dtype)
        check_backend(fn, {"o": o}, [dout], backend)
        once, again = (run_with_grads(fn, {"o": o}, [dout], backend=backend) for _ in range(2))
        assert all(torch.equal(once[name], again[name]) for name in once)


def test_kernels_read_strided_heads_and_cameras(device):
    """The ProPE heads of both paths in one tensor; a transposed camera, and one shared by the samples."""
    both, P = torch.randn(2, 6, 4, 8, device=device, requires_grad=True), torch.randn(2, 3, 4, 4, device=device)
    for backend in kernel_backends(device, "triton", "cpu"):
        for view, M in ((slice(2, 4), P), (slice(None, None, 2), P.mT), (slice(0, 2), P[:1].expand(2, 3, 4, 4))):
            dout = torch.randn(2, 6, 4, 8, device=device)[:, :, :2]
            got, want = (dit_ops.prope_output(both[:, :, view], M, backend=b) for b in (backend, "reference"))
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(torch.autograd.grad(got, both, dout), torch.autograd.grad(want, both, dout))


def test_op_is_well_registered_and_compiles(device):
    o, P = torch.randn(1, 4, 2, 8, device=device, requires_grad=True), torch.randn(1, 2, 4, 4, device=device)
    compiled = torch.compile(dit_ops.prope_output, fullgraph=True, backend="aot_eager")
    for backend in kernel_backends(device, "triton", "cpu"):
        opcheck(torch.ops.dit_ops.prope_output.default, (o, P, 1, backend))
        torch.testing.assert_close(compiled(o, P, backend=backend), dit_ops.prope_output(o, P, backend="reference"))
        assert dit_ops.prope_output(torch.randn(1, 0, 2, 8, device=device), P, backend=backend).shape == (1, 0, 2, 8)
        with pytest.raises(NotImplementedError, match="the gradient of P is written in the reference only"):
            dit_ops.prope_output(o, P.clone().requires_grad_(), backend=backend)


def test_zero_tokens_and_half_precision():
    P = torch.randn(1, 2, 4, 4)
    assert dit_ops.prope_output(torch.randn(1, 0, 2, 8), P).shape == (1, 0, 2, 8)
    o = torch.randn(1, 4, 2, 8).bfloat16()
    want = dit_ops.prope_output(o.double(), P).bfloat16()
    torch.testing.assert_close(dit_ops.prope_output(o, P), want)


def test_errors_name_argument_expected_and_got():
    with pytest.raises(
        ValueError, match=r"P must be \[B, F, 4, 4\] with B = 1 and halves \* F dividing L = 4, .* got \[1, 3, 4, 4\]"
    ):
        dit_ops.prope_output(torch.randn(1, 4, 2, 8), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="the head size D must be a multiple of 4, got 6"):
        dit_ops.prope_output(torch.randn(1, 4, 2, 6), torch.randn(1, 2, 4, 4))
