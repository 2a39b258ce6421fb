import pytest
import torch

import dit_ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_formula_in_place(dtype):
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in ((3, 4), (5,), (0,), ())]
    shadow = [torch.randn(p.shape) for p in params]
    before = [s.clone() for s in shadow]
    dit_ops.ema_update_(shadow, params, 0.9)
    for s, old, p in zip(shadow, before, params, strict=True):
        torch.testing.assert_close(s, 0.9 * old + 0.1 * p.detach().float())


def test_mixed_dtypes_and_the_ends():
    params = [torch.randn(4), torch.randn(4).bfloat16()]
    shadow = [torch.zeros(4), torch.zeros(4)]
    dit_ops.ema_update_(shadow, params, 1.0)
    assert not any(s.count_nonzero() for s in shadow)
    dit_ops.ema_update_(shadow, params, 0.0)
    assert all(torch.equal(s, p.float()) for s, p in zip(shadow, params, strict=True))
    dit_ops.ema_update_([], [], 0.5)


def test_small_updates_are_not_lost():
    """2000 steps of 1e-4 towards 1: an average kept in bf16 would stop after a few."""
    shadow, params = [torch.zeros(2)], [torch.ones(2).bfloat16()]
    for _ in range(2000):
        dit_ops.ema_update_(shadow, params, 0.9999)
    torch.testing.assert_close(shadow[0], torch.full((2,), 1 - 0.9999**2000), rtol=1e-4, atol=0)


def test_errors_name_argument_expected_and_got():
    a = torch.zeros(2)
    with pytest.raises(ValueError, match=r"ema_update_: decay must be in \[0, 1\], got 1.5"):
        dit_ops.ema_update_([a], [a], 1.5)
    with pytest.raises(ValueError, match="shadow must have as many tensors as params, 2, got 1"):
        dit_ops.ema_update_([a], [a, a], 0.5)
    with pytest.raises(ValueError, match=r"shadow\[0\] must be shaped as params\[0\] = \[3\], got \[2\]"):
        dit_ops.ema_update_([a], [torch.zeros(3)], 0.5)
    with pytest.raises(ValueError, match=r"shadow\[0\] must be fp32 .* got torch.bfloat16"):
        dit_ops.ema_update_([a.bfloat16()], [a], 0.5)


def _update_shards(rank: int, ranks: int) -> list[torch.Tensor | str]:
    """A linear layer sharded by FSDP2, its shadow, and one update of it; the shadow gathered, and the refusals."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (ranks,))
    layer = fully_shard(torch.nn.Linear(4, 5), mesh=mesh)  # 5 rows on 2 ranks: 3 and 2
    params = list(layer.parameters())
    shadow = [distribute_tensor(torch.ones(p.shape), mesh, p.placements) for p in params]
    shards = [s.to_local() for s in shadow]
    dit_ops.ema_update_(shadow, params, 0.75)
    errors = []
    for wrong in (shards[0], distribute_tensor(torch.ones(5, 4), mesh)):
        try:
            dit_ops.ema_update_([wrong], params[:1], 0.75)
        except ValueError as error:
            errors.append(str(error))
    assert all(s.to_local().data_ptr() == shard.data_ptr() for s, shard in zip(shadow, shards, strict=True))
    return [*(s.full_tensor() for s in shadow), *(p.detach().full_tensor() for p in params), *errors]


@pytest.mark.dist
def test_shards_of_fsdp_are_updated_in_place(run_ranks):
    for weight, bias, full_weight, full_bias, local, replicated in run_ranks(_update_shards, 2):
        torch.testing.assert_close(weight, 0.75 + 0.25 * full_weight)
        torch.testing.assert_close(bias, 0.75 + 0.25 * full_bias)
        assert local.startswith("ema_update_: shadow[0] must be shaped as params[0] = [5, 4], got ")
        assert replicated.startswith("ema_update_: shadow[0] must be placed as params[0], ") and "Replicate" in replicated


@pytest.mark.gpu
def test_the_kernel_on_the_gpu():
    """One launch for every tensor, which a graph replays."""
    params = [torch.randn(n, device="cuda").to(t) for n in (1, 5000, 100_001) for t in (torch.float32, torch.bfloat16)]
    shadow = [torch.randn(p.shape, device="cuda") for p in params]
    plain = [s.clone() for s in shadow]
    dit_ops.ema_update_(shadow, params, 0.9, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dit_ops.ema_update_(shadow, params, 0.9, backend="triton")
    graph.replay()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        dit_ops.ema_update_(shadow, params, 0.9, backend="triton")
        torch.cuda.synchronize()
    assert len([e for e in profile.events() if "ema_update" in e.name and e.device_type.name == "CUDA"]) == 1
    for _ in range(3):
        dit_ops.ema_update_(plain, params, 0.9, backend="reference")
    torch.testing.assert_close(shadow, plain)
