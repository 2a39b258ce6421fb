"""Condition dictionaries: names are keyword arguments of a backbone's forward, so training names no model.

Stages and samplers own noise and timestep, whose laws are what a recipe is about; the condition side owns the rest.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dit_ops import add_noise

PER_FRAME = ("condition_latents", "action")  # [B, F, …]; all others are of the whole video


class TwoSteps:
    """The two steps of every condition side: get_condition encodes once, process_condition makes a training call of it."""

    encode_text: Callable[[list[str]], dict[str, Tensor]]
    encode_image: Callable[[Tensor, int], dict[str, Tensor]]
    encode_to_latent: Callable[[Tensor], Tensor]

    def get_condition(self, prompts: list[str], videos: Tensor | None = None, *, image: bool = False) -> dict[str, Tensor]:
        """What a data set stores of B prompts and videos [B, Fp, 3, H, W] in [-1, 1]: text states, latents.

        image: the first pixel frame is a condition, too (image to video).
        """
        condition = dict(self.encode_text(prompts))
        if videos is None:
            return condition
        latents = self.encode_to_latent(videos)
        known = self.encode_image(videos[:, 0], latents.shape[1]) if image else {}
        return {"latents": latents, **condition, **known}

    @staticmethod
    def process_condition(
        condition: Mapping[str, Tensor], noise: Tensor, timestep: Tensor, **given: Tensor | None
    ) -> tuple[dict[str, Tensor | None], Tensor]:
        """(arguments of the model call, target): `x_t = (1 − σ)·x0 + σ·ε` with `σ = t/1000`, and the flow `ε − x0`.

        condition: of get_condition, with latents [B, F, Cz, h, w]   noise: as latents   timestep [B] or [B, F] in 0…1000
        given: further arguments, such as cameras or clean latents
        """
        x0 = condition["latents"]
        arguments = {**condition, "latents": add_noise(x0, noise, timestep / 1000), "timestep": timestep, **given}
        return arguments, noise.float() - x0.float()


process_condition = TwoSteps.process_condition


def image_condition(first: Tensor, frames: int) -> Tensor:
    """Latents of a first frame [B, 1, Cz, h, w] -> `[B, frames, Cz + 1, h, w]`: in frame 0, else 0, with a mask."""
    known = torch.cat([first, torch.ones_like(first[:, :, :1])], dim=2)
    return torch.cat([known, known.new_zeros(known.shape[0], frames - 1, *known.shape[2:])], dim=1)


def per_sample(condition: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """`{name: [B, …]}` → B dictionaries without the batch axis."""
    B = len(next(iter(condition.values())))
    return [{name: value[b] for name, value in condition.items()} for b in range(B)]


def of_frames(condition: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """The condition of frames [first, last). What is not per frame is the same tensor object: caches recognise it."""
    return {name: value[:, first:last] if name in PER_FRAME else value for name, value in condition.items()}


def of_clean(condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The condition of a clean chunk's rerun: without the action, which teacher forcing gives to the noisy half only."""
    return {name: value for name, value in condition.items() if name != "action"}


def negative_of(condition: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The unconditional condition: what `negative` (of one sample) has replaces the prompt's; image and action stay.

    ValueError: a name or a shape that the condition does not have.
    """
    replaced = {}
    for name, value in negative.items():
        if name not in condition:
            raise ValueError(f"negative must have names of the condition, {sorted(condition)}, got {name!r}")
        if value.shape != condition[name].shape[1:]:
            expected, got = list(condition[name].shape[1:]), list(value.shape)
            raise ValueError(f"negative {name} must be of one sample of the condition, {expected}, got {got}")
        replaced[name] = value.to(condition[name]).expand_as(condition[name])
    return {**condition, **replaced}


def with_negative(condition: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`[B, …]` → `[2B, …]`: the prompts, then the negative prompt for each of them."""
    other = negative_of(condition, negative)
    return {name: torch.cat([value, other[name]]) for name, value in condition.items()}


def in_dtype(condition: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """On a device, and floating tensors in `dtype`; masks and labels keep theirs."""
    return {name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in condition.items()}
