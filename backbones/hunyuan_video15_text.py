"""The condition tokens of HunyuanVideo 1.5: image, glyph (byT5) and prompt (LLM) states as one packed sequence.

Order [image | byT5 | LLM], padding dropped. In a batch the shorter sequences are filled up in front, so that every sample sees
one run of keys [its text | video] and never the padding.
Shapes: B batch, T tokens, C channels, N heads, D head size.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_ops import adaln, attention, gated_residual, gated_residual_adaln
from dit_ops.layout import VideoLayout
from dit_ops.masks import Full, Intervals, Mask, Range, Row, TeacherForcing, merge

Masks = Mask | Sequence[Mask] | None  # None: every query sees every key; a sequence: one mask per sample
Refine = Callable[[Any, Tensor, tuple[int, ...], Tensor], Tensor]  # refiner, states, counts, timestep
LLM, BYT5, IMAGE = range(3)  # rows of cond_type_embed


class Conditions(NamedTuple):
    """What a prompt and its first frame are encoded into. Masks are 0 at padding; None = there is none."""

    llm: Tensor  # [B, T, C_text]
    llm_mask: Tensor | None = None  # [B, T]
    byt5: Tensor | None = None  # [B, T', C_byt5]
    byt5_mask: Tensor | None = None  # [B, T']
    image: Tensor | None = None  # [B, T'', C_image]; all zeros: this sample has no image


def condition_tokens(
    model: Any, given: Conditions, timestep: Tensor, refine: Refine | None = None
) -> tuple[Tensor, tuple[int, ...]]:
    """Tokens `[B, T, C]` and how many of them each sample has.

    model: a HunyuanVideo15Transformer3DModel    timestep: [B]    refine: runs its context_embedder; None = `run_refiner`
    With gradient every embedder whose states are given runs, on padding if there is nothing else: the same parameters have a
    gradient on every rank, whatever its samples hold.
    """
    training = torch.is_grad_enabled()
    image_counts, byt5_counts, llm_counts = _counts(given)
    kind = model.cond_type_embed(torch.arange(3, device=given.llm.device))
    llm = pack(given.llm.to(kind.dtype), given.llm_mask, llm_counts)
    parts = [((refine or run_refiner)(model.context_embedder, llm, llm_counts, timestep) + kind[LLM], llm_counts)]
    if given.byt5 is not None and (training or any(byt5_counts)):
        byt5 = pack(given.byt5.to(kind.dtype), given.byt5_mask, byt5_counts)
        parts.insert(0, (model.context_embedder_2(byt5) + kind[BYT5], byt5_counts))
    if given.image is not None and (training or any(image_counts)):
        image = given.image[:, : max(1, *image_counts)].to(kind.dtype)
        parts.insert(0, (model.image_embedder(image) + kind[IMAGE], image_counts))
    tokens = torch.cat([part for part, _ in parts], 1)
    lengths = tuple(map(sum, zip(*(counts for _, counts in parts), strict=True)))
    valid = torch.cat([filled(counts, part.shape[1]) for part, counts in parts], 1)
    return pack(tokens, None if valid.all() else valid.to(tokens.device), lengths), lengths


def _counts(given: Conditions) -> tuple[tuple[int, ...], ...]:
    """Valid tokens of each sample: (image, byT5, LLM). Brought to the host together, the only synchronisation of a forward."""

    def count(states: Tensor | None, mask: Tensor | None) -> Tensor:
        if states is None or mask is None:
            return torch.full((given.llm.shape[0],), 0 if states is None else states.shape[1], device=given.llm.device)
        return mask.bool().sum(1).to(given.llm.device)

    image = given.image
    some = None if image is None else image.flatten(1).any(1, keepdim=True).expand(image.shape[:2])
    counts = [count(image, some), count(given.byt5, given.byt5_mask), count(given.llm, given.llm_mask)]
    images, byt5s, llms = (tuple(row) for row in torch.stack(counts).tolist())
    if 0 in llms:
        raise ValueError(f"encoder_attention_mask must keep at least one token of every sample, got {list(llms)}")
    return images, byt5s, llms


def pack(states: Tensor, mask: Tensor | None, counts: Sequence[int]) -> Tensor:
    """The valid states of every sample last, in order, cut to the longest sample, and to one where none has any."""
    if mask is None:
        return states
    order = mask.bool().to(torch.uint8).argsort(stable=True, dim=1)[:, -max(1, *counts) :]
    return states.gather(1, order.to(states.device)[..., None].expand(-1, -1, states.shape[2]))


def filled(counts: Sequence[int], T: int) -> Tensor:
    """Boolean [B, T]: False at the padding in front of each sample's tokens."""
    return torch.arange(T) >= T - torch.tensor(counts)[:, None]


