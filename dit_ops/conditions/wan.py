"""Wan's condition side from a diffusers model directory: tokenizer, UMT5 encoder, CLIP image encoder and AutoencoderKLWan."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dit_ops.conditions._diffusers import DiffusersComponents
from dit_ops.conditions._streaming import decode_chunks
from dit_ops.conditions._wan_decoder import WanDecoder
from dit_ops.conditions.arguments import image_condition

TEXT_LEN = 512  # tokens Wan was trained with


class WanCondition(DiffusersComponents):
    """Components as in diffusers' WanPipeline, or WanImageToVideoPipeline with its image encoder.

    text_len: tokens per prompt, the tokenizer's model_max_length up to 512
    """

    classes = {
        "tokenizer": None,
        "text_encoder": "UMT5EncoderModel",
        "image_encoder": None,
        "image_processor": None,
        "vae": "AutoencoderKLWan",
    }

    def __init__(self, directory: Any, **options: Any) -> None:
        super().__init__(directory, **options)
        limit = self._config("tokenizer", "tokenizer_config.json").get("model_max_length")
        self.text_len = min(TEXT_LEN, int(limit or TEXT_LEN))
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _vae_config(self, key: str, default: Any) -> Any:
        if "vae" not in self._index:
            self.component("vae")
        return self._config("vae").get(key, default)

    @property
    def latent_channels(self) -> int:
        return self._vae_config("z_dim", 16)

    @property
    def spatial_stride(self) -> int:
        return self._vae_config("scale_factor_spatial", 8)

    @property
    def temporal_stride(self) -> int:  # type: ignore[override]
        return self._vae_config("scale_factor_temporal", 4)

    @property
    def text_dim(self) -> int:
        if "text_encoder" not in self._index:
            self.component("text_encoder")
        return self._config("text_encoder")["d_model"]

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> encoder_hidden_states [B, text_len, text_dim] in the encoder's dtype; longer prompts are cut.

        Rows after shorter prompts are zero, and are attended.
        """
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self.component("tokenizer")(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        with self.on_device("text_encoder") as encoder:
            states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return {"encoder_hidden_states": states.masked_fill(tokens.attention_mask[..., None] == 0, 0)}

    @torch.no_grad()
    def encode_image(self, image: Tensor, frames: int) -> dict[str, Tensor]:
        """First frames [B, 3, H, W] in [-1, 1] -> encoder_hidden_states_image [B, 257, C] of the image encoder, if any,
        and condition_latents [B, frames, 4 + Cz, h, w]: four mask channels, then the latents of the picture followed by grey.

        Wan 2.2 TI2V, whose VAE has patches: condition_latents [B, frames, Cz + 1, h, w], the picture in frame 0, and a mask.
        """
        if self._vae_config("patch_size", None) is not None:
            return {"condition_latents": image_condition(self.encode_to_latent(image[:, None]), frames)}
        grey = image.new_zeros(image.shape[0], self.pixel_frames(frames) - 1, *image.shape[1:])
        latents = self.encode_to_latent(torch.cat([image[:, None], grey], dim=1))
        mask = torch.zeros_like(latents[:, :, :1]).repeat(1, 1, self.temporal_stride, 1, 1)
        mask[:, 0] = 1
        known = {"condition_latents": torch.cat([mask, latents], dim=2)}
        if "image_encoder" in self._index:
            levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
            with self.on_device("image_encoder") as encoder:
                inputs = self.component("image_processor")(images=list(levels), return_tensors="pt")
                states = encoder(inputs.pixel_values.to(self.device, encoder.dtype), output_hidden_states=True).hidden_states
            known["encoder_hidden_states_image"] = states[-2]
        return known

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent channels, [1, Cz, 1, 1, 1] fp32; copied to a device once."""
        if device not in self._constants:
            config = self.component("vae").config
            mean, std = torch.tensor([config.latents_mean, config.latents_std], device=device).view(2, 1, -1, 1, 1, 1)
            self._constants[device] = mean, std
        return self._constants[device]

    @torch.no_grad()
    def encode_to_latent(self, pixel: Tensor) -> Tensor:
        """[B, Fp, 3, H, W] in [-1, 1] -> (posterior mode - mean) / std, [B, 1 + (Fp - 1) / 4, Cz, H / 8, W / 8] fp32."""
        self.check_pixel(pixel, self.spatial_stride)
        vae = self.component("vae")
        with self._lock:  # the VAE keeps its feature caches on the module
            z = vae.encode(pixel.transpose(1, 2).to(self.device, vae.dtype)).latent_dist.mode().float()
        mean, std = self._moments(z.device)
        return ((z - mean) / std).transpose(1, 2)

    def _denormalised(self, latent: Tensor) -> Tensor:
        """[B, F, Cz, h, w] -> the VAE's own latents [B, Cz, F, h, w] in its dtype."""
        z = latent.transpose(1, 2).to(self.device, torch.float32)
        mean, std = self._moments(z.device)
        return (z * std + mean).to(self.component("vae").dtype)

    @torch.no_grad()
    def decode_to_pixel(self, latent: Tensor) -> Tensor:
        """[B, F, Cz, h, w] -> [B, 1 + 4 (F - 1), 3, 8 h, 8 w] in [-1, 1] fp32."""
        with self._lock:
            return self.component("vae").decode(self._denormalised(latent)).sample.float().transpose(1, 2)

    def decode_stream(self, chunks: Iterable[Tensor], *, context: int | None = None) -> Iterator[Tensor]:
        """Latents [B, F_i, Cz, h, w] chunk by chunk -> their pixels as they come; together decode_to_pixel of all of them.

        The decoder is causal and a stream keeps its past, so each frame is decoded once, in memory that does not grow;
        context changes nothing.
        """
        return decode_chunks(chunks, self._denormalised, lambda: WanDecoder(self.component("vae"), on_host=self._on_host()))

    def summary(self) -> dict[str, object]:
        """What a data set records of the condition side that made it."""
        return {
            "class": "WanCondition",
            "latent_channels": self.latent_channels,
            "spatial_stride": self.spatial_stride,
            "temporal_stride": self.temporal_stride,
            "text_len": self.text_len,
            "text_dim": self.text_dim,
        }
