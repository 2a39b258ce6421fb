"""Runs that train LoRA adapters: what is trained, saved, resumed and exported; and runs on data without cameras."""

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from test_conditions import wan_directory  # noqa: F401 - a fixture
from toy_backbones import NEGATIVE, tiny_batch
from toy_hunyuan_video15 import TINY
from toy_ranks import wan_engine, whole_state
from toy_stage import MODEL, run_config, weights, write_dataset

from dit_ops.conditions.arguments import per_sample
from dit_ops.convert import from_checkpoint
from dit_ops.registry import load_backbone
from dit_ops.training.checkpoint import export_model
from dit_ops.training.config import stage_class
from dit_ops.training.data import DatasetWriter, LatentDataset
from dit_ops.training.engine import Engine, load_backbones, run
from dit_ops.training.lora import load_lora
from dit_ops.training.networks import merged
from dit_ops.training.validation import validation_videos

LORA = {"rank": 2, "alpha": 3, "targets": ["attention"]}


def engine(data, output, model=None, **values) -> Engine:
    config = run_config(data, output, model={"config": MODEL, "lora": LORA} | (model or {}), **values)
    dataset = LatentDataset(data, "train")
    stage = stage_class(config.stage)(config.options, load_backbones(config), dataset.negative)
    return Engine(config, stage, dataset, output, progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("lora") / "data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    trainer = engine(data, output)
    before = {name: p.detach().clone() for name, p in trainer.stage.roles["generator"].named_parameters()}
    trainer.train()
    trainer.export()
    return trainer, before, output


def test_only_adapters_and_the_camera_learn(whole):
    trainer, before, _ = whole
    changed = {n for n, p in trainer.stage.roles["generator"].named_parameters() if not torch.equal(p, before[n])}
    assert changed == trainer.parameters["generator"].keys()
    kinds = {next(kind for kind in ("lora_A", "lora_B", "camera") if kind in name) for name in changed}
    assert trainer.stage.roles["generator"].transformer.peft_config["default"].lora_alpha == 3
    assert kinds == {"lora_A", "lora_B", "camera"} and not any(".net." in name for name in changed)
    frozen = trainer.ema["generator"].transformer.patch_embedding.weight
    assert frozen is trainer.stage.roles["generator"].transformer.patch_embedding.weight, "what is frozen is not held twice"
    keys = trainer.state()["model"]["generator"].keys()
    assert keys == changed == trainer.state()["ema"]["generator"].keys()


def test_the_export_is_the_adapted_model_merged(whole, data, tmp_path):
    trainer, _, output = whole
    merged = load_backbone(output / "model")
    assert WanTransformer3DModel.from_pretrained(output / "model/transformer").state_dict().keys() == (
        merged.transformer.state_dict().keys()
    )
    batch = tiny_batch(2, 4)
    cameras = {k: batch[k] for k in ("latents", "viewmats", "Ks")}
    given = cameras | batch["condition"] | {"timestep": torch.tensor([500.0, 90.0])}
    with torch.no_grad():
        expected = trainer.ema["generator"](**given)
        torch.testing.assert_close(merged(**given), expected, atol=2e-6, rtol=0)
        base = load_backbones(trainer.config)["generator"]
        base.camera.load_state_dict(trainer.ema["generator"].camera.state_dict())
        assert (base(**given) - expected).abs().max() > 1e-4
        load_lora(base, output / "lora")
        torch.testing.assert_close(base(**given), expected, atol=2e-6, rtol=0)
    assert all(name.startswith("transformer.blocks.") for name in load_file(output / "lora/pytorch_lora_weights.safetensors"))


def test_stopped_and_resumed_equals_one_go(whole, data, tmp_path):
    _, _, output = whole
    engine(data, tmp_path / "run", steps=4).train()
    again = engine(data, tmp_path / "run")
    again.train()
    again.export()
    assert weights(tmp_path / "run/model") == weights(output / "model")
    ours, whole_run = (load_file(path / "lora/pytorch_lora_weights.safetensors") for path in (tmp_path / "run", output))
    assert ours.keys() == whole_run.keys() and all(torch.equal(ours[name], whole_run[name]) for name in ours)


@pytest.mark.parametrize("ema", [True, False])
def test_a_checkpoint_of_adapters_converts_to_the_merged_model(whole, ema):
    trainer, _, output = whole
    model = from_checkpoint(output / "checkpoints/step-000006", ema=ema)
    expected = merged(trainer.ema["generator"] if ema else trainer.stage.roles["generator"])
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-7, rtol=0)


