"""A tiny random Wan and its inputs, for the tests of the backbone."""

import torch

from dit_ops.backbones.wan import WanBackbone
from dit_ops.camera import intrinsics_matrix, parse_trajectory

TINY = dict(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=24,
    ffn_dim=64,
    text_dim=12,
    freq_dim=32,
    in_channels=4,
    out_channels=4,
)
I2V = dict(in_channels=9, image_dim=10, added_kv_proj_dim=48)


def tiny(camera: bool = True, block_frames: int | None = 2, **config) -> WanBackbone:
    """A random model with a camera branch that matters."""
    model = WanBackbone.from_config(TINY | config, camera=camera, block_frames=block_frames)
    if camera:
        for layer in model.camera:
            torch.nn.init.normal_(layer.weight, std=0.2)
            torch.nn.init.normal_(layer.bias, std=0.2)
    return model


def inputs(B: int = 2, F: int = 5, h: int = 4, w: int = 6, T: int = 7, camera: bool = True):
    """Noisy latents, clean latents, text states, and cameras as keyword arguments."""
    latents, clean = torch.randn(2, B, F, 4, h, w)
    pose = parse_trajectory(f"l*{F - 1}" if F > 1 else "l*0")
    cameras = dict(viewmats=pose.expand(B, F, 4, 4), Ks=intrinsics_matrix(0.6, 0.8).expand(B, F, 3, 3)) if camera else {}
    return latents, clean, torch.randn(B, T, 12), cameras


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
