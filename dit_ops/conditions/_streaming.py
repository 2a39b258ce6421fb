"""Decoding a video chunk by chunk: what a causal VAE decoder remembers of the past lies here, not on the VAE.

Any number of streams may go on at a time with one VAE, each in a thread of its own, or moving from thread to thread; on a GPU
all chunks of a stream go on one CUDA stream.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Past = defaultdict[Any, Any]  # of one tile: by layer, the frames that it needs again, None at the start


@dataclass(frozen=True)
class Axis:
    """How tiles cut one side of a frame: `tile` latents every `stride`, which are `step` of the decoder's pixels."""

    tile: int
    stride: int
    step: int | None = None
    overlap: int = 0  # of the decoder's pixels, blended


class StreamDecoder:
    """The latent frames of one video, in order, to pixels, in the tiles of the VAE if its tiling is on.

    on_host: what the waiting tiles remember lies in host memory (pinned), and comes to the device and goes once per chunk
    """

    def __init__(self, vae: Any, *, on_host: bool = False) -> None:
        self.vae, self.on_host = vae, on_host
        self.past: dict[tuple[int, int], Past] = {}  # by the tile's first latent
        self.first = True

    def axes(self, h: int, w: int) -> tuple[Axis, Axis]:
        """Down and across."""
        raise NotImplementedError

    def decode_frame(self, z: Tensor, past: Past, first: bool) -> Tensor:
        """One latent frame of one tile, [1, Cz, 1, h, w] -> [1, C, 1 or more, H, W]; its past moves on, layer by layer."""
        raise NotImplementedError

    def __call__(self, z: Tensor) -> Tensor:
        """The next frames [1, Cz, F, h, w] -> [1, C, Fp, H, W]."""
        down, across = self.axes(*z.shape[-2:])
        above: list[Tensor] = []
        rows: list[Tensor] = []
        for y in range(0, z.shape[-2], down.stride):
            row: list[Tensor] = []
            for x in range(0, z.shape[-1], across.stride):
                tile = self._decode_tile((y, x), z[..., y : y + down.tile, x : x + across.tile])
                if above:
                    blend_(above[len(row)], tile, down.overlap, dim=-2)
                if row:
                    blend_(row[-1], tile, across.overlap, dim=-1)
                row.append(tile)
            rows.append(torch.cat([tile[..., : down.step, : across.step] for tile in row], dim=-1))
            above = row
        self.first = False
        return torch.cat(rows, dim=-2)

    def _decode_tile(self, place: tuple[int, int], z: Tensor) -> Tensor:
        """All frames of one tile: what it remembers travels once, and frames are blended together."""
        stored = past = self.past.setdefault(place, defaultdict(lambda: None))
        if self.on_host:
            past = stored.copy()
            for layer, value in stored.items():
                past[layer] = to_device(value, z.device)
        frames = [self.decode_frame(frame, past, self.first and i == 0) for i, frame in enumerate(z.split(1, dim=2))]
        if self.on_host:
            for layer, value in past.items():
                stored[layer] = to_host(value, stored[layer])
        return torch.cat(frames, dim=2)


def to_device(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def to_host(value: Any, buffer: Any) -> Any:
    """A copy in host memory, in `buffer` if that fits. A decoder's marks that are no tensors stay as they are."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(buffer, Tensor) or buffer.shape != value.shape:
        buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return buffer.copy_(value, non_blocking=True)


def blend_(before: Tensor, tile: Tensor, overlap: int, dim: int) -> None:
    """`tile[i] = (1 - i/n) · before[i - n] + i/n · tile[i]` along dim, for i < n: the overlap, or all of a smaller tile.

    Rounded as in diffusers' blend_v and blend_h, which take several launches per i.
    """
    n = min(tile.shape[dim], overlap)  # what is before is never smaller
    ramp = torch.arange(n, dtype=torch.float64, device=tile.device) / n
    fade, ramp = (weight.float().unflatten(0, (n, 1) if dim == -2 else (1, n)) for weight in (1 - ramp, ramp))
    edge = tile.narrow(dim, 0, n)
    edge.copy_((before.narrow(dim, before.shape[dim] - n, n) * fade).to(tile.dtype) + (edge * ramp).to(tile.dtype))


@torch.no_grad()
def decode_chunks(
    chunks: Iterable[Tensor], denormalised: Callable[[Tensor], Tensor], new_decoder: Callable[[], StreamDecoder]
) -> Iterator[Tensor]:
    """Latents [B, F_i, Cz, h, w] -> pixels [B, Fp_i, 3, H, W] in [-1, 1] fp32, one video after the other.

    denormalised: latents -> the VAE's own [B, Cz, F, h, w]
    """
    decoders: list[StreamDecoder] = []
    for chunk in chunks:
        decoders = decoders or [new_decoder() for _ in chunk]
        videos = [decoder(z) for decoder, z in zip(decoders, denormalised(chunk).split(1), strict=True)]
        yield torch.cat(videos).float().clamp(-1, 1).transpose(1, 2)
