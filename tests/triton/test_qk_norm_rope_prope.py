"""The Triton kernels of qk_norm_rope_prope in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import pytest
import torch
from op_cases import head_case
from torch.library import opcheck

import dit_ops
from dit_ops import _library as lib
from dit_ops.ops.qk_norm_rope_prope import turn_keys_values
from dit_ops.rope import Rope3D
from dit_ops.testing import check_backend, run_with_grads

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
GRID = (2, 2, 3)
LATE = {"start_frame": 2, "halves": 2, "eps": 1e-3}


def tables(D: int, grid: tuple[int, int, int] = GRID) -> tuple[torch.Tensor, ...]:
    side = 2 * (D // 6)
    return Rope3D(D, splits=(D - 2 * side, side, side)).tables(*grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["channels", "head", "no norm"])
@pytest.mark.parametrize("N, D", [(3, 16), (2, 24)])
def test_kernels_are_within_rounding(N, D, norm, dtype):
    """Heads and head sizes that are no powers of two, two halves, a camera per frame, a later start."""
    args = head_case(norm, dtype, "qkv", 1, 24, N, D)
    P, P_inv = torch.randn(2, 1, 2, 4, 4)
    factor = 4 if dtype == torch.bfloat16 else 2  # the interpreter truncates to bf16, a GPU rounds
    fn = lambda q, k, v, q_weight, k_weight, backend: dit_ops.qk_norm_rope_prope(
        q, k, v, q_weight, k_weight, tables(D), GRID, P, P_inv, backend=backend, **LATE
    )
    check_backend(fn, args, [torch.randn(1, 24, 2 * N, D).to(dtype) for _ in "qkv"], "triton", factor=factor)


def test_backward_sums_over_several_programs_and_samples():
    args = head_case("channels", torch.float32, "qkv", 2, 11, 2, 8) | {"k_weight": torch.randn(8)}
    P, P_inv = torch.randn(2, 2, 1, 4, 4)
    fn = lambda q, k, v, q_weight, k_weight, backend: dit_ops.qk_norm_rope_prope(
        q, k, v, q_weight, k_weight, tables(8, (1, 11, 1)), (1, 11, 1), P, P_inv, backend=backend
    )
    cotangents = [torch.randn(2, 11, 4, 8) for _ in "qkv"]
    check_backend(fn, args, cotangents, "triton")
    once, again = (run_with_grads(fn, args, cotangents, backend="triton") for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_reads_views_of_packed_tensors_in_place():
    """q, k, v one after the other in a token, and inside a head; cameras that are transposed views or shared by the samples."""
    weight = torch.randn(32)
    P, P_inv = torch.randn(1, 2, 4, 4).expand(2, 2, 4, 4), torch.randn(2, 2, 4, 4).mT
    for packed in (torch.randn(2, 12, 3, 2, 16).movedim(2, 0), torch.randn(2, 12, 2, 3, 16).movedim(3, 0)):
        args = (*packed, weight, weight, tables(16), GRID, P, P_inv)
        got = dit_ops.qk_norm_rope_prope(*args, backend="triton")
        torch.testing.assert_close(got, dit_ops.qk_norm_rope_prope(*args, backend="reference"))


def test_v_passes_unchanged_and_zero_tokens():
    q, v = torch.randn(2, 1, 12, 2, 16).bfloat16()
    P, P_inv = torch.randn(2, 1, 2, 4, 4)
    *_, v2 = dit_ops.qk_norm_rope_prope(q, q, v, None, None, tables(16), GRID, P, P_inv, backend="triton")
    assert torch.equal(v2[:, :, :2], v)
    x, weight = torch.randn(1, 0, 2, 16, requires_grad=True), torch.ones(32, requires_grad=True)
    out = dit_ops.qk_norm_rope_prope(x, x, x, weight, None, tables(16), (2, 0, 3), P, P_inv, backend="triton")
    dx, dweight = torch.autograd.grad(sum(t.sum() for t in out), (x, weight))
    assert dx.shape == x.shape and not dweight.count_nonzero()


@pytest.mark.parametrize("N, D", [(2, 16), (3, 24)])
def test_writes_keys_and_values_into_slots_of_a_cache(N, D):
    """Slots of 12 tokens in the middle of a cache of 20, which keeps the rest; and slots whose heads come before the tokens."""
    q, k, v = torch.randn(3, 2, 12, N, D).bfloat16()
    args = (q, k, v, torch.randn(N * D), torch.randn(D), tables(D), GRID, *torch.randn(2, 2, 2, 4, 4))
    want = dit_ops.qk_norm_rope_prope(*args, start_frame=3, backend="triton")
    for shape, axis in (((2, 20, 2 * N, D), None), ((2, 2 * N, 20, D), (1, 2))):
        caches = [torch.full(shape, 7.0, dtype=torch.bfloat16) for _ in "kv"]
        slots = [(c if axis is None else c.transpose(*axis))[:, 5:17] for c in caches]
        got = dit_ops.qk_norm_rope_prope(*args, start_frame=3, k_out=slots[0], v_out=slots[1], backend="triton")
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert got[1].data_ptr() == slots[0].data_ptr() and got[2].data_ptr() == slots[1].data_ptr()
        for cache in caches if axis is None else [c.transpose(*axis) for c in caches]:
            assert (cache[:, :5] == 7).all() and (cache[:, 17:] == 7).all()


@pytest.mark.parametrize("N, D", [(2, 16), (3, 24)])
def test_keys_and_values_are_turned_when_read(N, D):
    """Stored as N heads in slots of a cache, then turned from there into slots of another one, as when turned before."""
    q, k, v = torch.randn(3, 2, 12, N, D)
    P, P_inv = torch.randn(2, 2, 2, 4, 4)
    args = (q, k, v, torch.randn(N * D), torch.randn(D), tables(D), GRID, P, P_inv)
    want = dit_ops.qk_norm_rope_prope(*args, backend="triton")
    raw, turned = torch.full((2, 2, 20, N, D), 7.0), torch.full((2, 2, 2 * N, 20, D), 7.0).transpose(2, 3)
    stored, out = raw[:, :, 5:17], turned[:, :, 2:14]
    q2, *_ = dit_ops.qk_norm_rope_prope(*args, k_out=stored[0], v_out=stored[1], turn_keys=False, backend="triton")
    assert torch.equal(q2, want[0]) and torch.equal(stored[1], v)
    turn_keys_values(*stored, tables(D), GRID, P_inv, *out, backend="triton")
    torch.testing.assert_close(out[0], want[1])
    torch.testing.assert_close(out[1], want[2])
    assert (raw[:, :, :5] == 7).all() and (raw[:, :, 17:] == 7).all()
    assert (turned[:, :, :2] == 7).all() and (turned[:, :, 14:] == 7).all()
    turn_keys_values(stored[0], None, tables(D), GRID, None, out[0][:, :, :N], None, backend="triton")
    torch.testing.assert_close(out[0][:, :, :N], want[1][:, :, :N])


def test_op_that_writes_into_slots_is_well_registered():
    q, k, v = torch.randn(3, 1, 12, 2, 16)
    slots = torch.zeros(2, 1, 20, 4, 16)[:, :, 3:15]
    P, P_inv = torch.randn(2, 1, 2, 4, 4)
    op, end = torch.ops.dit_ops.qk_norm_rope_into.default, (*GRID, 1e-6, 0)
    opcheck(op, (q, k, v, None, None, *tables(16), P, P_inv, *slots, *end, True, "triton"), test_utils=OPCHECKS)
    one_path = slots[..., :2, :]
    opcheck(op, (q, k, v, None, None, *tables(16), P, P_inv, *one_path, *end, False, "triton"), test_utils=OPCHECKS)
    keys = (None, k, None, None, None, *tables(16), None, None, one_path[0], None)
    opcheck(op, (*keys, *end, True, "triton"), test_utils=OPCHECKS)


def test_triton_comes_first_here():
    x, eye = torch.randn(1, 12, 2, 16), torch.eye(4).expand(1, 2, 4, 4)
    assert dit_ops.explain("qk_norm_rope_prope", x, x, x, None, None, tables(16), GRID, eye, eye).backend == "triton"
    learned = eye.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="gradients of rope, P and P_inv"):
        dit_ops.qk_norm_rope_prope(x, x, x, None, None, tables(16), GRID, learned, eye, backend="triton")
