"""A stock diffusers HunyuanVideo 1.5 transformer that runs through our operators: subclasses that only compute differently.

`dit_ops.fuse` makes parts of a model instances of these classes and `unfuse` makes them stock again, so they hold no state.
The model packs the text once per forward, so that its blocks see no padding and build no mask of all tokens by all tokens.
Linear and Dropout are called as modules (LoRA, hooks). Shapes: B batch, L video tokens, T text tokens, C channels, N heads.
"""

import copy
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_hunyuan_video15 as stock
from torch import Tensor, nn

from dit_ops import attention, qk_norm_rope
from dit_ops.backbones._common import norm_weight
from dit_ops.backbones.hunyuan_video15_block import enter, leave, text_heads
from dit_ops.backbones.hunyuan_video15_text import Conditions, condition_tokens, filled, sees_text
from dit_ops.rope import Rope3D

Lengths = tuple[int, ...]  # text tokens of each sample; the rest of the T are padding


class FusedHunyuanVideo15Transformer3DModel(stock.HunyuanVideo15Transformer3DModel):
    """The stock arguments and outputs; the blocks get `Lengths` where stock ones get a mask of the text.

    An image of zeros is no image, for every sample on its own; a stock model looks at the whole batch.
    """

    @stock.apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,  # [B, Cz, F, h, w]
        timestep: Tensor,  # [B]
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep_r: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        encoder_attention_mask_2: Tensor | None = None,
        image_embeds: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        config, video = self.config, hidden_states
        rope = self.rope(video)
        temb = self.time_embed(timestep, timestep_r=timestep_r)
        x = self.x_embedder(video)
        given = Conditions(
            encoder_hidden_states,
            encoder_attention_mask,
            encoder_hidden_states_2,
            encoder_attention_mask_2,
            image_embeds,
        )
        text, lengths = condition_tokens(self, given, timestep, call_refiner)
        padded = lengths if min(lengths) < text.shape[1] else None
        for block in self.transformer_blocks:
            args = (x, text, temb, padded, rope)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, text = self._gradient_checkpointing_func(block, *args)
            else:
                x, text = block(*args)
        x = self.proj_out(self.norm_out(x, temb))
        patch = config.patch_size_t, config.patch_size, config.patch_size
        grid = [size // p for size, p in zip(video.shape[2:], patch, strict=True)]
        x = x.unflatten(2, (-1, *patch)).unflatten(1, grid).permute(0, 4, 1, 5, 2, 6, 3, 7)  # [B, Cz, F, pt, H, p, W, p]
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def call_refiner(refiner: nn.Module, states: Tensor, lengths: Lengths, timestep: Tensor) -> Tensor:
    T = states.shape[1]
    return refiner(states, timestep, None if min(lengths) == T else filled(lengths, T).to(states.device))


class FusedHunyuanVideo15TransformerBlock(stock.HunyuanVideo15TransformerBlock):
    """x += gate·Attn(adaLN(x)); x += gate·MLP(adaLN(x)), for the video and the text."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, L, C]
        encoder_hidden_states: Tensor,  # [B, T, C]
        temb: Tensor,  # [B, C]
        attention_mask: Lengths | None = None,
        freqs_cis: tuple[Tensor, Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        temb = self.norm1.silu(temb)[:, None]
        h, rows = enter(self.norm1, hidden_states, temb)
        text_h, text_rows = enter(self.norm1_context, encoder_hidden_states, temb)
        a, text_a = self.attn(h, encoder_hidden_states=text_h, attention_mask=attention_mask, image_rotary_emb=freqs_cis)
        x = leave(hidden_states, a, rows, self.norm2, self.ff)
        return x, leave(encoder_hidden_states, text_a, text_rows, self.norm2_context, self.ff_context)


class FusedHunyuanVideo15AttnProcessor(stock.HunyuanVideo15AttnProcessor2_0):
    """Norm and rotation in one operator. A diffusers attention backend that is set stays in charge."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Lengths | None,
        image_rotary_emb: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        T, (frame, height, width) = encoder_hidden_states.shape[1], image_rotary_emb
        q, k, v = (proj(hidden_states).unflatten(2, (attn.heads, -1)) for proj in (attn.to_q, attn.to_k, attn.to_v))
        norms = norm_weight(attn.norm_q, q), norm_weight(attn.norm_k, k)
        grid = frame.shape[0], height.shape[0], width.shape[0]
        q, k = qk_norm_rope(q, k, *norms, image_rotary_emb, grid, eps=attn.norm_q.eps)
        text = text_heads(attn, encoder_hidden_states)
        q, k, v = (torch.cat(pair, 1) for pair in zip(text, (q, k, v), strict=True))
        o = self._attend(q, k, v, T, attention_mask).flatten(2)
        return attn.to_out[1](attn.to_out[0](o[:, T:])), attn.to_add_out(o[:, :T])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, T: int, lengths: Lengths | None) -> Tensor:
        L = q.shape[1]
        if self._attention_backend is None and self._parallel_config is None:
            return attention(q, k, v, None if lengths is None else sees_text(L, L, T, lengths))
        mask = None
        if lengths is not None:  # [B, 1, 1, T + L]
            seen = torch.cat([filled(lengths, T), torch.ones(len(lengths), L - T, dtype=torch.bool)], 1)
            mask = seen[:, None, None].to(q.device)
        o = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return o.type_as(q)


class FusedHunyuanVideo15RotaryPosEmbed(stock.HunyuanVideo15RotaryPosEmbed):
    """The three tables (frame, height, width) of our operators, cut to the grid, instead of cos and sin of every token."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        F, H, W = hidden_states.shape[2:]
        F, H, W = F // self.patch_size_t, H // self.patch_size, W // self.patch_size
        d_t, d_h, d_w = self.rope_dim
        frame, height, width = Rope3D(d_t + d_h + d_w, self.theta, (d_t, d_h, d_w)).tables(F, H, W, hidden_states.device)
        return frame[:F], height[:H], width[:W]


# compile_repeated_blocks, FSDP and the saved config go by the name
FusedHunyuanVideo15TransformerBlock.__name__ = stock.HunyuanVideo15TransformerBlock.__name__
FusedHunyuanVideo15Transformer3DModel.__name__ = stock.HunyuanVideo15Transformer3DModel.__name__

BLOCKS = {stock.HunyuanVideo15TransformerBlock: FusedHunyuanVideo15TransformerBlock}
PARTS = {
    stock.HunyuanVideo15Transformer3DModel: FusedHunyuanVideo15Transformer3DModel,
    stock.HunyuanVideo15AttnProcessor2_0: FusedHunyuanVideo15AttnProcessor,
    stock.HunyuanVideo15RotaryPosEmbed: FusedHunyuanVideo15RotaryPosEmbed,
}


def register_cache_hooks() -> None:
    """Tells diffusers' cache hooks what our block returns, where this diffusers knows the stock block."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        known = TransformerBlockRegistry.get(stock.HunyuanVideo15TransformerBlock)
    except (ImportError, ValueError):
        return
    TransformerBlockRegistry.register(FusedHunyuanVideo15TransformerBlock, copy.copy(known))
