"""The Triton kernels of qk_norm_rope in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import pytest
import torch
from op_cases import head_case

import dit_ops
from dit_ops import _library as lib
from dit_ops.ops.qk_norm_rope import rms_norm_ref
from dit_ops.rope import Rope3D
from dit_ops.testing import check_backend, run_with_grads

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

GRID = (2, 2, 3)
LATE = {"start_frame": 2, "halves": 2, "eps": 1e-3}


def tables(D: int, grid: tuple[int, int, int] = GRID) -> tuple[torch.Tensor, ...]:
    side = 2 * (D // 6)
    return Rope3D(D, splits=(D - 2 * side, side, side)).tables(*grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["channels", "head", "no norm"])
@pytest.mark.parametrize("N, D", [(3, 16), (2, 24), (1, 6)])
def test_kernels_are_within_rounding(N, D, norm, dtype):
    """Heads and head sizes that are no powers of two, two halves of 2 by 3 tokens a frame, a later start."""
    args = head_case(norm, dtype, "qk", 1, 24, N, D)
    factor = 4 if dtype == torch.bfloat16 else 2  # the interpreter truncates to bf16, a GPU rounds
    fn = lambda q, k, q_weight, k_weight, backend: dit_ops.qk_norm_rope(
        q, k, q_weight, k_weight, tables(D), GRID, backend=backend, **LATE
    )
    check_backend(fn, args, [torch.randn(1, 24, N, D).to(dtype) for _ in "qk"], "triton", factor=factor)


def test_backward_sums_over_several_programs():
    args = head_case("channels", torch.float32, "qk", 2, 11, 2, 8) | {"k_weight": torch.randn(8)}
    fn = lambda q, k, q_weight, k_weight, backend: dit_ops.qk_norm_rope(
        q, k, q_weight, k_weight, tables(8, (1, 11, 1)), (1, 11, 1), backend=backend
    )
    cotangents = [torch.randn(2, 11, 2, 8) for _ in "qk"]
    check_backend(fn, args, cotangents, "triton")
    once, again = (run_with_grads(fn, args, cotangents, backend="triton") for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_reads_views_of_packed_tensors_in_place():
    """q, k, v one after the other in a token, and inside a head."""
    weight = torch.randn(32)
    for packed in (torch.randn(2, 12, 3, 2, 16).movedim(2, 0), torch.randn(2, 12, 2, 3, 16).movedim(3, 0)):
        q, k, _ = packed
        got = dit_ops.qk_norm_rope(q, k, weight, weight, tables(16), GRID, backend="triton")
        want = dit_ops.qk_norm_rope(q, k, weight, weight, tables(16), GRID, backend="reference")
        torch.testing.assert_close(got, want)


def test_only_one_of_the_two_is_normed():
    q, k, weight = torch.randn(1, 12, 2, 16), torch.randn(1, 12, 2, 16), torch.randn(32)
    for weights in ((weight, None), (None, weight)):
        got = dit_ops.qk_norm_rope(q, k, *weights, tables(16), GRID, backend="triton")
        torch.testing.assert_close(got, dit_ops.qk_norm_rope(q, k, *weights, tables(16), GRID, backend="reference"))


@pytest.mark.parametrize("turn_keys", [True, False])
def test_writes_keys_and_values_into_slots_of_a_cache(turn_keys):
    q, k, v = torch.randn(3, 2, 12, 3, 16).bfloat16()
    args = (q, k, torch.randn(48), torch.randn(16), tables(16), GRID)
    turned = dit_ops.qk_norm_rope(*args, backend="triton")
    for shape in ((2, 20, 3, 16), (2, 3, 20, 16)):
        caches = [torch.full(shape, 7.0, dtype=torch.bfloat16) for _ in "kv"]
        caches = [c if shape[2] == 3 else c.transpose(1, 2) for c in caches]
        slots = [c[:, 5:17] for c in caches]
        options = {"k_out": slots[0], "v_out": slots[1], "turn_keys": turn_keys, "backend": "triton"}
        got = dit_ops.qk_norm_rope(*args, v=v, **options)
        assert torch.equal(got[0], turned[0]) and torch.equal(slots[1], v)
        if turn_keys:
            assert torch.equal(slots[0], turned[1])
        else:
            torch.testing.assert_close(slots[0], rms_norm_ref(k, args[3], 1e-6).bfloat16(), rtol=1e-2, atol=0)
        assert all((c[:, :5] == 7).all() and (c[:, 17:] == 7).all() for c in caches)
    only_keys = torch.full_like(k, 7.0)
    queries, _ = dit_ops.qk_norm_rope(*args, k_out=only_keys, backend="triton")
    assert torch.equal(queries, turned[0]) and torch.equal(only_keys, turned[1])


def test_zero_tokens():
    x, weight = torch.randn(2, 0, 2, 16, requires_grad=True), torch.ones(32, requires_grad=True)
    q, _ = dit_ops.qk_norm_rope(x, x, weight, None, tables(16), (0, 2, 2), backend="triton")
    dx, dweight = torch.autograd.grad(q.sum(), (x, weight))
    assert q.shape == dx.shape == x.shape and not dweight.count_nonzero()


def test_triton_comes_first_here():
    x = torch.randn(1, 12, 2, 16)
    assert dit_ops.explain("qk_norm_rope", x, x, None, None, tables(16), GRID).backend == "triton"
    wide = torch.randn(1, 1, 65, 128)
    with pytest.raises(NotImplementedError, match="N = 65, D = 128: a token, .* at most 8192 values"):
        dit_ops.qk_norm_rope(wide, wide, None, None, tables(128, (1, 1, 1)), (1, 1, 1), backend="triton")
    learned = [t.clone().requires_grad_() for t in tables(16)]
    with pytest.raises(NotImplementedError, match="gradients of rope, P and P_inv"):
        dit_ops.qk_norm_rope(x, x, None, None, learned, GRID, backend="triton")
