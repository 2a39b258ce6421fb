"""The embedded condition side: a linear patch codec (PCA) and a deterministic text embedder, with nothing to download."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_ops.conditions.arguments import TwoSteps, image_condition
from dit_ops.draws import Draws


class PatchCodec:
    """Pixel patches [3 p p] <-> `channels` PCA coefficients, z = basis (x - mean) / scale.

    mean: [3 p p]; basis: [channels, 3 p p], orthonormal rows. One scale: channels that carry the picture stay the large ones.
    """

    def __init__(self, mean: Tensor, basis: Tensor, scale: float) -> None:
        self.mean, self.basis, self.scale = mean, basis, scale
        self.patch = round((mean.numel() / 3) ** 0.5)
        self.channels = basis.shape[0]

    @classmethod
    def fit(cls, videos: Tensor, patch: int = 8, channels: int = 16) -> "PatchCodec":
        """Leading eigenvectors of the patch covariance (fp64) of videos [n, F, 3, H, W] in [-1, 1].

        scale^2 is the mean of their eigenvalues, so their latents have overall unit variance. ValueError: channels > 3 p p.
        """
        if channels > 3 * patch * patch:
            raise ValueError(f"channels must be at most 3 * patch^2 = {3 * patch * patch} but got {channels}")
        rows = _patches(videos, patch).flatten(0, -2).double()
        mean = rows.mean(0)
        rows = rows - mean
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        basis = vectors[:, -channels:].flip(1).T
        # an eigenvector's sign is arbitrary: make its largest entry positive
        basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        scale = float(values[-channels:].mean().clamp(min=1e-12).sqrt())
        return cls(mean.float(), basis.float().contiguous(), scale)

    def tensors(self) -> dict[str, Tensor]:
        """The codec's numbers on the CPU, by name."""
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return {"mean": self.mean.cpu(), "basis": self.basis.cpu().contiguous(), "scale": scale}

    def encode(self, pixel: Tensor) -> Tensor:
        """[..., 3, H, W] -> [..., channels, H / p, W / p]."""
        return ((_patches(pixel, self.patch) - self.mean) @ self.basis.T / self.scale).movedim(-1, -3)

    def decode(self, latent: Tensor) -> Tensor:
        """[..., channels, h, w] -> [..., 3, h p, w p] in [-1, 1]."""
        rows = (latent.movedim(-3, -1) * self.scale) @ self.basis + self.mean
        *lead, h, w, _ = rows.shape
        p, n = self.patch, len(lead)
        pixel = rows.view(*lead, h, w, 3, p, p).permute(*range(n), n + 2, n, n + 3, n + 1, n + 4)
        return pixel.reshape(*lead, 3, h * p, w * p).clamp(-1, 1)


