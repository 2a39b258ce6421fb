"""HunyuanVideo 1.5's condition side from a diffusers model directory: Qwen2.5-VL text, byT5 glyphs, SigLIP image, VAE."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dit_ops.conditions._diffusers import DiffusersComponents
from dit_ops.conditions._hunyuan_video15_decoder import HunyuanVideo15Decoder
from dit_ops.conditions._streaming import decode_chunks
from dit_ops.conditions.arguments import image_condition

TEXT_LEN = 1000  # tokens behind the prompt template
STATES = {  # our name of what a text encoder gives
    "encoder_hidden_states": "encoder_attention_mask",
    "encoder_hidden_states_2": "encoder_attention_mask_2",
}


class HunyuanVideo15Condition(DiffusersComponents):
    """Components as in diffusers' HunyuanVideo15Pipeline, or HunyuanVideo15ImageToVideoPipeline with its image encoder."""

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

        with self.on_device("text_encoder") as encoder:
            text = Stock._get_mllm_prompt_embeds(encoder, self.component("tokenizer"), prompts, self.device)
        with self.on_device("text_encoder_2") as encoder:
            glyphs = Stock._get_byt5_prompt_embeds(self.component("tokenizer_2"), encoder, prompts, self.device)
        states: dict[str, Tensor] = {}
        for (name, mask_name), (values, mask) in zip(STATES.items(), (text, glyphs), strict=True):
            states |= {name: values, mask_name: mask.bool()}
        return states

    @torch.no_grad()
    def encode_image(self, image: Tensor, frames: int) -> dict[str, Tensor]:
        """First frames [B, 3, H, W] in [-1, 1] -> image_embeds [B, 729, C], condition_latents [B, frames, Cz + 1, h, w]."""
        levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        with self.on_device("image_encoder") as encoder:
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

    def _denormalised(self, latent: Tensor) -> Tensor:
        """[B, F, Cz, h, w] -> the VAE's own latents [B, Cz, F, h, w] in its dtype."""
        vae = self.component("vae")
        return (latent.transpose(1, 2).to(self.device, torch.float32) / vae.config.scaling_factor).to(vae.dtype)

    @torch.no_grad()
    def decode_to_pixel(self, latent: Tensor) -> Tensor:
        """[B, F, Cz, h, w] -> [B, 1 + 4 (F - 1), 3, 16 h, 16 w] in [-1, 1] fp32."""
        return self.component("vae").decode(self._denormalised(latent)).sample.float().clamp(-1, 1).transpose(1, 2)

    def decode_stream(self, chunks: Iterable[Tensor], *, context: int | None = None) -> Iterator[Tensor]:
        """Latents [B, F_i, Cz, h, w] chunk by chunk -> their pixels as they come; together decode_to_pixel of all of them.

        The decoder is causal and a stream keeps its past, so each frame is decoded once. One layer of it is an attention over
        the whole past: its keys and values, one row of the latent grid each, grow with the video.
        context: that attention sees the last `context` latent frames only; memory is bounded, and pixels are nearly the same
        """
        if context is not None and context < 1:
            raise ValueError(f"context must be at least 1 latent frame or None but is {context}")
        return decode_chunks(
            chunks,
            self._denormalised,
            lambda: HunyuanVideo15Decoder(self.component("vae"), context=context, on_host=self._on_host()),
        )

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
