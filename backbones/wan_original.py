"""Original Wan 2.1 key names (and minWM's `model.pt`) → diffusers names."""

import re
from pathlib import Path

from torch import Tensor

from dit_ops.backbones._common import original_state

RENAMES = [  # (pattern, replacement), first match wins
    (r"time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"time_projection\.1\.", "condition_embedder.time_proj."),
    (r"text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"head\.head\.", "proj_out."),
    (r"head\.modulation$", "scale_shift_table"),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),  # diffusers numbers the norms by position, the original by their role
    (r"(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"(blocks\.\d+)\.self_attn\.prope_o\.", r"camera:\1."),
    (r"(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"(blocks\.\d+)\.self_attn\.", r"\1.attn1."),
    (r"(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"(blocks\.\d+)\.cross_attn\.([kv])_img\.", r"\1.attn2.add_\2_proj."),
    (r"(blocks\.\d+)\.cross_attn\.norm_k_img\.", r"\1.attn2.norm_added_k."),
    (r"(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
]
IMAGE_DIM = 1280  # CLIP ViT-H tokens of Wan 2.1 I2V


def to_diffusers(
    weights: dict | str | Path, config: dict, *, ema: bool | None
) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """(diffusers config, transformer state, camera state `"<layer>.weight"`) of original weights and their original config."""
    state: dict[str, Tensor] = {}
    camera: dict[str, Tensor] = {}
    for name, tensor in original_state(weights, ema).items():
        name = rename(name)
        if name.startswith("camera:blocks."):
            camera[name.removeprefix("camera:blocks.")] = tensor
        else:
            state[name] = tensor
    return diffusers_config(config), state, camera


def rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name


def diffusers_config(config: dict) -> dict:
    """Original config.json (dim, ffn_dim, num_heads, …) → WanTransformer3DModel config."""
    needed = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim")
    missing = [k for k in needed if k not in config]
    if missing:
        raise ValueError(f"the original Wan config needs {list(needed)}, missing {missing}")
    if not config.get("qk_norm", True):
        raise ValueError("the original Wan config has qk_norm = false, which no released Wan 2.1 model uses")
    image = config.get("model_type", "t2v") == "i2v"
    return {
        "patch_size": tuple(config.get("patch_size", (1, 2, 2))),
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["dim"] // config["num_heads"],
        "in_channels": config["in_dim"],
        "out_channels": config["out_dim"],
        "text_dim": config.get("text_dim", 4096),
        "freq_dim": config.get("freq_dim", 256),
        "ffn_dim": config["ffn_dim"],
        "num_layers": config["num_layers"],
        "cross_attn_norm": config.get("cross_attn_norm", True),
        "eps": config.get("eps", 1e-6),
        "image_dim": IMAGE_DIM if image else None,
        "added_kv_proj_dim": config["dim"] if image else None,
    }
