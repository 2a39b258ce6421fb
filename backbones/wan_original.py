"""Original Wan 2.1 key names (and minWM's `model.pt`) ↔ diffusers names."""

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dit_ops.backbones._original import original_state

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
# (pattern of a diffusers name, original name): the inverse of RENAMES
ORIGINAL: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"condition_embedder\.time_embedder\.linear_([12])\.", lambda m: f"time_embedding.{2 * int(m[1]) - 2}."),
    (r"condition_embedder\.time_proj\.", "time_projection.1."),
    (r"condition_embedder\.text_embedder\.linear_([12])\.", lambda m: f"text_embedding.{2 * int(m[1]) - 2}."),
    (r"condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"proj_out\.", "head.head."),
    (r"scale_shift_table$", "head.modulation"),
    (r"(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    (r"(blocks\.\d+)\.attn1\.to_out\.0\.", r"\1.self_attn.o."),
    (r"(blocks\.\d+)\.attn1\.to_([qkv])\.", r"\1.self_attn.\2."),
    (r"(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"(blocks\.\d+)\.attn2\.to_out\.0\.", r"\1.cross_attn.o."),
    (r"(blocks\.\d+)\.attn2\.to_([qkv])\.", r"\1.cross_attn.\2."),
    (r"(blocks\.\d+)\.attn2\.add_([kv])_proj\.", r"\1.cross_attn.\2_img."),
    (r"(blocks\.\d+)\.attn2\.norm_added_k\.", r"\1.cross_attn.norm_k_img."),
    (r"(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
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


def to_original(state: dict[str, Tensor], branches: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse: the transformer's state dict and that of the camera branch under the original names."""
    out = {original(name): tensor for name, tensor in state.items()}
    for name, tensor in branches.get("camera", {}).items():
        layer, _, rest = name.partition(".")
        out[f"blocks.{layer}.self_attn.prope_o.{rest}"] = tensor
    return out


def original(name: str) -> str:
    """The original Wan name of a diffusers name. ValueError: it has none."""
    candidate = name
    for pattern, replacement in ORIGINAL:
        if re.match(pattern, name):
            candidate = re.sub(pattern, replacement, name, count=1)
            break
    if rename(candidate) != name:
        raise ValueError(f"{name!r} has no name in the original Wan layout")
    return candidate


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