def run_refiner(refiner: Any, states: Tensor, counts: tuple[int, ...], timestep: Tensor) -> Tensor:
    """LLM states `[B, T, C_text]` → `[B, T, C]`: x += gate·SelfAttn(LN(x)); x += gate·MLP(LN(x)), gates from time and text."""
    T = states.shape[1]
    valid = filled(counts, T).to(states.device)[..., None]
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    mean = wide.masked_fill(~valid, 0).sum(1) / valid.sum(1)
    temb = refiner.time_text_embed(timestep, mean.to(states.dtype))
    x, mask = refiner.proj_in(states), sees_text(T, T, T, counts)
    for block in refiner.token_refiner.refiner_blocks:
        gate_msa, gate_mlp = block.norm_out.linear(block.norm_out.nonlinearity(temb)).chunk(2, -1)  # [B, C]
        attn, norm1, norm2 = block.attn, block.norm1, block.norm2
        h = adaln(x, weight=norm1.weight, bias=norm1.bias, eps=norm1.eps)
        q, k, v = (proj(h).unflatten(2, (attn.heads, -1)) for proj in (attn.to_q, attn.to_k, attn.to_v))
        a = attn.to_out[0](attention(q, k, v, mask).flatten(2))
        x, h = gated_residual_adaln(x, a, gate_msa, weight=norm2.weight, bias=norm2.bias, eps=norm2.eps)
        x = gated_residual(x, block.ff(h), gate_mlp)
    return x


# masks: keys are [padding | text | video], T of them padding and text, lengths[b] text of sample b


@lru_cache(maxsize=256)
def sees_text(queries: int, keys: int, T: int, lengths: tuple[int, ...]) -> Masks:
    """Every query sees the sample's text tokens and all of the video."""
    return None if min(lengths) == T else _without_padding(Full(queries, keys), T, lengths)


@lru_cache(maxsize=64)
def video_mask(layout: VideoLayout, queries: int, keys: int, lengths: tuple[int, ...]) -> Masks:
    """What the video sees of [text | past | own], or in teacher forcing of [text | clean | noisy]; T is layout.prefix."""
    T = layout.prefix
    if layout.halves == 1:
        return sees_text(queries, keys, T, lengths)
    rows = tuple((q0 - T, q1 - T, seen) for q0, q1, seen in TeacherForcing(layout).intervals() if q0 >= T)
    video = Intervals(rows, queries, keys)
    return video if min(lengths) == T else _without_padding(video, T, lengths)


def _without_padding(mask: Mask, T: int, lengths: tuple[int, ...]) -> tuple[Mask, ...]:
    """The mask without the first T − lengths[b] keys, for every sample b."""

    def cut(seen: tuple[Range, ...], start: int) -> tuple[Range, ...]:
        return merge([(max(k0, start), k1) for k0, k1 in seen])

    def row(start: int) -> tuple[Row, ...]:
        return tuple((q0, q1, cut(seen, start)) for q0, q1, seen in mask.intervals())

    return tuple(Intervals(row(T - n), mask.queries, mask.keys) for n in lengths)
