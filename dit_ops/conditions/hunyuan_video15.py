"""HunyuanVideo 1.5's condition side from a diffusers model directory: Qwen2.5-VL text, byT5 glyphs, SigLIP image, VAE."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dit_ops.conditions._diffusers import DiffusersComponents
from dit_ops.conditions.arguments import image_condition

TEXT_LEN = 1000  # tokens behind the prompt template
STATES = {  # our name of what a text encoder gives
    "encoder_hidden_states": "encoder_attention_mask",
    "encoder_hidden_states_2": "encoder_attention_mask_2",
}


class HunyuanVideo15Condition(DiffusersComponents):
    """Components as in diffusers' HunyuanVideo15Pipeline, or HunyuanVideo15ImageToVideoPipeline with its image encoder.

    decode_context: latent frames of the past that decode_stream decodes again with each chunk; None: all, which is exact
    """

    classes = {
        "tokenizer": None,
        "text_encoder": "Qwen2_5_VLTextModel",
        "tokenizer_2": None,
        "text_encoder_2": "T5EncoderModel",
        "image_encoder": "SiglipVisionModel",
        "feature_extractor": None,
        "vae": "AutoencoderKLHunyuanVideo15",
    }
    text_len = TEXT_LEN

    def __init__(self, directory: Any, *, decode_context: int | None = None, **options: Any) -> None:
        super().__init__(directory, **options)
        if decode_context is not None and decode_context < 1:
            raise ValueError(f"decode_context must be at least 1 or None but is {decode_context}")
        self.decode_context = decode_context

    @property
    def latent_channels(self) -> int:
        return self._config("vae").get("latent_channels", 32)

    @property
    def spatial_stride(self) -> int:
        return self._config("vae").get("spatial_compression_ratio", 16)

    @property
    def temporal_stride(self) -> int:  # type: ignore[override]
        return self._config("vae").get("temporal_compression_ratio", 4)

    @property
    def text_dim(self) -> int:
        if "text_encoder" not in self._index:
            self.component("text_encoder")
        return self._config("text_encoder")["hidden_size"]

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> encoder_hidden_states [B, 1000, text_dim] and, of text in quotes only, encoder_hidden_states_2 [B, 256, byT5 dim].

        Both in their encoder's dtype, with boolean masks [B, T]. The prompt template, the hidden layer (the third from the end)
        and the glyph text are those of diffusers' own pipeline.
        """
        from diffusers import HunyuanVideo15Pipeline as Stock

        text = Stock._get_mllm_prompt_embeds(self.component("text_encoder"), self.component("tokenizer"), prompts, self.device)
        glyphs = Stock._get_byt5_prompt_embeds(
            self.component("tokenizer_2"), self.component("text_encoder_2"), prompts, self.device
        )
        states: dict[str, Tensor] = {}
        for (name, mask_name), (values, mask) in zip(STATES.items(), (text, glyphs), strict=True):
            states |= {name: values, mask_name: mask.bool()}
        return states

    @torch.no_grad()
    def encode_image(self, image: Tensor, frames: int) -> dict[str, Tensor]:
        """First frames [B, 3, H, W] in [-1, 1] -> image_embeds [B, 729, C], condition_latents [B, frames, Cz + 1, h, w]."""
        levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        encoder = self.component("image_encoder")
        inputs = self.component("feature_extractor").preprocess(images=list(levels), do_resize=True, return_tensors="pt")
        states = encoder(inputs.pixel_values.to(self.device, encoder.dtype)).last_hidden_state
        return {"image_embeds": states, "condition_latents": image_condition(self.encode_to_latent(image[:, None]), frames)}

    @torch.no_grad()
    def encode_to_latent(self, pixel: Tensor) -> Tensor:
        """[B, Fp, 3, H, W] in [-1, 1] -> posterior mode · scaling factor, [B, 1 + (Fp - 1) / 4, Cz, H / 16, W / 16] fp32."""
        self.check_pixel(pixel, self.spatial_stride)
        vae = self.component("vae")
        z = vae.encode(pixel.transpose(1, 2).to(self.device, vae.dtype)).latent_dist.mode().float()
        return (z * vae.config.scaling_factor).transpose(1, 2)

    @torch.no_grad()
    def decode_to_pixel(self, latent: Tensor) -> Tensor:
        """[B, F, Cz, h, w] -> [B, 1 + 4 (F - 1), 3, 16 h, 16 w] in [-1, 1] fp32."""
        vae = self.component("vae")
        z = latent.transpose(1, 2).to(self.device, torch.float32) / vae.config.scaling_factor
        return vae.decode(z.to(vae.dtype)).sample.float().clamp(-1, 1).transpose(1, 2)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latents [B, F_i, Cz, h, w] chunk by chunk -> their pixels as they come; together decode_to_pixel of all of them.

        The decoder is causal but keeps no state, and its attention sees the whole past: the past is decoded again.
        """
        past: Tensor | None = None
        for chunk in chunks:
            new = chunk.shape[1] * self.temporal_stride if past is not None else self.pixel_frames(chunk.shape[1])
            past = chunk if past is None else torch.cat([past, chunk], dim=1)
            yield self.decode_to_pixel(past)[:, -new:]
            if self.decode_context is not None:
                past = past[:, -self.decode_context :]

    def summary(self) -> dict[str, object]:
        """What a data set records of the condition side that made it."""
        return {
            "class": "HunyuanVideo15Condition",
            "latent_channels": self.latent_channels,
            "spatial_stride": self.spatial_stride,
            "temporal_stride": self.temporal_stride,
            "text_len": self.text_len,
            "text_dim": self.text_dim,
        }
