"""Classifier-free guidance: the conditional and the unconditional flow in one forward."""

import torch
from torch import Tensor, nn


def cond_and_uncond_flow(
    backbone: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    negative_text: Tensor,
    **conditions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Flows `[B, F, Cz, h, w]` for text and for negative_text from one batch of 2B; all else, the camera too, is shared.

    latents [B, F, Cz, h, w]   timestep [B] or [B, F]   text [B, T, Dt]   negative_text [T, Dt]   conditions start with B
    """
    flow = backbone(
        twice(latents), twice(timestep), with_negative(text, negative_text), **{k: twice(v) for k, v in conditions.items()}
    )
    cond, uncond = flow.chunk(2)
    return cond, uncond


def twice(x: Tensor | None) -> Tensor | None:
    """`[B, …] → [2B, …]`"""
    return None if x is None else torch.cat([x, x])


def with_negative(text: Tensor, negative_text: Tensor) -> Tensor:
    """`[B, T, Dt]`, `[T, Dt]` → `[2B, T, Dt]`: the prompts, then the negative prompt for each of them."""
    if negative_text.shape != text.shape[1:]:
        raise ValueError(f"negative_text must be [T, Dt] = {list(text.shape[1:])}, got {list(negative_text.shape)}")
    return torch.cat([text, negative_text.to(text).expand_as(text)])
