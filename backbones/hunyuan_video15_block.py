"""One block of HunyuanVideo 1.5: a video stream and a text stream that meet in the attention.

On several ranks (dit_ops/parallel.py) a block holds this rank's part of the video and all of the text. Keys and values of the
text never travel: a rank has computed them and takes its heads. Where the text sees the video too, its output comes back with
the video's, in one exchange.
Shapes: B batch, F frames, L video tokens, T text tokens, C channels, N heads, D head size; F' = F, or 1 for one timestep;
L_r and N_r are a rank's share.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15TransformerBlock
from torch import Tensor, nn

from dit_ops import adaln, attention, gated_residual, gated_residual_adaln, ulysses_gather_heads, ulysses_scatter_heads
from dit_ops.backbones.hunyuan_video15_text import sees_text, video_mask
from dit_ops.cache import KVCache
from dit_ops.layout import VideoLayout
from dit_ops.ops.qk_norm_rope import Rope
from dit_ops.parallel import SequenceParallel


@dataclass(frozen=True)
class Pass:
    """What every block of one forward shares."""

    layout: VideoLayout  # its prefix is the text
    lengths: tuple[int, ...]  # text tokens of each sample; the rest of the T are padding
    rope: Rope
    cameras: tuple[Tensor, Tensor] | None  # P, P⁻¹ [B, F, 4, 4]
    cache: KVCache | None
    shared_prope: bool
    last: int  # of the last block, which has no use for the text's output
    parallel: SequenceParallel | None = None  # of more than one rank

    @property
    def joint(self) -> bool:
        """The text sees the video too: bidirectional."""
        return self.layout.halves == 1 and self.cache is None

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.parallel is None else self.parallel.group


def run_block(
    i: int,
    block: HunyuanVideo15TransformerBlock,
    camera: nn.Linear | None,
    x: Tensor,  # [B, L_r, C]
    text: Tensor | None,  # [B, T, C]; None: its keys are in the cache
    temb: Tensor,  # [B, F', C]
    text_temb: Tensor | None,  # [B, 1, C], as text
    past: tuple[Tensor, Tensor] | None,
    shared: Pass,
) -> tuple[Tensor, Tensor | None]:
    """x += gate·Attn(adaLN(x)); x += gate·MLP(adaLN(x)), for the video and the text, which meet in the attention."""
    h, rows = enter(block.norm1, x, temb)
    if text is None or text_temb is None:
        a, _ = joint_attention(i, block.attn, camera, h, None, past, shared)
        return leave(x, a, rows, block.norm2, block.ff), None
    text_h, text_rows = enter(block.norm1_context, text, text_temb)
    a, text_a = joint_attention(i, block.attn, camera, h, text_h, past, shared)
    x = leave(x, a, rows, block.norm2, block.ff)
    return x, None if text_a is None else leave(text, text_a, text_rows, block.norm2_context, block.ff_context)


def store_keys(i: int, block: HunyuanVideo15TransformerBlock, x: Tensor, temb: Tensor, shared: Pass) -> None:
    """Of a block only what the cache keeps: keys and values of x."""
    h, _ = enter(block.norm1, x, temb)
    _, _, _, own = own_heads(i, block.attn, h, shared, keys_only=True)
    if own is not None:
        share_rope_path(i, own, shared)


def enter(norm: AdaLayerNormZero, x: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The modulated norm before attention, and the rest of the modulation: gate, shift, scale, gate, each [B, F', C]."""
    shift, scale, *rows = norm.linear(temb).chunk(6, dim=-1)
    return adaln(x, scale, shift, eps=norm.norm.eps), rows


def leave(x: Tensor, a: Tensor, rows: list[Tensor], norm: nn.LayerNorm, mlp: nn.Module) -> Tensor:
    """The residual sums of the attention's output `a` and of the MLP."""
    gate, shift, scale, gate_mlp = rows
    x, h = gated_residual_adaln(x, a, gate, scale, shift, eps=norm.eps)
    return gated_residual(x, mlp(h), gate_mlp)


