"""Classifier-free guidance: the conditional and the unconditional flow in one forward."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dit_ops.conditions.arguments import with_negative


def cond_and_uncond_flow(
    backbone: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    condition: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    **given: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Flows `[B, F, Cz, h, w]` for the condition and for its negative from one batch of 2B; all else is shared, the camera too.

    latents [B, F, Cz, h, w]   timestep [B] or [B, F]   condition, given: start with B   negative: of one sample
    """
    flow = backbone(
        twice(latents), twice(timestep), **with_negative(condition, negative), **{k: twice(v) for k, v in given.items()}
    )
    cond, uncond = flow.chunk(2)
    return cond, uncond


def twice(x: Tensor | None) -> Tensor | None:
    """`[B, …] → [2B, …]`"""
    return None if x is None else torch.cat([x, x])
