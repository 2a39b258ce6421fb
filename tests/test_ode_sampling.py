import dataclasses
import json

import pytest
import torch
from toy_backbones import LATENT, TEXT, GaussianBackbone, text_condition, tiny_batch, tiny_wan

from dit_ops import cfg_euler_step, rope
from dit_ops.conditions.arguments import per_sample
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training import ode_sampling
from dit_ops.training.config import parse_config
from dit_ops.training.data import DatasetWriter, LatentDataset
from dit_ops.training.engine import run
from dit_ops.training.ode_sampling import ODESamplingConfig, kept_indices, sample_trajectories

FRAMES = 5  # blocks of 2: the last one is shorter
NEGATIVE = torch.randn(TEXT, generator=torch.Generator().manual_seed(9))


def joint_sampling(model, config, noise, batch):
    """The definition: all frames at once, teacher-forced on the ground truth, two separate passes for guidance."""
    sigmas = FlowSchedule(config.shift).sampling(config.num_steps)
    given = dict(clean_latents=batch["latents"], viewmats=batch["viewmats"], Ks=batch["Ks"])
    negative = NEGATIVE.expand_as(batch["condition"]["encoder_hidden_states"])
    x, states = noise, [noise]
    for s, s_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        t = torch.full((len(x),), 1000 * s)
        x = cfg_euler_step(
            x,
            model(x, t, batch["condition"]["encoder_hidden_states"], **given),
            model(x, t, negative, **given),
            config.guidance,
            s,
            s_next,
        )
        states.append(x)
    return states


def sample(model, config, noise, batch):
    return sample_trajectories(
        model,
        config,
        noise,
        batch["latents"],
        batch["condition"],
        text_condition(NEGATIVE),
        viewmats=batch["viewmats"],
        Ks=batch["Ks"],
    )


@pytest.mark.parametrize("block_frames", [1, 2, None])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equals_joint_teacher_forcing(guidance, block_frames):
    model, batch = tiny_wan(block_frames), tiny_batch(2, FRAMES)
    config = ODESamplingConfig(num_steps=8, guidance=guidance)
    noise = Draws(1).normal("noise", tuple(batch["latents"].shape))
    with torch.no_grad():
        states = joint_sampling(model, config, noise, batch)
    got = sample(model, config, noise, batch)
    expected = torch.stack([*(states[i] for i in (0, 2, 4, 6)), states[-1], batch["latents"]], dim=1)
    assert got.shape == (2, 6, FRAMES, *LATENT)
    assert expected.abs().max() < 30  # the comparison below is absolute
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_clean_context_and_its_text_matter():
    """Negative control: another ground truth of block 0 changes block 1, and not block 0."""
    model, batch, config = tiny_wan(2), tiny_batch(2, 4), ODESamplingConfig(num_steps=4)
    noise = Draws(1).normal("noise", tuple(batch["latents"].shape))
    a = sample(model, config, noise, batch)
    batch["latents"] = batch["latents"].clone()
    batch["latents"][:, :2] += 1
    b = sample(model, config, noise, batch)
    assert torch.equal(a[:, :-1, :2], b[:, :-1, :2])
    assert (a[:, -2, 2:] - b[:, -2, 2:]).abs().max() > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_linear_ode_in_closed_form(guidance):
    """Data N(m, s²): x_σ = (1 − σ)·m + d(σ)·x_1, d² = (1 − σ)²·s² + σ². Guidance moves m to u + g·(m − u)."""
    std, mean, negative = 0.5, 0.7, -0.2
    text, uncond = torch.full((2, *TEXT), mean), torch.full(TEXT, negative)
    noise = torch.randn(2, 3, *LATENT)
    coarse, fine = (
        sample_trajectories(
            GaussianBackbone(std),
            ODESamplingConfig(num_steps=n, guidance=guidance),
            noise,
            torch.zeros_like(noise),
            text_condition(text),
            text_condition(uncond),
        )
        for n in (400, 800)
    )
    got = 2 * fine - coarse  # Euler's error is first order in 1/n: this cancels it
    sigma = torch.tensor([1.0, 0.9375, 0.8333333, 0.625, 0.0]).view(1, -1, 1, 1, 1, 1)
    m = negative + guidance * (mean - negative)
    expected = (1 - sigma) * m + ((1 - sigma) ** 2 * std**2 + sigma**2).sqrt() * noise[:, None]
    torch.testing.assert_close(got[:, :-1], expected, atol=1e-3, rtol=0)
    assert (fine[:, -2] - expected[:, -1]).abs().max() > 2e-3  # the cancelling was needed


