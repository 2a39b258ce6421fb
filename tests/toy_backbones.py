"""Backbones for tests of the training stages: a closed-form one and a tiny random Wan."""

import torch
from torch import Tensor, nn

from dit_ops.backbones.wan import WanBackbone

LATENT = (2, 4, 4)  # Cz, h, w
TEXT = (3, 8)  # T, Dt


class GaussianBackbone(nn.Module):
    """The exact flow of data x0 ~ N(mean, std²), independent in every element; mean is encoder_hidden_states[..., 0, 0].

    Records what it is called with.

    x_t = (1 − σ)·x0 + σ·ε has variance d = (1 − σ)²·std² + σ²; with y = x_t − (1 − σ)·mean:
    E[x0 | x_t] = mean + (1 − σ)·std²·y / d,   E[ε | x_t] = σ·y / d.
    """

    block_frames: int | None = None

    def __init__(self, std: float):
        super().__init__()
        self.std = nn.Parameter(torch.tensor(std))
        self.calls: list[dict] = []

    def new_cache(self, batch: int, height: int, width: int, **options) -> None:
        return None

    def forward(self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **given) -> Tensor:
        self.calls.append({"latents": latents, "timestep": timestep, "grad": torch.is_grad_enabled(), **given})
        sigma, mean = (t.view(-1, 1, 1, 1, 1) for t in (timestep / 1000, encoder_hidden_states[:, 0, 0]))
        return gaussian_flow(latents, sigma, mean, self.std)


def gaussian_flow(x: Tensor, sigma: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    y = x - (1 - sigma) * mean
    d = ((1 - sigma) * std) ** 2 + sigma**2
    return sigma * y / d - mean - (1 - sigma) * std**2 * y / d


class TabularBackbone(nn.Module):
    """flow = a[t]·x + b[t], one pair of numbers per timestep: can represent any linear ODE exactly."""

    block_frames: int | None = None

    def __init__(self, timesteps: Tensor):
        super().__init__()
        self.register_buffer("timesteps", timesteps.float())
        self.a, self.b = nn.Parameter(torch.zeros(len(timesteps))), nn.Parameter(torch.zeros(len(timesteps)))

    def forward(self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **given) -> Tensor:
        distance, i = (timestep[:, None] - self.timesteps).abs().min(1)
        assert distance.max() < 1e-3, "a timestep that is not in the table"
        return self.a[i].view(-1, 1, 1, 1, 1) * latents + self.b[i].view(-1, 1, 1, 1, 1)


def tiny_wan(block_frames: int | None, *, seed: int = 0, camera: bool = True, sharpness: float = 6.0) -> WanBackbone:
    """Two layers, random everywhere (camera branch and head too), with attention sharp enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = dict(
            patch_size=[1, 2, 2],
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=LATENT[0],
            out_channels=LATENT[0],
            text_dim=TEXT[1],
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
        )
        model = WanBackbone.from_config(config, camera=camera, block_frames=block_frames)
        for name, p in model.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.5 * p.shape[-1] ** -0.5 if "scale_shift" not in name else 0.3)
            elif not name.endswith(("norm_q.weight", "norm_k.weight")):
                nn.init.normal_(p, std=0.1)
            else:
                nn.init.constant_(p, sharpness**0.5)
    return model


def text_condition(states: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": states}


NEGATIVE = text_condition(torch.zeros(TEXT))


def tiny_batch(B: int, frames: int, *, seed: int = 0) -> dict:
    """latents, condition, viewmats and Ks of B different random samples."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.randn(B, frames, generator=g) * 0.5
    viewmats = torch.eye(4).repeat(B, frames, 1, 1)
    viewmats[..., 0, 0] = viewmats[..., 2, 2] = angle.cos()
    viewmats[..., 0, 2], viewmats[..., 2, 0] = angle.sin(), -angle.sin()
    viewmats[..., :3, 3] = torch.randn(B, frames, 3, generator=g) * 0.3
    Ks = torch.tensor([[0.5, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]).repeat(B, frames, 1, 1)
    return {
        "latents": torch.randn(B, frames, *LATENT, generator=g),
        "condition": text_condition(torch.randn(B, *TEXT, generator=g)),
        "viewmats": viewmats,
        "Ks": Ks,
    }
