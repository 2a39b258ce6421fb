"""Self-rollout of a causal few-step generator, as it will run at inference (Self Forcing, arXiv 2506.08009)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dit_ops import flow_to_x0, renoise
from dit_ops.conditions.arguments import of_clean, of_frames
from dit_ops.draws import Draws
from dit_ops.layout import VideoLayout


def inference_with_trajectory(
    generator: Any,
    noise: Tensor,
    condition: Mapping[str, Tensor],
    *,
    timesteps: Sequence[float] | Tensor,
    exit_step: int,
    draws: Draws,
    viewmats: Tensor | None = None,
    Ks: Tensor | None = None,
    context: Literal["exit", "last"] = "exit",
    window_frames: int | None = None,
    sink_frames: int = 0,
) -> tuple[Tensor, float, float]:
    """`(pred, timestep_from, timestep_to)`: every block is denoised down to step k = exit_step and predicts its x0 there.

    Block by block, with x = noise at t_0: steps j < k re-noise, `x ← (1 − σ_{j+1})·x0(x, t_j) + σ_{j+1}·ε` with a fresh ε;
    step k gives `pred = x0(x, t_k)`; then the block is rerun on that x0 at t = 0, so that the next block sees clean keys.
    context = "last": the block goes on after step k to the last step without gradient, and the rerun is on that sample.
    Only step k records a gradient (none under no_grad), and the past is a constant: the gradient is truncated to the block.

    generator: a causal backbone      condition: dict of [B, …], of all frames
    noise [B, F, Cz, h, w]   timesteps falling, 0 … 1000, fp32   viewmats [B, F, 4, 4]   Ks [B, F, 3, 3]
    pred [B, F, Cz, h, w]; timestep_from = t_k; timestep_to = t_{k+1}, or 0 after the last step.
    """
    B, frames, _, height, width = noise.shape
    t = [float(s) for s in timesteps] + [0.0]
    last_step = len(t) - 2
    if not 0 <= exit_step <= last_step:
        raise ValueError(f"exit_step must be in [0, {len(t) - 1}), one of the timesteps {t[:-1]}, got {exit_step}")
    cache = generator.new_cache(B, height, width, window_frames=window_frames, sink_frames=sink_frames)

    pred = []
    for first, last in VideoLayout(frames, height, width, generator.block_frames).blocks:
        x = noise[:, first:last]
        chunk = {
            "cache": cache,
            "start_frame": first,
            "viewmats": None if viewmats is None else viewmats[:, first:last],
            "Ks": None if Ks is None else Ks[:, first:last],
        }
        given = of_frames(condition, first, last)
        for j in range((exit_step if context == "exit" else last_step) + 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and j == exit_step):
                flow = generator(x, noise.new_full((B,), t[j]), **given, **chunk)
                x0 = flow_to_x0(x, flow, t[j] / 1000)
            if j == exit_step:
                pred.append(x0)
            if j < last_step:
                eps = draws.at(first, j).normal("renoise", tuple(x.shape), device=x.device, dtype=x.dtype)
                x = renoise(x, flow.detach(), eps, t[j] / 1000, t[j + 1] / 1000)
        if last < frames:
            with torch.no_grad():
                generator(x0.detach(), noise.new_zeros(B), **of_clean(given), **chunk, keys_only=True)
    return torch.cat(pred, dim=1), t[exit_step], t[exit_step + 1]
