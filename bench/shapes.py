"""The token shapes of real models, for the benches of adaln and its relatives."""

import argparse
from collections.abc import Iterator

from torch import Tensor

from dit_ops.rope import Rope3D

SHAPES = {  # B, L, C, F
    "wan2.1-1.3b, 480p, 21 latent frames": (1, 32760, 1536, 21),
    "wan2.1-14b, 480p, 21 latent frames": (1, 32760, 5120, 21),
    "hunyuanvideo-1.5, 480p, 20 latent frames": (1, 31200, 2048, 20),
    "wan2.1-1.3b, one streaming chunk of 3 latent frames": (1, 4680, 1536, 3),
    "rooms-tiny, 8 latent frames of 2 by 2 tokens": (16, 32, 128, 8),
}
GRIDS = {  # B, F, H, W, N, D
    "wan2.1-1.3b, 480p, 21 latent frames": (1, 21, 30, 52, 12, 128),
    "wan2.1-14b, 480p, 21 latent frames": (1, 21, 30, 52, 40, 128),
    "hunyuanvideo-1.5, 480p, 20 latent frames": (1, 20, 30, 52, 16, 128),
    "wan2.1-1.3b, one streaming chunk of 3 latent frames": (1, 3, 30, 52, 12, 128),
    "rooms-tiny, 8 latent frames of 2 by 2 tokens": (16, 8, 2, 2, 4, 32),
}


def shapes(args: argparse.Namespace) -> Iterator[tuple[str, int, int, int, int]]:
    """name, B, L, C, F"""
    tokens = args.tokens
    for name, (B, L, C, F) in [*SHAPES.items()][: args.shapes]:
        if tokens is None or tokens >= L:
            yield name, B, L, C, F
        else:
            yield f"{name}, first {tokens // F * F} tokens", B, tokens // F * F, C, F


def head_shapes(args: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...], tuple[int, int, int], tuple[Tensor, ...]]]:
    """name, (B, L, N, D), grid, rope; --tokens cuts whole frames off."""
    for name, (B, F, H, W, N, D) in [*GRIDS.items()][: args.shapes]:
        frames = F if args.tokens is None else min(F, max(1, args.tokens // (H * W)))
        rope = Rope3D(D).tables(frames, H, W, args.device)
        yield name if frames == F else f"{name}, first {frames} frames", (B, frames * H * W, N, D), (frames, H, W), rope
