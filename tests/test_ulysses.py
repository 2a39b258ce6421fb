import pytest
import torch
import torch.distributed as dist

import dit_ops
from dit_ops.ops.ulysses import check_split, even_split

CASES = [  # tokens per rank, heads per rank, halves
    ((3, 3), (2, 2), 1),
    ((5, 2), (2, 1), 1),
    ((4, 6), (1, 3), 2),
    ((0, 7), (3, 0), 1),
]


def full(tokens: tuple[int, ...], heads: tuple[int, ...], halves: int) -> torch.Tensor:
    """The whole sequence [B, L, N, D], the same on every rank; [clean | noisy] for two halves."""
    return torch.randn(2, sum(tokens), sum(heads), 4, generator=torch.Generator().manual_seed(1))


def local_tokens(x: torch.Tensor, tokens: tuple[int, ...], halves: int, rank: int) -> torch.Tensor:
    """What a rank holds: its part of every half."""
    parts = x.unflatten(1, (halves, -1)).split([t // halves for t in tokens], 2)
    return parts[rank].flatten(1, 2)


def exchange(rank: int, ranks: int) -> dict:
    out = {}
    for tokens, heads, halves in CASES:
        whole = full(tokens, heads, halves)
        x = local_tokens(whole, tokens, halves, rank).clone().requires_grad_()
        y = dit_ops.ulysses_scatter_heads(x, dist.group.WORLD, tokens=tokens, heads=heads, halves=halves)
        mine = whole.split(heads, 2)[rank]
        back = dit_ops.ulysses_gather_heads(y, dist.group.WORLD, tokens=tokens, heads=heads, halves=halves)
        (dx,) = torch.autograd.grad((y * mine).sum(), x, retain_graph=True)  # the gradient of sum(whole ** 2) / 2
        (dx_back,) = torch.autograd.grad(back.sin().sum(), x)
        out[str((tokens, heads, halves))] = {
            "scattered": torch.equal(y, mine),
            "back": torch.equal(back, x),
            "gradient": torch.equal(dx, x),
            "gradient there and back": torch.equal(dx_back, x.cos()),
        }
    x = torch.randn(1, 4, 4, 2)
    out["defaults"] = dit_ops.ulysses_gather_heads(dit_ops.ulysses_scatter_heads(x, dist.group.WORLD), dist.group.WORLD).equal(
        x
    )
    return out


@pytest.mark.dist
def test_exchange_round_trip_and_gradients(run_ranks):
    for rank, results in enumerate(run_ranks(exchange, 2)):
        assert results.pop("defaults")
        for case, checks in results.items():
            assert all(checks.values()), f"rank {rank}, {case}: {checks}"


def test_one_rank_copies_nothing():
    x = torch.randn(1, 4, 3, 2)
    assert dit_ops.ulysses_scatter_heads(x) is x and dit_ops.ulysses_gather_heads(x, None) is x


def test_splits_are_checked_before_anything_is_sent():
    with pytest.raises(ValueError, match="op: 12 does not split evenly over 8 ranks; pass the sizes of every rank"):
        even_split("op", 12, 8)
    with pytest.raises(ValueError, match=r"op: heads must be 2 sizes, at least 0, with sum 5, got \[2, 2\]"):
        check_split("op", "heads", (2, 2), 2, 5)
    with pytest.raises(ValueError, match=r"op: tokens must be 2 sizes, multiples of 2, got \[3, 4\]"):
        check_split("op", "tokens", (3, 4), 2, None, halves=2)
    with pytest.raises(ValueError, match=r"x must be \[B, L, N, D\], got \[4, 3, 2\]"):
        dit_ops.ulysses_scatter_heads(torch.randn(4, 3, 2))
