import pytest
import torch
from toy_backbones import LATENT, TEXT, GaussianBackbone, text_condition, tiny_batch, tiny_wan

from dit_ops import flow_to_x0, renoise
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.rollout import inference_with_trajectory

TIMESTEPS = FlowSchedule(5.0).few_step([1000, 750, 500, 250])
FRAMES = 5  # blocks of 2: the last one is shorter
BLOCKS = ((0, 2), (2, 4), (4, 5))


def rollout(generator, batch, exit_step, draws, **options):
    args = dict(viewmats=batch["viewmats"], Ks=batch["Ks"]) | options
    return inference_with_trajectory(
        generator, batch["latents"], batch["condition"], timesteps=TIMESTEPS, exit_step=exit_step, draws=draws, **args
    )


def one_block(generator, batch, i, pred, exit_step, draws):
    """Block i alone, on a fresh cache that is filled without gradient from the predicted blocks before it."""
    B, _, _, height, width = batch["latents"].shape
    cache = generator.new_cache(B, height, width)
    run = lambda x, t, f0, f1: generator(
        x,
        torch.full((B,), float(t)),
        batch["condition"]["encoder_hidden_states"],
        cache=cache,
        start_frame=f0,
        viewmats=batch["viewmats"][:, f0:f1],
        Ks=batch["Ks"][:, f0:f1],
    )
    with torch.no_grad():
        for f0, f1 in BLOCKS[:i]:
            run(pred[:, f0:f1], 0, f0, f1)
        f0, f1 = BLOCKS[i]
        x = batch["latents"][:, f0:f1]
        for j in range(exit_step):
            eps = draws.at(f0, j).normal("renoise", tuple(x.shape))
            x = renoise(x, run(x, TIMESTEPS[j], f0, f1), eps, TIMESTEPS[j].item() / 1000, TIMESTEPS[j + 1].item() / 1000)
    return flow_to_x0(x, run(x, TIMESTEPS[exit_step], f0, f1), TIMESTEPS[exit_step].item() / 1000)


def gradients(model, loss):
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True), strict=True))


def relative_difference(a, b):
    return {n: ((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-12)).item() for n in b}


@pytest.mark.parametrize("exit_step", range(4))
def test_steps_and_result(exit_step):
    generator, batch, draws = tiny_wan(2), tiny_batch(2, FRAMES), Draws(3, (1,))
    with torch.no_grad():
        pred, timestep_from, timestep_to = rollout(generator, batch, exit_step, draws)
        for i, (f0, f1) in enumerate(BLOCKS):
            torch.testing.assert_close(
                pred[:, f0:f1], one_block(generator, batch, i, pred, exit_step, draws), atol=2e-6, rtol=0
            )
    assert timestep_from == pytest.approx(TIMESTEPS[exit_step].item())
    assert timestep_to == (pytest.approx(TIMESTEPS[exit_step + 1].item()) if exit_step < 3 else 0.0)


