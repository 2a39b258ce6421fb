"""Tencent's HunyuanVideo 1.5 key names, and minWM's with camera and action branches ↔ diffusers names."""

from pathlib import Path

import torch
from torch import Tensor

from dit_ops.backbones._original import original_state

Names = tuple[tuple[str, str], ...]  # (original, diffusers), beginnings of names; the first that fits counts

OUTER: Names = (
    ("img_in.", "x_embedder."),
    ("vision_in.proj.0.", "image_embedder.norm_in."),
    ("vision_in.proj.1.", "image_embedder.linear_1."),
    ("vision_in.proj.3.", "image_embedder.linear_2."),
    ("vision_in.proj.4.", "image_embedder.norm_out."),
    ("byt5_in.layernorm.", "context_embedder_2.norm."),
    ("byt5_in.fc", "context_embedder_2.linear_"),
    ("time_in.mlp.0.", "time_embed.timestep_embedder.linear_1."),
    ("time_in.mlp.2.", "time_embed.timestep_embedder.linear_2."),
    ("cond_type_embedding.", "cond_type_embed."),
    ("txt_in.input_embedder.", "context_embedder.proj_in."),
    ("txt_in.t_embedder.mlp.0.", "context_embedder.time_text_embed.timestep_embedder.linear_1."),
    ("txt_in.t_embedder.mlp.2.", "context_embedder.time_text_embed.timestep_embedder.linear_2."),
    ("txt_in.c_embedder.", "context_embedder.time_text_embed.text_embedder."),
    ("final_layer.linear.", "proj_out."),
    ("final_layer.adaLN_modulation.1.", "norm_out.linear."),
    ("action_in.mlp.0.", "action:linear_1."),
    ("action_in.mlp.2.", "action:linear_2."),
)
DOUBLE: Names = (
    ("img_mod.linear.", "norm1.linear."),
    ("txt_mod.linear.", "norm1_context.linear."),
    *((f"img_attn_{x}_norm.", f"attn.norm_{x}.") for x in "qk"),
    *((f"txt_attn_{x}_norm.", f"attn.norm_added_{x}.") for x in "qk"),
    *((f"img_attn_{x}.", f"attn.to_{x}.") for x in "qkv"),
    *((f"txt_attn_{x}.", f"attn.add_{x}_proj.") for x in "qkv"),
    ("img_attn_proj.", "attn.to_out.0."),
    ("txt_attn_proj.", "attn.to_add_out."),
    ("img_attn_prope_proj.", "camera:"),
    ("img_mlp.fc1.", "ff.net.0.proj."),
    ("img_mlp.fc2.", "ff.net.2."),
    ("txt_mlp.fc1.", "ff_context.net.0.proj."),
    ("txt_mlp.fc2.", "ff_context.net.2."),
)
REFINER: Names = (
    ("self_attn_proj.", "attn.to_out.0."),
    ("mlp.fc1.", "ff.net.0.proj."),
    ("mlp.fc2.", "ff.net.2."),
    ("adaLN_modulation.1.", "norm_out.linear."),
)
BLOCKS = (  # beginnings of names, original and diffusers, and the names inside of a block
    ("double_blocks.", "transformer_blocks.", DOUBLE),
    ("txt_in.individual_token_refiner.blocks.", "context_embedder.token_refiner.refiner_blocks.", REFINER),
)
BYT5_DIM = 1472  # the byT5 glyph encoder of HunyuanVideo 1.5


