"""The frozen condition side: prompts -> text states, pixels <-> latents. Computed once offline, it leaves training's memory."""

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Condition(Protocol):
    """What training data, pipelines and the demo ask of a condition side."""

    offload: bool
    """Text and image encoders are on the device only while they encode."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def text_dim(self) -> int: ...

    @property
    def text_len(self) -> int: ...

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent, each way."""
        ...

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame, after the first."""
        ...

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> arguments of the backbone's forward, each [B, …]; encoder_hidden_states among them."""
        ...

    def encode_image(self, image: Tensor, frames: int) -> dict[str, Tensor]:
        """First frames [B, 3, H, W] in [-1, 1] -> arguments for `frames` latent frames, condition_latents among them."""
        ...

    def get_condition(self, prompts: list[str], videos: Tensor | None = None, *, image: bool = False) -> dict[str, Tensor]:
        """Encode once: what a data set stores. Keys are `latents` and arguments of the backbone's forward."""
        ...

    def process_condition(
        self, condition: Mapping[str, Tensor], noise: Tensor, timestep: Tensor, **given: Tensor | None
    ) -> tuple[dict[str, Tensor | None], Tensor]:
        """(arguments of the model call, target), from noise and timesteps that the training stage drew."""
        ...

    def encode_to_latent(self, pixel: Tensor) -> Tensor:
        """[B, Fp, 3, H, W] in [-1, 1] -> normalised latents [B, F, latent_channels, h, w]."""
        ...

    def decode_to_pixel(self, latent: Tensor) -> Tensor:
        """[B, F, latent_channels, h, w] -> [B, Fp, 3, H, W] in [-1, 1]."""
        ...

    def decode_stream(self, chunks: Iterable[Tensor], *, context: int | None = None) -> Iterator[Tensor]:
        """Chunks of latent frames -> their pixels as they come; together what decode_to_pixel gives for all of them.

        context: latent frames of the past that a decoder without state decodes again with each chunk, which bounds its memory;
        None: all, which is exact. A decoder that keeps its own past is exact and bounded, and needs none.
        """
        ...

    def enable_tiling(self) -> None:
        """The VAE works on overlapping tiles, one after the other: less memory, nearly the same pixels."""
        ...

    def latent_frames(self, pixel_frames: int) -> int: ...

    def pixel_frames(self, latent_frames: int) -> int: ...

    def summary(self) -> dict[str, object]: ...

    def to(self, device: torch.device | str) -> "Condition": ...

    def save_pretrained(self, directory: str | Path) -> None: ...


CONDITIONS = {  # class of a component in model_index.json: our condition side, as "module:Class"
    "AutoencoderKLWan": "dit_ops.conditions.wan:WanCondition",
    "UMT5EncoderModel": "dit_ops.conditions.wan:WanCondition",
    "AutoencoderKLHunyuanVideo15": "dit_ops.conditions.hunyuan_video15:HunyuanVideo15Condition",
    "Qwen2_5_VLTextModel": "dit_ops.conditions.hunyuan_video15:HunyuanVideo15Condition",
}


def load(directory: str | Path) -> Condition:
    """The condition side in a directory: condition.json (linear), a diffusers model, or a model's condition/ folder.

    A diffusers model is known by the class of its vae, else of its text encoder. ValueError: none of them, or an unknown class.
    """
    directory = Path(directory)
    if (directory / "condition.json").is_file():
        from dit_ops.conditions.linear import LinearCondition

        return LinearCondition.from_pretrained(directory)
    if (directory / "condition").is_dir():
        return load(directory / "condition")
    index = directory / "model_index.json"
    entries = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    found = [entries[name][1] for name in ("vae", "text_encoder") if entries.get(name) and entries[name][1]]
    if not found:
        raise ValueError(f"{directory} must hold condition.json, or a model_index.json that names a vae or a text_encoder")
    if found[0] not in CONDITIONS:
        known = ", ".join(CONDITIONS)
        raise ValueError(f"{index}: no condition side for {found[0]!r}; known are {known} (docs/adding_a_backbone.md)")
    module, name = CONDITIONS[found[0]].split(":")
    return getattr(importlib.import_module(module), name).from_pretrained(directory)
