"""Bidirectional stage: its noise levels, its loss, and a run from data set to pipeline."""

import json
import shutil

import pytest
import torch
from toy_backbones import LATENT, TEXT, text_condition, tiny_batch
from toy_stage import MODEL, Recorder, run_config, weights, write_dataset

from dit_ops.conditions.linear import HashTextEmbedder, LinearCondition, PatchCodec
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.pipelines import loading
from dit_ops.pipelines.bidirectional import BidirectionalPipeline
from dit_ops.training.bidirectional import BidirectionalConfig, BidirectionalStage
from dit_ops.training.engine import load_backbones, run

NEGATIVE = torch.full(TEXT, -5.0)


def stage_of(**options) -> tuple[BidirectionalStage, Recorder]:
    backbone = Recorder(0.5)
    return BidirectionalStage(BidirectionalConfig(**options), {"generator": backbone}, text_condition(NEGATIVE)), backbone


def test_one_fp32_timestep_per_sample_uniform_over_the_shifted_schedule():
    stage, backbone = stage_of(shift=5.0)
    batch = tiny_batch(50, 2)
    for step in range(60):
        stage.loss("generator", batch, Draws(0, (step, 0, 0)))
    t = torch.stack([call["timestep"] for call in backbone.calls]).flatten()
    assert t.dtype == torch.float32 and backbone.calls[0]["timestep"].shape == (50,)
    i = (FlowSchedule(5.0).timesteps - t[:, None]).abs().argmin(1)
    assert torch.equal(FlowSchedule(5.0).timesteps[i], t), "a timestep that the schedule does not have"
    assert len(t.unique()) > 900, "bf16 timesteps are at most 294"
    counts = torch.bincount(i // 100, minlength=10)  # 300 each, standard deviation 16
    assert counts.min() > 230 and counts.max() < 370


def test_loss_is_its_formula():
    """w(t)·mean((v − (ε − x0))²), x_t = (1 − σ)·x0 + σ·ε with one ε for input and target."""
    stage, backbone = stage_of(shift=3.0)
    batch = tiny_batch(3, 2)
    loss, _ = stage.loss("generator", batch, Draws(0, (0, 0, 0)))
    call, x0 = backbone.calls[0], batch["latents"].double()
    t = call["timestep"].double()
    sigma = (t / 1000).view(-1, 1, 1, 1, 1)
    noise = (call["latents"].double() - (1 - sigma) * x0) / sigma
    weight = FlowSchedule(3.0).training_weight(t).double()
    expected = (weight * (0.5 - (noise - x0)).square().flatten(1).mean(1)).mean()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert noise.std().item() == pytest.approx(1, abs=0.15) and noise.mean().item() == pytest.approx(0, abs=0.15)
    loss.backward()
    gradient = (weight.view(-1, 1, 1, 1, 1) * 2 * (0.5 - (noise - x0))).mean()
    assert backbone.flow.grad.item() == pytest.approx(gradient.item(), rel=1e-5)
    assert torch.equal(call["viewmats"], batch["viewmats"]) and torch.equal(call["Ks"], batch["Ks"])
    assert "clean_latents" not in call and "cache" not in call


def test_loss_without_weights_and_in_fp32_for_bf16_data():
    stage, backbone = stage_of(weighted=False)
    batch = tiny_batch(3, 2) | {"latents": tiny_batch(3, 2)["latents"].bfloat16()}
    loss, _ = stage.loss("generator", batch, Draws(0, (0, 0, 0)))
    call, x0 = backbone.calls[0], batch["latents"].float()
    sigma = (call["timestep"] / 1000).view(-1, 1, 1, 1, 1)
    noise = (call["latents"] - (1 - sigma) * x0) / sigma
    assert call["latents"].dtype == torch.float32
    assert loss.item() == pytest.approx((0.5 - (noise - x0)).square().mean().item(), rel=1e-4)


def test_the_same_draws_give_the_same_loss_and_others_another():
    stage, _ = stage_of()
    batch = tiny_batch(3, 2)
    losses = [stage.loss("generator", batch, Draws(0, key))[0].item() for key in ((1, 0, 0), (1, 0, 0), (1, 0, 1), (2, 0, 0))]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_text_dropout_replaces_whole_texts_at_its_rate():
    batch = tiny_batch(100, 1)
    for probability, low, high in ((0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 1, 1)):
        stage, backbone = stage_of(text_dropout=probability)
        for step in range(4):
            stage.loss("generator", batch, Draws(0, (step, 0, 0)))
        text = torch.cat([call["text"] for call in backbone.calls])
        dropped = (text == NEGATIVE).all((1, 2))
        assert low <= dropped.float().mean() <= high
        assert torch.equal(text[~dropped], batch["condition"]["encoder_hidden_states"].repeat(4, 1, 1)[~dropped])
    with pytest.raises(ValueError, match=r"text_dropout must be in \[0, 1\], got 1.5"):
        BidirectionalConfig(text_dropout=1.5)


def test_roles_must_be_the_generator_alone():
    with pytest.raises(ValueError, match=r"roles \['generator'\], got \['generator', 'real_score'\]"):
        BidirectionalStage(BidirectionalConfig(), {"generator": Recorder(), "real_score": Recorder()}, text_condition(NEGATIVE))


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data")


def test_a_run_resumed_exports_the_same_bytes_as_one_go(dataset, tmp_path):
    whole = run(run_config(dataset, tmp_path / "whole"), progress=False)
    run(run_config(dataset, tmp_path / "parts", steps=3), progress=False)
    early = weights(tmp_path / "parts/model")
    parts = run(run_config(dataset, tmp_path / "parts"), progress=False)
    assert weights(parts) == weights(whole) != early
    index = json.loads((whole / "model_index.json").read_text())
    assert index["_class_name"] == "BidirectionalPipeline" and index["transformer"] == ["dit_ops", "WanBackbone"]
    expected = {"frames": 4, "height": 32, "width": 32, "fps": 8, "shift": 5.0, "guidance": 2.0, "num_steps": 3}
    assert {key: index[key] for key in expected} == expected and "denoising_steps" not in index
    assert index["intrinsics"] == [0.5, 0.9, 0.5, 0.5]


def test_gradient_checkpointing_and_bf16_compute_train_fp32_masters(dataset, tmp_path):
    plain = run(run_config(dataset, tmp_path / "plain", steps=2), progress=False)
    saved = run(run_config(dataset, tmp_path / "saved", steps=2, activation_checkpointing="full"), progress=False)
    assert weights(plain) == weights(saved)
    assert load_backbones(run_config(dataset, "unused", activation_checkpointing="full"))["generator"].gradient_checkpointing
    mixed = run(run_config(dataset, tmp_path / "mixed", steps=2, precision="bf16"), progress=False)
    models = [
        load_backbones(run_config(dataset, "unused", init={"generator": str(path)}))["generator"] for path in (plain, mixed)
    ]
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert q.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)
    assert weights(plain) != weights(mixed)


