"""A tiny random Wan 2.2 TI2V model directory, saved through the stock classes: 48 latent channels, a timestep per token."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT = 12
CONFIG = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "ffn_dim": 64,
    "text_dim": TEXT,
    "freq_dim": 32,
    "in_channels": 48,
    "out_channels": 48,
}
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "room", "with", "blue", "ball"]


def randomise(module: torch.nn.Module, std: float = 0.15) -> None:
    """Weights for which time, text and attention matter."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * std + (p.dim() == 1) * 0.5)


def save(directory: Path, *, image: bool = False) -> Path:
    """WanPipeline, or with `image` WanImageToVideoPipeline; both with expand_timesteps."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=512)
    text = UMT5Config(vocab_size=len(WORDS), d_model=TEXT, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=torch.linspace(-0.1, 0.1, 48).tolist(),
        latents_std=torch.linspace(0.3, 0.6, 48).tolist(),
    )
    transformer = WanTransformer3DModel(**CONFIG)
    randomise(transformer)
    pipeline = (WanImageToVideoPipeline if image else WanPipeline)(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text),
        vae=vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        expand_timesteps=True,
    )
    pipeline.save_pretrained(directory)
    return directory
