"""The two condition sides: closed-form codec and text embedder, and Wan's encoders against diffusers itself."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dit_ops import rooms
from dit_ops.conditions import load
from dit_ops.conditions.linear import HashTextEmbedder, LinearCondition, PatchCodec
from dit_ops.conditions.wan import WanCondition


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    poses = ("w*3", "a*2,l*1", "i*3", "s*1,d*2")
    return torch.stack([rooms.film(prompt, pose, 48) for prompt, pose in zip(rooms.PROMPTS, poses, strict=False)])


def test_codec_is_the_best_linear_one(videos):
    codec = PatchCodec.fit(videos, patch=8, channels=16)
    assert codec.basis.shape == (16, 192)
    torch.testing.assert_close(codec.basis @ codec.basis.T, torch.eye(16), atol=1e-5, rtol=0)
    # Eckart-Young: no rank-16 affine map has a smaller squared error than the discarded singular values
    rows = videos.unfold(3, 8, 8).unfold(4, 8, 8).permute(0, 1, 3, 4, 2, 5, 6).reshape(-1, 192).double()
    tail = torch.linalg.svdvals(rows - rows.mean(0))[16:].square().sum()
    decoded = (codec.encode(videos).movedim(2, -1) * codec.scale) @ codec.basis + codec.mean
    torch.testing.assert_close((decoded.reshape(-1, 192).double() - rows).square().sum(), tail, rtol=1e-3, atol=0)
    assert psnr(codec.decode(codec.encode(videos)), videos) > 26


def test_latents_have_unit_variance_with_one_scale(videos):
    latents = LinearCondition.fit(videos).encode_to_latent(videos)
    assert latents.shape == (4, 4, 16, 6, 6)
    assert float(latents.square().mean()) == pytest.approx(1, abs=1e-3)
    channel = latents.std((0, 1, 3, 4))
    assert channel[0] > 5 * channel[-1], "channels are not whitened one by one"


def test_all_channels_lose_nothing(videos):
    codec = PatchCodec.fit(videos, patch=4, channels=48)
    torch.testing.assert_close(codec.decode(codec.encode(videos)), videos, atol=1e-4, rtol=0)


def test_a_patch_decodes_where_it_was_encoded(videos):
    codec = PatchCodec.fit(videos, patch=8)
    latent = codec.encode(videos[0, 0])
    changed = latent.clone()
    changed[:, 2, 4] += 1
    moved = (codec.decode(changed) - codec.decode(latent)).abs().amax(0) > 0
    assert moved[16:24, 32:40].any()
    moved[16:24, 32:40] = False
    assert not moved.any()


def test_text_is_deterministic_ordered_and_padded_with_zeros():
    text = HashTextEmbedder(text_len=6, text_dim=32)
    one, two, empty, case = text.encode(["a red room", "a room red", "", "A  red, room!"])
    assert one.shape == (6, 32)
    assert torch.equal(one, case) and torch.equal(one, HashTextEmbedder(6, 32).encode(["a red room"])[0])
    assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])
    assert not empty.any() and not one[3:].any() and one[:3].abs().amin(1).gt(0).all()
    long = text.encode(["a b c d e f g", "a b c d e f h", "x b c d e f g"])
    assert not torch.equal(long[0], long[1]) and not torch.equal(long[0], long[2]), "words beyond text_len still count"


def test_linear_condition_saves_and_loads_bit_for_bit(videos, tmp_path):
    condition = LinearCondition.fit(videos, patch=4, channels=12)
    condition.save_pretrained(tmp_path / "condition")
    for directory in (tmp_path / "condition", tmp_path):
        again = load(directory)
        assert isinstance(again, LinearCondition)
        assert again.summary() == condition.summary()
        latent = again.encode_to_latent(videos)
        assert torch.equal(latent, condition.encode_to_latent(videos))
        assert torch.equal(again.decode_to_pixel(latent), condition.decode_to_pixel(latent))
    assert LinearCondition.fit(videos[:2], 4, 12).summary() != condition.summary(), "the fingerprint tells codecs apart"
    chunks = list(again.decode_stream(iter(latent.split(3, 1))))
    assert torch.equal(torch.cat(chunks, 1), again.decode_to_pixel(latent))


def test_linear_errors_name_the_argument(videos, tmp_path):
    condition = LinearCondition.fit(videos)
    with pytest.raises(ValueError, match=r"multiples of 8 but got \[1, 2, 3, 20, 48\]"):
        condition.encode_to_latent(torch.zeros(1, 2, 3, 20, 48))
    with pytest.raises(ValueError, match="channels must be at most 3 \\* patch\\^2 = 12 but got 16"):
        PatchCodec.fit(videos, patch=2)
    with pytest.raises(ValueError, match="must hold condition.json"):
        load(tmp_path)


WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "room", "with", "ball", "and", "box", "&"]


@pytest.fixture(scope="module")
def wan_directory(tmp_path_factory):
    """A Wan pipeline directory of tiny random components, written by diffusers."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12
    )
    config = UMT5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    directory = tmp_path_factory.mktemp("wan")
    parts = {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(config).eval(), "vae": vae.eval()}
    pipeline = WanPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=None)
    pipeline.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def wan(wan_directory) -> WanCondition:
    condition = load(wan_directory)
    assert isinstance(condition, WanCondition)
    return condition


