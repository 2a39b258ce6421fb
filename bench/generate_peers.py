"""What bench_generate compares with: the same model and pipeline on plain PyTorch, launched eagerly or compiled.

Compiled is what stays the same from chunk to chunk: of every block one graph up to attention and one behind it, shared by all
layers. Between them run the cache, whose cursors are host integers of which Dynamo would make a graph per chunk, and attention,
for which Inductor would call SDPA as well. The graphs write keys and values into the slots of the cache, and multiply by the
4×4 camera matrices in sums, which Inductor fuses with what is around them, where it would call a library for a matrix product.
Embeddings, head, sampler and the last layer of the clean rerun stay eager. Mode is the default: "reduce-overhead" records no
graph that writes into its inputs, and for "max-autotune" the bench is too short.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

import dit_ops
from dit_ops import adaln, attention, gated_residual, gated_residual_adaln
from dit_ops.backbones import wan
from dit_ops.backbones.wan_block import Pass, modulation_of, run_block
from dit_ops.ops import prope_output, qk_norm_rope, qk_norm_rope_prope
from dit_ops.ops.qk_norm_rope import Grid, Rope
from dit_ops.pipelines import stages


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """Chunks in here, from the first one of a stream on, record no CUDA graphs."""
    with patch.object(stages, "capture_of", lambda *_: None):
        yield


@contextlib.contextmanager
def reference() -> Iterator[None]:
    with launched(), dit_ops.use_backend("reference"):
        yield


class Compiled:
    """The context of compiled chunks. compiler: of torch.compile; its graphs are kept from one context to the next."""

    def __init__(self, compiler: str | Callable[..., Any] = "inductor") -> None:
        options: dict[str, Any] = {"backend": compiler, "dynamic": False, "fullgraph": True}
        self._before, self._behind = torch.compile(before_attention, **options), torch.compile(behind_attention, **options)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(reference())
            stack.enter_context(patch.object(wan, "run_block", self.run_block))
            for module in (prope_output, qk_norm_rope, qk_norm_rope_prope):
                stack.enter_context(patch.object(module, "project_ref", project_in_sums))
            yield

    def run_block(
        self,
        i: int,
        block: WanTransformerBlock,
        camera: nn.Linear | None,
        x: Tensor,
        context: tuple[Tensor, Tensor | None] | None,
        modulation: Tensor,
        past: tuple[Tensor, Tensor] | None,
        shared: Pass,
    ) -> Tensor:
        """As backbones/wan_block.py, of a stream whose cache holds the text's keys; else, in its first step, eagerly."""
        cache, cameras, grid = shared.cache, shared.cameras, shared.layout.grid
        text = None if cache is None or context is not None else cache.text[i]
        if cache is None or camera is None or cameras is None or text is None:
            return run_block(i, block, camera, x, context, modulation, past, shared)
        B, L, _ = x.shape
        N, D = block.attn1.heads, block.attn1.inner_dim // block.attn1.heads
        slots = cache.slots(i, x.new_empty(B, L, 0, D), 2 * N)
        k, v = slots or x.new_empty(2, B, L, 2 * N, D)
        q = self._before(block, x, modulation, shared.rope, grid, *cameras, k, v)
        if slots is None:
            cache.write(i, k, v)
        o = attention(q, *cache.visible(i))
        return self._behind(block, camera, x, o, modulation, grid, cameras[0], text)


def before_attention(
    block: WanTransformerBlock,
    x: Tensor,  # [B, L, C]
    modulation: Tensor,  # [B, F', 6, C]
    rope: Rope,
    grid: Grid,
    P: Tensor,  # [B, F, 4, 4]
    P_inv: Tensor,
    k_out: Tensor,  # [B, L, 2N, D]
    v_out: Tensor,
) -> Tensor:
    """Queries of both paths [B, L, 2N, D]; keys and values go to k_out and v_out."""
    attn = block.attn1
    shift, scale, *_ = modulation_of(block, modulation)
    h = adaln(x, scale, shift, eps=block.norm1.eps)
    q, k, v = (proj(h).unflatten(2, (attn.heads, -1)) for proj in (attn.to_q, attn.to_k, attn.to_v))
    weights = attn.norm_q.weight, attn.norm_k.weight
    options: dict[str, Any] = {"k_out": k_out, "v_out": v_out, "eps": attn.norm_q.eps}
    return dit_ops.qk_norm_rope_prope(q, k, v, *weights, rope, grid, P, P_inv, **options)[0]


def behind_attention(
    block: WanTransformerBlock,
    camera: nn.Linear,
    x: Tensor,  # [B, L, C]
    o: Tensor,  # [B, L, 2N, D]
    modulation: Tensor,  # [B, F', 6, C]
    grid: Grid,
    P: Tensor,  # [B, F, 4, 4]
    text: tuple[Tensor, ...],  # keys and values
) -> Tensor:
    """x of the next block: output projections of both paths, cross-attention and FFN, each added with its gate."""
    eps = block.norm1.eps
    _, _, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation_of(block, modulation)
    o, projected = dit_ops.ulysses_gather_heads(o, grid, P, heads=block.attn1.heads)
    a = block.attn1.to_out[0](o.flatten(2)) + camera(projected.flatten(2))
    x, h = gated_residual_adaln(x, a, gate_sa, weight=block.norm2.weight, bias=block.norm2.bias, eps=eps)
    attn = block.attn2
    q = attn.norm_q(attn.to_q(h)).unflatten(2, (attn.heads, -1))
    c = attn.to_out[0](attention(q, text[0], text[1]).flatten(2))
    x, h = gated_residual_adaln(x, c, None, scale_ffn, shift_ffn, eps=eps)
    return gated_residual(x, block.ffn(h), gate_ffn)


def project_in_sums(x: Tensor, M: Tensor, halves: int) -> Tensor:
    """M x for every group of 4 channels, in fp32, as dit_ops/ops/prope_output.py has it in matrix products."""
    B, L, N, D = x.shape
    F = halves * M.shape[1]
    rows = x.float().view(B, F, L // F, N, D // 4, 1, 4)
    return (rows * M.float().repeat(1, halves, 1, 1)[:, :, None, None, None]).sum(-1).view(B, L, N, D)
