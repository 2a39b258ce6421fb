"""Wan 2.2 TI2V 5B: Wan with 48 latent channels, and with known frames in place of noisy ones instead of further channels.

A known frame enters clean, at timestep 0, and the model's own flow for it means nothing. What is returned there is the flow
that leads to it, `v = (x_t − x0) / σ`: every sampler keeps the frame, and every loss is zero on it.
"""

from typing import Any

import torch
from torch import Tensor

from dit_ops.backbones.wan import WanBackbone
from dit_ops.flow import per_frame


class WanTI2VBackbone(WanBackbone):
    """As WanBackbone; condition_latents `[B, F, Cz + 1, h, w]`: latents of known frames, and a mask that is 1 in them."""

    @property
    def takes_condition_latents(self) -> bool:
        return True

    def _flow(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        condition_latents: Tensor | None = None,
        clean_latents: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        keys_only: bool = False,
        **given: Any,
    ) -> Tensor:
        given["keys_only"] = keys_only
        if condition_latents is None:
            given |= {"clean_latents": clean_latents, "clean_timestep": clean_timestep}
            return super()._flow(latents, timestep, encoder_hidden_states, **given)
        B, frames, channels, *plane = latents.shape
        if condition_latents.shape != (B, frames, channels + 1, *plane):
            expected = [B, frames, channels + 1, *plane]
            raise ValueError(
                f"condition_latents must be [B, F, Cz + 1, h, w] = {expected}, got {list(condition_latents.shape)}"
            )
        frame = condition_latents[:, :, :-1].to(latents.dtype)
        known = condition_latents[:, :, -1, 0, 0] > 0  # [B, F]
        x, t = with_known(latents, timestep, frame, known)
        if clean_latents is not None:
            clean_timestep = torch.zeros_like(timestep) if clean_timestep is None else clean_timestep
            clean_latents, clean_timestep = with_known(clean_latents, clean_timestep, frame, known)
        given |= {"clean_latents": clean_latents, "clean_timestep": clean_timestep}
        flow = super()._flow(x, t, encoder_hidden_states, **given)
        if keys_only:
            return flow
        sigma = _over_frames(per_frame(timestep, frames).float() / 1000)
        exact = (latents.float() - frame.float()) / sigma.masked_fill(sigma == 0, torch.inf)
        return torch.where(_over_frames(known), exact.to(flow.dtype), flow)

    def keep_known(self, x: Tensor, condition_latents: Tensor | None = None, **_: Any) -> Tensor:
        """x with the known frames themselves: UniPC's timesteps are whole numbers, which leaves 1e-3 of the noise in them."""
        if condition_latents is None:
            return x
        known = condition_latents[: len(x), :, -1, 0, 0] > 0
        return torch.where(_over_frames(known), condition_latents[: len(x), :, :-1].to(x), x)


def with_known(x: Tensor, t: Tensor, frame: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, F, Cz, h, w] and t [B, F], in known frames: the frame itself, and 0."""
    return torch.where(_over_frames(known), frame, x), per_frame(t, x.shape[1]).masked_fill(known, 0)


def _over_frames(values: Tensor) -> Tensor:
    return values[:, :, None, None, None]