@pytest.fixture(scope="module")
def pipeline(wan_directory):
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(wan_directory, local_files_only=True)


def test_wan_facts_need_no_weights(wan_directory):
    condition = WanCondition(wan_directory)
    assert (condition.text_len, condition.text_dim, condition.latent_channels) == (12, 32, 16)
    assert (condition.spatial_stride, condition.temporal_stride) == (8, 4)
    assert (condition.latent_frames(77), condition.pixel_frames(20), condition.latent_frames(1)) == (20, 77, 1)
    assert not condition._loaded


def test_wan_text_equals_diffusers(wan, pipeline):
    prompts = [
        "a red  room with a blue ball",
        "a box",
        "",
        "a red room with a blue ball and a red box and a blue box",
        "red &amp; blue",
    ]
    text = wan.encode_text(prompts)["encoder_hidden_states"]
    expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=12, device="cpu")
    assert text.shape == (5, 12, 32)
    torch.testing.assert_close(text, expected, atol=1e-5, rtol=1e-5)
    assert not text[1, 3:].any() and text[1, :3].any(1).all(), "two words and the end token, then zeros"
    assert text[2, 0].any() and not text[2, 1:].any(), "the empty prompt is its end token"


def test_wan_latents_equal_diffusers(wan, pipeline):
    pixel = torch.rand(2, 9, 3, 16, 24) * 2 - 1
    latent = wan.encode_to_latent(pixel)
    assert latent.shape == (2, 3, 16, 2, 3)
    vae = pipeline.vae
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        z = vae.encode(pixel.transpose(1, 2)).latent_dist.mode()
        torch.testing.assert_close(latent, ((z - mean) / std).transpose(1, 2), atol=1e-5, rtol=1e-5)
        expected = vae.decode(latent.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    decoded = wan.decode_to_pixel(latent)
    assert decoded.shape == pixel.shape
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)
    assert wan._moments(latent.device)[0][0, 7, 0, 0, 0] == pytest.approx(1.5508)


def test_wan_streamed_decoding_equals_the_whole(wan):
    latent = torch.randn(2, 5, 16, 2, 3)
    whole = wan.decode_to_pixel(latent)
    chunks = list(wan.decode_stream(iter(latent.split([2, 1, 2], 1))))
    assert [chunk.shape[1] for chunk in chunks] == [5, 4, 8]
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=1e-5, rtol=1e-5)
    alone = wan.decode_to_pixel(latent[:, 2:3])
    assert not torch.allclose(alone[:, :1], whole[:, 5:6], atol=1e-3), "without its past a chunk decodes to something else"


