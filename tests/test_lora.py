"""LoRA on both backbones: zero at the start, trainable alone, the same in diffusers, the same when merged."""

import pytest
import torch
import toy_hunyuan_video15 as hunyuan
from safetensors import safe_open
from toy_backbones import tiny_batch, tiny_wan

from dit_ops.training.lora import add_lora, has_lora, load_lora, merge_lora, save_lora, set_trainable


def wan():
    batch = tiny_batch(2, 3)
    return tiny_wan(None, camera=False), {"latents": batch["latents"], **batch["condition"]}


def hunyuan_video15():
    latents, _, _ = hunyuan.video(2, 3)
    return hunyuan.tiny(camera=False, block_frames=None), {"latents": latents, **hunyuan.conditions(2)}


@pytest.fixture(params=[wan, hunyuan_video15], ids=lambda make: make.__name__)
def setup(request):
    backbone, given = request.param()
    return backbone, given | {"timestep": torch.tensor([300.0, 800.0])}


def randomise(backbone) -> None:
    with torch.no_grad():
        for name, p in backbone.transformer.named_parameters():
            if ".lora_" in name:
                p.normal_(std=0.2)


def test_adapters_start_as_nothing_and_only_they_train(setup):
    backbone, given = setup
    before = backbone(**given)
    count = len(list(backbone.parameters()))
    add_lora(backbone, rank=2, alpha=4)
    torch.testing.assert_close(backbone(**given), before, atol=1e-6, rtol=0)
    randomise(backbone)
    backbone(**given).square().mean().backward()
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained) and len(list(backbone.parameters())) == count + len(trained)
    with_gradient = {name for name, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    kinds = {name.split(".lora_")[0].split(".", 3)[-1] for name in with_gradient}
    assert any(kind.endswith("to_q") for kind in kinds) and any(kind.endswith("net.2") for kind in kinds)
    assert with_gradient <= trained
    set_trainable(backbone, False)
    assert not any(p.requires_grad for p in backbone.parameters())


def test_merged_and_in_diffusers_they_are_the_same(setup, tmp_path):
    backbone, given = setup
    plain = {name: p.clone() for name, p in backbone.transformer.state_dict().items()}
    base = backbone(**given)
    add_lora(backbone, rank=2, alpha=3)
    randomise(backbone)
    with torch.no_grad():
        adapted = backbone(**given)
    assert (adapted - base).abs().max() > 1e-2
    path = save_lora(backbone, tmp_path)
    with safe_open(path, "pt") as file:
        assert all(name.startswith("transformer.") and name.endswith(".weight") for name in file.keys())  # noqa: SIM118

    stock = type(backbone.transformer).from_config(backbone.transformer.config)
    stock.load_state_dict(plain)
    stock.load_lora_adapter(str(tmp_path), weight_name=path.name)
    again = type(backbone)(stock)
    assert has_lora(again)
    with torch.no_grad():
        torch.testing.assert_close(again(**given), adapted, atol=1e-5, rtol=0)

    merge_lora(backbone)
    assert not has_lora(backbone) and backbone.transformer.state_dict().keys() == plain.keys()
    with torch.no_grad():
        torch.testing.assert_close(backbone(**given), adapted, atol=1e-4, rtol=0)


def test_saved_adapters_are_loaded(setup, tmp_path):
    backbone, given = setup
    plain = {name: p.clone() for name, p in backbone.transformer.state_dict().items()}
    add_lora(backbone, rank=3, targets=["ffn"])
    randomise(backbone)
    save_lora(backbone, tmp_path)
    other = type(backbone)(type(backbone.transformer).from_config(backbone.transformer.config))
    other.transformer.load_state_dict(plain)
    load_lora(other, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(other(**given), backbone(**given), atol=1e-5, rtol=0)


def test_an_offloaded_backbone_is_refused(setup, tmp_path):
    """PEFT merges into weights that a copy on the device would not follow."""
    backbone, _ = setup
    backbone.offloaded = True
    for call in (lambda: add_lora(backbone, 2), lambda: load_lora(backbone, tmp_path), lambda: merge_lora(backbone)):
        with pytest.raises(ValueError, match="before offload_blocks, got an offloaded backbone"):
            call()


def test_mistakes_are_named(setup, tmp_path):
    backbone, _ = setup
    for call, message in (
        (lambda: add_lora(backbone, 0), "rank must be at least 1, got 0"),
        (lambda: add_lora(backbone, 2, targets=["attn"]), r"targets must be some of attention, ffn, got \['attn'\]"),
        (lambda: merge_lora(backbone), "no adapters to merge"),
        (lambda: save_lora(backbone, tmp_path), "no adapters to save"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="expected LoRA weights"):
        load_lora(backbone, tmp_path)
    add_lora(backbone, 2)
    with pytest.raises(ValueError, match="has adapters: merge them first"):
        add_lora(backbone, 2)
    path = save_lora(backbone, tmp_path)
    other, _ = hunyuan_video15() if hasattr(backbone.transformer, "blocks") else wan()
    with pytest.raises(ValueError, match="has an adapter for .*, a layer that this model does not have"):
        load_lora(other, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_lora(other, tmp_path)
