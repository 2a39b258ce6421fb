import pytest
import torch
from torch import nn
from toy_backbones import LATENT, NEGATIVE, TEXT, GaussianBackbone, gaussian_flow, text_condition, tiny_batch, tiny_wan

from dit_ops.draws import Draws
from dit_ops.training.dmd import DMDConfig, DMDStage, dmd_gradient

STD = 0.5


class Fixed(nn.Module):
    """A generator whose x0 is its own parameter, whatever the noise: flow = (x − x0)/σ."""

    block_frames = None

    def __init__(self, x0):
        super().__init__()
        self.x0 = nn.Parameter(x0)

    def new_cache(self, batch, height, width, **options):
        return None

    def forward(self, latents, timestep, encoder_hidden_states, **given):
        return (latents - self.x0) / (timestep / 1000).view(-1, 1, 1, 1, 1)


def gaussian_stage(x0, fake_mean, *, uncond_mean=0.0, **options):
    """real_score is exact for N(text, STD²), fake_score for N(fake_mean, STD²)."""

    class Fake(GaussianBackbone):
        def forward(self, latents, timestep, encoder_hidden_states, **given):
            return super().forward(latents, timestep, torch.full_like(encoder_hidden_states, fake_mean), **given)

    backbones = {"generator": Fixed(x0), "real_score": GaussianBackbone(STD), "fake_score": Fake(STD)}
    return DMDStage(DMDConfig(**options), backbones, text_condition(torch.full(TEXT, uncond_mean)))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("fake_mean", [-1.0, 2.0])
def test_gradient_on_a_gaussian_is_the_closed_form(fake_mean, guidance):
    """E[x0 | x_t] = m + k·(x_t − (1 − σ)·m), k = (1 − σ)·s²/d, d = (1 − σ)²·s² + σ²: they differ by (m_fake − m_real)·σ²/d,
    with m_real = u + g·(c − u); divided by mean|x − E_real[x0 | x_t]| and by the number of elements."""
    real_mean, uncond_mean = 0.7, 0.2
    x = fake_mean + STD * torch.randn(3, 2, *LATENT)
    batch = {"latents": torch.zeros_like(x), "condition": text_condition(torch.full((3, *TEXT), real_mean))}
    draws = Draws(4, (0, 0, 0))
    stage = gaussian_stage(x, fake_mean, uncond_mean=uncond_mean, guidance=guidance)
    loss, metrics = stage.loss("generator", batch, draws)
    loss.backward()

    u = draws.uniform("score_sigma", (3,)).double()
    s = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98).view(3, 1, 1, 1, 1)
    x_t = (1 - s) * x + s * draws.normal("score_noise", tuple(x.shape)).double()
    d = (1 - s) ** 2 * STD**2 + s**2
    m_real = uncond_mean + guidance * (real_mean - uncond_mean)
    x0_real = m_real + (1 - s) * STD**2 / d * (x_t - (1 - s) * m_real)
    difference = (fake_mean - m_real) * s**2 / d
    gradient = difference / (x - x0_real).abs().mean((1, 2, 3, 4), keepdim=True)
    expected = gradient.expand_as(x) / x.numel()
    torch.testing.assert_close(stage.roles["generator"].x0.grad, expected.float(), atol=1e-8, rtol=1e-4)
    assert (stage.roles["generator"].x0.grad * (fake_mean - m_real)).min() > 0  # a step against it goes from fake to real
    assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-4)
    assert metrics["dmd_gradient"].item() == pytest.approx(gradient.abs().mean().item(), rel=1e-4)


def test_gradient_vanishes_where_fake_is_real():
    x = 0.7 + STD * torch.randn(2, 2, *LATENT)
    stage = gaussian_stage(x, 0.7, guidance=1.0)
    stage.loss(
        "generator", {"latents": torch.zeros_like(x), "condition": text_condition(torch.full((2, *TEXT), 0.7))}, Draws(0)
    )[0].backward()
    assert stage.roles["generator"].x0.grad.abs().max() < 1e-6