def test_streamed_decoding_with_the_residual_vae_of_wan_22(tmp_path):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    shape = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    outside = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    moments = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    vae = AutoencoderKLWan(**shape, **outside, **moments, temperal_downsample=[False, True, True], is_residual=True)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKLWan"]}))
    condition = load(tmp_path)
    pixel = torch.rand(1, 9, 3, 32, 32) * 2 - 1
    latent = condition.encode_to_latent(pixel)
    assert latent.shape == (1, 3, 4, 2, 2) and condition.spatial_stride == 16
    chunks = list(condition.decode_stream(iter(latent.split([1, 2], 1))))
    torch.testing.assert_close(torch.cat(chunks, 1), condition.decode_to_pixel(latent), atol=1e-5, rtol=1e-5)


def test_wan_copies_itself(wan, wan_directory, tmp_path):
    wan.save_pretrained(tmp_path / "condition")
    again = load(tmp_path)
    text = lambda condition: condition.encode_text(["a red ball"])["encoder_hidden_states"]
    assert torch.equal(text(again), text(wan))
    copied, original = (
        load_file(d / "vae" / "diffusion_pytorch_model.safetensors") for d in (tmp_path / "condition", wan_directory)
    )
    assert all(torch.equal(copied[key], original[key]) for key in original) and len(copied) == len(original)


def test_wan_uses_only_what_is_there(wan_directory, tmp_path):
    index = json.loads((wan_directory / "model_index.json").read_text())
    (tmp_path / "vae").symlink_to(wan_directory / "vae")
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    condition = load(tmp_path)
    assert condition.encode_to_latent(torch.zeros(1, 1, 3, 8, 8)).shape == (1, 1, 16, 1, 1)
    with pytest.raises(ValueError, match="has no text_encoder"):
        condition.text_dim  # noqa: B018
    with pytest.raises(ValueError, match="has no tokenizer"):
        condition.encode_text(["a"])
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match="no condition side for 'AutoencoderKL'; known are AutoencoderKLWan"):
        load(tmp_path)


def test_wan_refuses_pixels_that_would_be_dropped(wan):
    with pytest.raises(ValueError, match="1 \\+ a multiple of 4 but are 8"):
        wan.encode_to_latent(torch.zeros(1, 8, 3, 16, 16))
    with pytest.raises(ValueError, match="multiples of 8 but got"):
        wan.encode_to_latent(torch.zeros(1, 5, 3, 16, 20))


def test_wan_image_conditions_equal_diffusers(wan_directory, tmp_path):
    """Latents and mask as WanImageToVideoPipeline makes them; image states from the layer before the last."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    size = {"height": 28, "width": 28}
    parts = {
        "image_encoder": CLIPVisionModel(vision).eval(),
        "image_processor": CLIPImageProcessor(size=size, crop_size=size),
        "vae": AutoencoderKLWan.from_pretrained(wan_directory / "vae").eval(),
    }
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "transformer"))
    stock = WanImageToVideoPipeline(**parts, **nothing, scheduler=FlowMatchEulerDiscreteScheduler())
    stock.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 16, 24) * 2 - 1
    image = ((image + 1) * 127.5).round() / 127.5 - 1
    got = load(tmp_path).encode_image(image, 3)
    given = {"batch_size": 1, "num_channels_latents": 16, "height": 16, "width": 24, "num_frames": 9}
    _, expected = stock.prepare_latents(image, **given, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(got["condition_latents"], expected.transpose(1, 2), atol=1e-5, rtol=0)
    picture = ((image[0] + 1) * 127.5).round().byte()
    with torch.no_grad():
        states = stock.encode_image(picture, "cpu")
    assert got["encoder_hidden_states_image"].shape == (1, 5, 16)
    torch.testing.assert_close(got["encoder_hidden_states_image"], states, atol=1e-5, rtol=0)