def to_diffusers(
    weights: dict | str | Path, config: dict, *, ema: bool | None
) -> tuple[dict, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(diffusers config, transformer state, states of our branches) of original weights and their original config."""
    state: dict[str, Tensor] = {}
    branches: dict[str, dict[str, Tensor]] = {"camera": {}, "action": {}}
    for original, tensor in original_state(weights, ema).items():
        name = rename(original, 0)
        if "self_attn_qkv." in name:  # [3C, C] → three [C, C]
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("self_attn_qkv.", f"attn.to_{part}.")] = piece
        elif ":" in name:  # "transformer_blocks.<i>.camera:weight", "action:linear_1.weight"
            branch, _, rest = name.removeprefix("transformer_blocks.").partition(":")
            layer, _, branch = branch.rpartition(".")
            branches[branch][f"{layer}.{rest}" if layer else rest] = tensor
        else:
            state[name] = swap_halves(tensor) if name.startswith("norm_out.linear.") else tensor
    return diffusers_config(config), state, branches


def to_original(state: dict[str, Tensor], branches: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse: the transformer's state dict and those of our branches (camera, action) under the original names."""
    camera = {f"transformer_blocks.{k.replace('.', '.camera:', 1)}": v for k, v in branches.get("camera", {}).items()}
    action = {f"action:{k}": v for k, v in branches.get("action", {}).items()}
    out: dict[str, Tensor] = {}
    for name, tensor in (state | camera | action).items():
        if "refiner_blocks." in name and ".attn.to_" in name and ".to_out." not in name:
            if ".to_q." in name:
                parts = [state[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
                out[rename(name.replace("attn.to_q.", "self_attn_qkv."), 1)] = torch.cat(parts)
        else:
            out[rename(name, 1)] = swap_halves(tensor) if name.startswith("norm_out.linear.") else tensor
    return out


def swap_halves(tensor: Tensor) -> Tensor:
    """(shift, scale) ↔ (scale, shift)."""
    return tensor.roll(tensor.shape[0] // 2, 0)


def rename(name: str, side: int) -> str:
    """The name on the other side of the tables; side 0 is the original, 1 diffusers. An unknown name stays."""
    for *heads, inner in BLOCKS:
        if name.startswith(heads[side]):
            i, _, rest = name.removeprefix(heads[side]).partition(".")
            return f"{heads[1 - side]}{i}.{_swap_beginning(rest, inner, side)}"
    return _swap_beginning(name, OUTER, side)


def _swap_beginning(name: str, names: Names, side: int) -> str:
    for pair in names:
        if name.startswith(pair[side]):
            return pair[1 - side] + name.removeprefix(pair[side])
    return name


def diffusers_config(config: dict) -> dict:
    """Original config.json (hidden_size, heads_num, …) → HunyuanVideo15Transformer3DModel config."""
    needed = ("hidden_size", "heads_num", "mm_double_blocks_depth", "in_channels", "out_channels", "text_states_dim")
    missing = [k for k in needed if k not in config]
    if missing:
        raise ValueError(f"the original HunyuanVideo 1.5 config needs {list(needed)}, missing {missing}")
    fixed = {
        "mm_single_blocks_depth": 0,
        "glyph_byT5_v2": True,
        "use_cond_type_embedding": True,
        "vision_projection": "linear",
        "qk_norm": True,
        "qk_norm_type": "rms",
        "text_projection": "single_refiner",
    }
    other = {k: config[k] for k, value in fixed.items() if config.get(k, value) != value}
    if other:
        raise ValueError(f"the original HunyuanVideo 1.5 config must have {fixed}, got {other}")
    patch_t, patch, width = config.get("patch_size", (1, 1, 1))
    if patch != width:
        raise ValueError(f"the original config's patch_size must be square, got {config['patch_size']}")
    channels = config["in_channels"]
    return {
        "in_channels": 2 * channels + 1 if config.get("concat_condition", True) else channels,
        "out_channels": config["out_channels"],
        "num_attention_heads": config["heads_num"],
        "attention_head_dim": config["hidden_size"] // config["heads_num"],
        "num_layers": config["mm_double_blocks_depth"],
        "mlp_ratio": config.get("mlp_width_ratio", 4.0),
        "patch_size": patch,
        "patch_size_t": patch_t,
        "text_embed_dim": config["text_states_dim"],
        "text_embed_2_dim": BYT5_DIM,
        "image_embed_dim": config.get("vision_states_dim", 1152),
        "rope_theta": config.get("rope_theta", 256.0),
        "rope_axes_dim": tuple(config.get("rope_dim_list", (16, 56, 56))),
        "target_size": {"480p": 640, "720p": 960}.get(config.get("ideal_resolution", "480p"), 640),
        "task_type": config.get("ideal_task") or "i2v",
        "use_meanflow": config.get("use_meanflow", False),
    }
