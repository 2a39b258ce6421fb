"""Wan's condition side from a diffusers model directory: tokenizer, UMT5 encoder and AutoencoderKLWan, loaded at first use."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXT_LEN = 512  # tokens Wan was trained with
CLASSES = {"tokenizer": None, "text_encoder": "UMT5EncoderModel", "vae": "AutoencoderKLWan"}


class WanCondition:
    """Components named by model_index.json; using one that the directory lacks is a ValueError.

    text_len: tokens per prompt, the tokenizer's model_max_length up to 512
    text_dtype: of the text encoder, None: as stored; the VAE runs in vae_dtype
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        text_dtype: torch.dtype | None = None,
        vae_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.directory = Path(directory)
        index = self.directory / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{self.directory} is not a diffusers model directory: it has no model_index.json")
        entries = json.loads(index.read_text(encoding="utf-8"))
        self._classes = {name: entries[name][1] for name in CLASSES if entries.get(name) and entries[name][1]}
        for name, found in self._classes.items():
            if CLASSES[name] not in (None, found):
                raise ValueError(f"{index}: {name} must be {CLASSES[name]} but is {found}")
        self._dtypes: dict[str, Any] = {"text_encoder": text_dtype or "auto", "vae": vae_dtype}
        self._loaded: dict[str, Any] = {}
        self.device = torch.device(device)
        limit = self._config("tokenizer", "tokenizer_config.json").get("model_max_length")
        self.text_len = min(TEXT_LEN, int(limit or TEXT_LEN))

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> "WanCondition":
        """Options as of the class; loads no weights yet."""
        return cls(directory, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Copy the component folders (they are frozen) and name them in a model_index.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {"_class_name": "WanCondition"}
        for name, class_name in self._classes.items():
            shutil.copytree(self.directory / name, directory / name, dirs_exist_ok=True)
            index[name] = ["diffusers" if name == "vae" else "transformers", class_name]
        (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def to(self, device: torch.device | str) -> "WanCondition":
        self.device = torch.device(device)
        for name in ("text_encoder", "vae"):
            if name in self._loaded:
                self._loaded[name].to(self.device)
        return self

    def _config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        path = self.directory / name / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def component(self, name: str) -> Any:
        """The tokenizer, text_encoder or vae, loaded now if it was not. ValueError: the directory has none."""
        if name not in self._loaded:
            if name not in self._classes or not (self.directory / name).is_dir():
                raise ValueError(f"{self.directory} has no {name}: its model_index.json and a folder {name}/ must provide one")
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> Any:
        folder = self.directory / name
        if name == "tokenizer":
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if name == "text_encoder":
            from transformers import UMT5EncoderModel

            model = UMT5EncoderModel.from_pretrained(folder, dtype=self._dtypes[name], local_files_only=True)
        else:
            from diffusers import AutoencoderKLWan

            model = AutoencoderKLWan.from_pretrained(folder, torch_dtype=self._dtypes[name], local_files_only=True)
            model.use_slicing = True  # one video at a time: same result, a batch's memory less
        return model.eval().requires_grad_(False).to(self.device)

    def _vae_config(self, key: str, default: Any) -> Any:
        if "vae" not in self._classes:
            self.component("vae")
        return self._config("vae").get(key, default)

    @property
    def latent_channels(self) -> int:
        return self._vae_config("z_dim", 16)

    @property
    def spatial_stride(self) -> int:
        return self._vae_config("scale_factor_spatial", 8)

    @property
    def temporal_stride(self) -> int:
        return self._vae_config("scale_factor_temporal", 4)

    @property
    def text_dim(self) -> int:
        if "text_encoder" not in self._classes:
            self.component("text_encoder")
        return self._config("text_encoder")["d_model"]

    def latent_frames(self, pixel_frames: int) -> int:
        """1 + (Fp - 1) / 4: the first pixel frame has a latent frame of its own. ValueError: not a whole number."""
        if pixel_frames < 1 or (pixel_frames - 1) % self.temporal_stride:
            raise ValueError(f"pixel frames must be 1 + a multiple of {self.temporal_stride} but are {pixel_frames}")
        return 1 + (pixel_frames - 1) // self.temporal_stride

    def pixel_frames(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * self.temporal_stride

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """-> [B, text_len, text_dim] in the encoder's dtype; longer prompts are cut, rows after shorter ones are zero."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self.component("tokenizer")(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        states = self.component("text_encoder")(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return states.masked_fill(tokens.attention_mask[..., None] == 0, 0)

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent channels, [1, Cz, 1, 1, 1] fp32."""
        config = self.component("vae").config
        mean, std = torch.tensor([config.latents_mean, config.latents_std], device=like.device).view(2, 1, -1, 1, 1, 1)
        return mean, std

    @torch.no_grad()
    def encode_to_latent(self, pixel: Tensor) -> Tensor:
        """[B, Fp, 3, H, W] in [-1, 1] -> (posterior mode - mean) / std, [B, 1 + (Fp - 1) / 4, Cz, H / 8, W / 8] fp32."""
        if pixel.dim() != 5 or pixel.shape[2] != 3 or any(n % self.spatial_stride for n in pixel.shape[3:]):
            multiple = f"H and W multiples of {self.spatial_stride}"
            raise ValueError(f"pixel must have shape [B, Fp, 3, H, W] with {multiple} but got {list(pixel.shape)}")
        self.latent_frames(pixel.shape[1])
        vae = self.component("vae")
        z = vae.encode(pixel.transpose(1, 2).to(self.device, vae.dtype)).latent_dist.mode().float()
        mean, std = self._moments(z)
        return ((z - mean) / std).transpose(1, 2)

    def _denormalised(self, latent: Tensor) -> Tensor:
        """[B, F, Cz, h, w] -> the VAE's own latents [B, Cz, F, h, w] in its dtype."""
        z = latent.transpose(1, 2).to(self.device, torch.float32)
        mean, std = self._moments(z)
        return (z * std + mean).to(self.component("vae").dtype)

    @torch.no_grad()
    def decode_to_pixel(self, latent: Tensor) -> Tensor:
        """[B, F, Cz, h, w] -> [B, 1 + 4 (F - 1), 3, 8 h, 8 w] in [-1, 1] fp32."""
        return self.component("vae").decode(self._denormalised(latent)).sample.float().transpose(1, 2)

    @torch.no_grad()
    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latents [B, F_i, Cz, h, w] chunk by chunk -> their pixels as they come; together decode_to_pixel of all of them.

        The decoder is causal and keeps its own past, so each latent frame is decoded once.
        """
        vae = self.component("vae")
        vae.clear_cache()
        cache, first = list(vae._feat_map), True
        for chunk in chunks:
            z = vae.post_quant_conv(self._denormalised(chunk))
            frames = []
            for i in range(z.shape[2]):
                frames.append(vae.decoder(z[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=first))
                first = False
            pixel = torch.cat(frames, 2)
            if vae.config.patch_size is not None:
                from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

                pixel = unpatchify(pixel, patch_size=vae.config.patch_size)
            yield pixel.float().clamp(-1, 1).transpose(1, 2)

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