def joint_attention(
    i: int,
    attn: Attention,
    camera: nn.Linear | None,
    h: Tensor,
    text_h: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
    shared: Pass,
) -> tuple[Tensor, Tensor | None]:
    """`W_o·o [+ W_p·P·o']` of the video, its RoPE and ProPE paths in one call of attention with 2N heads; `W·o` of the text.

    Keys are [text | past | own]. The text has no position and no camera: both paths see the same keys of it.
    """
    layout, N, cameras = shared.layout, attn.heads, shared.cameras
    T, paths, prefix, text_o = layout.prefix, 1 if cameras is None else 2, 0, None
    q, k, v, own = video_heads(i, attn, h, shared)
    if text_h is not None:
        text = text_heads(attn, text_h)
        if i != shared.last and not shared.joint:
            text_o = attention(*text, sees_text(T, T, T, shared.lengths))
        text_q, text_k, text_v = (heads_here(t, shared.parallel) for t in text)
        parts = [(text_k.repeat(1, 1, paths, 1), text_v.repeat(1, 1, paths, 1)), *([] if past is None else [past]), (k, v)]
        k, v = (torch.cat(t, 1) for t in zip(*parts, strict=True))
        if i != shared.last and shared.joint:
            q, prefix = torch.cat([text_q.repeat(1, 1, paths, 1), q], 1), T
    if q.shape[2]:
        o = attention(q, k, v, video_mask(layout, q.shape[1], k.shape[1], shared.lengths))
    else:  # a rank without heads: the same parameters have a gradient as on the others, and it takes part in the exchange
        o = q + k.sum(1, keepdim=True) + v.sum(1, keepdim=True)
    if own is not None:
        share_rope_path(i, own, shared)
    if prefix and shared.group is None:  # views; the operator would join the text and the projected video again
        text_o, o, prefix = o[:, :T, :N], o[:, T:], 0
    where: dict[str, Any] = {"group": shared.group, "halves": layout.halves, "prefix": prefix}
    o, *prope_o = ulysses_gather_heads(o, layout.grid, None if cameras is None else cameras[0], heads=N, **where)
    if prefix:
        text_o = o[:, :T]
    out = attn.to_out[0](o[:, prefix:].flatten(2))
    if camera is not None and prope_o:
        out = out + camera(prope_o[0][:, prefix:].flatten(2))
    return out, None if text_o is None else attn.to_add_out(text_o.flatten(2))


def video_heads(
    i: int, attn: Attention, h: Tensor, shared: Pass
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Queries, keys and values of all tokens, h being this rank's: N_r heads of RoPE, with cameras N_r more of ProPE.

    In streaming without gradient the keys and values are all that the cache lets the chunk see; then also the chunk's own.
    """
    q, k, v, own = own_heads(i, attn, h, shared)
    if own is not None and shared.cache is not None:
        k, v = shared.cache.visible(i)
    return q, k, v, own


def own_heads(
    i: int, attn: Attention, h: Tensor, shared: Pass, *, keys_only: bool = False
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Queries, keys and values of all tokens; in streaming without gradient the latter are in the cache, and returned again.

    keys_only: the queries mean nothing; keys stand in for them, which saves their projection.
    """
    layout, N = shared.layout, attn.heads
    cache = None if torch.is_grad_enabled() else shared.cache
    q = None if keys_only else attn.to_q(h).unflatten(2, (N, -1))
    k, v = (proj(h).unflatten(2, (N, -1)) for proj in (attn.to_k, attn.to_v))
    own, slots, into = None, None, {}
    if cache is not None:
        mine = N if shared.parallel is None else shared.parallel.heads(N)[shared.parallel.rank]
        stored = 2 * mine if cache.rotated and shared.cameras is not None else mine
        slots = None if shared.shared_prope else cache.slots(i, k, stored)
        shape = k.shape[0], layout.tokens, stored, k.shape[3]
        own = slots or (k.new_empty(shape), v.new_empty(shape))
        into = {"k_out": own[0], "v_out": own[1], "turn_keys": cache.rotated}
    where: dict[str, Any] = {"eps": attn.norm_q.eps, "start_frame": layout.start_frame, "halves": layout.halves, **into}
    norms, cameras = (attn.norm_q.weight, attn.norm_k.weight), shared.cameras or (None, None)
    q, k, v = ulysses_scatter_heads(
        k if q is None else q, k, v, *norms, shared.rope, layout.grid, *cameras, group=shared.group, **where
    )
    if cache is not None and own is not None and slots is None:
        cache.write(i, *own)
    return q, k, v, own


def share_rope_path(i: int, own: tuple[Tensor, Tensor], shared: Pass) -> None:
    """For later chunks the RoPE path's keys and values stand in the place of the ProPE path's, if the model wants it so."""
    if not shared.shared_prope or shared.cameras is None or shared.cache is None:
        return
    for t in own:
        rope_path, prope_path = t.tensor_split(2, 2)
        prope_path.copy_(rope_path)
    shared.cache.write(i, *own)


def cache_text(
    i: int,
    block: HunyuanVideo15TransformerBlock,
    text: Tensor,
    temb: Tensor,
    lengths: tuple[int, ...],
    cache: KVCache,
    paths: int,
    parallel: SequenceParallel | None,
) -> Tensor:
    """The text's half of a block alone; its keys and values, of this rank's heads, go into the cache, for each of the paths."""
    h, rows = enter(block.norm1_context, text, temb)
    q, k, v = text_heads(block.attn, h)
    cache.write_prefix(i, *(heads_here(t, parallel).repeat(1, 1, paths, 1) for t in (k, v)))
    T = text.shape[1]
    a = block.attn.to_add_out(attention(q, k, v, sees_text(T, T, T, lengths)).flatten(2))
    return leave(text, a, rows, block.norm2_context, block.ff_context)


def text_heads(attn: Attention, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed queries and keys, and values, of the text `[B, T, N, D]`."""
    q, k, v = (proj(h).unflatten(2, (attn.heads, -1)) for proj in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    return attn.norm_added_q(q), attn.norm_added_k(k), v


def heads_here(text: Tensor, parallel: SequenceParallel | None) -> Tensor:
    """This rank's heads of the text: `[B, T, N, D] → [B, T, N_r, D]`, a view."""
    return text if parallel is None else text.tensor_split(parallel.size, 2)[parallel.rank]