def test_following_the_gradient_matches_the_distributions():
    """Samples N(−1, s²) with a fake score that always knows them end at the teacher's mean."""
    x = -1 + STD * torch.randn(256, 1, *LATENT)
    stage = gaussian_stage(x, 0.0, guidance=1.0)
    generator, fake = stage.roles["generator"], stage.roles["fake_score"]
    batch = {"latents": torch.zeros_like(x), "condition": text_condition(torch.full((256, *TEXT), 0.7))}
    for step in range(60):
        mean = generator.x0.detach().mean()
        fake.forward = lambda latents, timestep, mean=mean, **given: gaussian_flow(
            latents, (timestep / 1000).view(-1, 1, 1, 1, 1), mean, STD
        )
        generator.x0.grad = None
        stage.loss("generator", batch, Draws(0, (step, 0)))[0].backward()
        with torch.no_grad():
            generator.x0 -= 0.1 * x.numel() * generator.x0.grad
    assert generator.x0.mean().item() == pytest.approx(0.7, abs=0.05)


def test_scores_see_timesteps_that_are_1000_sigma():
    """1000 σ is fed, and the law: shift(U) clamped to [20, 980]; one σ per sample, the same x_t for both scores."""
    timesteps = []
    for step in range(40):
        x = torch.randn(8, 1, *LATENT)
        stage = gaussian_stage(x, 0.0)
        draws = Draws(0, (step, 0))
        stage.loss("generator", {"latents": x, "condition": text_condition(torch.zeros(8, *TEXT))}, draws)
        (real,), (fake,) = stage.roles["real_score"].calls, stage.roles["fake_score"].calls
        assert not real["grad"] and not fake["grad"]
        assert torch.equal(real["latents"], fake["latents"].repeat(2, 1, 1, 1, 1))
        assert torch.equal(real["timestep"], fake["timestep"].repeat(2))
        t = fake["timestep"]
        assert t.dtype == torch.float32
        s = (t / 1000).view(-1, 1, 1, 1, 1)
        expected = (1 - s) * x + s * draws.normal("score_noise", tuple(x.shape))
        torch.testing.assert_close(fake["latents"], expected, atol=1e-5, rtol=0)
        timesteps.append(t)
    t = torch.cat(timesteps)
    assert t.min() >= 20 and t.max() == pytest.approx(980)
    assert t.median() == pytest.approx(833, abs=40)  # shift 5 of 0.5
    assert ((t == t.max()).float().mean()) == pytest.approx(0.092, abs=0.05)  # u > 0.907 ends at the clamp


def test_gradient_is_finite():
    x = torch.ones(2, 1, *LATENT)
    g = dmd_gradient(x, x + torch.tensor([1.0, float("nan")]).view(2, 1, 1, 1, 1), x)
    assert g.isfinite().all()
    assert torch.equal(g[0], torch.full_like(g[0], 1e8))  # the mean |x − x0_real| is clamped
    assert torch.equal(g[1], torch.zeros_like(g[1]))


def test_fake_score_loss_is_flow_matching_on_rollouts():
    x = torch.randn(3, 2, *LATENT)
    stage = gaussian_stage(x, 0.3)
    draws = Draws(2, (1, 0))
    batch = {"latents": torch.zeros_like(x), "condition": text_condition(torch.zeros(3, *TEXT))}
    loss, _ = stage.loss("fake_score", batch, draws)
    u, noise = draws.uniform("score_sigma", (3,)), draws.normal("score_noise", tuple(x.shape))
    s = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98).view(3, 1, 1, 1, 1)
    flow = gaussian_flow((1 - s) * x + s * noise, s, torch.tensor(0.3), STD)
    torch.testing.assert_close(loss, (flow - (noise - x)).square().mean())
    loss.backward()
    assert stage.roles["generator"].x0.grad is None
    assert stage.roles["fake_score"].std.grad.abs() > 0
    assert not stage.roles["real_score"].calls


def test_updates():
    stage = gaussian_stage(torch.zeros(1, 1, *LATENT), 0.0)
    assert [stage.updates(i) for i in range(7)] == [
        ["generator", "fake_score"],
        ["fake_score"],
        ["fake_score"],
        ["fake_score"],
        ["fake_score"],
        ["generator", "fake_score"],
        ["fake_score"],
    ]


