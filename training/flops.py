"""Exact FLOPs of a backbone's forward: matrix products, and attention by the (query, key) pairs that its mask lets through.

A product [M, K] × [K, N] is 2·M·K·N; attention is 4·D per pair and head. Norms and other pointwise work count nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_ops.backbones._common import token_grid
from dit_ops.layout import VideoLayout
from dit_ops.masks import Full, TeacherForcing


def knows(backbone: nn.Module) -> bool:
    return type(getattr(backbone, "transformer", None)).__name__.removeprefix("FSDP") in MODELS


def forward_flops(backbone: Any, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **given: Any) -> int:
    """Of one call of a backbone with these arguments."""
    model = type(backbone.transformer).__name__.removeprefix("FSDP")
    return MODELS[model](backbone, latents, timestep, encoder_hidden_states, **given)


def video(backbone: Any, latents: Tensor, timestep: Tensor, given: dict[str, Any]) -> tuple[VideoLayout, int, int]:
    """The layout (no prefix), the frames of past keys that are seen beside it, and the rows of modulation."""
    _, frames, _, height, width = latents.shape
    halves = 1 if given.get("clean_latents") is None else 2
    layout = VideoLayout(frames, *token_grid(height, width, backbone.patch), backbone.block_frames, halves)
    cache = given.get("cache")
    limit = math.inf if cache is None or cache.window_frames is None else cache.window_frames
    past = 0 if cache is None else int(min(given.get("start_frame", 0), max(0, limit - frames)))
    return layout, past, halves * frames if halves == 2 or timestep.dim() == 2 else 1


def pairs(layout: VideoLayout, past: int) -> int:
    if layout.halves == 2:
        return TeacherForcing(layout).pairs()
    return Full(layout.tokens, layout.tokens + past * layout.tokens_per_frame).pairs()


def linear(rows: int, *layers: Any) -> int:
    """Of the layers that are there, over so many rows; a patch convolution is one product per patch."""
    return sum(2 * rows * layer.weight.numel() for layer in layers if layer is not None)


def linears(rows: int, module: nn.Module | None) -> int:
    """Of all linear layers in a module."""
    return linear(rows, *(m for m in module.modules() if isinstance(m, nn.Linear))) if module is not None else 0


def wan(backbone: Any, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **given: Any) -> int:
    layout, past, rows = video(backbone, latents, timestep, given)
    t, B, T = backbone.transformer, len(latents), encoder_hidden_states.shape[1]
    image = given.get("encoder_hidden_states_image")
    camera = backbone.camera if given.get("viewmats") is not None else None
    M, seen = layout.halves * layout.tokens, pairs(layout, past)
    embedder = t.condition_embedder
    stored = given.get("cache") is not None and not torch.is_grad_enabled() and given.get("start_frame", 0) > 0
    keys_only = given.get("keys_only", False)
    total = B * (linear(M, t.patch_embedding) + (0 if keys_only else linear(layout.tokens, t.proj_out)))
    total += B * (linears(rows, embedder.time_embedder) + linear(rows, embedder.time_proj))
    total += 0 if stored else B * linears(T, embedder.text_embedder)
    total += B * linears(image.shape[1], embedder.image_embedder) if image is not None else 0
    for i, block in enumerate(t.blocks):
        own, cross = block.attn1, block.attn2
        C = own.to_q.out_features
        keys = T + (image.shape[1] if image is not None else 0)
        total += 0 if stored else B * linear(T, cross.to_k, cross.to_v)
        total += B * linear(image.shape[1], cross.add_k_proj, cross.add_v_proj) if image is not None else 0
        if keys_only and i == len(t.blocks) - 1:
            return total + B * linear(M, own.to_k, own.to_v)
        total += B * (linear(M, own.to_q, own.to_k, own.to_v, own.to_out[0]) + linears(M, block.ffn))
        total += B * (linear(M, camera[i]) if camera is not None else 0)
        total += B * 4 * seen * C * (1 if camera is None else 2)
        total += B * (linear(M, cross.to_q, cross.to_out[0]) + 4 * M * keys * C)
    return total


def hunyuan_video15(backbone: Any, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **given: Any) -> int:
    """The conditions count in their full length: how much of it is padding is known on the device only."""
    layout, past, rows = video(backbone, latents, timestep, given)
    t, B, T = backbone.transformer, len(latents), encoder_hidden_states.shape[1]
    glyphs, image = given.get("encoder_hidden_states_2"), given.get("image_embeds")
    camera = backbone.camera if given.get("viewmats") is not None else None
    M, own_pairs = layout.halves * layout.tokens, pairs(layout, past)
    stored = given.get("cache") is not None and not torch.is_grad_enabled() and given.get("start_frame", 0) > 0
    joint = layout.halves == 1 and given.get("cache") is None
    action = backbone.action if given.get("action") is not None else None
    keys_only = given.get("keys_only", False)
    head = 0 if keys_only else linear(layout.tokens, t.proj_out) + linear(latents.shape[1], t.norm_out.linear)
    total = B * (linear(M, t.x_embedder.proj) + head)
    total += B * (linears(rows + (not stored), t.time_embed) + linears(latents.shape[1], action))
    tokens = T
    if not stored:
        refiner = t.context_embedder
        total += B * (linears(1, refiner.time_text_embed) + linear(T, refiner.proj_in))
        for block in refiner.token_refiner.refiner_blocks:
            heads = block.attn
            total += B * (linear(T, heads.to_q, heads.to_k, heads.to_v, heads.to_out[0]) + linears(T, block.ff))
            total += B * (linears(1, block.norm_out) + 4 * T * T * heads.to_q.out_features)
        for states, embedder in ((glyphs, t.context_embedder_2), (image, t.image_embedder)):
            total += B * linears(states.shape[1], embedder) if states is not None else 0
    tokens += sum(states.shape[1] for states in (glyphs, image) if states is not None)
    for i, block in enumerate(t.transformer_blocks):
        attn, last = block.attn, i == len(t.transformer_blocks) - 1
        C = attn.to_q.out_features
        if not stored:
            total += B * (
                linear(1, block.norm1_context.linear) + linear(tokens, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            if not last:
                keys = tokens + (layout.tokens if joint else 0)
                total += B * (linear(tokens, attn.to_add_out) + linears(tokens, block.ff_context) + 4 * tokens * keys * C)
        if keys_only and last:
            return total + B * (linear(rows, block.norm1.linear) + linear(M, attn.to_k, attn.to_v))
        total += B * (linear(rows, block.norm1.linear) + linear(M, attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]))
        total += B * (linears(M, block.ff) + (linear(M, camera[i]) if camera is not None else 0))
        total += B * 4 * (own_pairs + M * tokens) * C * (1 if camera is None else 2)
    return total


MODELS: dict[str, Callable[..., int]] = {
    "WanTransformer3DModel": wan,
    "HunyuanVideo15Transformer3DModel": hunyuan_video15,
}
