"""The elementwise steps of flow-matching samplers and trainers: x_t = (1 - sigma) x0 + sigma noise, flow = noise - x0.

Tensors are latents [B, F, Cz, h, w] or any shape that starts with B. A sigma is a float or a tensor [B] or [B, F].
Steps are computed in fp32 (fp64 for fp64), the result has the first argument's dtype; differentiable in every tensor.
"""

import torch
from torch import Tensor

from dit_ops import _library as lib

Sigma = float | Tensor


def add_noise(x0: Tensor, noise: Tensor, sigma: Sigma, *, backend: str | None = None) -> Tensor:
    """(1 - sigma) x0 + sigma noise"""
    s = _prepare("add_noise", x0, {"noise": noise}, {"sigma": sigma}, backend)[0]
    x = _wide(x0)
    return torch.lerp(x, noise.to(x.dtype), s).to(x0.dtype)


def flow_to_x0(x: Tensor, flow: Tensor, sigma: Sigma, *, backend: str | None = None) -> Tensor:
    """x - sigma flow"""
    s = _prepare("flow_to_x0", x, {"flow": flow}, {"sigma": sigma}, backend)[0]
    return _x0(_wide(x), flow, s).to(x.dtype)


def renoise(x: Tensor, flow: Tensor, noise: Tensor, sigma: Sigma, sigma_next: Sigma, *, backend: str | None = None) -> Tensor:
    """(1 - sigma_next) (x - sigma flow) + sigma_next noise"""
    sigmas = {"sigma": sigma, "sigma_next": sigma_next}
    s, s_next = _prepare("renoise", x, {"flow": flow, "noise": noise}, sigmas, backend)
    x0 = _x0(_wide(x), flow, s)
    return torch.lerp(x0, noise.to(x0.dtype), s_next).to(x.dtype)


def cfg_euler_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance: float,
    sigma: Sigma,
    sigma_next: Sigma,
    *,
    backend: str | None = None,
) -> Tensor:
    """x + (sigma_next - sigma) v, with v = uncond + guidance (cond - uncond), or v = cond where uncond is None"""
    others = {"cond": cond} if uncond is None else {"cond": cond, "uncond": uncond}
    s, s_next = _prepare("cfg_euler_step", x, others, {"sigma": sigma, "sigma_next": sigma_next}, backend)
    v = _wide(cond)
    if uncond is not None:
        v = uncond.to(v.dtype) + guidance * (v - uncond.to(v.dtype))
    return (_wide(x) + (s_next - s) * v).to(x.dtype)


def _x0(x: Tensor, flow: Tensor, s: Sigma) -> Tensor:
    return x - s * flow.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _prepare(op: str, x: Tensor, others: dict[str, Tensor], sigmas: dict[str, Sigma], backend: str | None) -> tuple[Sigma, ...]:
    """Checks the arguments and gives every sigma tensor the trailing axes of x."""
    first = {"add_noise": "x0"}.get(op, "x")
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"{op}: {first} must be a floating point tensor [B, ...], got {x.dtype} {list(x.shape)}")
    for name, t in others.items():
        lib.check_shape(op, name, t, f"as {first}", tuple(x.shape))
    lib.choose(op, backend, {}, x)
    return tuple(_spread(op, name, sigma, x) for name, sigma in sigmas.items())


def _spread(op: str, name: str, sigma: Sigma, x: Tensor) -> Sigma:
    if not isinstance(sigma, Tensor):
        return float(sigma)
    if sigma.ndim > min(2, x.ndim) or sigma.shape != x.shape[: sigma.ndim]:
        raise ValueError(f"{op}: {name} must be a float, [B] or [B, F] of {list(x.shape)}, got {list(sigma.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    return sigma.to(x.device, wide).view(sigma.shape + (1,) * (x.ndim - sigma.ndim))