def _patches(pixel: Tensor, p: int) -> Tensor:
    """[..., 3, H, W] -> [..., H / p, W / p, 3 p p], entries in order (colour, y, x)."""
    *lead, colours, height, width = pixel.shape
    if colours != 3 or height % p or width % p:
        raise ValueError(f"pixel must have shape [..., 3, H, W] with H and W multiples of {p} but got {list(pixel.shape)}")
    n = len(lead)
    blocks = pixel.reshape(*lead, 3, height // p, p, width // p, p).permute(*range(n), n + 1, n + 3, n, n + 2, n + 4)
    return blocks.reshape(*lead, height // p, width // p, 3 * p * p)


class HashTextEmbedder:
    """Word i of a prompt adds (word vector + position vector) / sqrt(2) to row i mod text_len; other rows are exact zeros.

    Vectors are N(0, 1) draws keyed by the word and by i: the same everywhere, with no vocabulary; "" is all zeros.
    """

    def __init__(self, text_len: int = 16, text_dim: int = 64) -> None:
        self.text_len, self.text_dim = text_len, text_dim

    def encode(self, prompts: list[str]) -> Tensor:
        """-> [B, text_len, text_dim]."""
        out = torch.zeros(len(prompts), self.text_len, self.text_dim)
        draws = Draws(0)
        for row, prompt in zip(out, prompts, strict=True):
            for i, word in enumerate(re.findall(r"\w+", prompt.lower())):
                vectors = (draws.normal(f"{kind} {key}", (self.text_dim,)) for kind, key in (("word", word), ("position", i)))
                row[i % self.text_len] += sum(vectors) * 0.5**0.5
        return out


class LinearCondition(TwoSteps):
    """PatchCodec + HashTextEmbedder behind the interface of every condition side; one latent frame per pixel frame.

    offload and enable_tiling change nothing: the embedder lies in host memory, the codec is a matrix applied patch by patch.
    """

    temporal_stride = 1
    offload = False

    def __init__(self, codec: PatchCodec, text: HashTextEmbedder | None = None) -> None:
        self.codec, self.text = codec, text or HashTextEmbedder()
        self.latent_channels, self.spatial_stride = codec.channels, codec.patch
        self.text_len, self.text_dim = self.text.text_len, self.text.text_dim

    @classmethod
    def fit(cls, videos: Tensor, patch: int = 8, channels: int = 16) -> "LinearCondition":
        """Fit the codec to videos [n, F, 3, H, W] in [-1, 1]."""
        return cls(PatchCodec.fit(videos, patch, channels))

    @property
    def device(self) -> torch.device:
        return self.codec.mean.device

    def to(self, device: torch.device | str) -> "LinearCondition":
        self.codec.mean, self.codec.basis = self.codec.mean.to(device), self.codec.basis.to(device)
        return self

    def latent_frames(self, pixel_frames: int) -> int:
        return pixel_frames

    def pixel_frames(self, latent_frames: int) -> int:
        return latent_frames

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> encoder_hidden_states [B, text_len, text_dim]; unused rows are zeros."""
        return {"encoder_hidden_states": self.text.encode(prompts).to(self.device)}

    def encode_image(self, image: Tensor, frames: int) -> dict[str, Tensor]:
        """image [B, 3, H, W] in [-1, 1] -> condition_latents [B, frames, channels + 1, h, w]: the first frame, and its mask."""
        return {"condition_latents": image_condition(self.encode_to_latent(image[:, None]), frames)}

    @torch.no_grad()
    def encode_to_latent(self, pixel: Tensor) -> Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> [B, F, channels, H / p, W / p] fp32."""
        return self.codec.encode(pixel.to(self.device, torch.float32))

    @torch.no_grad()
    def decode_to_pixel(self, latent: Tensor) -> Tensor:
        """[B, F, channels, h, w] -> [B, F, 3, h p, w p] in [-1, 1] fp32."""
        return self.codec.decode(latent.to(self.device, torch.float32))

    def enable_tiling(self) -> None:
        """Patches are tiles already."""

    def decode_stream(self, chunks: Iterable[Tensor], *, context: int | None = None) -> Iterator[Tensor]:
        """Chunks of latent frames -> their pixels as they come; frames are independent and need no context."""
        yield from map(self.decode_to_pixel, chunks)

    def summary(self) -> dict[str, object]:
        """What a data set records of the condition side that made it; the fingerprint tells codecs apart."""
        numbers = b"".join(tensor.numpy().tobytes() for tensor in self.codec.tensors().values())
        return {
            "class": "LinearCondition",
            "latent_channels": self.latent_channels,
            "spatial_stride": self.spatial_stride,
            "temporal_stride": self.temporal_stride,
            "text_len": self.text_len,
            "text_dim": self.text_dim,
            "fingerprint": hashlib.blake2b(numbers, digest_size=8).hexdigest(),
        }

    def save_pretrained(self, directory: str | Path) -> None:
        """Write condition.json and codec.safetensors."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.codec.tensors(), directory / "codec.safetensors")
        (directory / "condition.json").write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "LinearCondition":
        """Read what save_pretrained wrote."""
        config = json.loads((Path(directory) / "condition.json").read_text(encoding="utf-8"))
        codec = load_file(Path(directory) / "codec.safetensors")
        text = HashTextEmbedder(config["text_len"], config["text_dim"])
        return cls(PatchCodec(codec["mean"], codec["basis"], float(codec["scale"])), text)
