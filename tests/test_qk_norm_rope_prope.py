from pathlib import Path

import pytest
import torch
from op_cases import DTYPES, head_case, kernel_backends
from safetensors.torch import load_file
from torch.library import opcheck

import dit_ops
from dit_ops.camera import parse_trajectory, projective_cameras
from dit_ops.ops.qk_norm_rope import rms_norm_ref
from dit_ops.ops.qk_norm_rope_prope import turn_keys_values
from dit_ops.rope import Rope3D
from dit_ops.testing import assert_within_rounding, check_backend, run_with_grads

CASES = Path(__file__).parent / "golden/cases.safetensors"
GRID = (3, 2, 1)
ROPE = Rope3D(16, splits=(8, 4, 4)).tables(*GRID)


def inputs(dtype: torch.dtype = torch.float64, B: int = 2, N: int = 2) -> list[torch.Tensor]:
    """q, k, v of GRID, and the weights of a norm over channels and of one per head."""
    return [*torch.randn(3, B, 6, N, 16, dtype=dtype), torch.randn(N * 16, dtype=dtype), torch.randn(16, dtype=dtype)]


def cameras(B: int = 2, F: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rigid cameras with a focal length away from 1."""
    rotation, _ = torch.linalg.qr(torch.randn(B, F, 3, 3, dtype=torch.float64))
    rotation = rotation * rotation.det().sign()[..., None, None]
    V = torch.eye(4, dtype=torch.float64).repeat(B, F, 1, 1)
    V[..., :3, :3], V[..., :3, 3] = rotation, torch.randn(B, F, 3, dtype=torch.float64)
    K = torch.diag(torch.tensor([0.6, 1.4, 1.0], dtype=torch.float64)).expand(B, F, 3, 3)
    return projective_cameras(V, K)


def test_golden_prope():
    golden = load_file(CASES)
    q, k, v = (golden[f"prope.{name}"].transpose(1, 2) for name in "qkv")  # [B, L, N, D], 2 frames of 5 tokens
    P, P_inv = projective_cameras(golden["prope.viewmats"], golden["prope.Ks"])
    tables = Rope3D(16, splits=(8, 4, 4)).tables(2, 5, 1)
    out = dit_ops.qk_norm_rope_prope(q, k, v, None, None, tables, (2, 5, 1), P, P_inv)
    for name, got in zip("qkv", out, strict=True):
        want = golden[f"prope.{name}_out"].transpose(1, 2)
        torch.testing.assert_close(got[:, :, 3:], want, rtol=0, atol=1e-6)  # recorded with fp32 intrinsics


def test_golden_numbers_of_one_camera():
    V = parse_trajectory("l*10,w*5")[-1].view(1, 1, 4, 4)
    K = torch.diag(torch.tensor([0.5050505, 0.89786756, 1.0])).view(1, 1, 3, 3)
    P, P_inv = projective_cameras(V, K)
    x = torch.arange(1.0, 9).view(1, 1, 1, 8)
    tables = Rope3D(8, splits=(4, 2, 2)).tables(1, 1, 1)
    q, k, v = (t[0, 0, 1] for t in dit_ops.qk_norm_rope_prope(x, x, x, None, None, tables, (1, 1, 1), P, P_inv))
    q_want = torch.tensor([1.937387, 1.795735, 2.345551, 2.8, 5.686933, 5.387205, 4.799551, 5.2])
    k_want = torch.tensor([4.014730, 2.2275, 2.993717, 4, 13.673653, 6.6825, 3.883459, 8])
    for got, want in ((q, q_want), (k, k_want), (v, k_want)):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identity_cameras_change_nothing(dtype):
    q, k, v, weight, _ = inputs(dtype)
    eye = torch.eye(4).expand(2, 3, 4, 4)
    q2, k2, v2 = dit_ops.qk_norm_rope_prope(q, k, v, weight, weight, ROPE, GRID, eye, eye)
    no_turn = tuple(torch.stack((torch.ones_like(t[..., 0]), torch.zeros_like(t[..., 0])), -1) for t in ROPE)
    normed = dit_ops.qk_norm_rope(q, k, weight, weight, no_turn, GRID)
    for got, want in ((q2, normed[0]), (k2, normed[1]), (v2, v)):
        assert torch.equal(got[:, :, 2:], want)
    assert torch.equal(v2[:, :, :2], v)


def test_rope_heads_are_qk_norm_rope():
    q, k, v, weight, head_weight = inputs()
    q2, k2, _ = dit_ops.qk_norm_rope_prope(q, k, v, weight, head_weight, ROPE, GRID, *cameras(), start_frame=4)
    want = dit_ops.qk_norm_rope(q, k, weight, head_weight, ROPE, GRID, start_frame=4)
    assert torch.equal(q2[:, :, :2], want[0]) and torch.equal(k2[:, :, :2], want[1])


def test_attention_does_not_see_the_world_frame():
    """One rigid motion of the world, on the right of every camera, leaves P o unchanged."""
    q, k, v, weight, _ = inputs(torch.float32)
    P, P_inv = (M.float() for M in cameras())
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    G = torch.eye(4)
    G[:3, :3], G[:3, 3] = rotation * rotation.det().sign(), torch.tensor([0.5, -2.0, 1.0])
    outs = []
    for A, A_inv in ((P, P_inv), (P @ G, torch.linalg.inv(G) @ P_inv)):
        q2, k2, v2 = dit_ops.qk_norm_rope_prope(q, k, v, weight, weight, ROPE, GRID, A, A_inv)
        outs.append(dit_ops.prope_output(dit_ops.attention(q2, k2, v2)[:, :, 2:].contiguous(), A))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-4)
    plain = dit_ops.attention(*(t[:, :, 2:].contiguous() for t in (q2, k2, v2)))
    assert not torch.allclose(plain, outs[0], atol=1e-2)  # without P the frame shows


def test_halves_share_cameras_and_positions():
    q, k, v, weight, _ = inputs()
    P, P_inv = cameras()
    one = dit_ops.qk_norm_rope_prope(q, k, v, weight, weight, ROPE, GRID, P, P_inv)
    doubled = (torch.cat((t, t), 1) for t in (q, k, v))
    two = dit_ops.qk_norm_rope_prope(*doubled, weight, weight, ROPE, GRID, P, P_inv, halves=2)
    for a, b in zip(two, one, strict=True):
        torch.testing.assert_close(a, torch.cat((b, b), 1), rtol=0, atol=1e-12)


def test_strided_views_and_a_batch_of_two():
    packed = torch.randn(2, 6, 3, 2, 16)
    P, P_inv = (M.float() for M in cameras())
    weight = torch.randn(32)
    got = dit_ops.qk_norm_rope_prope(*packed.unbind(2), weight, weight, ROPE, GRID, P, P_inv)
    for b in (0, 1):
        one = (t.contiguous() for t in packed[b : b + 1].unbind(2))
        alone = dit_ops.qk_norm_rope_prope(*one, weight, weight, ROPE, GRID, P[b : b + 1], P_inv[b : b + 1])
        for g, a in zip(got, alone, strict=True):
            torch.testing.assert_close(g[b : b + 1], a, rtol=0, atol=1e-6)


def test_reference_gradients():
    q, k, v = (torch.randn(1, 4, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    P, P_inv = (M.detach().requires_grad_() for M in cameras(1, 2))
    tables = Rope3D(8, splits=(4, 2, 2)).tables(2, 2, 1)
    fn = lambda q, k, v, w, P, P_inv: dit_ops.qk_norm_rope_prope(q, k, v, w, w, tables, (2, 2, 1), P, P_inv)
    assert torch.autograd.gradcheck(fn, (q, k, v, weight, P, P_inv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["channels", "head", "no norm"])
def test_kernels_are_within_rounding(norm, dtype, device):
    """150 tokens of two halves, and cameras that differ by sample and frame."""
    tables = Rope3D(16, splits=(8, 4, 4)).tables(7, 5, 3, device)
    P, P_inv = (M.float().to(device) for M in cameras(2, 5))
    fn = lambda q, k, v, q_weight, k_weight, backend: dit_ops.qk_norm_rope_prope(
        q, k, v, q_weight, k_weight, tables, (5, 5, 3), P, P_inv, start_frame=2, halves=2, eps=1e-3, backend=backend
    )
    for backend in kernel_backends(device, "triton", "cpu"):
        args = head_case(norm, dtype, "qkv", 2, 150, 3, 16, device)
        check_backend(fn, args, [torch.randn(2, 150, 6, 16, device=device).to(dtype) for _ in range(3)], backend)


@pytest.mark.gpu
@pytest.mark.parametrize("N, D", [(12, 128), (16, 64), (24, 128), (40, 128)])
def test_head_counts_of_real_models(N, D, device):
    rope = Rope3D(D).tables(3, 9, 11, device)
    P, P_inv = (M.float().to(device) for M in cameras(2, 3))
    fn = lambda q, k, v, q_weight, k_weight, backend: dit_ops.qk_norm_rope_prope(
        q, k, v, q_weight, k_weight, rope, (3, 9, 11), P, P_inv, backend=backend
    )
    for norm in ("channels", "head"):
        args = head_case(norm, torch.bfloat16, "qkv", 2, 297, N, D, device)
        cotangents = [torch.randn(2, 297, 2 * N, D, device=device).bfloat16() for _ in "qkv"]
        check_backend(fn, args, cotangents, "triton")
        once, again = (run_with_grads(fn, args, cotangents, backend="triton") for _ in range(2))
        assert all(torch.equal(once[name], again[name]) for name in once)


def test_zero_frames(device):
    empty = torch.eye(4, device=device).expand(2, 1, 4, 4)[:, :0]
    rope = Rope3D(16, splits=(8, 4, 4)).tables(*GRID, device)
    for backend in (*kernel_backends(device, "triton", "cpu"), "reference"):
        q, weight = (
            torch.randn(2, 0, 2, 16, device=device, requires_grad=True),
            torch.ones(32, device=device, requires_grad=True),
        )
        with pytest.raises(ValueError, match=r"P must be \[B, F, 4, 4\]"):
            dit_ops.qk_norm_rope_prope(q, q, q, weight, None, rope, (0, 2, 1), empty, empty, backend=backend)
        eye = torch.eye(4, device=device).expand(2, 3, 4, 4)
        out = dit_ops.qk_norm_rope_prope(q, q, q, weight, None, rope, (3, 0, 1), eye, eye, backend=backend)
        dq, dweight = torch.autograd.grad(sum(t.sum() for t in out), (q, weight))
        assert dq.shape == q.shape and not dweight.count_nonzero()


def test_keys_and_values_go_into_slots_of_a_cache(device):
    q, k, v, weight, _ = (t.to(device) for t in inputs(torch.float32))
    rope = Rope3D(16, splits=(8, 4, 4)).tables(*GRID, device)
    args = (q, k, v, weight, weight, rope, GRID, *(M.float().to(device) for M in cameras()))
    for backend in (*kernel_backends(device, "triton", "cpu"), "reference"):
        want = dit_ops.qk_norm_rope_prope(*args, backend=backend)
        k_cache, v_cache = torch.full((2, 2, 9, 4, 16), 7.0, device=device)
        slots = {"k_out": k_cache[:, 2:8], "v_out": v_cache[:, 2:8]}
        got = dit_ops.qk_norm_rope_prope(*args, **slots, backend=backend)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        for cache, w in ((k_cache, want[1]), (v_cache, want[2])):
            assert torch.equal(cache[:, 2:8], w) and (cache[:, :2] == 7).all() and (cache[:, 8:] == 7).all()
    with pytest.raises(ValueError, match="k_out and v_out come together, got only v_out"):
        dit_ops.qk_norm_rope_prope(*args, v_out=slots["v_out"])
    with pytest.raises(ValueError, match=r"k_out must be \[B, L, 2N, D\] = \[2, 6, 4, 16\], got \[2, 9, 4, 16\]"):
        dit_ops.qk_norm_rope_prope(*args, k_out=k_cache, v_out=slots["v_out"])
    with pytest.raises(ValueError, match="turn_keys = False needs k_out and v_out, got None"):
        dit_ops.qk_norm_rope_prope(*args, turn_keys=False)
    with pytest.raises(ValueError, match="written without gradient, got a tensor that requires it"):
        dit_ops.qk_norm_rope_prope(q.requires_grad_(), *args[1:], **slots)


@pytest.mark.parametrize("with_cameras", [True, False])
def test_keys_that_are_turned_when_read_are_those_turned_when_written(with_cameras, device):
    """Frames 6, 1 and 4 of a stream, each written on its own, then read together by a table row and a camera each."""
    q, k, v, weight, head_weight = (t.to(device) for t in inputs(torch.float32))
    P, P_inv = (M.float().to(device) for M in cameras())
    frames, T = (6, 1, 4), GRID[1] * GRID[2]
    rope = Rope3D(16, splits=(8, 4, 4)).tables(8, *GRID[1:], device)
    rows = torch.cat([rope[0][f : f + 1] for f in frames]), *rope[1:]
    heads = 4 if with_cameras else 2
    for backend in (*kernel_backends(device, "triton", "cpu"), "reference"):
        k_cache, v_cache = torch.full((2, 2, 9, 2, 16), 7.0, device=device)
        wanted = []
        for i, f in enumerate(frames):
            at, slot = slice(i * T, (i + 1) * T), slice(1 + i * T, 1 + (i + 1) * T)
            here = [t[:, at] for t in (q, k, v)]
            options = {"start_frame": f, "eps": 1e-3, "backend": backend}
            into = {"k_out": k_cache[:, slot], "v_out": v_cache[:, slot], "turn_keys": False}
            tables = weight, head_weight, rope, (1, *GRID[1:])
            if with_cameras:
                M = P[:, i : i + 1], P_inv[:, i : i + 1]
                turned = dit_ops.qk_norm_rope_prope(*here, *tables, *M, **options)
                queries, *_ = dit_ops.qk_norm_rope_prope(*here, *tables, *M, **into, **options)
            else:
                turned = *dit_ops.qk_norm_rope(*here[:2], *tables, **options), here[2]
                queries, _ = dit_ops.qk_norm_rope(*here[:2], *tables, v=here[2], **into, **options)
            assert torch.equal(queries, turned[0])
            wanted.append(turned[1:])
        stored = k_cache[:, 1:7], v_cache[:, 1:7]
        torch.testing.assert_close(stored[0], rms_norm_ref(k, head_weight, 1e-3))
        assert torch.equal(stored[1], v)
        assert all((c[:, :1] == 7).all() and (c[:, 7:] == 7).all() for c in (k_cache, v_cache))
        out = torch.full((2, 2, 8, heads, 16), 7.0, device=device)
        to = out[0][:, 2:], out[1][:, 2:]
        turn_keys_values(*stored, rows, GRID, P_inv if with_cameras else None, *to, backend=backend)
        for got, want in zip(to, zip(*wanted, strict=True), strict=True):
            torch.testing.assert_close(got, torch.cat(want, 1))
        assert (out[:, :, :2] == 7).all()


def test_keys_alone_are_turned():
    _, k, _, _, _ = inputs(torch.float32)
    for backend in (*kernel_backends("cpu", "cpu"), "reference"):
        out = torch.empty_like(k)
        turn_keys_values(k, None, ROPE, GRID, None, out, None, backend=backend)
        torch.testing.assert_close(out, dit_ops.qk_norm_rope(k, k, None, None, ROPE, GRID)[1])
    with pytest.raises(
        ValueError, match=r"turn_keys_values: k_out must be \[B, L, 2N, D\] = \[2, 6, 4, 16\], got \[2, 6, 2, 16\]"
    ):
        turn_keys_values(k, None, ROPE, GRID, cameras()[1], out, None)
    with pytest.raises(ValueError, match="v and v_out come together with k_out, got only v"):
        turn_keys_values(k, k, ROPE, GRID, None, out, None)
    with pytest.raises(ValueError, match=r"the L of k must be halves \* F \* H \* W = 8, got 6"):
        turn_keys_values(k, None, ROPE, (4, 2, 1), None, out, None)


def test_op_is_well_registered_and_compiles(device):
    q, k, v, weight, head_weight = (t.to(device).requires_grad_() for t in inputs(torch.float32))
    eye = torch.eye(4, device=device).repeat(2, 3, 1, 1)
    rope = Rope3D(16, splits=(8, 4, 4)).tables(*GRID, device)
    compiled = torch.compile(dit_ops.qk_norm_rope_prope, fullgraph=True, backend="aot_eager")
    for backend in kernel_backends(device, "triton", "cpu"):
        op = torch.ops.dit_ops.qk_norm_rope_prope.default
        opcheck(op, (q, k, v, weight, head_weight, *rope, eye, eye, *GRID, 1e-6, 0, backend))
        opcheck(op, (q, k, v, None, None, *rope, eye, eye, *GRID, 1e-6, 0, backend))
        args = (q, k, v, weight, weight, rope, GRID, eye, eye)
        torch.testing.assert_close(compiled(*args, backend=backend), dit_ops.qk_norm_rope_prope(*args, backend="reference"))


def test_bf16_is_within_rounding_of_fp64():
    q, k, v, weight, _ = inputs(torch.bfloat16)
    P, P_inv = (M.float() for M in cameras())
    exact = dit_ops.qk_norm_rope_prope(*(t.double() for t in (q, k, v)), weight, weight, ROPE, GRID, P, P_inv)
    got = dit_ops.qk_norm_rope_prope(q, k, v, weight, weight, ROPE, GRID, P, P_inv)
    for name, g, e in zip("qkv", got, exact, strict=True):
        assert_within_rounding(name, g, e, e.bfloat16())


def test_errors_name_argument_expected_and_got():
    q, k, v, *_ = inputs(torch.float32)
    P, P_inv = (M.float() for M in cameras())
    with pytest.raises(ValueError, match="P must have F = 3 frames, as grid says, got 1"):
        dit_ops.qk_norm_rope_prope(q, k, v, None, None, ROPE, GRID, P[:, :1], P_inv[:, :1])
    with pytest.raises(ValueError, match=r"P_inv must be \[B, F, 4, 4\] with B = 2 .* got \[1, 3, 4, 4\]"):
        dit_ops.qk_norm_rope_prope(q, k, v, None, None, ROPE, GRID, P, P_inv[:1])
    with pytest.raises(ValueError, match=r"v must be \[B, L, N, D\] = \[2, 6, 2, 16\], got \[2, 5, 2, 16\]"):
        dit_ops.qk_norm_rope_prope(q, k, v[:, :5], None, None, ROPE, GRID, P, P_inv)