def test_one_step_rollout_is_teacher_forcing_on_its_own_output():
    generator, batch = tiny_wan(2), tiny_batch(2, FRAMES)
    with torch.no_grad():
        pred, _, _ = rollout(generator, batch, 0, Draws(0))
        flow = generator(
            batch["latents"],
            torch.full((2,), 1000.0),
            batch["condition"]["encoder_hidden_states"],
            clean_latents=pred,
            viewmats=batch["viewmats"],
            Ks=batch["Ks"],
        )
    torch.testing.assert_close(pred, batch["latents"] - flow, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("exit_step", [0, 2])
def test_gradient_is_truncated_to_each_block(exit_step, checkpointing):
    """As if every block had been run alone on constant keys of the past."""
    generator, batch, draws = tiny_wan(2), tiny_batch(2, FRAMES), Draws(3)
    weight = torch.randn(2, FRAMES, *LATENT, generator=torch.Generator().manual_seed(1))
    generator.gradient_checkpointing = checkpointing
    pred, _, _ = rollout(generator, batch, exit_step, draws)
    got = gradients(generator, (pred * weight).sum())

    generator.gradient_checkpointing = False
    alone = [one_block(generator, batch, i, pred.detach(), exit_step, draws) for i in range(len(BLOCKS))]
    expected = gradients(generator, (torch.cat(alone, 1) * weight).sum())
    worst = relative_difference(got, expected)
    assert max(worst.values()) < 1e-5, worst
    assert all(g.abs().max() > 0 for g in expected.values())


def test_gradient_through_the_past_would_be_another():
    """Negative control of the test above: teacher forcing on the same values also has a gradient through the past's keys."""
    generator, batch = tiny_wan(2), tiny_batch(2, FRAMES)
    weight = torch.randn(2, FRAMES, *LATENT, generator=torch.Generator().manual_seed(1))
    pred, _, _ = rollout(generator, batch, 0, Draws(0))
    truncated = gradients(generator, (pred * weight).sum())
    camera = dict(viewmats=batch["viewmats"], Ks=batch["Ks"])
    flow = generator(
        batch["latents"],
        torch.full((2,), 1000.0),
        batch["condition"]["encoder_hidden_states"],
        clean_latents=pred.detach(),
        **camera,
    )
    through = gradients(generator, ((batch["latents"] - flow) * weight).sum())
    difference = relative_difference(truncated, through)
    assert difference["transformer.blocks.0.attn1.to_k.weight"] > 0.05
    assert difference["transformer.blocks.0.attn1.to_v.weight"] > 0.05


def test_no_grad_rollout_records_nothing():
    generator, batch = tiny_wan(2), tiny_batch(1, FRAMES)
    with torch.no_grad():
        pred, _, _ = rollout(generator, batch, 1, Draws(0))
    assert not pred.requires_grad


def test_noise_is_fresh_and_not_from_the_global_generator():
    """std = 0 and mean 0: x0 is exactly 0, so the input of step j is σ_j·ε of that block and step."""
    generator, batch = GaussianBackbone(0.0), tiny_batch(2, FRAMES)
    generator.block_frames = 2
    batch["condition"] = text_condition(torch.zeros(2, *TEXT))
    before = torch.random.get_rng_state()
    pred, _, _ = rollout(generator, batch, 3, Draws(5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert pred.abs().max() < 1e-6
    inputs = {(c["start_frame"], round(c["timestep"][0].item())): c["latents"] for c in generator.calls if c["timestep"][0] > 0}
    assert len(inputs) == 4 * len(BLOCKS)
    eps = [inputs[f0, round(t.item())] / (t / 1000) for f0, _ in BLOCKS[:2] for t in TIMESTEPS]
    for i, a in enumerate(eps):
        assert 0.7 < a.std() < 1.3
        for b in eps[:i]:
            assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.5


def test_last_block_is_not_rerun():
    generator, batch = GaussianBackbone(1.0), tiny_batch(1, FRAMES)
    generator.block_frames = 2
    rollout(generator, batch, 1, Draws(0))
    assert [(c["start_frame"], c["timestep"][0].item()) for c in generator.calls] == [
        (0, 1000.0),
        (0, 937.5),
        (0, 0.0),
        (2, 1000.0),
        (2, 937.5),
        (2, 0.0),
        (4, 1000.0),
        (4, 937.5),
    ]


def test_exit_step_outside_the_list_is_an_error():
    with pytest.raises(ValueError, match=r"exit_step must be in \[0, 4\).*got 4"):
        rollout(tiny_wan(2), tiny_batch(1, FRAMES), 4, Draws(0))


@pytest.mark.parametrize("exit_step", [0, 2, 3])
def test_context_of_the_last_step(exit_step):
    """Later blocks see the block denoised to the end; the prediction is still the x0 of the exit step, with its gradient."""
    generator, batch = tiny_wan(2), tiny_batch(2, 4)
    early, *_ = rollout(generator, batch, exit_step, Draws(3), context="last")
    with torch.no_grad():
        plain, *_ = rollout(generator, batch, exit_step, Draws(3))
        end, *_ = rollout(generator, batch, 3, Draws(3))
    torch.testing.assert_close(early[:, :2], plain[:, :2], atol=1e-6, rtol=0)
    run = one_block(generator, batch, 1, end, exit_step, Draws(3))
    torch.testing.assert_close(early[:, 2:], run, atol=2e-5, rtol=0)
    if exit_step < 3:
        assert (early[:, 2:] - plain[:, 2:]).abs().max() > 1e-3, "the context differs"
    early.square().mean().backward()
    assert all(p.grad is not None for p in generator.parameters())
