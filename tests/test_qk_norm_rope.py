from pathlib import Path

import pytest
import torch
from op_cases import DTYPES, head_case, kernel_backends
from safetensors.torch import load_file
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import dit_ops
from dit_ops.ops.qk_norm_rope import rms_norm_ref
from dit_ops.rope import Rope3D
from dit_ops.testing import assert_within_rounding, check_backend, run_with_grads

CASES = Path(__file__).parent / "golden/cases.safetensors"
GRID = (3, 2, 2)
ROPE = Rope3D(16, splits=(8, 4, 4)).tables(*GRID)


def heads(*shape: int, n: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(n)]


def test_golden_rope():
    golden = load_file(CASES)
    x, tables = golden["rope.x"], Rope3D(64).tables(8, 4, 3)
    for start, name in ((0, "rope.out"), (5, "rope.out_start5")):
        got = dit_ops.qk_norm_rope(x, x, None, None, tables, (3, 4, 3), start_frame=start)
        for out in got:
            torch.testing.assert_close(out, golden[name], rtol=0, atol=1e-6)  # fp32 tables against fp64 ones


def test_golden_wan_angles():
    x = torch.zeros(1, 8, 1, 128)
    x[..., 0::2] = 1
    q, _ = dit_ops.qk_norm_rope(x, x, None, None, Rope3D(128).tables(2, 2, 2), (2, 2, 2))
    token = q[0, 7, 0]  # (1, 1, 1)
    want = {0: (0.540302, 0.841471), 2: (0.791258, 0.611483), 44: (0.540302, 0.841471), 86: (0.540302, 0.841471)}
    for channel, pair in want.items():
        torch.testing.assert_close(token[channel : channel + 2], torch.tensor(pair), rtol=0, atol=1e-6)


def test_norm_spans_all_channels_or_one_head():
    (x,) = heads(2, 12, 3, 16, n=1)
    weight = torch.randn(48, dtype=torch.float64)
    per_channel = x.flatten(2) * torch.rsqrt(x.flatten(2).square().mean(-1, keepdim=True) + 1e-6) * weight
    torch.testing.assert_close(rms_norm_ref(x, weight, 1e-6).flatten(2), per_channel)
    per_head = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight[:16]
    torch.testing.assert_close(rms_norm_ref(x, weight[:16], 1e-6), per_head)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_axis_may_have_all_channels(axis):
    """A stream of tokens with one axis: the other two tables are empty, and the rotation is still there."""
    table = torch.randn(12, 8, 2)
    rope = [table if i == axis else table[:, :0] for i in range(3)]
    grid = tuple(12 if i == axis else 1 for i in range(3))
    q = torch.randn(2, 12, 2, 16)
    want = dit_ops.qk_norm_rope(q, q, None, None, tuple(rope), grid, backend="reference")[0]
    assert not torch.allclose(want, q)
    for backend in kernel_backends("cpu", "cpu"):
        got = dit_ops.qk_norm_rope(q, q, None, None, tuple(rope), grid, backend=backend)[0]
        torch.testing.assert_close(got, want)


