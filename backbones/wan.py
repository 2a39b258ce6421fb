"""Wan 2.1 as bidirectional, teacher-forced and causal streaming backbone, with an optional ProPE camera branch.

The weights live in a stock diffusers WanTransformer3DModel; only the camera branch's output projections are ours.
Rounding as in diffusers: norm, modulation and gates in fp32, everything else in the model's dtype.
Wan: arXiv 2503.20314. Shapes: B batch, F frames, L tokens, C channels, N heads, D head size.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from typing_extensions import Self

from dit_ops import adaln
from dit_ops.backbones._block import Recompute, call_block
from dit_ops.backbones._common import DiffusersBackbone, patchify, token_grid, zero_linears
from dit_ops.backbones.wan_block import Pass, run_block, store_keys
from dit_ops.backbones.wan_original import to_diffusers
from dit_ops.cache import KVCache
from dit_ops.camera import projective_cameras
from dit_ops.flow import per_frame
from dit_ops.layout import VideoLayout
from dit_ops.masks import TeacherForcing
from dit_ops.ops.qk_norm_rope import Rope
from dit_ops.rope import Rope3D


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
    def blocks(self) -> nn.ModuleList:
        return self.transformer.blocks

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
        return KVCache(len(self.blocks), window_frames=window_frames, sink_frames=sink_frames, rotated=rotated)

    def _flow(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        rope: Rope,
        encoder_hidden_states_image: Tensor | None = None,  # [B, T_image, C_image]
        condition_latents: Tensor | None = None,  # [B, F, C_condition, h, w], joined to the latents' channels (I2V)
        clean_latents: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        viewmats: Tensor | None = None,
        Ks: Tensor | None = None,
        cache: KVCache | None = None,
        start_frame: int = 0,
        keys_only: bool = False,
    ) -> Tensor:
        """rope: its row start_frame is the first frame's."""
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
            rope,
            None if viewmats is None or Ks is None else projective_cameras(viewmats, Ks),
            cache,
            self.sequence_parallel,
        )
        parallel = self.sequence_parallel
        mine = (lambda tokens: tokens) if parallel is None else (lambda tokens: parallel.local_tokens(tokens, layout))
        x = patchify(x, self.transformer.patch_embedding, mine)
        for i, block in enumerate(self.blocks):
            if keys_only and i == len(self.blocks) - 1:
                call_block(block, store_keys, i, block, x, context, modulation, shared)
                return x.new_empty(0)
            past = cache.past(i) if cache is not None and torch.is_grad_enabled() else None
            camera = self.camera[i] if self.camera is not None and shared.cameras is not None else None
            args: Any = (i, block, camera, x, context, modulation, past, shared)
            x = call_block(block, run_block, *args, recompute=self.gradient_checkpointing)

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
