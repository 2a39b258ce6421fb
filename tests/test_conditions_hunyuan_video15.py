"""HunyuanVideo 1.5's condition side against diffusers' own pipelines, on tiny random components."""

import inspect
import json

import PIL.Image
import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from toy_hunyuan_directory import GLYPH, IMAGE, TEXT, TOKENS, save

from dit_ops.backbones.hunyuan_video15 import HunyuanVideo15Backbone
from dit_ops.backbones.wan import WanBackbone
from dit_ops.conditions import load
from dit_ops.conditions.hunyuan_video15 import HunyuanVideo15Condition
from dit_ops.conditions.linear import LinearCondition

PROMPTS = ["a red room with a blue ball", 'a box and a sign saying "open"', ""]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save(tmp_path_factory.mktemp("hunyuan") / "model", image=True)


@pytest.fixture(scope="module")
def stock(directory):
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(directory)
    for name in ("text_encoder", "text_encoder_2", "image_encoder", "vae"):
        getattr(pipeline, name).eval()
    pipeline.vae.use_slicing = True  # its attention mask has no head axis: a batch of two would fail
    return pipeline


@pytest.fixture(scope="module")
def condition(directory) -> HunyuanVideo15Condition:
    return load(directory)


def test_text_states_are_those_of_the_stock_pipeline(condition, stock):
    got = condition.encode_text(PROMPTS)
    with torch.no_grad():
        text, mask, glyphs, glyph_mask = stock.encode_prompt(PROMPTS, device="cpu", batch_size=3)
    assert got["encoder_hidden_states"].shape == (3, 1000, TEXT) and got["encoder_hidden_states_2"].shape == (3, 256, GLYPH)
    torch.testing.assert_close(got["encoder_hidden_states"], text, rtol=0, atol=1e-6)
    torch.testing.assert_close(got["encoder_hidden_states_2"], glyphs, rtol=0, atol=1e-6)
    assert torch.equal(got["encoder_attention_mask"], mask.bool()) and got["encoder_attention_mask"].dtype == torch.bool
    assert torch.equal(got["encoder_attention_mask_2"], glyph_mask.bool())
    valid = got["encoder_attention_mask"].sum(1)
    assert valid.tolist() == [len(["a", "red", "room", "with", "a", "blue", "ball", "assistant"]), 10, 1], (
        "the template is cut off"
    )
    assert got["encoder_attention_mask_2"].any(1).tolist() == [False, True, False], "only text in quotes has glyphs"


def test_image_states_and_latents_are_those_of_the_stock_pipeline(condition, stock):
    picture = PIL.Image.effect_noise((48, 32), 60).convert("RGB")
    image = torch.tensor(list(picture.tobytes()), dtype=torch.float32).view(32, 48, 3).permute(2, 0, 1) / 127.5 - 1
    got = condition.encode_image(image[None], 3)
    with torch.no_grad():
        states = stock.encode_image(picture, 1, "cpu", torch.float32)
        latents, mask = stock.prepare_cond_latents_and_mask(
            torch.zeros(1, 4, 3, 2, 3), picture, 1, 32, 48, torch.float32, "cpu"
        )
    assert got["image_embeds"].shape == (1, TOKENS, IMAGE)
    torch.testing.assert_close(got["image_embeds"], states, rtol=0, atol=1e-5)
    expected = torch.cat([latents, mask], 1).transpose(1, 2)
    torch.testing.assert_close(got["condition_latents"], expected, rtol=0, atol=1e-5)


def test_latents_and_pixels_are_the_vaes(condition, stock):
    pixel = torch.rand(2, 9, 3, 32, 48) * 2 - 1
    latent = condition.encode_to_latent(pixel)
    with torch.no_grad():
        z = stock.vae.encode(pixel.transpose(1, 2)).latent_dist.mode() * 0.7
        decoded = stock.vae.decode(z / 0.7).sample.transpose(1, 2).clamp(-1, 1)
    assert latent.shape == (2, 3, 4, 2, 3)
    torch.testing.assert_close(latent, z.transpose(1, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(condition.decode_to_pixel(latent), decoded, rtol=0, atol=1e-5)
    chunks = list(condition.decode_stream(iter(latent.split([1, 2], 1))))
    assert [chunk.shape[1] for chunk in chunks] == [1, 8]
    torch.testing.assert_close(torch.cat(chunks, 1), decoded, rtol=0, atol=1e-5)
    first = condition.encode_to_latent(pixel[:, :1])
    torch.testing.assert_close(first, latent[:, :1], rtol=0, atol=1e-5)  # the encoder is causal


def arguments(backbone: type) -> set[str]:
    return set(inspect.signature(backbone._flow).parameters)


def test_the_two_steps_give_exactly_arguments_of_the_model_call(condition):
    """For both backbones, with and without an image."""
    videos = torch.rand(1, 5, 3, 32, 32) * 2 - 1
    linear = LinearCondition.fit(videos)
    for side, backbone in ((condition, HunyuanVideo15Backbone), (linear, WanBackbone)):
        for image in (False, True):
            stored = side.get_condition(["a red room"], videos, image=image)
            noise = torch.randn_like(stored["latents"])
            given, target = side.process_condition(stored, noise, torch.tensor([250.0]), viewmats=None, Ks=None)
            assert given.keys() <= arguments(backbone)
            assert given.keys() == stored.keys() | {"timestep", "viewmats", "Ks"}
            torch.testing.assert_close(given["latents"], 0.75 * stored["latents"] + 0.25 * noise)
            torch.testing.assert_close(target, noise - stored["latents"])
        assert side.get_condition(["a red room"]).keys() == stored.keys() - {"latents", "image_embeds", "condition_latents"}


def test_unknown_and_missing_components_are_named(directory, tmp_path):
    index = json.loads((directory / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKLMagvit"]}))
    with pytest.raises(ValueError, match="no condition side for 'AutoencoderKLMagvit'; known are AutoencoderKLWan, "):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "UMT5EncoderModel"]}))
    with pytest.raises(ValueError, match="text_encoder must be Qwen2_5_VLTextModel but is UMT5EncoderModel"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no image_encoder"):
        load(tmp_path).encode_image(torch.zeros(1, 3, 32, 32), 1)


def test_a_copy_is_the_same_condition_side(condition, tmp_path):
    condition.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.summary() == condition.summary() and again.summary()["class"] == "HunyuanVideo15Condition"
    a, b = (side.encode_text(PROMPTS[1:2]) for side in (again, condition))
    assert all(torch.equal(a[name], b[name]) for name in b)
