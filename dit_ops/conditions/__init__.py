"""The frozen condition side: prompts -> text states, pixels <-> latents. Computed once offline, it leaves training's memory."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Condition(Protocol):
    """What training data, pipelines and the demo ask of a condition side."""

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

    def encode_text(self, prompts: list[str]) -> Tensor:
        """-> [B, text_len, text_dim]; rows after a prompt are exact zeros."""
        ...

    def encode_to_latent(self, pixel: Tensor) -> Tensor:
        """[B, Fp, 3, H, W] in [-1, 1] -> normalised latents [B, F, latent_channels, h, w]."""
        ...

    def decode_to_pixel(self, latent: Tensor) -> Tensor:
        """[B, F, latent_channels, h, w] -> [B, Fp, 3, H, W] in [-1, 1]."""
        ...

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of latent frames -> their pixels as they come; together what decode_to_pixel gives for all of them."""
        ...

    def latent_frames(self, pixel_frames: int) -> int: ...

    def pixel_frames(self, latent_frames: int) -> int: ...

    def summary(self) -> dict[str, object]: ...

    def to(self, device: torch.device | str) -> "Condition": ...

    def save_pretrained(self, directory: str | Path) -> None: ...


def load(directory: str | Path) -> Condition:
    """The condition side in a directory: condition.json (linear), a diffusers model (Wan), or a model's condition/ folder.

    ValueError: the directory holds none of them.
    """
    directory = Path(directory)
    if (directory / "condition.json").is_file():
        from dit_ops.conditions.linear import LinearCondition

        return LinearCondition.from_pretrained(directory)
    if (directory / "condition").is_dir():
        return load(directory / "condition")
    index = directory / "model_index.json"
    if index.is_file() and {"vae", "text_encoder"} & set(json.loads(index.read_text(encoding="utf-8"))):
        from dit_ops.conditions.wan import WanCondition

        return WanCondition.from_pretrained(directory)
    raise ValueError(f"{directory} must hold condition.json, or a model_index.json that names a vae or a text_encoder")