def test_the_seed_decides_the_initial_weights_and_the_camera_branch_starts_at_zero(dataset, tmp_path):
    models = [load_backbones(run_config(dataset, tmp_path, seed=seed))["generator"] for seed in (1, 1, 2)]
    first, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert len(models[0].camera) == 1 and all(not p.any() for p in models[0].camera.parameters())
    no_camera = load_backbones(run_config(dataset, tmp_path, model={"config": MODEL, "camera": False}))["generator"]
    assert no_camera.camera is None


def test_the_exported_directory_loads_as_a_pipeline_with_its_sampler_and_condition(tmp_path):
    condition = LinearCondition(PatchCodec.fit(torch.rand(1, 1, 3, 32, 32), 8, LATENT[0]), HashTextEmbedder(*TEXT))
    dataset = write_dataset(tmp_path / "data", condition)
    model = run(run_config(dataset, tmp_path / "run", steps=2), progress=False)
    pipeline = loading.load(model, "cpu")
    assert isinstance(pipeline, BidirectionalPipeline)
    assert (pipeline.settings.frames, pipeline.settings.guidance, pipeline.settings.shift) == (4, 2.0, 5.0)
    assert pipeline(["a room"], pose="w*3").shape == (1, 4, 3, 32, 32)
    shutil.rmtree(dataset)
    assert loading.load(model, "cpu").condition.text_dim == TEXT[1], "a small condition side is copied"


def test_a_large_condition_side_is_linked(tmp_path):
    dataset = write_dataset(tmp_path / "data")
    published = tmp_path / "Wan2.1-T2V-1.3B-Diffusers"
    published.mkdir()
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}
    (published / "model_index.json").write_text(json.dumps(index))
    data = {"path": str(dataset), "condition": str(published)}
    model = run(run_config(dataset, tmp_path / "run", steps=1, data=data), progress=False)
    assert (model / "condition").is_symlink() and (model / "condition").resolve() == published
    assert json.loads((model / "model_index.json").read_text())["condition"] == ["dit_ops", "WanCondition"]
    bare = run(run_config(dataset, tmp_path / "bare", steps=1), progress=False)
    assert "condition" not in json.loads((bare / "model_index.json").read_text())
