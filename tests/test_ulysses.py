"""Pack, exchange, unpack: simulated ranks in one process, and gloo processes."""

import pytest
import torch
import torch.distributed as dist
import ulysses_cases as cases
from op_cases import head_case

import dit_ops
from dit_ops.ops._ulysses_wire import first_of, split
from dit_ops.ops.prope_output import prope_output
from dit_ops.rope import Rope3D

SPLITS = (8, 4, 4)


def tables(grid, D=16):
    return Rope3D(D, splits=SPLITS if D == 16 else None).tables(*grid)


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers whose sums of products are exact in any order."""
    return torch.randint(-4, 5, shape).to(dtype)


def test_split_is_tensor_split():
    for n in (0, 1, 7, 12, 1560):
        for ranks in (1, 2, 3, 8):
            parts = torch.arange(n).tensor_split(ranks)
            assert split(n, ranks) == [len(p) for p in parts]
            assert all(first_of(n, ranks, rank) == sum(split(n, ranks)[:rank]) for rank in range(ranks + 1))


@pytest.mark.parametrize("S", [1, 7, 45, 257])
@pytest.mark.parametrize("halves", [1, 2])
def test_simulated_ranks_are_bitwise_one_rank(S, halves):
    """The exchange of any number of ranks, heads and tokens changes no bit of RoPE and ProPE, nor of P o on the way back."""
    grid = (2, 1, S)
    rope, (P, P_inv) = tables(grid), integers(2, 1, 2, 4, 4)
    for N in (1, 3, 12):
        q, k, v = (integers(1, halves * 2 * S, N, 16) for _ in "qkv")
        want = dit_ops.qk_norm_rope_prope(q, k, v, None, None, rope, grid, P, P_inv, halves=halves, backend="reference")
        back = prope_output(want[2][:, :, N:], P, halves=halves, backend="reference")
        back = torch.stack((want[2][:, :, :N], back), 2)
        for ranks in (1, 2, 3, 4, 8):
            for before in (False, True):
                args = ((None, None), rope, grid, (P, P_inv), halves, ranks, "reference")
                out = cases.scatter(q, k, v, *args, before=before)
                for i in range(3):
                    got = [o[i].unflatten(2, (2, -1)) for o in out]
                    assert torch.equal(torch.cat(got, 3).flatten(2, 3), want[i]), (N, ranks, before, "qkv"[i])
            gathered = cases.gather([o[2] for o in out], N, grid, P, halves, ranks, "reference")
            assert all(g.equal(cases.local(back, halves * 2, ranks, rank)) for rank, g in enumerate(gathered))


@pytest.mark.parametrize("S", [32760, 32761])
def test_long_videos_round_trip(S):
    """Values come back where they were, through any number of ranks; 12 heads on 8 ranks."""
    x = torch.randn(1, S, 12, 4).bfloat16()
    for ranks in (2, 3, 4, 8):
        out = cases.scatter(x, x + 1, x + 2, (None, None), None, (1, 1, S), (None, None), 1, ranks, "reference")
        for i in range(3):
            assert torch.equal(torch.cat([o[i] for o in out], 2), x + i)
        back = cases.gather([o[0] for o in out], 12, (1, 1, S), None, 1, ranks, "reference")
        assert all(b[:, :, 0].equal(cases.local(x, 1, ranks, rank)) for rank, b in enumerate(back))


def test_prefix_goes_to_every_rank_and_is_not_projected():
    P = torch.randn(1, 2, 4, 4)
    o = torch.randn(1, 3 + 10, 2 * 3, 8)
    heads = split(3, 2)
    parts = [p.flatten(2, 3) for p in o.unflatten(2, (2, 3)).split(heads, 3)]
    got = cases.gather(parts, 3, (2, 1, 5), P, 1, 2, "reference", prefix=3)
    video = torch.stack((o[:, 3:, :3], prope_output(o[:, 3:, 3:], P, backend="reference")), 2)
    for rank, g in enumerate(got):
        assert torch.equal(g[:, :3], o[:, :3].unflatten(2, (2, 3)))
        torch.testing.assert_close(g[:, 3:], cases.local(video, 2, 2, rank), rtol=0, atol=1e-6)


def test_one_rank_is_the_plain_operator_without_collectives_and_copies(monkeypatch):
    monkeypatch.setattr(dist, "all_to_all_single", None)
    args = head_case("channels", torch.float32, "qkv", 1, 12, 3, 16)
    q, k, v, weights = args["q"], args["k"], args["v"], (args["q_weight"], args["k_weight"])
    rope, grid, (P, P_inv) = tables((2, 2, 3)), (2, 2, 3), torch.randn(2, 1, 2, 4, 4)
    got = dit_ops.ulysses_scatter_heads(q, k, v, *weights, rope, grid, P, P_inv)
    want = dit_ops.qk_norm_rope_prope(q, k, v, *weights, rope, grid, P, P_inv)
    assert all(map(torch.equal, got, want))
    *_, same = dit_ops.ulysses_scatter_heads(q, k, v, *weights, rope, grid)
    assert same is v
    (o,) = dit_ops.ulysses_gather_heads(q, grid, heads=3)
    assert o is q
    first, second = dit_ops.ulysses_gather_heads(got[0], grid, P, heads=3)
    assert first.data_ptr() == got[0].data_ptr() and torch.equal(second, prope_output(got[0][:, :, 3:], P))


def test_errors_come_before_anything_is_sent():
    rope, grid, group = tables((2, 1, 5)), (2, 1, 5), cases.Rank(0, 2)
    x = torch.randn(1, 6, 3, 16)
    with pytest.raises(ValueError, match=r"q must be \[B, halves \* F \* S_r, N, D\] = \[1, 6, 3, 16\], got \[1, 4, 3, 16\]"):
        dit_ops.ulysses_scatter_heads(x[:, :4], x[:, :4], x[:, :4], None, None, rope, grid, group=group)
    with pytest.raises(
        ValueError, match="q, k and v must have one dtype to share the wire, got torch.float32 and torch.bfloat16"
    ):
        dit_ops.ulysses_scatter_heads(x, x, x.bfloat16(), None, None, rope, grid, group=group)
    with pytest.raises(ValueError, match="transform must be 'after' or 'before', got 'during'"):
        dit_ops.ulysses_scatter_heads(x, x, x, None, None, rope, grid, transform="during")
    with pytest.raises(ValueError, match=r"o must be .* = \[1, 10, 2, 16\], got \[1, 10, 3, 16\]"):
        dit_ops.ulysses_gather_heads(torch.randn(1, 10, 3, 16), grid, heads=3, group=group)
    slots = torch.empty(1, 10, 3, 16), torch.empty(1, 10, 2, 16)
    with pytest.raises(ValueError, match=r"k_out must be .* = \[1, 10, 2, 16\], got \[1, 10, 3, 16\]"):
        dit_ops.ulysses_scatter_heads(x, x, x, None, None, rope, grid, group=group, k_out=slots[0], v_out=slots[1])
    with pytest.raises(ValueError, match="P and P_inv come together, got only P"):
        dit_ops.ulysses_scatter_heads(x, x, x, None, None, rope, grid, torch.eye(4).expand(1, 2, 4, 4), group=group)
    with pytest.raises(NotImplementedError, match="backend 'cpu' cannot run this call: not written yet"):
        dit_ops.ulysses_scatter_heads(x, x, x, None, None, rope, grid, group=group, backend="cpu")


GRID, HALVES, START = (2, 1, 5), 2, 1
EXCHANGES = {  # options of the scatter; how many all-to-alls it takes
    "after": ({}, 1),
    "before": ({"transform": "before"}, 1),
    "overlap": ({"overlap": True}, 3),
}


def chain(x, weights, cameras, scatter, gather):
    """q, k, v -> exchange -> something that mixes tokens and not heads -> exchange back."""
    q, k, v = scatter(*x, *weights, tables((START + 2, 1, 5)), GRID, *cameras, start_frame=START, halves=HALVES)
    o = torch.einsum("blnd,bmnd,bmne->blne", q, k, v) / 10
    return torch.cat(gather(o, GRID, cameras[0], heads=3, halves=HALVES), 2)


def inputs() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    return [make(2, 20, 3, 16) for _ in "qkv"], [make(48), make(16)], list(make(2, 2, 2, 4, 4))


def exchanges(rank: int, ranks: int) -> dict:
    """Outputs and gradients of this rank, and the calls and bytes of its all-to-alls."""
    calls, real, group = [], dist.all_to_all_single, dist.group.WORLD

    def counted(out, flat, *args, **kwargs):
        calls.append(flat.nbytes)
        return real(out, flat, *args, **kwargs)

    dist.all_to_all_single = counted
    results = {}
    for name, (options, _) in EXCHANGES.items():
        for camera in (True, False):
            xs, weights, cameras = inputs()
            weights = [w.requires_grad_() for w in weights]
            mine = [cases.local(x, HALVES * 2, ranks, rank).requires_grad_() for x in xs]
            given = [(lambda t=t: t) for t in mine] if name == "overlap" else mine
            scatter = lambda *a, options=options, **kw: dit_ops.ulysses_scatter_heads(*a, group=group, **options, **kw)
            gather = lambda *a, **kw: dit_ops.ulysses_gather_heads(*a, group=group, **kw)
            calls.clear()
            out = chain(given, weights, cameras if camera else (None, None), scatter, gather)
            forward = list(calls)
            grads = torch.autograd.grad(out.sin().sum(), [*mine, *weights])
            results[f"{name} {camera}"] = {"out": out.detach(), "grads": grads, "calls": forward, "all": len(calls)}
    dist.all_to_all_single = real
    return results


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_gloo_ranks_equal_one_rank(run_ranks, ranks):
    """3 heads and rows of 5 tokens over 2 and 4 ranks, one of them without a head; every form of the exchange."""
    results = run_ranks(exchanges, ranks)
    for name, (_, calls) in EXCHANGES.items():
        for camera in (True, False):
            xs, weights, cameras = inputs()
            leaves = [t.requires_grad_() for t in (*xs, *weights)]
            one = [dit_ops.ulysses_scatter_heads, dit_ops.ulysses_gather_heads]
            out = chain(leaves[:3], leaves[3:], cameras if camera else (None, None), *one)
            grads = torch.autograd.grad(out.sin().sum(), leaves)
            got = [r[f"{name} {camera}"] for r in results]
            for rank, r in enumerate(got):
                torch.testing.assert_close(r["out"], cases.local(out, HALVES * 2, ranks, rank), rtol=0, atol=1e-10)
                for dx, want in zip(r["grads"][:3], grads[:3], strict=True):
                    torch.testing.assert_close(dx, cases.local(want, HALVES * 2, ranks, rank), rtol=1e-10, atol=1e-10)
                tokens, paths = HALVES * 2 * split(5, ranks)[rank], 2 if camera else 1
                one_tensor = 2 * tokens * 3 * 16 * 8
                sent = 3 * one_tensor * (paths if name == "before" else 1)
                back = 2 * HALVES * 2 * 5 * split(3, ranks)[rank] * paths * 16 * 8
                assert sum(r["calls"]) == sent + back, "bytes: q, k, v of my tokens and o of my heads, nothing else"
                assert len(r["calls"]) == calls + 1 and r["all"] == 2 * len(r["calls"])
            for i, want in enumerate(grads[3:], 3):
                torch.testing.assert_close(sum(r["grads"][i] for r in got), want, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("N, ranks, norm", [(12, 8, "channels"), (40, 8, "channels"), (16, 3, "head")])
def test_simulated_ranks_on_a_gpu(N, ranks, norm, device):
    """The kernels at the head counts of real models: as one rank up to the rounding on the wire, and the same bits twice."""
    grid, D = (3, 9, 11), 128
    args = head_case(norm, torch.bfloat16, "qkv", 2, 2 * 297, N, D, device)
    rope = Rope3D(D).tables(*grid, device)
    cameras = tuple(torch.randn(2, 2, 3, 4, 4, device=device))
    where = (args["q_weight"], args["k_weight"]), rope, grid, cameras, 2, ranks
    qkv = args["q"], args["k"], args["v"]
    for before in (False, True):
        got, again = (cases.scatter(*qkv, *where, "triton", before=before) for _ in range(2))
        want = cases.scatter(*qkv, *where, "reference", before=before)
        for a, b, w in zip(got, again, want, strict=True):
            assert all(map(torch.equal, a, b))
            torch.testing.assert_close(a, w, rtol=2**-6, atol=0.1)
    outs = [g[0] for g in cases.scatter(*qkv, *where, "triton")]
    P = cameras[0]
    got, want = (cases.gather(outs, N, grid, P, 2, ranks, backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(got, want, rtol=2**-6, atol=0.1)
