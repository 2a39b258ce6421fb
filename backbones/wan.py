"""Wan 2.1 as bidirectional, teacher-forced and causal streaming backbone, with an optional ProPE camera branch.

The weights live in a stock diffusers WanTransformer3DModel; only the camera branch's output projections are ours.
Rounding as in diffusers: norm, modulation and gates in fp32, everything else in the model's dtype.
Wan: arXiv 2503.20314. Shapes: B batch, F frames, L tokens, C channels, N heads, D head size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn
from typing_extensions import Self

from dit_ops import adaln, attention, gated_residual, gated_residual_adaln, ulysses_gather_heads, ulysses_scatter_heads
from dit_ops.backbones._block import Recompute, call_block
from dit_ops.backbones._common import DiffusersBackbone, check_video, patchify, token_grid, zero_linears
from dit_ops.backbones.wan_original import to_diffusers
from dit_ops.cache import KVCache
from dit_ops.camera import projective_cameras
from dit_ops.flow import per_frame
from dit_ops.layout import VideoLayout
from dit_ops.masks import Mask, TeacherForcing
from dit_ops.parallel import SequenceParallel
from dit_ops.rope import Rope3D


@dataclass(frozen=True)
class Pass:
    """What every block of one forward shares."""

    layout: VideoLayout
    mask: Mask | None
    rope: tuple[Tensor, Tensor, Tensor]
    cameras: tuple[Tensor, Tensor] | None  # P, P⁻¹ [B, F, 4, 4]
    cache: KVCache | None
    parallel: SequenceParallel | None  # the tokens of a block are this rank's part of every frame

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.parallel is None else self.parallel.group


class WanBackbone(DiffusersBackbone):
    """Flow prediction `[B, F, Cz, h, w] → [B, F, Cz, h, w]`.

    camera         True adds the ProPE branch: one more output projection per layer, zero at the start
    block_frames   latent frames per causal block (teacher forcing); None = one block of all frames

    With `sequence_parallel` set, every rank of its group is given the same arguments and returns the whole flow; each
    computes its part of the tokens.
    """

    stock = WanTransformer3DModel

    def __init__(self, transformer: WanTransformer3DModel, *, camera: bool = False, block_frames: int | None = None):
        super().__init__()
        config = transformer.config
        if config.patch_size[0] != 1:
            raise ValueError(f"WanBackbone: patch_size must be (1, height, width), got {tuple(config.patch_size)}")
        self.transformer = transformer
        self.block_frames = block_frames
        self.sequence_parallel: SequenceParallel | None = None
        self.gradient_checkpointing: Recompute | bool = False
        self.rope = Rope3D(config.attention_head_dim)
        self.camera: nn.ModuleList | None = None
        if camera:
            self.add_camera()

    @classmethod
    def from_original(
        cls,
        weights: dict | str | Path,
        config: dict,
        *,
        block_frames: int | None = None,
        ema: bool | None = None,
    ) -> Self:
        """Reads weights under the original Wan key names, or minWM's `model.pt`; `config` is the original config.json.

        ema: True takes `generator_ema`, False `generator`, None the EMA where the file has one. Strict as from_pretrained.
        """
        config, state, camera = to_diffusers(weights, config, ema=ema)
        return cls.from_state(config, state, {"camera": camera}, block_frames=block_frames)

    def add_camera(self) -> None:
        """Adds the ProPE output projections `[C, C]`, zero: the model's output does not change until they are trained."""
        if self.camera is None:
            self.camera = zero_linears([block.attn1.to_out[0] for block in self.transformer.blocks])

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.patch_embedding.weight.dtype

    @property
    def patch(self) -> tuple[int, int]:
        """Latents per token, (height, width)."""
        return self.config.patch_size[1:]

    def new_cache(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        window_frames: int | None = None,
        sink_frames: int = 0,
        rotated: bool = True,
    ) -> KVCache:
        """A cache for streaming latents `[batch, ·, Cz, height, width]`; window and sink are counted in latent frames.

        rotated = False takes half the memory of a camera model's cache and turns keys and values when it reads them.
        """
        if batch < 1:
            raise ValueError(f"new_cache: batch must be at least 1, got {batch}")
        token_grid(height, width, self.patch)
        return KVCache(len(self.transformer.blocks), window_frames=window_frames, sink_frames=sink_frames, rotated=rotated)

    def forward(
        self,
        latents: Tensor,  # [B, F, Cz, h, w]
        timestep: Tensor,  # [B] or [B, F], 0 … 1000
        encoder_hidden_states: Tensor,  # [B, T, C_text], as the condition side pads it
        *,
        encoder_hidden_states_image: Tensor | None = None,  # [B, T_image, C_image]
        condition_latents: Tensor | None = None,  # [B, F, C_condition, h, w], joined to the latents' channels (I2V)
        clean_latents: Tensor | None = None,  # [B, F, Cz, h, w]: teacher forcing
        clean_timestep: Tensor | None = None,  # [B] or [B, F], zeros by default
        viewmats: Tensor | None = None,  # [B, F, 4, 4] world-to-camera
        Ks: Tensor | None = None,  # [B, F, 3, 3] normalised
        cache: KVCache | None = None,  # causal streaming: latents are the next chunk
        start_frame: int = 0,  # absolute index of the chunk's first frame
    ) -> Tensor:
        """The flow `v = ε − x0` of the noisy latents: teacher forcing, streaming, or else bidirectional.

        In streaming the chunk's keys and values are stored when gradients are off (see KVCache).
        """
        check_video(latents, clean_latents, viewmats, Ks, cache, self.camera is not None)
        B, frames, _, height, width = latents.shape
        text_dim = self.config.text_dim
        if encoder_hidden_states.dim() != 3 or encoder_hidden_states.shape[::2] != (B, text_dim):
            got = list(encoder_hidden_states.shape)
            raise ValueError(f"encoder_hidden_states must be [B, T, C_text] = [{B}, T, {text_dim}], got {got}")
        halves = 1 if clean_latents is None else 2
        layout = VideoLayout(frames, *token_grid(height, width, self.patch), self.block_frames, halves, start_frame=start_frame)
        x, t = latents, timestep
        if clean_latents is not None:
            x = torch.cat([clean_latents, latents], dim=1)
            clean_t = torch.zeros_like(timestep) if clean_timestep is None else clean_timestep
            t = torch.cat([per_frame(clean_t, frames), per_frame(timestep, frames)], dim=1)
        if condition_latents is not None:
            x = torch.cat([x, condition_latents.repeat(1, halves, 1, 1, 1)], dim=2)

        context = self._text_context(encoder_hidden_states, encoder_hidden_states_image, cache)
        temb, modulation = self._time(t)
        shared = Pass(
            layout,
            TeacherForcing(layout) if halves == 2 else None,
            self.rope.tables(start_frame + frames, layout.height, layout.width, x.device),
            None if viewmats is None or Ks is None else projective_cameras(viewmats, Ks),
            cache,
            self.sequence_parallel,
        )
        parallel = self.sequence_parallel
        mine = (lambda tokens: tokens) if parallel is None else (lambda tokens: parallel.local_tokens(tokens, layout))
        x = patchify(x, self.transformer.patch_embedding, mine)
        if cache is not None:
            P_inv = None if shared.cameras is None else shared.cameras[1]
            size = layout.height, layout.width
            cache.begin(start_frame, frames, layout.tokens_per_frame, rope=shared.rope, size=size, P_inv=P_inv)
        for i, block in enumerate(self.transformer.blocks):
            past = cache.past(i) if cache is not None and torch.is_grad_enabled() else None
            camera = self.camera[i] if self.camera is not None and shared.cameras is not None else None
            args: Any = (i, block, camera, x, context, modulation, past, shared)
            x = call_block(block, run_block, *args, recompute=self.gradient_checkpointing)
        if cache is not None and not torch.is_grad_enabled():
            cache.commit()

        x = x.unflatten(1, (halves, -1))[:, -1]  # the noisy half
        temb = temb[:, -frames:]
        shift, scale = (self.transformer.scale_shift_table + temb.unsqueeze(2)).unbind(2)  # [B, F, C]
        x = self.transformer.proj_out(adaln(x, scale, shift, eps=self.config.eps))
        if parallel is not None:
            x = parallel.gather_tokens(x, layout, halves=1)
        return self._unpatchify(x, layout)

    def _unpatchify(self, x: Tensor, layout: VideoLayout) -> Tensor:
        """`[B, L, ph·pw·Cz]`, channel fastest → `[B, F, Cz, h, w]`."""
        x = x.unflatten(2, (*self.patch, -1)).unflatten(1, layout.grid)  # [B, F, H, W, ph, pw, Cz]
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`[B]` or `[B, F']` → time embedding `[B, F', C]` and the blocks' modulation `[B, F', 6, C]`; F' = 1 for `[B]`."""
        embedder = self.transformer.condition_embedder
        t = t[:, None] if t.dim() == 1 else t
        half = self.config.freq_dim // 2
        freq = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angle = t.double()[..., None] * freq
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).to(embedder.time_embedder.linear_1.weight.dtype)
        temb = embedder.time_embedder(wave).to(self.dtype)
        return temb, embedder.time_proj(nnf.silu(temb)).unflatten(-1, (6, -1))

    def _text_context(self, text: Tensor, image: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor | None] | None:
        """Embedded text and image tokens; None when the cache holds the keys and values made from these very tensors."""
        if cache is not None and not torch.is_grad_enabled() and cache.text_is(text, image) and cache.text[-1] is not None:
            return None
        embedder = self.transformer.condition_embedder
        if (image is None) != (embedder.image_embedder is None):
            need = "needs" if image is None else "has no image embedder and takes no"
            raise ValueError(f"this model {need} encoder_hidden_states_image")
        return embedder.text_embedder(text.to(self.dtype)), None if image is None else embedder.image_embedder(
            image.to(self.dtype)
        )


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
    shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = (block.scale_shift_table + modulation.float()).unbind(2)
    h = adaln(x, scale_sa, shift_sa, eps=eps)
    a = self_attention(i, block.attn1, camera, h, past, shared)
    if isinstance(block.norm2, nn.Identity):
        x = h = gated_residual(x, a, gate_sa)
    else:
        x, h = gated_residual_adaln(x, a, gate_sa, weight=block.norm2.weight, bias=block.norm2.bias, eps=eps)
    c = cross_attention(i, block.attn2, h, context, shared.cache)
    x, h = gated_residual_adaln(x, c, None, scale_ffn, shift_ffn, eps=eps)
    return gated_residual(x, block.ffn(h), gate_ffn)


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
    """The queries of h, and the keys and values of all tokens that they see: N heads of RoPE, with cameras N more of ProPE.

    In streaming without gradient the kernel writes keys and values into the slots of the cache.
    """
    layout, N, paths = shared.layout, attn.heads, 1 if shared.cameras is None else 2
    cache = None if torch.is_grad_enabled() else shared.cache
    q, k, v = (proj(h).unflatten(2, (N, -1)) for proj in (attn.to_q, attn.to_k, attn.to_v))
    slots, into = None, {}
    if cache is not None:
        mine = N if shared.parallel is None else shared.parallel.heads(N)[shared.parallel.rank]
        stored = mine * paths if cache.rotated else mine
        slots = cache.slots(i, k, stored)
        k_out, v_out = slots or (k.new_empty(k.shape[0], layout.tokens, stored, k.shape[3]) for _ in "kv")
        into = {"k_out": k_out, "v_out": v_out, "turn_keys": cache.rotated}
    where: dict[str, Any] = {"eps": attn.norm_q.eps, "start_frame": layout.start_frame, "halves": layout.halves, **into}
    weights, cameras = (attn.norm_q.weight, attn.norm_k.weight), shared.cameras or (None, None)
    q, k, v = ulysses_scatter_heads(q, k, v, *weights, shared.rope, layout.grid, *cameras, group=shared.group, **where)
    if cache is not None:
        k, v = cache.visible(i) if slots else cache.write(i, k_out, v_out)
    elif past is not None:
        k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
    return q, k, v


def cross_attention(
    i: int, attn: WanAttention, h: Tensor, context: tuple[Tensor, Tensor | None] | None, cache: KVCache | None
) -> Tensor:
    """Attention to the text and, separately, to the image tokens (I2V); the two results are summed before `W_o`."""
    N = attn.heads
    q = attn.norm_q(attn.to_q(h)).unflatten(2, (N, -1))
    keys = cache.text[i] if cache is not None and context is None else None
    if keys is None:
        assert context is not None
        text, image = context
        keys = (attn.norm_k(attn.to_k(text)), attn.to_v(text))
        if image is not None:
            keys += (attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image))
        keys = tuple(t.unflatten(2, (N, -1)) for t in keys)
        if cache is not None and not torch.is_grad_enabled():
            cache.text[i] = keys
    o = attention(q, keys[0], keys[1])
    if len(keys) == 4:
        o = o + attention(q, keys[2], keys[3])
    return attn.to_out[0](o.flatten(2))
