"""A stock diffusers Wan transformer that runs through our operators: subclasses of its parts that only compute differently.

`dit_ops.fuse` makes parts of a model instances of these classes and `unfuse` makes them stock again, so they hold no state.
They compute what the stock classes compute, with the same arguments; Linear and Dropout are called as modules (LoRA, hooks).
Shapes: B batch, L tokens, C channels, N heads, D head size; F = 1, or L where every token has its own timestep (Wan 2.2).
"""

import copy
from typing import NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_wan as stock
from torch import Tensor, nn

from dit_ops import adaln, attention, gated_residual, gated_residual_adaln, qk_norm_rope
from dit_ops.backbones._common import norm_weight

TEXT_TOKENS = 512  # what stock models expect behind the image tokens


class Rotary(NamedTuple):
    """What the blocks get as rotary_emb: stock's two tables, which context parallelism splits, and ours, cut to the grid."""

    cos: Tensor  # [1, L, 1, D]
    sin: Tensor
    frame: Tensor  # [F, D_axis / 2, 2]
    height: Tensor  # [H, ...]
    width: Tensor  # [W, ...]


class FusedWanTransformerBlock(stock.WanTransformerBlock):
    """x += gate·SelfAttn(adaLN(x));  x += CrossAttn(LN(x));  x += gate·FFN(adaLN(x))."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, L, C]
        encoder_hidden_states: Tensor,  # [B, T, C]
        temb: Tensor,  # [B, 6, C] or [B, L, 6, C]
        rotary_emb: tuple[Tensor, ...],
    ) -> Tensor:
        temb = temb if temb.ndim == 4 else temb[:, None]
        modulation = self.scale_shift_table + temb.float()
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation.unbind(2)  # [B, F, C]
        x, norm2 = hidden_states, self.norm2
        h = adaln(x, scale_sa, shift_sa, eps=self.norm1.eps)
        a = self.attn1(h, None, None, rotary_emb)
        if isinstance(norm2, nn.Identity):
            x = h = gated_residual(x, a, gate_sa)
        else:
            x, h = gated_residual_adaln(x, a, gate_sa, weight=norm_weight(norm2, x), bias=norm2.bias, eps=norm2.eps)
        c = self.attn2(h, encoder_hidden_states, None, None)
        x, h = gated_residual_adaln(x, c, None, scale_ffn, shift_ffn, eps=self.norm3.eps)
        return gated_residual(x, self.ffn(h), gate_ffn)


class FusedWanAttnProcessor(stock.WanAttnProcessor):
    """Norm and rotation in one operator. A diffusers attention backend or context parallelism that is set stays in charge."""

    def __call__(
        self,
        attn: stock.WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        text, image, parallel = encoder_hidden_states, None, self._parallel_config
        if text is not None:
            parallel = None  # every rank holds the whole context
        if attn.add_k_proj is not None:
            assert text is not None
            image, text = text.tensor_split([text.shape[1] - TEXT_TOKENS], dim=1)
        q, k, v = stock._get_qkv_projections(attn, hidden_states, text)
        if rotary_emb is None:
            q, k = (t.unflatten(2, (attn.heads, -1)) for t in (attn.norm_q(q), attn.norm_k(k)))
        else:
            q, k = (t.unflatten(2, (attn.heads, -1)) for t in (q, k))
            norms = norm_weight(attn.norm_q, q), norm_weight(attn.norm_k, k)
            q, k = qk_norm_rope(q, k, *norms, *tables_and_grid(rotary_emb), eps=attn.norm_q.eps)
        o = self._attend(q, k, v.unflatten(2, (attn.heads, -1)), attention_mask, parallel)
        if image is not None:
            k, v = stock._get_added_kv_projections(attn, image)
            k, v = (t.unflatten(2, (attn.heads, -1)) for t in (attn.norm_added_k(k), v))
            o = o + self._attend(q, k, v, None, None)
        return attn.to_out[1](attn.to_out[0](o.flatten(2)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, parallel: object) -> Tensor:
        if mask is None and parallel is None and self._attention_backend is None:
            return attention(q, k, v)
        o = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=parallel)
        return o.type_as(q)


class FusedWanRotaryPosEmbed(stock.WanRotaryPosEmbed):
    def forward(self, hidden_states: Tensor) -> Rotary:
        cos, sin = super().forward(hidden_states)
        grid = [size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True)]
        axes = pairs(self.freqs_cos, self.freqs_sin).split([self.t_dim // 2, self.h_dim // 2, self.w_dim // 2], dim=1)
        return Rotary(cos, sin, *(axis[:n].contiguous() for axis, n in zip(axes, grid, strict=True)))


def pairs(cos: Tensor, sin: Tensor) -> Tensor:
    """[..., D / 2, 2] of (cos, sin) from two stock tables [..., D], where each value stands twice."""
    return torch.stack((cos[..., 0::2], sin[..., 1::2]), -1)


def tables_and_grid(rotary: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    """Without our tables (a stock model's, or tokens split over ranks): one axis with all channels, a position per token."""
    if isinstance(rotary, Rotary):
        frame, height, width = rotary[2:]
    else:
        frame = pairs(rotary[0][0, :, 0], rotary[1][0, :, 0])
        height = width = frame[:1, :0]
    return (frame, height, width), (frame.shape[0], height.shape[0], width.shape[0])


FusedWanTransformerBlock.__name__ = stock.WanTransformerBlock.__name__  # compile_repeated_blocks and FSDP go by it

BLOCKS = {stock.WanTransformerBlock: FusedWanTransformerBlock}
PARTS = {stock.WanAttnProcessor: FusedWanAttnProcessor, stock.WanRotaryPosEmbed: FusedWanRotaryPosEmbed}


def register_cache_hooks() -> None:
    """Tells diffusers' cache hooks (FirstBlockCache and others) what our block returns, where this diffusers has them."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        known = TransformerBlockRegistry.get(stock.WanTransformerBlock)
    except (ImportError, ValueError):
        return
    TransformerBlockRegistry.register(FusedWanTransformerBlock, copy.copy(known))