def test_only_relative_positions_matter():
    """q at frame p times k at frame r depends on p - r only."""
    tables = Rope3D(16, splits=(8, 4, 4)).tables(50, 2, 2)
    q, k = (t / t.norm(dim=-1, keepdim=True) for t in heads(1, 12, 2, 16))
    dots = []
    for start in (0, 1, 40):
        a, b = dit_ops.qk_norm_rope(q, k, None, None, tables, GRID, start_frame=start)
        dots.append(torch.einsum("blnd,bmnd->bnlm", a, b))
    torch.testing.assert_close(dots[1], dots[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(dots[2], dots[0], rtol=0, atol=1e-6)
    assert not torch.allclose(dots[0], torch.einsum("blnd,bmnd->bnlm", q, k), atol=1e-3)


def test_backward_is_the_rotation_back():
    q, dq = heads(2, 12, 2, 16)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(dit_ops.qk_norm_rope(q, q.detach(), None, None, ROPE, GRID)[0], q, dq)
    back = tuple(t * torch.tensor([1.0, -1.0]) for t in ROPE)
    torch.testing.assert_close(grad, dit_ops.qk_norm_rope(dq, dq, None, None, back, GRID)[0])


def test_reference_gradients():
    q, k = (t.requires_grad_() for t in heads(1, 4, 2, 8))
    weights = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (16, 8)]
    tables = [torch.randn(n, d, 2, dtype=torch.float64, requires_grad=True) for n, d in ((3, 2), (2, 1), (1, 1))]
    fn = lambda q, k, wq, wk, *rope: dit_ops.qk_norm_rope(q, k, wq, wk, rope, (2, 2, 1), start_frame=1)
    assert torch.autograd.gradcheck(fn, (q, k, *weights, *tables))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_within_rounding_of_fp64(dtype):
    q, k, weight = torch.randn(2, 12, 3, 16), torch.randn(2, 12, 3, 16), torch.randn(48)
    exact = dit_ops.qk_norm_rope(q.to(dtype).double(), k.to(dtype).double(), weight, weight, ROPE, GRID)
    got = dit_ops.qk_norm_rope(q.to(dtype), k.to(dtype), weight, weight, ROPE, GRID)
    for name, g, e in zip("qk", got, exact, strict=True):
        assert_within_rounding(name, g, e, e.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["channels", "head", "no norm"])
def test_kernels_are_within_rounding(norm, dtype, device):
    """150 tokens of two halves: three chunks of partial sums, the last one short, the second across the halves."""
    tables = Rope3D(16, splits=(8, 4, 4)).tables(7, 5, 3, device)
    fn = lambda q, k, q_weight, k_weight, backend: dit_ops.qk_norm_rope(
        q, k, q_weight, k_weight, tables, (5, 5, 3), start_frame=2, halves=2, eps=1e-3, backend=backend
    )
    for backend in kernel_backends(device, "triton", "cpu"):
        args = head_case(norm, dtype, "qk", 2, 150, 3, 16, device)
        check_backend(fn, args, [torch.randn(2, 150, 3, 16, device=device).to(dtype) for _ in range(2)], backend)


@pytest.mark.gpu
@pytest.mark.parametrize("N, D", [(12, 128), (16, 64), (24, 128), (40, 128)])
def test_head_counts_of_real_models(N, D, device):
    rope = Rope3D(D).tables(3, 9, 11, device)
    fn = lambda q, k, q_weight, k_weight, backend: dit_ops.qk_norm_rope(
        q, k, q_weight, k_weight, rope, (3, 9, 11), backend=backend
    )
    for norm in ("channels", "head"):
        args = head_case(norm, torch.bfloat16, "qk", 2, 297, N, D, device)
        cotangents = [torch.randn(2, 297, N, D, device=device).bfloat16() for _ in "qk"]
        check_backend(fn, args, cotangents, "triton")
        once, again = (run_with_grads(fn, args, cotangents, backend="triton") for _ in range(2))
        assert all(torch.equal(once[name], again[name]) for name in once)


def test_kernels_read_strided_heads(device):
    """Out of a packed [B, L, 3, N, D], and with heads before tokens in memory; gradients too."""
    packed = torch.randn(2, 12, 3, 2, 16, device=device)
    heads_first = packed[:, :, 0].transpose(1, 2).contiguous()
    leaves = {
        "packed": (packed, lambda t: t.unbind(2)[:2]),
        "heads first": (heads_first, lambda t: (t.transpose(1, 2), t.transpose(1, 2))),
    }
    weights = torch.ones(32, device=device), torch.ones(16, device=device)
    rope = Rope3D(16, splits=(8, 4, 4)).tables(*GRID, device)
    for name, (leaf, view) in leaves.items():
        runs = []
        for backend in (*kernel_backends(device, "triton", "cpu"), "reference"):
            x = leaf.clone().requires_grad_()
            out = dit_ops.qk_norm_rope(*view(x), *weights, rope, GRID, backend=backend)
            runs.append((*out, *torch.autograd.grad(out[0].sin().sum() + out[1].cos().sum(), x)))
        for other in runs[:-1]:
            torch.testing.assert_close(other, runs[-1], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_keys_and_values_go_into_slots_of_a_cache(layout, device):
    """Slots of 12 tokens in a cache of 20, which keeps the rest."""
    q, k, v = torch.randn(3, 2, 12, 2, 16, device=device)
    weight = torch.randn(32, device=device)
    args = (q, k, weight, weight, Rope3D(16, splits=(8, 4, 4)).tables(*GRID, device), GRID)
    for backend in (*kernel_backends(device, "triton", "cpu"), "reference"):
        want = dit_ops.qk_norm_rope(*args, backend=backend)
        normed = rms_norm_ref(k, weight, 1e-6)
        for turn_keys, k_want in ((True, want[1]), (False, normed)):
            caches = torch.full((2, 2, 20, 2, 16) if layout == "tokens first" else (2, 2, 2, 20, 16), 7.0, device=device)
            caches = caches if layout == "tokens first" else caches.transpose(2, 3)
            k_out, v_out = caches[:, :, 5:17]
            q_got, k_got = dit_ops.qk_norm_rope(*args, v=v, k_out=k_out, v_out=v_out, turn_keys=turn_keys, backend=backend)
            assert torch.equal(q_got, want[0]) and k_got is k_out and torch.equal(v_out, v)
            torch.testing.assert_close(k_out, k_want)
            assert (caches[:, :, :5] == 7).all() and (caches[:, :, 17:] == 7).all()
    only_keys = torch.full((2, 12, 2, 16), 7.0, device=device)
    dit_ops.qk_norm_rope(*args, k_out=only_keys)
    torch.testing.assert_close(only_keys, want[1])
    for options, message in [
        ({"v_out": v_out}, "v_out needs k_out, got only v_out"),
        ({"v": v, "v_out": v_out}, "v is only copied beside the keys, to v_out, and needs k_out, got None"),
        ({"v": v, "k_out": k_out}, "v and v_out come together with k_out, got only v"),
        ({"k_out": k_out[:, :, :1]}, r"k_out must be \[B, L, N, D\] = \[2, 12, 2, 16\], got \[2, 12, 1, 16\]"),
        ({"k_out": k_out.double()}, "k_out must be torch.float32 with unit stride over D, got torch.float64"),
        ({"turn_keys": False}, "turn_keys = False needs k_out, got None"),
    ]:
        with pytest.raises(ValueError, match=message):
            dit_ops.qk_norm_rope(*args, **options)
    with pytest.raises(ValueError, match="written without gradient, got a tensor that requires it"):
        dit_ops.qk_norm_rope(q.requires_grad_(), *args[1:], k_out=k_out)


def test_writing_into_slots_copies_nothing(device):
    """The op itself is the only thing that runs, and nothing is copied to or from the slots around it."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    q, k, v = torch.randn(3, 2, 12, 2, 16, device=device)
    weight = torch.randn(32, device=device)
    caches = torch.full((2, 2, 20, 2, 16), 7.0, device=device)
    k_out, v_out = caches[:, :, 5:17]
    rope = Rope3D(16, splits=(8, 4, 4)).tables(*GRID, device)
    for backend in kernel_backends(device, "triton", "cpu"):
        for turn_keys in (True, False):
            names = []
            with Calls():
                options = {"k_out": k_out, "v_out": v_out, "turn_keys": turn_keys, "backend": backend}
                dit_ops.qk_norm_rope(q, k, weight, weight, rope, GRID, v=v, **options)
            assert names == ["dit_ops::qk_norm_rope_into"]


def test_op_that_writes_into_slots_is_well_registered_and_compiles(device):
    q, k, v = torch.randn(3, 1, 12, 2, 16, device=device)
    rope = Rope3D(16, splits=(8, 4, 4)).tables(*GRID, device)
    P, P_inv = torch.randn(2, 1, 3, 4, 4, device=device)
    op, weight = torch.ops.dit_ops.qk_norm_rope_into.default, torch.randn(32, device=device)
    slots, double = (torch.zeros(2, 1, 20, n, 16, device=device)[:, :, 3:15] for n in (2, 4))
    for backend in kernel_backends(device, "triton", "cpu"):
        end = (*GRID, 1e-6, 0)
        for args in (
            (q, k, v, weight, None, *rope, None, None, *slots, *end, True, backend),
            (q, k, v, weight, weight, *rope, P, P_inv, *double, *end, True, backend),
            (q, k, v, weight, weight, *rope, P, P_inv, *slots, *end, False, backend),
            (None, k, v, None, None, *rope, None, P_inv, *double, *end, True, backend),
            (None, k, None, None, None, *rope, None, None, slots[0], None, *end, True, backend),
        ):
            opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
        compiled = torch.compile(dit_ops.qk_norm_rope, fullgraph=True, backend="aot_eager")
        caches = torch.full((2, 2, 1, 20, 2, 16), 7.0, device=device)
        for run, (k_cache, v_cache) in zip((compiled, dit_ops.qk_norm_rope), caches, strict=True):
            views = {"k_out": k_cache[:, 5:17], "v_out": v_cache[:, 5:17]}
            run(q, k, weight, weight, rope, GRID, v=v, **views, backend=backend)
        assert torch.equal(*caches) and not (caches[0, :, :, 5:17] == 7).any()


def test_op_is_well_registered(device):
    q, k = (t.to(device).requires_grad_() for t in heads(1, 12, 2, 16, dtype=torch.float32))
    weight = torch.randn(32, device=device, requires_grad=True)
    rope = Rope3D(16, splits=(8, 4, 4)).tables(*GRID, device)
    for backend in kernel_backends(device, "triton", "cpu"):
        for w in (weight, None):
            opcheck(torch.ops.dit_ops.qk_norm_rope.default, (q, k, w, w, *rope, *GRID, 1e-6, 0, backend))


def test_gradients_of_the_tables_run_on_the_reference():
    q = torch.randn(1, 12, 2, 16)
    tables = tuple(t.clone().requires_grad_() for t in ROPE)
    explained = dit_ops.explain(dit_ops.qk_norm_rope, q, q, None, None, tables, GRID)
    assert explained.backend == "reference"
    with pytest.raises(NotImplementedError, match="written in the reference only|is not built"):
        dit_ops.qk_norm_rope(q, q, None, None, tables, GRID, backend="cpu")


def test_strided_views_of_a_packed_qkv_and_a_batch_of_two():
    packed = torch.randn(2, 12, 3, 2, 16)
    q, k, _ = packed.unbind(2)
    weight = torch.randn(32)
    got = dit_ops.qk_norm_rope(q, k, weight, weight, ROPE, GRID)
    alone = [
        dit_ops.qk_norm_rope(q[b : b + 1].contiguous(), k[b : b + 1].contiguous(), weight, weight, ROPE, GRID) for b in (0, 1)
    ]
    for i in (0, 1):
        torch.testing.assert_close(got[i], torch.cat([pair[i] for pair in alone]), rtol=0, atol=0)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)  # heads before tokens in memory
    torch.testing.assert_close(dit_ops.qk_norm_rope(transposed, k, weight, weight, ROPE, GRID)[0], got[0], rtol=0, atol=0)


def test_both_halves_have_the_same_positions():
    q, k = heads(2, 12, 2, 16)
    one = dit_ops.qk_norm_rope(q, k, None, None, ROPE, GRID)
    two = dit_ops.qk_norm_rope(torch.cat((q, k), 1), torch.cat((k, q), 1), None, None, ROPE, GRID, halves=2)
    for a, b in zip(two, (torch.cat(one, 1), torch.cat(one[::-1], 1)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_zero_frames():
    x = torch.randn(2, 0, 2, 16, requires_grad=True)
    q, _ = dit_ops.qk_norm_rope(x, x, torch.ones(32), None, ROPE, (0, 2, 2))
    assert q.shape == torch.autograd.grad(q.sum(), x)[0].shape == x.shape


def test_compiles_without_graph_break():
    q, k = heads(2, 12, 2, 16, dtype=torch.float32)
    weight = torch.randn(32)
    compiled = torch.compile(dit_ops.qk_norm_rope, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(q, k, weight, weight, ROPE, GRID), dit_ops.qk_norm_rope(q, k, weight, weight, ROPE, GRID)
    )


def test_errors_name_argument_expected_and_got():
    q = torch.randn(1, 12, 2, 16)
    with pytest.raises(ValueError, match=r"k must be \[B, L, N, D\] = \[1, 12, 2, 16\], got \[1, 12, 1, 16\]"):
        dit_ops.qk_norm_rope(q, q[:, :, :1], None, None, ROPE, GRID)
    with pytest.raises(ValueError, match=r"the L of q must be halves \* F \* H \* W = 8, got 12"):
        dit_ops.qk_norm_rope(q, q, None, None, ROPE, (2, 2, 2))
    with pytest.raises(ValueError, match=r"q_weight must be \[N \* D\] = \[32\], \[D\] = \[16\] or None, got \[2\]"):
        dit_ops.qk_norm_rope(q, q, torch.ones(2), None, ROPE, GRID)
    with pytest.raises(ValueError, match="rope must be three tables .* D_axis summing to D = 16, got"):
        dit_ops.qk_norm_rope(q, q, None, None, Rope3D(32).tables(*GRID), GRID)
    with pytest.raises(ValueError, match="rope's frame table must have at least 1027 positions, got 1024"):
        dit_ops.qk_norm_rope(q, q, None, None, ROPE, GRID, start_frame=1024)
    with pytest.raises(ValueError, match="halves must be 1 or 2, got 3"):
        dit_ops.qk_norm_rope(q, q, None, None, ROPE, GRID, halves=3)
