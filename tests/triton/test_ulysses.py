"""The Triton kernels around the Ulysses exchange in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import pytest
import torch
import ulysses_cases as cases
from op_cases import head_case
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dit_ops import _library as lib
from dit_ops.ops import _ulysses_output, _ulysses_qkv, ulysses
from dit_ops.ops._ulysses_wire import split
from dit_ops.rope import Rope3D
from dit_ops.testing import assert_within_rounding, run_with_grads

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
GRID, HALVES, RANKS, START = (2, 1, 3), 2, 2, 1
ROPE = Rope3D(16, splits=(8, 4, 4)).tables(START + 2, 1, 3)


def compare(kernel, plain, tensors, cotangents, factor=2.0):
    """Outputs and gradients of a piece against the same piece in PyTorch, with the fp64 one as the truth."""
    wide = {n: None if t is None else t.double() for n, t in tensors.items()}
    exact = run_with_grads(plain, wide, [c.double() for c in cotangents])
    near, got = run_with_grads(plain, tensors, cotangents), run_with_grads(kernel, tensors, cotangents)
    for name in exact:
        assert_within_rounding(name, got[name], exact[name], near[name], factor)


@pytest.mark.parametrize("norm, dtype", [("channels", torch.float32), ("head", torch.bfloat16), ("no norm", torch.float16)])
@pytest.mark.parametrize("transform", ["norm", "rope", "prope"])
def test_pack(transform, norm, dtype):
    """3 heads over 2 ranks, the second of them with a shorter part of every row."""
    rank, tokens = 1, HALVES * 2 * 1
    rope = None if transform == "norm" else ROPE
    P, P_inv = torch.randn(2, 1, 2, 4, 4) if transform == "prope" else (None, None)
    if norm == "head" and transform == "rope":
        rank, tokens = 0, HALVES * 2 * 2
    where = RANKS, rank
    kernel = lambda q, k, v, q_weight, k_weight: _ulysses_qkv.pack(
        q, k, v, q_weight, k_weight, *(rope or [None] * 3), P, P_inv, *where, *GRID, 1e-3, START, "triton"
    )[0]
    plain = lambda q, k, v, q_weight, k_weight: _ulysses_qkv.pack_ref(
        q, k, v, q_weight, k_weight, rope, P, P_inv, *where, GRID, HALVES, 1e-3, START
    )
    args = head_case(norm, dtype, "qkv", 1, tokens, 3, 16)
    wire = torch.randn(tokens * 3 * 3 * 16 * (2 if P is not None else 1)).to(dtype)
    compare(kernel, plain, args, [wire], 4.0 if dtype == torch.bfloat16 else 2.0)


@pytest.mark.parametrize("camera, dtype", [(True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("three", [True, False], ids=["three wires", "one wire"])
def test_unpack(three, camera, dtype):
    B, N, D, L = 2, 2, 16, HALVES * 2 * 3
    P, P_inv = torch.randn(2, B, 2, 4, 4) if camera else (None, None)
    wires = dict.fromkeys(("k", "v")) | {"q": torch.randn((1 if three else 3) * B * L * N * D).to(dtype)}
    if three:
        wires |= {name: torch.randn_like(wires["q"]) for name in "kv"}
    sizes = B, N, D, RANKS
    kernel = lambda q, k, v: _ulysses_qkv.unpack(q, k, v, *ROPE, P, P_inv, *sizes, *GRID, HALVES, START, "triton")
    plain = lambda q, k, v: _ulysses_qkv.unpack_ref(
        [t for t in (q, k, v) if t is not None], ROPE, P, P_inv, *sizes, GRID, HALVES, START
    )
    cotangents = [torch.randn(B, L, N * (2 if camera else 1), D).to(dtype) for _ in "qkv"]
    compare(kernel, plain, {n: wires[n] for n in "qkv"}, cotangents, 4.0 if dtype == torch.bfloat16 else 2.0)


@pytest.mark.parametrize("turn_keys", [True, False])
def test_unpack_into_slots(turn_keys):
    N, paths = 2, 2 if turn_keys else 1
    P, P_inv = torch.randn(2, 1, 2, 4, 4)
    wire = torch.randn(3 * 6 * N * 16)
    buffers = torch.full((2, 1, 10, N * paths, 16), 7.0)
    k_out, v_out = buffers[:, :, 2:8]
    sizes = 1, N, 16, RANKS
    q = _ulysses_qkv.unpack_into(wire, None, None, *ROPE, P, P_inv, k_out, v_out, *sizes, *GRID, 1, START, turn_keys, "triton")
    want = _ulysses_qkv.unpack_ref([wire], ROPE, P, P_inv, *sizes, GRID, 1, START, turn_keys)
    torch.testing.assert_close((q, k_out, v_out), want)
    assert (buffers[:, :, :2] == 7).all() and (buffers[:, :, 8:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix, camera", [(0, True), (2, True), (2, False)])
def test_pack_output(prefix, camera, dtype):
    B, N, D, L = 2, 2, 16, HALVES * 2 * 3
    P, paths = (torch.randn(B, 2, 4, 4), 2) if camera else (None, 1)
    o = torch.randn(B, prefix + L, paths * N, D).to(dtype)
    kernel = lambda o: _ulysses_output.pack_output(o, P, 2, HALVES, prefix, RANKS, "triton")
    plain = lambda o: _ulysses_output.pack_output_ref(o, P, 2, HALVES, prefix, RANKS)
    wire = torch.randn(B * (L + RANKS * prefix) * paths * N * D).to(dtype)
    compare(kernel, plain, {"o": o}, [wire], 4.0 if dtype == torch.bfloat16 else 2.0)


@pytest.mark.parametrize("paths", [1, 2])
def test_unpack_output(paths):
    B, L, N, D = 2, 3, 5, 16
    kernel = lambda wire: _ulysses_output.unpack_output(wire, B, L, paths, N, D, 3, "triton")
    plain = lambda wire: _ulysses_output.unpack_output_ref(wire, B, L, paths, N, D, 3)
    wire, do = torch.randn(B * L * paths * N * D), torch.randn(B, L, paths, N, D)
    a, b = (run_with_grads(fn, {"wire": wire}, [do]) for fn in (kernel, plain))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_simulated_ranks_are_bitwise_one_rank():
    """3 heads and rows of 5 tokens over 4 ranks, one of them without a head."""
    grid, N, ranks = (1, 1, 5), 3, 4
    rope = Rope3D(16, splits=(8, 4, 4)).tables(*grid)
    P, P_inv = torch.randint(-4, 5, (2, 1, 1, 4, 4)).float()
    q, k, v = torch.randint(-4, 5, (3, 1, 5, N, 16)).float()
    from dit_ops import qk_norm_rope_prope

    want = qk_norm_rope_prope(q, k, v, None, None, rope, grid, P, P_inv, backend="triton")
    for before in (False, True):
        out = cases.scatter(q, k, v, (None, None), rope, grid, (P, P_inv), 1, ranks, "triton", before=before)
        for i in range(3):
            assert torch.equal(torch.cat([o[i].unflatten(2, (2, -1)) for o in out], 3).flatten(2, 3), want[i])
    got = cases.gather([o[2] for o in out], N, grid, P, 1, ranks, "triton")
    plain = cases.gather([o[2] for o in out], N, grid, P, 1, ranks, "reference")
    assert all(map(torch.equal, got, plain))


def test_same_bits_twice_views_and_opcheck():
    packed, weight = torch.randn(2, 20, 3, 3, 16).movedim(2, 0), torch.randn(48)
    q, k, v = packed[:, :, :10]  # of two chunks in the backward
    grid, where = (1, 1, 20), (2, 0)
    args = lambda q, k, v, w: (q, k, v, w, w, *[None] * 5, *where, *grid, 1e-6, 0, "triton")
    fn = lambda q, k, v, w: _ulysses_qkv.pack(*args(q, k, v, w))[0]
    tensors = {"q": q, "k": k, "v": v, "w": weight}
    wire = torch.randn(3 * 2 * 10 * 48)
    once, again = (run_with_grads(fn, tensors, [wire]) for _ in range(2))
    assert all(torch.equal(once[n], again[n]) for n in once)
    opcheck(torch.ops.dit_ops.ulysses_pack.default, args(q[:, :2], k[:, :2], v[:, :2], weight), test_utils=OPCHECKS)
    P, P_inv = torch.randn(2, 1, 2, 4, 4)
    wire = torch.randn(3 * 6 * 2 * 16, requires_grad=True)
    unpack = (wire, None, None, *ROPE, P, P_inv, 1, 2, 16, RANKS, *GRID, 1, START, "triton")
    opcheck(torch.ops.dit_ops.ulysses_unpack.default, unpack, test_utils=OPCHECKS)
    o = torch.randn(1, 8, 4, 16, requires_grad=True)
    opcheck(torch.ops.dit_ops.ulysses_pack_output.default, (o, P, 2, 1, 2, RANKS, "triton"), test_utils=OPCHECKS)
    wire = torch.randn(2 * 2 * 3 * 16, requires_grad=True)
    opcheck(torch.ops.dit_ops.ulysses_unpack_output.default, (wire, 1, 2, 2, 3, 16, RANKS, "triton"), test_utils=OPCHECKS)
    assert split(3, RANKS) == [2, 1]


class Calls(TorchDispatchMode):
    """Operators that compute or copy, by name; views and empty memory are free."""

    FREE = ("empty", "view", "detach", "unbind", "split", "slice", "alias", "as_strided", "transpose", "select", "expand")

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(word in func.__name__ for word in self.FREE):
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_one_launch_on_each_side_of_an_exchange_and_no_copy(monkeypatch):
    sent = []
    start = lambda flat, to, received, group: sent.append(flat.numel()) or (lambda: flat)
    monkeypatch.setattr(ulysses, "start_exchange", start)
    monkeypatch.setattr(ulysses, "exchange", lambda *args: start(*args)())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    q, k, v = torch.randn(1, 12, 3, 4, 16).unbind(2)  # views of one GEMM's output
    grid, group, weight = (2, 3, 4), cases.Rank(0, 2), torch.ones(64)
    rope = Rope3D(16, splits=(8, 4, 4)).tables(*grid)
    P, P_inv = torch.randn(2, 1, 2, 4, 4)
    with torch.no_grad(), Calls() as calls:
        q2, _, _ = ulysses.ulysses_scatter_heads(q, k, v, weight, weight, rope, grid, P, P_inv, group=group, backend="triton")
        o, o_prope = ulysses.ulysses_gather_heads(q2, grid, P, heads=4, group=group, backend="triton")
        o.flatten(2), o_prope.flatten(2)  # what the projections read
    assert calls.names == ["ulysses_pack", "ulysses_unpack", "ulysses_pack_output", "ulysses_unpack_output"]
    assert sent == [3 * q.numel(), 2 * q.numel()]
