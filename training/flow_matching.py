"""Pieces of the flow-matching loss that stages share."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dit_ops.conditions.arguments import negative_of
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule

TimestepLaw = Literal["uniform", "logit_normal"]


def flow_loss(flow: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """`mean(w · (v − (ε − x0))²)` in fp32; latents [B, F, Cz, h, w], weight [B] or [B, F]."""
    error = (flow.float() - target.float()).square()
    if weight is not None:
        error = error * weight.view(*weight.shape, *[1] * (error.dim() - weight.dim()))
    return error.mean()


def draw_timesteps(schedule: FlowSchedule, law: TimestepLaw, shape: tuple[int, ...], draws: Draws) -> Tensor:
    """fp32 timesteps: uniform over the shifted schedule, or `1000·shift(sigmoid(N(0, 1)))` (Esser et al. 2024)."""
    if law == "logit_normal":
        return 1000 * schedule.shifted(draws.normal("timestep", shape).sigmoid())
    return schedule.timesteps[draws.integers("timestep", 0, schedule.num_steps, shape)]


def drop_text(
    condition: Mapping[str, Tensor], negative: Mapping[str, Tensor], probability: float, draws: Draws
) -> dict[str, Tensor]:
    """The condition [B, …], where each sample has with this probability the negative prompt: trains the unconditional flow."""
    if probability == 0:
        return dict(condition)
    B, device = next((len(value), value.device) for value in condition.values())
    dropped = draws.uniform("text_dropout", (B, 1, 1), device=device).flatten() < probability
    other = negative_of(condition, negative)
    choose = lambda yes, no: torch.where(dropped.view(-1, *[1] * (yes.dim() - 1)), no, yes)
    return {name: choose(value, other[name]) if name in negative else value for name, value in condition.items()}


def cameras(batch: dict) -> dict[str, Any]:
    """viewmats [B, F, 4, 4] and Ks [B, F, 3, 3], None in data without cameras."""
    return {"viewmats": batch.get("viewmats"), "Ks": batch.get("Ks")}


def check_probability(stage: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{stage}: {name} must be in [0, 1], got {value}")
