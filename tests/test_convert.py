"""Weights through every layout and back: the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_cli_mistakes import CONFIG
from toy_backbones import tiny_wan
from toy_stage import run_config, write_dataset

from dit_ops.cli import main
from dit_ops.convert import to_minwm
from dit_ops.registry import load_backbone
from dit_ops.training.engine import run
from dit_ops.training.lora import add_lora, save_lora


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_minwm_and_back(tmp_path):
    backbone = tiny_wan(4)
    backbone.save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "model.pt")]) == 0
    content = torch.load(tmp_path / "model.pt", weights_only=True)["generator"]
    assert "model.blocks.0.self_attn.prope_o.weight" in content and "model.time_embedding.0.weight" in content
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_layers": 2}))
    arguments = ["--config", str(tmp_path / "config.json"), "--block-frames", "4"]
    assert main(["convert", str(tmp_path / "model.pt"), str(tmp_path / "again"), *arguments]) == 0
    again = load_backbone(tmp_path / "again")
    assert same(again, backbone) and again.block_frames == 4


def test_a_model_without_original_names(tmp_path):
    class Other(torch.nn.Module):
        branches = ()

    with pytest.raises(ValueError, match="model.pt can be written of WanBackbone, HunyuanVideo15Backbone, got Other"):
        to_minwm(Other(), tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("ema", [True, False])
def test_a_training_checkpoint_is_the_exported_model(tmp_path, ema):
    config = run_config(write_dataset(tmp_path / "data"), tmp_path / "run", **{"ema": {"decay": 0.5, "export": ema}})
    model = run(config, progress=False)
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    flag = "--ema" if ema else "--no-ema"
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), flag]) == 0
    files = [folder / "diffusion_pytorch_model.safetensors" for folder in (model / "transformer", tmp_path / "out")]
    a, b = map(load_file, files)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == sorted(
        {p.name for p in checkpoint.parent.glob("step-*")}
    )


def test_a_checkpoint_without_the_role(tmp_path, capsys):
    run(run_config(write_dataset(tmp_path / "data"), tmp_path / "run", steps=1), progress=False)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--role", "critic"]) == 2
    assert "has no role 'critic'; it has generator" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_lora_is_merged(tmp_path):
    backbone = tiny_wan(None, camera=False)
    backbone.save_pretrained(tmp_path / "base")
    add_lora(backbone, 2, alpha=6)
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if ".lora_" in name:
                p.normal_()
    save_lora(backbone, tmp_path / "lora")
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "out"), "--lora", str(tmp_path / "lora")]) == 0
    merged, base = load_backbone(tmp_path / "out"), load_backbone(tmp_path / "base")
    name = "blocks.0.attn1.to_q"
    layer = backbone.transformer.get_submodule(name)
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = lambda model: model.transformer.get_submodule(name).weight
    torch.testing.assert_close(weight(merged), weight(base) + 6 / 2 * change)