def test_exit_step_is_one_for_all_micro_batches_and_ranks():
    stage = gaussian_stage(torch.zeros(1, 1, *LATENT), 0.0)
    batch = {"latents": torch.zeros(1, 1, *LATENT), "condition": text_condition(torch.zeros(1, *TEXT))}
    at = lambda *counters: stage.rollout(batch, Draws(0, counters))[1]
    for step in range(5):
        assert len({at(step, 0, micro) for micro in range(8)}) == 1
    assert len({at(step, 0, 0) for step in range(30)}) == 4


@pytest.fixture
def wan_stage():
    backbones = {"generator": tiny_wan(2), "real_score": tiny_wan(None, seed=1), "fake_score": tiny_wan(None, seed=2)}
    return DMDStage(DMDConfig(), backbones, NEGATIVE)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("role", ["generator", "fake_score"])
def test_each_update_reaches_every_parameter_of_its_role_only(wan_stage, role, bf16):
    for step in range(4):  # other exit steps
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = wan_stage.loss(role, tiny_batch(2, 5), Draws(0, (step, 0, 0)))
        loss.backward()
        for name, module in wan_stage.roles.items():
            for parameter, p in module.named_parameters():
                if name == role:
                    assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, (step, parameter)
                else:
                    assert p.grad is None, (name, parameter)
        wan_stage.roles[role].zero_grad()


def test_same_draws_give_the_same_loss(wan_stage):
    batch = tiny_batch(2, 4)
    a, b, c = (wan_stage.loss("generator", batch, Draws(0, (0, 0, micro)))[0] for micro in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="generator_every must be at least 1, got 0"):
        gaussian_stage(torch.zeros(1, 1, *LATENT), 0.0, generator_every=0)
    with pytest.raises(ValueError, match=r"must be of one sample of the condition, \[3, 8\], got \[1, 3, 8\]"):
        stage = gaussian_stage(torch.zeros(1, 1, *LATENT), 0.0)
        stage.negative = text_condition(torch.zeros(1, *TEXT))
        stage.loss(
            "generator", {"latents": torch.zeros(1, 1, *LATENT), "condition": text_condition(torch.zeros(1, *TEXT))}, Draws(0)
        )


def test_hunyuan_recipe_scores_between_the_exit_step_and_the_next():
    """u between the raw levels, σ = shift(u); the timestep is 1000 σ, or reversed as released models were fed."""
    options = {"score_range": "exit_step", "min_score_timestep": 0.0, "max_score_timestep": 1000.0}
    levels = [1.0, 0.75, 0.5, 0.25, 0.0]
    seen = set()
    for step in range(24):
        x, draws = torch.randn(64, 1, *LATENT), Draws(0, (step, 0, 0))
        stage = gaussian_stage(x, 0.0, **options)
        k = stage.exit_step(draws)
        seen.add(k)
        x_t, noise, sigma, t = stage.noised(x, draws)
        raw = sigma / (5 - 4 * sigma)  # the inverse of shift 5
        assert raw.min() >= levels[k + 1] - 1e-5 and raw.max() <= levels[k] + 1e-5
        torch.testing.assert_close(t, 1000 * sigma)
        s = sigma.view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(x_t, (1 - s) * x + s * noise, atol=1e-5, rtol=0)
        reversed_stage = gaussian_stage(x, 0.0, **options, score_timestep="reversed")
        *_, same_sigma, t = reversed_stage.noised(x, draws)
        assert torch.equal(same_sigma, sigma) and (t - 1000 * (1 - raw)).abs().max() < 1.1
    assert seen == {0, 1, 2, 3}


def test_exclusive_updates():
    stage = gaussian_stage(torch.zeros(1, 1, *LATENT), 0.0, exclusive=True, generator_every=3)
    assert [stage.updates(i) for i in range(4)] == [["generator"], ["fake_score"], ["fake_score"], ["generator"]]
    with pytest.raises(ValueError, match="generator_every must be at least 2 with exclusive"):
        gaussian_stage(torch.zeros(1, 1, *LATENT), 0.0, exclusive=True, generator_every=1)


def test_normalizer_of_the_batch_is_one_number():
    x = torch.zeros(2, 1, *LATENT)
    fake, real = x + torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1), x + torch.tensor([2.0, 6.0]).view(2, 1, 1, 1, 1)
    own, shared = (dmd_gradient(x, fake, real, per_sample=flag)[:, 0, 0, 0, 0].tolist() for flag in (True, False))
    assert own == [-0.5, -0.5] and shared == [-0.25, -0.75]