def test_kept_states():
    assert kept_indices((1000, 750, 500, 250), 48) == [0, 12, 24, 36]
    sigmas = FlowSchedule(5.0).sampling(48)
    torch.testing.assert_close(1000 * sigmas[[0, 12, 24, 36]], FlowSchedule(5.0).few_step([1000, 750, 500, 250]))
    with pytest.raises(ValueError, match="levels of the 50-step sampler, got 750"):
        ODESamplingConfig(num_steps=50)


def test_guided_passes_share_a_forward():
    model, noise = GaussianBackbone(1.0), torch.randn(2, 3, *LATENT)
    config = ODESamplingConfig(num_steps=4)
    sample_trajectories(model, config, noise, noise, text_condition(torch.zeros(2, *TEXT)), text_condition(torch.zeros(TEXT)))
    assert [len(c["latents"]) for c in model.calls] == [4] * 4


def test_training_goes_on_after_sampling():
    """What inference mode leaves behind (tables, caches) must not reach a later training step."""
    model, batch = tiny_wan(2), tiny_batch(2, 4)
    rope._table.cache_clear()
    sample(model, ODESamplingConfig(num_steps=4), torch.randn_like(batch["latents"]), batch)
    flow = model(
        batch["latents"],
        torch.full((2,), 500.0),
        batch["condition"]["encoder_hidden_states"],
        clean_latents=batch["latents"],
        viewmats=batch["viewmats"],
        Ks=batch["Ks"],
    )
    flow.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.fixture
def workspace(tmp_path):
    """A data set of 5 samples in two shapes, a model, and the config of a run."""
    with DatasetWriter(tmp_path / "data", fps=8, negative=text_condition(NEGATIVE), condition={"name": "toy"}) as writer:
        for i, frames in enumerate((4, 4, 2, 4, 2)):
            batch = tiny_batch(1, frames, seed=i)
            one = {k: v[0] for k, v in batch.items() if k != "condition"} | {"condition": per_sample(batch["condition"])[0]}
            writer.add(f"room-{i}", **one, prompt=f"room {i}", pose="w*3", height=32, width=32, split="train")
        (tmp_path / "data" / "condition").mkdir()
        (tmp_path / "data" / "condition" / "condition.json").write_text("{}")
    tiny_wan(2).save_pretrained(tmp_path / "model" / "transformer")

    def config(output, **changes):
        raw = {
            "stage": "ode_sampling",
            "output": str(tmp_path / output),
            "steps": 100,
            "data": {"path": str(tmp_path / "data"), "batch_size": 2},
            "init": {"generator": str(tmp_path / "model")},
            "options": {"num_steps": 4},
            "seed": 3,
            "device": "cpu",
        }
        return parse_config(raw | changes)

    return config


def trajectories(path):
    dataset = LatentDataset(path)
    return {dataset[i]["id"]: dataset[i]["trajectory"] for i in range(len(dataset))}


def test_writes_a_data_set(workspace):
    config = workspace("ode")
    assert run(config, progress=False) == ode_sampling.Path(config.output)
    source, dataset = LatentDataset(config.data.path), LatentDataset(config.output)
    assert dataset.meta == source.meta
    assert torch.equal(dataset.negative["encoder_hidden_states"], source.negative["encoder_hidden_states"])
    assert (dataset.condition_directory / "condition.json").is_file()
    by_id = {sample["id"]: sample for sample in (dataset[i] for i in range(len(dataset)))}
    for i in range(len(source)):
        given, got = source[i], by_id[source[i]["id"]]
        assert torch.equal(got["condition"]["encoder_hidden_states"], given["condition"]["encoder_hidden_states"])
        for name in ("latents", "viewmats", "Ks"):
            assert torch.equal(got[name], given[name])
        assert (got["prompt"], got["pose"]) == (given["prompt"], given["pose"])
        assert got["trajectory"].shape == (6, *given["latents"].shape)
        assert torch.equal(got["trajectory"][-1], given["latents"])
    strip = lambda entries: sorted(json.dumps({k: v for k, v in e.items() if k != "shard"}, sort_keys=True) for e in entries)
    assert strip(dataset.entries) == strip(source.entries)


