from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dit_ops
from dit_ops.camera import parse_trajectory, projective_cameras

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