def test_adapters_do_not_go_on_over_another_base(whole, data, tmp_path):
    _, _, output = whole
    for name in ("one", "two"):
        shutil.copytree(output / "model", tmp_path / name)
    init = lambda name: {"model": {"config": None}, "init": {"generator": str(tmp_path / name)}}
    engine(data, tmp_path / "run", steps=2, **init("one")).train()
    with pytest.raises(ValueError, match=r"belongs to another run: init.generator '.*one' → '.*two'"):
        engine(data, tmp_path / "run", steps=3, **init("two")).train()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4, "targets": ["mlp"]}, r"model\.lora: lora: targets must be some of attention, ffn, got \['mlp'\]"),
        ({"rank": 0}, r"model\.lora: lora: rank must be at least 1, got 0"),
        ({"ranks": 4}, r"unknown key 'model\.lora\.ranks'; did you mean 'model\.lora\.rank'\?"),
        ({"alpha": 4}, r"model\.lora\.rank is required"),
    ],
)
def test_a_wrong_section_is_explained(lora, message):
    with pytest.raises(ValueError, match=message):
        run_config("data", "out", model={"lora": lora})


def test_options_of_the_backbones_are_set_or_refused(data, tmp_path):
    config = run_config(data, tmp_path, model={"config": MODEL, "options": {"text_timestep": 0}})
    with pytest.raises(ValueError, match=r"model\.options: WanBackbone has the options \[\], got 'text_timestep'"):
        load_backbones(config)
    hunyuan = {"class_name": "HunyuanVideo15Transformer3DModel", "config": TINY, "options": {"text_timestep": 0}}
    assert load_backbones(run_config(data, tmp_path, model=hunyuan))["generator"].text_timestep == 0


def test_data_without_cameras(tmp_path):
    """A run, its validation videos' settings and its export, where samples have neither viewmats nor Ks."""
    samples = tiny_batch(4, 4)
    with DatasetWriter(tmp_path / "data", fps=8, negative=NEGATIVE) as writer:
        for i, condition in enumerate(per_sample(samples["condition"])):
            size = {"height": 32, "width": 32, "split": "train"}
            writer.add(f"s{i}", latents=samples["latents"][i], condition=condition, prompt="a", pose="", **size)
    assert LatentDataset(tmp_path / "data").intrinsics is None
    config = run_config(tmp_path / "data", tmp_path / "run", steps=1, model={"config": MODEL, "camera": False})
    index = json.loads((run(config, progress=False) / "model_index.json").read_text())
    assert "intrinsics" not in index and index["frames"] == 4
    assert validation_videos(config) is None


def test_a_linked_condition_is_named_by_its_class(wan_directory, whole, tmp_path):  # noqa: F811
    trainer, _, output = whole
    model = load_backbone(output / "model")
    export_model(tmp_path / "model", model, stage="bidirectional", sampler={}, condition=wan_directory)
    assert json.loads((tmp_path / "model/model_index.json").read_text())["condition"] == ["dit_ops", "WanCondition"]


def test_a_condition_that_is_none_is_an_error_before_training(data, tmp_path):
    config = run_config(data, tmp_path / "run", data={"path": str(data), "split": "train", "condition": str(tmp_path)})
    with pytest.raises(ValueError, match="must hold condition.json, or a model_index.json"):
        run(config, progress=False)
    assert not (tmp_path / "run").exists()


def _two_ranks(rank: int, ranks: int, data: str, output: str) -> dict:
    """State after 3 steps in shards, at once and resumed after 2, and the exported model's weights."""
    found = {}
    for fsdp in ("none", "full"):
        given = {"model": {"lora": LORA}, "ema": {"decay": 0.5}, "parallel": {"fsdp": fsdp}}
        wan_engine(data, f"{output}/{fsdp}", steps=2, **given).train()
        engine = wan_engine(data, f"{output}/{fsdp}", **given)
        engine.train()
        found[fsdp] = whole_state(engine)
        engine.export()
    return found


@pytest.mark.dist
def test_two_ranks_with_shards_equal_one_process(data, tmp_path, run_ranks):
    given = {"model": {"lora": LORA}, "ema": {"decay": 0.5}, "grad_accumulation": 2}
    one = wan_engine(data, tmp_path / "one", **given)
    one.train()
    one.export()
    expected = whole_state(one)
    for found in run_ranks(_two_ranks, 2, str(data), str(tmp_path)):
        for state in found.values():
            assert state.keys() == expected.keys() and any("lora_B" in name for name in state)
            for name, value in expected.items():
                torch.testing.assert_close(state[name], value, atol=1e-12, rtol=1e-9)
    models = [load_file(tmp_path / name / "model/transformer/diffusion_pytorch_model.safetensors") for name in ("one", "full")]
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, atol=1e-12, rtol=1e-9)
