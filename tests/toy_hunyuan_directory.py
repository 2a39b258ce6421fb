"""A tiny random HunyuanVideo 1.5 model directory, saved through the stock classes."""

import inspect
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

SENTENCE = "a red room with blue ball box sign saying open user assistant system"
WORDS = ["<pad>", "<unk>", *SENTENCE.split(), '"', *".,12345"]
TEXT, GLYPH, IMAGE, TOKENS = 16, 8, 12, 4  # widths, and image tokens of 28 × 28 pixels in patches of 14


def tokenizer() -> PreTrainedTokenizerFast:
    """Words and punctuation; its chat template fills the prompt up to the 108 tokens that the pipeline cuts off."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", padding_side="right")
    message = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
    head = len(pre_tokenizers.Whitespace().pre_tokenize_str(message))
    assert head <= 107
    fill = " system" * (107 - head)
    fast.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}" + fill + " user {% else %}{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"
    )
    return fast


def save(directory: Path, *, image: bool = False, guidance: float = 3.0) -> Path:
    """HunyuanVideo15Pipeline, or with `image` HunyuanVideo15ImageToVideoPipeline."""
    torch.manual_seed(0)
    text = Qwen2_5_VLTextConfig(
        vocab_size=len(WORDS),
        hidden_size=TEXT,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
    )
    glyph = T5Config(vocab_size=384, d_model=GLYPH, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, scaling_factor=0.7
    )
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, text_embed_dim=TEXT, text_embed_2_dim=GLYPH, image_embed_dim=IMAGE, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    components = dict(
        text_encoder=Qwen2_5_VLTextModel(text),
        tokenizer=tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=T5EncoderModel(glyph),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=guidance),
    )
    if image:
        vision = SiglipVisionConfig(
            hidden_size=IMAGE, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
        )
        components["image_encoder"] = SiglipVisionModel(vision)
        components["feature_extractor"] = SiglipImageProcessor(size={"height": 28, "width": 28})
    pipeline = (HunyuanVideo15ImageToVideoPipeline if image else HunyuanVideo15Pipeline)(**components)
    pipeline.save_pretrained(directory)
    return directory