def test_trajectory_depends_on_the_sample_and_not_on_its_batch(workspace):
    two, one = workspace("two"), workspace("one", data=dataclasses.asdict(workspace("one").data) | {"batch_size": 1})
    run(two, progress=False)
    run(one, progress=False)
    a, b = trajectories(two.output), trajectories(one.output)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)
    assert not torch.equal(a["room-0"][0], a["room-1"][0])


def test_stopped_run_goes_on(workspace, monkeypatch):
    whole, stopped = workspace("whole"), workspace("stopped")
    run(whole, progress=False)

    calls = []

    def interrupted(*args, **kwargs):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return sample_trajectories(*args, **kwargs)

    monkeypatch.setattr(ode_sampling, "sample_trajectories", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, progress=False)
    with pytest.raises(FileNotFoundError, match="stopped early"):
        LatentDataset(stopped.output)

    sampled = []
    monkeypatch.setattr(
        ode_sampling, "sample_trajectories", lambda *a, **k: sampled.append(len(a[2])) or sample_trajectories(*a, **k)
    )
    run(stopped, progress=False)
    assert sum(sampled) == 3
    a, b = trajectories(whole.output), trajectories(stopped.output)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_with_other_settings_is_an_error(workspace):
    run(workspace("ode"), progress=False)
    with pytest.raises(ValueError, match="cannot be resumed: seed was 3 and is now 4"):
        run(workspace("ode", seed=4), progress=False)
    with pytest.raises(ValueError, match="cannot be resumed: options was .*guidance=6.0.* is now .*guidance=2.0"):
        run(workspace("ode", options={"num_steps": 4, "guidance": 2.0}), progress=False)


def test_processes_sample_parts_and_the_last_one_joins_them(workspace, monkeypatch):
    one, several = workspace("one"), workspace("several")
    run(one, progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (ode_sampling.Path(several.output) / "index.jsonl").exists()
        monkeypatch.setenv("RANK", rank)
        run(several, progress=False)
    a, b = trajectories(one.output), trajectories(several.output)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)
    assert LatentDataset(several.output).meta == LatentDataset(one.output).meta
    before = (ode_sampling.Path(several.output) / "index.jsonl").stat().st_mtime_ns
    run(several, progress=False)
    assert (ode_sampling.Path(several.output) / "index.jsonl").stat().st_mtime_ns == before
    assert not ode_sampling.parts_folder(ode_sampling.Path(several.output)).exists()  # nothing was sampled again
    with pytest.raises(ValueError, match="options was .* and is now"):
        run(workspace("several", options={"num_steps": 8}), progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parallel": {"sequence": 2}}, "parallel.sequence must be 1 and parallel.fsdp none, got 2 and none"),
        ({"model": {"lora": {"rank": 2}}}, "model.lora trains adapters and nothing is trained here"),
    ],
)
def test_what_sampling_cannot_do_is_refused(workspace, changes, message):
    with pytest.raises(ValueError, match=message):
        run(workspace("ode", **changes), progress=False)


def test_steps_limit_the_samples(workspace):
    config = workspace("ode", steps=1)
    run(config, progress=False)
    assert sorted(trajectories(config.output)) == ["room-0", "room-1"]
    run(workspace("ode"), progress=False)
    assert len(trajectories(config.output)) == 5


def test_a_data_set_with_trajectories_can_be_sampled_again(workspace):
    first = workspace("first")
    run(first, progress=False)
    again = workspace("again", data={"path": first.output, "batch_size": 2}, seed=4)
    run(again, progress=False)
    a, b = trajectories(first.output), trajectories(again.output)
    assert not any(torch.equal(a[name][0], b[name][0]) for name in a)
