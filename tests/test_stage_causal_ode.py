import pytest
import torch
from toy_backbones import LATENT, TEXT, GaussianBackbone, TabularBackbone, text_condition, tiny_batch, tiny_wan

from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.causal_ode import CausalODEConfig, CausalODEStage

TIMESTEPS = FlowSchedule(5.0).few_step([1000, 750, 500, 250])


def numbered(B, F=2):
    """trajectory[b, s] is filled with 10·b + s."""
    states = 10 * torch.arange(B)[:, None] + torch.arange(6)
    return states.view(B, 6, 1, 1, 1, 1).expand(B, 6, F, *LATENT).float()


def test_every_sample_gets_its_own_state():
    """The gather is per sample; clean half = ground truth, timestep = that state's, in fp32."""
    model = GaussianBackbone(1.0)
    stage = CausalODEStage(CausalODEConfig(), {"generator": model})
    trajectory = numbered(7)
    seen = set()
    for step in range(8):
        stage.loss(
            "generator", {"trajectory": trajectory, "condition": text_condition(torch.zeros(7, *TEXT))}, Draws(0, (step,))
        )
        call = model.calls[-1]
        k = (call["timestep"][:, None] - TIMESTEPS).abs().argmin(1)
        assert torch.equal(call["timestep"], TIMESTEPS[k])
        expected = (10 * torch.arange(7) + k).view(7, 1, 1, 1, 1).expand_as(call["latents"]).float()
        assert torch.equal(call["latents"], expected)
        assert torch.equal(call["clean_latents"], trajectory[:, 5])
        seen |= {tuple(k.tolist())}
    assert {i for ks in seen for i in ks} == {0, 1, 2, 3}
    assert any(len(set(ks)) > 1 for ks in seen), "one state for the whole batch"


def test_loss_is_the_formula():
    model, trajectory = tiny_wan(2), torch.randn(3, 6, 4, *LATENT)
    batch = tiny_batch(3, 4) | {"trajectory": trajectory}
    loss, _ = CausalODEStage(CausalODEConfig(), {"generator": model}).loss("generator", batch, Draws(1))
    k = Draws(1).integers("step", 0, 4, (3,))
    errors = []
    for b in range(3):
        given = {name: batch[name][b : b + 1] for name in ("viewmats", "Ks")}
        x, t = trajectory[b : b + 1, k[b]], TIMESTEPS[k[b] : k[b] + 1]
        x0 = x - t / 1000 * model(
            x, t, batch["condition"]["encoder_hidden_states"][b : b + 1], clean_latents=trajectory[b : b + 1, 5], **given
        )
        errors.append((x0 - trajectory[b : b + 1, 4]).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_student_of_a_linear_ode_becomes_its_closed_form():
    """Data N(m, s²) has the flow map x_0 = m + s/d(σ)·(x_σ − (1 − σ)·m), d² = (1 − σ)²·s² + σ²; a linear one."""
    mean, std = 0.6, 0.5
    sigma = TIMESTEPS / 1000
    d = ((1 - sigma) ** 2 * std**2 + sigma**2).sqrt()
    start = torch.randn(256, 1, *LATENT)
    states = [(1 - s) * mean + e * start for s, e in zip(sigma, d, strict=True)]
    end = mean + std * start
    batch = {
        "trajectory": torch.stack([*states, end, torch.zeros_like(end)], dim=1),
        "condition": text_condition(torch.zeros(256, *TEXT)),
    }
    student = TabularBackbone(TIMESTEPS)
    stage = CausalODEStage(CausalODEConfig(), {"generator": student})
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 300)
        loss, _ = stage.loss("generator", batch, Draws(0, (step,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-6
    # x − σ·(a·x + b) = m + (s/d)·(x − (1 − σ)·m)
    torch.testing.assert_close(1 - sigma * student.a, std / d, atol=2e-3, rtol=0)
    torch.testing.assert_close(-sigma * student.b, mean * (1 - std / d * (1 - sigma)), atol=2e-3, rtol=0)


def test_wrong_trajectory_is_an_error():
    stage = CausalODEStage(CausalODEConfig(), {"generator": GaussianBackbone(1.0)})
    with pytest.raises(ValueError, match="trajectory must hold 6 states .*got 5"):
        stage.loss(
            "generator", {"trajectory": numbered(2)[:, 1:], "condition": text_condition(torch.zeros(2, *TEXT))}, Draws(0)
        )
    with pytest.raises(ValueError, match=r"causal_ode: backbones must be for the roles \['generator'\], got \['teacher'\]"):
        CausalODEStage(CausalODEConfig(), {"teacher": GaussianBackbone(1.0)})
