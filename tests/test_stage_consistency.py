import copy

import pytest
import torch
from torch import nn
from toy_backbones import LATENT, TEXT, GaussianBackbone, TabularBackbone, text_condition, tiny_batch, tiny_wan

from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.consistency import ConsistencyConfig, ConsistencyStage

NEGATIVE = torch.full(TEXT, -0.5)


def make(config, generator, teacher, ema=None, negative=NEGATIVE):
    stage = ConsistencyStage(config, {"generator": generator, "teacher": teacher}, text_condition(negative))
    stage.ema = {"generator": ema if ema is not None else copy.deepcopy(generator)}
    return stage


class Constant(nn.Module):
    """flow = 1 for the prompt, 0 for the negative prompt; the Euler step with guidance g is then g·(σ' − σ)."""

    block_frames = None

    def __init__(self):
        super().__init__()
        self.calls = []
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, latents, timestep, encoder_hidden_states, **given):
        self.calls.append({"latents": latents, "timestep": timestep, **given})
        return torch.where(encoder_hidden_states[:, 0, 0] > 0, 1.0, 0.0).view(-1, 1, 1, 1, 1).expand_as(latents)


def test_noise_levels_and_euler_step_are_exact():
    """x_t, t, t' and σ' − σ come from one fp32 schedule. With t rounded to bf16, Δσ would be wrong by up to 66 %."""
    config = ConsistencyConfig()
    sigmas = FlowSchedule(5.0).sampling(50).double()
    clean = torch.zeros(64, 1, *LATENT)
    batch = {"latents": clean, "condition": text_condition(torch.ones(64, *TEXT))}
    levels, worst_bf16 = set(), 0.0
    for step in range(12):
        student, teacher, ema = Constant(), Constant(), Constant()
        make(config, student, teacher, ema).loss("generator", batch, Draws(0, (step,)))
        x, t = student.calls[0]["latents"], student.calls[0]["timestep"]
        x_next, t_next = ema.calls[0]["latents"], ema.calls[0]["timestep"]
        assert torch.equal(teacher.calls[0]["timestep"], torch.cat([t, t]))
        i = (1000 * sigmas - t[:, None].double()).abs().argmin(1)
        assert t.dtype == t_next.dtype == torch.float32
        torch.testing.assert_close(t.double(), 1000 * sigmas[i], atol=1e-4, rtol=0)
        torch.testing.assert_close(t_next.double(), 1000 * sigmas[i + 1], atol=1e-4, rtol=0)
        noise = Draws(0, (step,)).normal("noise", tuple(clean.shape))
        torch.testing.assert_close(x, noise * sigmas[i].float().view(-1, 1, 1, 1, 1), atol=1e-6, rtol=0)
        moved = ((x_next - x).double() / config.guidance).flatten(1).mean(1)
        exact = sigmas[i + 1] - sigmas[i]
        assert ((moved - exact).abs() / exact.abs()).max() < 1e-4
        rounded = (t_next.bfloat16().double() - t.bfloat16().double()) / 1000
        worst_bf16 = max(worst_bf16, ((rounded - exact).abs() / exact.abs()).max().item())
        levels |= set(i.tolist())
    assert worst_bf16 > 0.5  # so the bound above would have caught it
    assert levels == set(range(49))  # every level but the last


def test_every_network_is_teacher_forced_on_the_ground_truth():
    batch = tiny_batch(2, 3) | {"condition": text_condition(torch.ones(2, *TEXT))}
    student, teacher, ema = Constant(), Constant(), Constant()
    make(ConsistencyConfig(), student, teacher, ema).loss("generator", batch, Draws(0))
    for model, copies in ((student, 1), (teacher, 2), (ema, 1)):
        (call,) = model.calls  # one forward each: the teacher's two passes share one
        for got, given in (("clean_latents", "latents"), ("viewmats", "viewmats"), ("Ks", "Ks")):
            assert torch.equal(call[got], batch[given].repeat(copies, *[1] * (batch[given].dim() - 1)))


def test_gradient_is_the_students_alone():
    generator, batch = tiny_wan(2), tiny_batch(2, 4)
    negative = torch.zeros(TEXT)
    stage = make(ConsistencyConfig(), generator, tiny_wan(2, seed=1), negative=negative)
    loss, _ = stage.loss("generator", batch, Draws(0))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
    for other in (stage.roles["teacher"], stage.ema["generator"]):
        assert all(p.grad is None for p in other.parameters())
    assert not any(p.requires_grad for p in stage.roles["teacher"].parameters())


def euler_map(sigmas, mean, std):
    """The N-step Euler solution of the Gaussian ODE from every level: x_0 = A_i·x_i + B_i, in fp64."""
    A, B = torch.ones(len(sigmas), dtype=torch.float64), torch.zeros(len(sigmas), dtype=torch.float64)
    for i in range(len(sigmas) - 2, -1, -1):
        s, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        d = ((1 - s) * std) ** 2 + s**2
        slope = (s - (1 - s) * std**2) / d
        offset = -mean - slope * (1 - s) * mean
        A[i], B[i] = A[i + 1] * (1 + dt * slope), A[i + 1] * dt * offset + B[i + 1]
    return A, B


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_student_of_a_linear_ode_becomes_its_closed_form(guidance):
    """The fixed point is the teacher's own N-step solution; it starts from the teacher, which is right on the last step."""
    std, mean, negative, steps = 0.5, 0.4, -0.5, 6
    guided = negative + guidance * (mean - negative)
    config = ConsistencyConfig(num_steps=steps, guidance=guidance)
    sigmas = FlowSchedule(5.0).sampling(steps).double()
    A, B = euler_map(sigmas, guided, std)
    student = TabularBackbone(1000 * sigmas[:-1].float())
    with torch.no_grad():  # x − σ·(a·x + b) = A·x + B on the last level, anything elsewhere
        student.a[-1], student.b[-1] = (1 - A[-2]) / sigmas[-2], -B[-2] / sigmas[-2]
    stage = make(config, student, GaussianBackbone(std), negative=torch.full(TEXT, negative))
    batch = {"latents": mean + std * torch.randn(128, 1, *LATENT), "condition": text_condition(torch.full((128, *TEXT), mean))}
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05, betas=(0.8, 0.99))
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 600)
        loss, _ = stage.loss("generator", batch, Draws(0, (step,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for e, p in zip(stage.ema["generator"].parameters(), student.parameters(), strict=True):
            e.data.lerp_(p.data, 0.2)
    torch.testing.assert_close(1 - sigmas[:-1] * student.a.double(), A[:-1], atol=5e-3, rtol=0)
    torch.testing.assert_close(-sigmas[:-1] * student.b.double(), B[:-1], atol=5e-3, rtol=0)


def test_the_closed_form_tends_to_the_exact_flow_map():
    """x_0 = m + s·x_1 for data N(m, s²)."""
    A, B = euler_map(FlowSchedule(5.0).sampling(4000).double(), 0.4, 0.5)
    assert A[0].item() == pytest.approx(0.5, abs=2e-3) and B[0].item() == pytest.approx(0.4, abs=2e-3)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="num_steps must be at least 2, got 1"):
        make(ConsistencyConfig(num_steps=1), Constant(), Constant())
    with pytest.raises(ValueError, match=r"roles \['generator', 'teacher'\], got \['generator'\]"):
        ConsistencyStage(ConsistencyConfig(), {"generator": Constant()}, text_condition(NEGATIVE))
    with pytest.raises(ValueError, match="same block_frames, got .*'generator': 2, 'teacher': 4"):
        make(ConsistencyConfig(), tiny_wan(2), tiny_wan(4))
