"""HunyuanVideo 1.5 as bidirectional, teacher-forced and causal streaming backbone, with optional camera and action branches.

The weights live in a stock diffusers HunyuanVideo15Transformer3DModel; only the ProPE projections and the action embedding
are ours. Norms, modulation and gates take the model's dtype, as in diffusers; our operators round once where it rounds often.
HunyuanVideo 1.5: arXiv 2511.18870. Shapes: B batch, F frames, L video tokens, T text tokens, C channels, N heads, D head size.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from typing_extensions import Self

from dit_ops import adaln
from dit_ops.backbones._block import call_block
from dit_ops.backbones._common import DiffusersBackbone, patchify, token_grid, zero_linears
from dit_ops.backbones.hunyuan_video15_block import Pass, cache_text, run_block, store_keys
from dit_ops.backbones.hunyuan_video15_original import to_diffusers
from dit_ops.backbones.hunyuan_video15_text import Conditions, condition_tokens
from dit_ops.cache import KVCache
from dit_ops.camera import projective_cameras
from dit_ops.flow import per_frame
from dit_ops.layout import VideoLayout
from dit_ops.ops.qk_norm_rope import Rope
from dit_ops.parallel import SequenceParallel
from dit_ops.rope import Rope3D

PROPE_CACHES = ("separate", "shared")


class HunyuanVideo15Backbone(DiffusersBackbone):
    """Flow prediction `[B, F, Cz, h, w] → [B, F, Cz, h, w]`.

    camera          True adds the ProPE branch: one more output projection per layer, zero at the start
    action          True adds an embedding of discrete actions (`dit_ops.actions`) to the time embedding, zero at the start
    block_frames    latent frames per causal block (teacher forcing); None = one block of all frames
    text_timestep   the text stream's timestep; None = the video's in the bidirectional mode (as diffusers) and 0 in the causal
                    modes. Models trained by minWM have 0 in every mode
    prope_cache     "separate": in streaming the ProPE path sees the past through its own keys, as in teacher forcing.
                    "shared": it sees the RoPE path's keys and values, as minWM's released streaming checkpoints were trained

    With `sequence_parallel` set, every rank of its group is given the same arguments and returns the whole flow; each
    computes its part of the video tokens, and all of the text outside of attention.
    """

    stock = HunyuanVideo15Transformer3DModel
    branches = ("camera", "action")
    options = ("block_frames", "text_timestep", "prope_cache")

    def __init__(
        self,
        transformer: HunyuanVideo15Transformer3DModel,
        *,
        camera: bool = False,
        action: bool = False,
        block_frames: int | None = None,
        text_timestep: float | None = None,
        prope_cache: str = "separate",
    ):
        super().__init__()
        config = transformer.config
        if config.patch_size_t != 1:
            raise ValueError(f"HunyuanVideo15Backbone: patch_size_t must be 1, got {config.patch_size_t}")
        if config.use_meanflow:
            raise ValueError("HunyuanVideo15Backbone: use_meanflow must be false (a second timestep), got true")
        if prope_cache not in PROPE_CACHES:
            raise ValueError(f"HunyuanVideo15Backbone: prope_cache must be one of {PROPE_CACHES}, got {prope_cache!r}")
        self.transformer = transformer
        self.block_frames, self.text_timestep, self.prope_cache = block_frames, text_timestep, prope_cache
        self.gradient_checkpointing = False
        self.rope = Rope3D(config.attention_head_dim, config.rope_theta, tuple(config.rope_axes_dim))
        self.camera: nn.ModuleList | None = None
        self.action: TimestepEmbedding | None = None
        if camera:
            self.add_camera()
        if action:
            self.add_action()

    @classmethod
    def from_original(
        cls,
        weights: dict | str | Path,
        config: dict,
        *,
        block_frames: int | None = None,
        ema: bool | None = None,
        **options: Any,
    ) -> Self:
        """Reads weights under Tencent's key names, minWM's branches among them; `config` is the original config.json.

        ema: True takes `generator_ema`, False `generator`, None the EMA where the file has one. Strict as from_pretrained.
        """
        return cls.from_state(*to_diffusers(weights, config, ema=ema), block_frames=block_frames, **options)

    def add_camera(self) -> None:
        """Adds the ProPE output projections `[C, C]`, zero: the model's output does not change until they are trained."""
        if self.camera is None:
            self.camera = zero_linears([block.attn.to_out[0] for block in self.transformer.transformer_blocks])

    def add_action(self) -> None:
        """Adds the action embedding, its last layer zero: the model's output does not change until it is trained."""
        if self.action is None:
            like = self.transformer.time_embed.timestep_embedder.linear_1.weight
            with torch.device(like.device):
                self.action = TimestepEmbedding(like.shape[1], like.shape[0]).to(like.dtype)
            nn.init.zeros_(self.action.linear_2.weight)
            nn.init.zeros_(self.action.linear_2.bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.x_embedder.proj.weight.dtype

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.transformer_blocks

    @property
    def patch(self) -> tuple[int, int]:
        """Latents per token, (height, width)."""
        return self.config.patch_size, self.config.patch_size

    def new_cache(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        window_frames: int | None = None,
        sink_frames: int = 0,
        rotated: bool = True,
        text_tokens: int | None = None,
    ) -> KVCache:
        """A cache for streaming latents `[batch, ·, Cz, height, width]`; window and sink are counted in latent frames.

        rotated = False takes half the memory of a camera model's cache and turns keys and values when it reads them.
        text_tokens: room for the keys of the text, image (729) and glyphs (256) included, where a longer text may come
        later in the stream; None = as many as the first text has.
        """
        if batch < 1:
            raise ValueError(f"new_cache: batch must be at least 1, got {batch}")
        if not rotated and self.prope_cache == "shared":
            raise ValueError("new_cache: rotated must be True for a model with prope_cache = 'shared', got False")
        token_grid(height, width, self.patch)
        layers, room = len(self.blocks), text_tokens or 0
        return KVCache(layers, window_frames=window_frames, sink_frames=sink_frames, prefix=room, rotated=rotated)

    def _flow(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        rope: Rope,
        encoder_attention_mask: Tensor | None = None,  # [B, T], 0 at padding
        encoder_hidden_states_2: Tensor | None = None,  # [B, T', C_byt5] glyph states
        encoder_attention_mask_2: Tensor | None = None,  # [B, T']
        image_embeds: Tensor | None = None,  # [B, T'', C_image]; zeros = no image
        condition_latents: Tensor | None = None,  # [B, F, Cz + 1, h, w] image latents and mask; None = zeros: text to video
        clean_latents: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        viewmats: Tensor | None = None,
        Ks: Tensor | None = None,
        action: Tensor | None = None,  # [B, F] labels; None in streaming: the rerun of a clean chunk
        cache: KVCache | None = None,
        start_frame: int = 0,
        keys_only: bool = False,
    ) -> Tensor:
        """rope: its row start_frame is the first frame's."""
        given = Conditions(
            encoder_hidden_states,
            encoder_attention_mask,
            encoder_hidden_states_2,
            encoder_attention_mask_2,
            image_embeds,
        )
        self._check_conditions(latents, given, action, cache)
        _, frames, _, height, width = latents.shape
        grid = token_grid(height, width, self.patch)
        halves = 1 if clean_latents is None else 2
        x, t = latents, per_frame(timestep, frames)
        if clean_latents is not None:
            x = torch.cat([clean_latents, latents], dim=1)
            clean_t = torch.zeros_like(timestep) if clean_timestep is None else clean_timestep
            t = torch.cat([per_frame(clean_t, frames), t], dim=1)
        elif timestep.dim() == 1:
            t = timestep[:, None]  # one row of modulation for all frames
        parallel = self.sequence_parallel if self.sequence_parallel is not None and self.sequence_parallel.size > 1 else None
        x = self._concat_condition(x, condition_latents, halves)
        if parallel is not None:
            x = self._local_patches(x, parallel)
        x = patchify(x, self.transformer.x_embedder.proj)
        temb = self._time(t, action)
        cameras = None if viewmats is None or Ks is None else projective_cameras(viewmats, Ks)
        text, text_temb = None, None
        if cache is not None and not torch.is_grad_enabled():
            lengths = self._cache_text(given, timestep, cache, parallel)
        else:
            text_t, text_temb = self._text_time(timestep, halves == 1 and cache is None)
            text, lengths = condition_tokens(self.transformer, given, text_t)
        layout = VideoLayout(frames, *grid, self.block_frames, halves, prefix=max(lengths), start_frame=start_frame)
        shared = Pass(layout, lengths, rope, cameras, cache, self.prope_cache == "shared", len(self.blocks) - 1, parallel)
        for i, block in enumerate(self.blocks):
            if keys_only and i == shared.last:
                call_block(block, store_keys, i, block, x, temb, shared)
                return x.new_empty(0)
            past = cache.past(i) if cache is not None and torch.is_grad_enabled() else None
            camera = self.camera[i] if self.camera is not None else None
            args = (i, block, camera, x, text, temb, text_temb, past, shared)
            x, text = call_block(block, run_block, *args, recompute=self.gradient_checkpointing)

        x = x.tensor_split(halves, 1)[-1]  # the noisy half
        norm = self.transformer.norm_out
        scale, shift = norm.linear(temb[:, -frames:]).chunk(2, dim=-1)  # [B, F, C]
        x = self.transformer.proj_out(adaln(x, scale, shift, eps=norm.norm.eps))
        if parallel is not None:
            x = parallel.gather_tokens(x, layout, halves=1)
        return self._unpatchify(x, layout)

    def _check_conditions(self, latents: Tensor, given: Conditions, action: Tensor | None, cache: KVCache | None) -> None:
        B, frames = latents.shape[:2]
        widths = {
            "encoder_hidden_states": (given.llm, self.config.text_embed_dim),
            "encoder_hidden_states_2": (given.byt5, self.config.text_embed_2_dim),
            "image_embeds": (given.image, self.config.image_embed_dim),
        }
        for name, (states, C) in widths.items():
            if states is not None and (states.dim() != 3 or states.shape[0] != B or states.shape[2] != C):
                raise ValueError(f"{name} must be [B, T, C] = [{B}, T, {C}], got {list(states.shape)}")
        masks = {
            "encoder_attention_mask": (given.llm_mask, given.llm),
            "encoder_attention_mask_2": (given.byt5_mask, given.byt5),
        }
        for name, (mask, states) in masks.items():
            if mask is not None and (states is None or mask.shape != states.shape[:2]):
                expected = "left out without its states" if states is None else f"[B, T] = {list(states.shape[:2])}"
                raise ValueError(f"{name} must be {expected}, got {list(mask.shape)}")
        if action is not None and self.action is None:
            raise ValueError("action was given, but this model has no action branch (add_action() makes one)")
        if action is None and self.action is not None and cache is None:
            raise ValueError("this model has an action branch and needs action, got none")
        if action is not None and action.shape != (B, frames):
            raise ValueError(f"action must be [B, F] = {[B, frames]}, got {list(action.shape)}")

    def _concat_condition(self, x: Tensor, condition: Tensor | None, halves: int) -> Tensor:
        """Latents of both halves beside the condition's channels, the same for both."""
        channels = self.config.in_channels - self.latent_channels
        B, frames, _, height, width = x.shape
        expected = [B, frames // halves, channels, height, width]
        if condition is not None and list(condition.shape) != expected:
            raise ValueError(f"condition_latents must be {expected}, got {list(condition.shape)}")
        if channels == 0:
            return x
        if condition is None:
            condition = x.new_zeros(1, 1, 1, 1, 1).expand(expected)
        return torch.cat([x, condition.repeat(1, halves, 1, 1, 1)], dim=2)

    def _local_patches(self, x: Tensor, parallel: SequenceParallel) -> Tensor:
        """This rank's patches of every frame, one beside the other: `[B, F, Cz, h, w] → [B, F, Cz, p, S_r·p]`."""
        p = self.config.patch_size
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).transpose(3, 4)  # [B, F, Cz, p, H, W, p]
        return x.flatten(4, 5).tensor_split(parallel.size, 4)[parallel.rank].flatten(4, 5)

    def _time(self, t: Tensor, action: Tensor | None) -> Tensor:
        """`[B, F']` → `silu(embedding)` `[B, F', C]`; the action's embedding is added to the noisy frames, the last F."""
        temb = self._wave(t, self.transformer.time_embed.timestep_embedder)
        if action is not None:
            first = max(0, t.shape[1] - action.shape[1])
            temb = torch.cat([temb[:, :first], temb[:, first:] + self._wave(action, self.action)], dim=1)
        return nnf.silu(temb)

    def _wave(self, values: Tensor, embedder: Any) -> Tensor:
        """`[B, F'] → [B, F', C]`: sinusoids (cos first), then the embedder's two layers."""
        wave = self.transformer.time_embed.time_proj(values.flatten()).to(embedder.linear_1.weight.dtype)
        return embedder(wave).unflatten(0, values.shape)

    def _text_time(self, timestep: Tensor, joint: bool) -> tuple[Tensor, Tensor]:
        """The text's timestep `[B]` and its embedding `[B, 1, C]`.

        It is the fixed one; else in the bidirectional mode the video's (the highest of its frames), else 0.
        """
        t = timestep if timestep.dim() == 1 else timestep.amax(1)
        if self.text_timestep is not None:
            t = torch.full_like(t, self.text_timestep)
        elif not joint:
            t = torch.zeros_like(t)
        return t, self._time(t[:, None], None)

    def _cache_text(
        self, given: Conditions, timestep: Tensor, cache: KVCache, parallel: SequenceParallel | None
    ) -> tuple[int, ...]:
        """Runs the text through all blocks, once per text, and leaves its keys and values in the cache; tokens per sample."""
        if cache.text_is(*given) and cache.text_lengths is not None:
            return cache.text_lengths
        t, temb = self._text_time(timestep, False)
        text, lengths = condition_tokens(self.transformer, given, t)
        cache.make_room(text.shape[1])
        paths = 1 if self.camera is None or not cache.rotated else 2
        for i, block in enumerate(self.blocks):
            text = call_block(block, cache_text, i, block, text, temb, lengths, cache, paths, parallel)
        cache.text_lengths = lengths
        return lengths

    def _unpatchify(self, x: Tensor, layout: VideoLayout) -> Tensor:
        """`[B, L, Cz·p·p]`, channel slowest → `[B, F, Cz, h, w]`."""
        p = self.config.patch_size
        x = x.unflatten(2, (-1, p, p)).unflatten(1, layout.grid)  # [B, F, H, W, Cz, p, p]
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
