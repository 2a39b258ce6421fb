"""Backbones are found by the class name in a folder's config.json, lazily, and what is not found is said in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import dit_ops
from dit_ops.registry import BACKBONES, RECIPE, backbone_class, load_backbone

TINY = {
    "WanTransformer3DModel": dict(
        num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=8, text_dim=4, freq_dim=8, in_channels=2
    ),
    "HunyuanVideo15Transformer3DModel": dict(
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=12,
        text_embed_dim=4,
        text_embed_2_dim=4,
        image_embed_dim=4,
        rope_axes_dim=(4, 4, 4),
        in_channels=2,
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_loads_what_diffusers_saved(name, tmp_path):
    """From the transformer's folder and from a pipeline's, with the weights that are in it."""
    stock = getattr(diffusers, name)(**TINY[name])
    stock.save_pretrained(tmp_path / "transformer")
    for folder in (tmp_path, tmp_path / "transformer"):
        model = load_backbone(folder, dtype=torch.bfloat16)
        assert type(model) is backbone_class(name) and type(model.transformer) is type(stock)
        assert all(
            torch.equal(v.bfloat16(), model.transformer.state_dict()[k].bfloat16()) for k, v in stock.state_dict().items()
        )


def test_the_folders_have_a_load_of_their_own(tmp_path):
    """dit_ops.backbones.load(dir) and dit_ops.pipelines.load(dir), which import a model only when called."""
    diffusers.WanTransformer3DModel(**TINY["WanTransformer3DModel"]).save_pretrained(tmp_path)
    assert type(dit_ops.backbones.load(tmp_path)) is backbone_class("WanTransformer3DModel")
    with pytest.raises(FileNotFoundError, match="a model directory must hold model_index.json"):
        dit_ops.pipelines.load(tmp_path)
    code = "import sys, dit_ops; dit_ops.pipelines.load; sys.exit('dit_ops.pipelines.loading' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_what_is_not_found_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at .*nowhere: expected config.json or transformer/config.json"):
        load_backbone(tmp_path / "nowhere")
    assert (Path(__file__).resolve().parents[1] / RECIPE).is_file()
    for text, message in [
        (
            json.dumps({"_class_name": "OtherModel"}),
            "no backbone for 'OtherModel'; known are WanTransformer3DModel, HunyuanVideo15",
        ),
        (json.dumps({"_class_name": "OtherModel"}), r"\(docs/adding_a_backbone.md says how to add one\)"),
        (json.dumps({"dim": 1}), "expected '_class_name', the diffusers class, got None"),
        ('{"_class_na', "config.json: not a complete JSON file"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_backbone(tmp_path)


def test_looking_for_a_backbone_imports_no_model():
    code = "import sys, dit_ops.registry\nassert not {'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
