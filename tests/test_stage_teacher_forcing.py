"""Teacher-forcing stage: one noise level per block, the clean half, and its augmentation."""

import json

import pytest
import torch
from toy_backbones import TEXT, text_condition, tiny_batch, tiny_wan
from toy_stage import Recorder, run_config, weights, write_dataset

from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.engine import run
from dit_ops.training.teacher_forcing import TeacherForcingConfig, TeacherForcingStage

NEGATIVE = torch.full(TEXT, -5.0)


def stage_of(block_frames: int | None = 2, **options) -> tuple[TeacherForcingStage, Recorder]:
    backbone = Recorder(0.5)
    backbone.block_frames = block_frames
    return TeacherForcingStage(TeacherForcingConfig(**options), {"generator": backbone}, text_condition(NEGATIVE)), backbone


def noise_in(x: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """ε of x = (1 − σ)·x0 + σ·ε, t [B, F]."""
    sigma = (t.double() / 1000)[..., None, None, None]
    return (x.double() - (1 - sigma) * x0.double()) / sigma


def test_one_timestep_per_block_with_a_shorter_last_block():
    stage, backbone = stage_of(block_frames=2)
    for step in range(40):
        stage.loss("generator", tiny_batch(20, 5), Draws(0, (step, 0, 0)))
    t = torch.cat([call["timestep"] for call in backbone.calls])
    assert t.shape == (800, 5) and t.dtype == torch.float32
    assert torch.equal(t[:, 0], t[:, 1]) and torch.equal(t[:, 2], t[:, 3])
    assert (t[:, [0, 2, 4]].diff(dim=1) == 0).float().mean() < 0.01, "blocks have levels of their own"
    assert torch.isin(t, FlowSchedule(5.0).timesteps).all() and len(t.unique()) > 800
    i = 1000 - (FlowSchedule(5.0).timesteps <= t[:, [0, 2, 4], None]).sum(-1)  # index of each timestep
    assert i.float().mean().item() == pytest.approx(499.5, abs=25)  # standard deviation 6


def test_loss_is_its_formula_and_the_clean_half_is_the_truth():
    stage, backbone = stage_of(block_frames=2)
    batch = tiny_batch(3, 5)
    loss, _ = stage.loss("generator", batch, Draws(0, (0, 0, 0)))
    call, x0 = backbone.calls[0], batch["latents"]
    assert torch.equal(call["clean_latents"], x0) and torch.equal(call["clean_timestep"], torch.zeros(3, 5))
    assert torch.equal(call["viewmats"], batch["viewmats"]) and torch.equal(call["Ks"], batch["Ks"])
    noise = noise_in(call["latents"], x0, call["timestep"])
    weight = FlowSchedule(5.0).training_weight(call["timestep"]).double()
    expected = (weight * (0.5 - (noise - x0.double())).square().mean((2, 3, 4))).mean()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_augmentation_noises_the_clean_half_a_little_and_with_noise_of_its_own():
    """Indices of the small sigmas (the schedule falls), an ε that is not the noisy half's."""
    stage, backbone = stage_of(block_frames=2, noise_augmentation_max_timestep=100.0)
    batch = tiny_batch(20, 5)
    for step in range(40):
        stage.loss("generator", batch, Draws(0, (step, 0, 0)))
    t = torch.cat([call["clean_timestep"] for call in backbone.calls])
    table = FlowSchedule(5.0).timesteps
    small = table[table <= 100]
    assert len(small) == 21 and set(t.unique().tolist()) == set(small.tolist())
    assert torch.equal(t[:, 0], t[:, 1]) and not torch.equal(t[:, 1], t[:, 2])
    counts = torch.stack([(t[:, [0, 2, 4]] == level).sum() for level in small])  # 114 each, standard deviation 10
    assert counts.min() > 70 and counts.max() < 160

    x0 = batch["latents"]
    clean_noise = torch.cat([noise_in(call["clean_latents"], x0, call["clean_timestep"]) for call in backbone.calls])
    noise = torch.cat([noise_in(call["latents"], x0, call["timestep"]) for call in backbone.calls])
    assert clean_noise.std().item() == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(torch.stack([clean_noise.flatten(), noise.flatten()]))[0, 1]
    assert abs(correlation.item()) < 0.02


@pytest.mark.parametrize("limit", [1.0, -1.0, 1001.0])
def test_an_augmentation_that_the_schedule_does_not_have_is_refused(limit):
    with pytest.raises(
        ValueError, match=rf"noise_augmentation_max_timestep must be 0 \(off\) or in \[4.98, 1000\].* got {limit}"
    ):
        TeacherForcingConfig(noise_augmentation_max_timestep=limit)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="the generator has no causal blocks: set model.block_frames"):
        stage_of(block_frames=None)


def test_text_dropout():
    stage, backbone = stage_of(text_dropout=1.0)
    stage.loss("generator", tiny_batch(3, 4), Draws(0, (0, 0, 0)))
    assert torch.equal(backbone.calls[0]["text"], NEGATIVE.expand(3, -1, -1))


def test_a_block_is_trained_on_its_clean_past_only():
    """Changing the clean latents of block i changes the flow of later noisy blocks, and of no other."""
    model = tiny_wan(2)
    batch = tiny_batch(1, 6)
    stage = TeacherForcingStage(TeacherForcingConfig(), {"generator": model}, text_condition(NEGATIVE))
    flows = []
    keep = lambda module, args, kwargs, flow: flows.append(flow.detach())
    change = lambda module, args, kwargs: (args, kwargs | {"clean_latents": kwargs["clean_latents"] + shift})
    model.register_forward_hook(keep, with_kwargs=True)
    model.register_forward_pre_hook(change, with_kwargs=True)
    shift = torch.zeros_like(batch["latents"])
    stage.loss("generator", batch, Draws(0, (0, 0, 0)))
    shift[:, 2:4] = 1.0
    loss, _ = stage.loss("generator", batch, Draws(0, (0, 0, 0)))
    loss.backward()
    moved = (flows[1] - flows[0]).abs().amax((0, 2, 3, 4))
    assert torch.equal(moved[:4], torch.zeros(4)) and (moved[4:] > 1e-3).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_run_starts_from_the_bidirectional_model_and_exports_an_autoregressive_one(tmp_path):
    dataset = write_dataset(tmp_path / "data")
    first = run(run_config(dataset, tmp_path / "bidirectional", steps=2), progress=False)
    config = run_config(
        dataset,
        tmp_path / "teacher_forcing",
        stage="teacher_forcing",
        steps=2,
        init={"generator": str(first)},
        model={"block_frames": 3},
        options={"noise_augmentation_max_timestep": 50},
    )
    second = run(config, progress=False)
    assert json.loads((second / "model_index.json").read_text())["_class_name"] == "AutoregressivePipeline"
    assert json.loads((second / "transformer/dit_ops.json").read_text())["block_frames"] == 3
    assert weights(first).keys() == weights(second).keys()
    lines = [json.loads(line) for line in (tmp_path / "teacher_forcing/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["grad_norm/generator"] > 0 for line in lines)
