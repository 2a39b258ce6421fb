"""The Triton kernel of the moving average in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import pytest
import torch
from torch.library import opcheck

import dit_ops
from dit_ops import _library as lib
from dit_ops.testing import assert_within_rounding

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from dit_ops.kernels import ema_update as kernel  # noqa: E402

SHAPES = ((3, 5), (0,), (), (kernel.BN,), (2 * kernel.BN + 1,), (7,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def lists() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    params = [torch.randn(shape).to(dtype) for shape in SHAPES for dtype in DTYPES]
    return [torch.randn(p.shape) for p in params], params


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.999, 1.0])
def test_one_launch_updates_every_tensor(decay, monkeypatch):
    launches, function = [], type(kernel.ema_update_kernel)
    launch = function.__getitem__
    monkeypatch.setattr(function, "__getitem__", lambda self, grid: launches.append(grid) or launch(self, grid))
    shadow, params = lists()
    before = [s.clone() for s in shadow]
    dit_ops.ema_update_(shadow, params, decay, backend="triton")
    assert launches == [(3 * 7,)]  # of 1, 0, 1, 1, 3 and 1 programs per dtype
    for i, (got, s, p) in enumerate(zip(shadow, before, params, strict=True)):
        plain = torch.lerp(s, p.float(), 1 - decay)
        exact = decay * s.double() + (1 - decay) * p.double()
        assert_within_rounding(f"shadow[{i}]", got, exact, plain)
    if decay == 1:
        assert all(torch.equal(a, b) for a, b in zip(shadow, before, strict=True))
    if decay == 0:
        assert all(torch.equal(a, b.float()) for a, b in zip(shadow, params, strict=True))


def test_nothing_outside_the_tensors_is_written():
    buffer = torch.full((3 * kernel.BN,), 7.0)
    shadow, param = buffer[5 : 2 * kernel.BN + 8], torch.randn(2 * kernel.BN + 3)
    dit_ops.ema_update_([shadow], [param], 0.0, backend="triton")
    assert torch.equal(shadow, param)
    assert (buffer[:5] == 7).all() and (buffer[2 * kernel.BN + 8 :] == 7).all()


def test_the_table_is_kept_and_follows_new_addresses():
    kernel._tables.clear()
    shadow, params = [torch.zeros(6)], [torch.ones(6)]
    for _ in range(3):
        dit_ops.ema_update_(shadow, params, 0.5, backend="triton")
    assert len(kernel._tables) == 1 and torch.equal(shadow[0], torch.full((6,), 0.875))
    others = [[torch.full((n,), 2.0)] for n in range(1, 12)]
    for other in others:
        dit_ops.ema_update_(other, [torch.zeros_like(other[0])], 0.5, backend="triton")
    assert len(kernel._tables) == 8 and all(torch.equal(o[0], torch.ones_like(o[0])) for o in others)


def test_a_fixed_point_stays_one():
    param = torch.randn(100)
    shadow = [param.clone()]
    dit_ops.ema_update_(shadow, [param], 0.9993, backend="triton")
    assert torch.equal(shadow[0], param)


def test_refusals_name_the_tensor():
    a, bad = torch.zeros(4, 4), torch.zeros(4, 4).T
    for shadow, params, why in (
        ([a, bad], [a, a], r"shadow\[1\] is not contiguous"),
        ([a, a], [a, bad], r"params\[1\] is not contiguous"),
        ([a, a.double()], [a, a], r"shadow\[1\]: dtype is torch.float64"),
        ([a], [a.int()], r"params\[0\]: dtype is torch.int32"),
    ):
        with pytest.raises(NotImplementedError, match=f"ema_update_: backend 'triton' cannot run this call: {why}"):
            dit_ops.ema_update_(shadow, params, 0.5, backend="triton")


def test_empty_lists_and_registration():
    dit_ops.ema_update_([], [], 0.5, backend="triton")
    dit_ops.ema_update_([torch.zeros(0)], [torch.zeros(0)], 0.5, backend="triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.dit_ops.ema_update_.default, ([torch.zeros(4)], [torch.ones(4)], 0.5, "triton"), test_utils=tests)
