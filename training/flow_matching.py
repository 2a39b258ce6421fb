"""Pieces of the flow-matching loss that stages share."""

import torch
from torch import Tensor

from dit_ops.draws import Draws


def flow_loss(flow: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """`mean(w · (v − (ε − x0))²)` in fp32; latents [B, F, Cz, h, w], weight [B] or [B, F]."""
    error = (flow.float() - (noise.float() - x0.float())).square()
    if weight is not None:
        error = error * weight.view(*weight.shape, *[1] * (error.dim() - weight.dim()))
    return error.mean()


def drop_text(text: Tensor, negative_text: Tensor, probability: float, draws: Draws) -> Tensor:
    """The text [B, T, Dt] of each sample, or with this probability negative_text [T, Dt]: trains the unconditional flow."""
    if probability == 0:
        return text
    dropped = draws.uniform("text_dropout", (len(text), 1, 1), device=text.device) < probability
    return torch.where(dropped, negative_text.to(text), text)


def check_probability(stage: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{stage}: {name} must be in [0, 1], got {value}")
