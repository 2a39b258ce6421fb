"""One block of Wan: self-attention over the frames, cross-attention to the text, and the FFN.

Shapes: B batch, F frames, L tokens, C channels, N heads, D head size; F' = F (of both halves), or 1 for one timestep.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn

from dit_ops import adaln, attention, gated_residual, gated_residual_adaln, ulysses_gather_heads, ulysses_scatter_heads
from dit_ops.cache import KVCache
from dit_ops.layout import VideoLayout
from dit_ops.masks import Mask
from dit_ops.ops.qk_norm_rope import Rope
from dit_ops.parallel import SequenceParallel


@dataclass(frozen=True)
class Pass:
    """What every block of one forward shares."""

    layout: VideoLayout
    mask: Mask | None
    rope: Rope
    cameras: tuple[Tensor, Tensor] | None  # P, P⁻¹ [B, F, 4, 4]
    cache: KVCache | None
    parallel: SequenceParallel | None  # the tokens of a block are this rank's part of every frame

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.parallel is None else self.parallel.group


def run_block(
    i: int,
    block: WanTransformerBlock,
    camera: nn.Linear | None,
    x: Tensor,  # [B, L, C]
    context: tuple[Tensor, Tensor | None] | None,
    modulation: Tensor,  # [B, F', 6, C]
    past: tuple[Tensor, Tensor] | None,
    shared: Pass,
) -> Tensor:
    """x += gate·SelfAttn(adaLN(x));  x += CrossAttn(LN(x));  x += gate·FFN(adaLN(x))."""
    eps = block.norm1.eps
    shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation_of(block, modulation)
    h = adaln(x, scale_sa, shift_sa, eps=eps)
    a = self_attention(i, block.attn1, camera, h, past, shared)
    if isinstance(block.norm2, nn.Identity):
        x = h = gated_residual(x, a, gate_sa)
    else:
        x, h = gated_residual_adaln(x, a, gate_sa, weight=block.norm2.weight, bias=block.norm2.bias, eps=eps)
    c = cross_attention(i, block.attn2, h, context, shared.cache)
    x, h = gated_residual_adaln(x, c, None, scale_ffn, shift_ffn, eps=eps)
    return gated_residual(x, block.ffn(h), gate_ffn)


def store_keys(
    i: int,
    block: WanTransformerBlock,
    x: Tensor,
    context: tuple[Tensor, Tensor | None] | None,
    modulation: Tensor,
    shared: Pass,
) -> None:
    """Of a block only what the cache keeps: keys and values of x, and those of a text that is new."""
    shift_sa, scale_sa, *_ = modulation_of(block, modulation)
    own_heads(i, block.attn1, adaln(x, scale_sa, shift_sa, eps=block.norm1.eps), shared, keys_only=True)
    text_heads(i, block.attn2, context, shared.cache)


def modulation_of(block: WanTransformerBlock, modulation: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of self-attention and of the FFN, each [B, F', C]."""
    return (block.scale_shift_table + modulation.float()).unbind(2)


def self_attention(
    i: int, attn: WanAttention, camera: nn.Linear | None, h: Tensor, past: tuple[Tensor, Tensor] | None, shared: Pass
) -> Tensor:
    """`W_o·o [+ W_p·P·o']`: the RoPE path and the ProPE path are one attention call with 2N heads."""
    q, k, v = heads_seen(i, attn, h, past, shared)
    o = attention(q, k, v, shared.mask) if q.shape[2] else q  # a rank may have no head; it takes part in the exchange
    layout, P = shared.layout, None if shared.cameras is None else shared.cameras[0]
    o, *paths = ulysses_gather_heads(o, layout.grid, P, heads=attn.heads, group=shared.group, halves=layout.halves)
    out = attn.to_out[0](o.flatten(2))
    return out if camera is None else out + camera(paths[0].flatten(2))


def heads_seen(
    i: int, attn: WanAttention, h: Tensor, past: tuple[Tensor, Tensor] | None, shared: Pass
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries of h, and the keys and values of all tokens that they see: N heads of RoPE, with cameras N more of ProPE."""
    q, k, v = own_heads(i, attn, h, shared)
    if shared.cache is not None and not torch.is_grad_enabled():
        k, v = shared.cache.visible(i)
    elif past is not None:
        k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
    return q, k, v


def own_heads(i: int, attn: WanAttention, h: Tensor, shared: Pass, *, keys_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of h. In streaming without gradient the kernel writes the latter into the slots of the cache.

    keys_only: the queries mean nothing; keys stand in for them, which saves their projection.
    """
    layout, N, paths = shared.layout, attn.heads, 1 if shared.cameras is None else 2
    cache = None if torch.is_grad_enabled() else shared.cache
    q = None if keys_only else attn.to_q(h).unflatten(2, (N, -1))
    k, v = (proj(h).unflatten(2, (N, -1)) for proj in (attn.to_k, attn.to_v))
    slots, into = None, {}
    if cache is not None:
        mine = N if shared.parallel is None else shared.parallel.heads(N)[shared.parallel.rank]
        stored = mine * paths if cache.rotated else mine
        slots = cache.slots(i, k, stored)
        k_out, v_out = slots or (k.new_empty(k.shape[0], layout.tokens, stored, k.shape[3]) for _ in "kv")
        into = {"k_out": k_out, "v_out": v_out, "turn_keys": cache.rotated}
    where: dict[str, Any] = {"eps": attn.norm_q.eps, "start_frame": layout.start_frame, "halves": layout.halves, **into}
    weights, cameras = (attn.norm_q.weight, attn.norm_k.weight), shared.cameras or (None, None)
    q, k, v = ulysses_scatter_heads(
        k if q is None else q, k, v, *weights, shared.rope, layout.grid, *cameras, group=shared.group, **where
    )
    if cache is not None and slots is None:
        cache.write(i, k_out, v_out)
    return q, k, v


def cross_attention(
    i: int, attn: WanAttention, h: Tensor, context: tuple[Tensor, Tensor | None] | None, cache: KVCache | None
) -> Tensor:
    """Attention to the text and, separately, to the image tokens (I2V); the two results are summed before `W_o`."""
    q = attn.norm_q(attn.to_q(h)).unflatten(2, (attn.heads, -1))
    keys = text_heads(i, attn, context, cache)
    o = attention(q, keys[0], keys[1])
    if len(keys) == 4:
        o = o + attention(q, keys[2], keys[3])
    return attn.to_out[0](o.flatten(2))


def text_heads(
    i: int, attn: WanAttention, context: tuple[Tensor, Tensor | None] | None, cache: KVCache | None
) -> tuple[Tensor, ...]:
    """Keys and values of the text, and of the image; context None: those that the cache holds."""
    if context is None:
        return cast(tuple[Tensor, ...], cast(KVCache, cache).text[i])
    text, image = context
    keys: tuple[Tensor, ...] = (attn.norm_k(attn.to_k(text)), attn.to_v(text))
    if image is not None:
        keys += (attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image))
    keys = tuple(t.unflatten(2, (attn.heads, -1)) for t in keys)
    if cache is not None and not torch.is_grad_enabled():
        cache.text[i] = keys
    return keys
