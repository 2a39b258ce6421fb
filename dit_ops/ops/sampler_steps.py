"""The elementwise steps of flow-matching samplers and trainers: x_t = (1 - sigma) x0 + sigma noise, flow = noise - x0.

Tensors are latents [B, F, Cz, h, w] or any shape that starts with B. A sigma is a float or a tensor [B] or [B, F].
Steps are computed in fp32 (fp64 for fp64), the result has the first argument's dtype; differentiable in every tensor.
"""

import torch
from torch import Tensor

from dit_ops import _library as lib

Sigma = float | Tensor
STEPS = ("add_noise", "flow_to_x0", "renoise", "cfg_euler_step")  # kernels know them by number


def add_noise(x0: Tensor, noise: Tensor, sigma: Sigma, *, backend: str | None = None) -> Tensor:
    """(1 - sigma) x0 + sigma noise"""
    return _step("add_noise", {"x0": x0, "noise": noise}, {"sigma": sigma}, 1.0, backend)


def flow_to_x0(x: Tensor, flow: Tensor, sigma: Sigma, *, backend: str | None = None) -> Tensor:
    """x - sigma flow"""
    return _step("flow_to_x0", {"x": x, "flow": flow}, {"sigma": sigma}, 1.0, backend)


def renoise(x: Tensor, flow: Tensor, noise: Tensor, sigma: Sigma, sigma_next: Sigma, *, backend: str | None = None) -> Tensor:
    """(1 - sigma_next) (x - sigma flow) + sigma_next noise"""
    sigmas = {"sigma": sigma, "sigma_next": sigma_next}
    return _step("renoise", {"x": x, "flow": flow, "noise": noise}, sigmas, 1.0, backend)


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
    tensors = {"x": x, "cond": cond} if uncond is None else {"x": x, "cond": cond, "uncond": uncond}
    guidance = 1.0 if uncond is None else float(guidance)
    return _step("cfg_euler_step", tensors, {"sigma": sigma, "sigma_next": sigma_next}, guidance, backend)


def sampler_step_ref(step: str, x: Tensor, y: Tensor, z: Tensor | None, s: Sigma, t: Sigma, guidance: float) -> Tensor:
    """x, y, z: the tensors of `step` in their order; s, t: sigma and sigma_next, which spread over them."""
    dtype = x.dtype
    x = x.to(torch.promote_types((y if step == "cfg_euler_step" else x).dtype, torch.promote_types(dtype, torch.float32)))
    if step == "add_noise":
        return torch.lerp(x, y.to(x.dtype), s).to(dtype)
    if step == "cfg_euler_step":
        v = y.to(x.dtype)
        if z is not None:
            v = z.to(v.dtype) + guidance * (v - z.to(v.dtype))
        return (x + (t - s) * v).to(dtype)
    x0 = x - s * y.to(x.dtype)
    if step == "renoise":
        assert z is not None
        x0 = torch.lerp(x0, z.to(x0.dtype), t)
    return x0.to(dtype)


def _step(op: str, tensors: dict[str, Tensor], sigmas: dict[str, Sigma], guidance: float, backend: str | None) -> Tensor:
    (first, x), *others = tensors.items()
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"{op}: {first} must be a floating point tensor [B, ...], got {x.dtype} {list(x.shape)}")
    for name, tensor in others:
        lib.check_shape(op, name, tensor, f"as {first}", tuple(x.shape))
    backend = lib.choose(op, backend, REFUSES, *tensors.values())
    s, t = [_table(op, name, sigma, x) for name, sigma in sigmas.items()] + [0.0] * (2 - len(sigmas))
    y, z = others[0][1], others[1][1] if len(others) > 1 else None
    if backend == "reference":
        return sampler_step_ref(op, x, y, z, _spread(s, x), _spread(t, x), guidance)
    if op == "cfg_euler_step" and not isinstance(s, Tensor) and not isinstance(t, Tensor):
        s, t = 0.0, t - s  # the difference of two numbers is rounded once
    tables = [sigma.contiguous() if isinstance(sigma, Tensor) else None for sigma in (s, t)]
    values = [0.0 if isinstance(sigma, Tensor) else sigma for sigma in (s, t)]
    branches = [None if tensor is None else tensor.contiguous() for tensor in (x, y, z)]
    return _sampler_step(op, *branches, *tables, *values, guidance, backend)


def _table(op: str, name: str, sigma: Sigma, x: Tensor) -> Sigma:
    if not isinstance(sigma, Tensor):
        return float(sigma)
    if sigma.ndim > min(2, x.ndim) or sigma.shape != x.shape[: sigma.ndim]:
        raise ValueError(f"{op}: {name} must be a float, [B] or [B, F] of {list(x.shape)}, got {list(sigma.shape)}")
    return sigma.to(x.device, torch.promote_types(x.dtype, torch.float32))


def _spread(sigma: Sigma, x: Tensor) -> Sigma:
    """A table with the trailing axes of x."""
    return sigma.view(sigma.shape + (1,) * (x.ndim - sigma.ndim)) if isinstance(sigma, Tensor) else sigma


def _triton_refuses(*tensors: Tensor) -> str | None:
    return next((refused for refused in (lib.refuses("triton", t) for t in tensors) if refused), None)


def _cuda_refuses(*tensors: Tensor) -> str | None:
    x, *branches = tensors
    dtypes = {b.dtype for b in branches}
    if len(dtypes) > 1 or (x.dtype not in dtypes and x.dtype != torch.float32):
        others = ", ".join(sorted(map(str, dtypes)))
        return f"dtype is {x.dtype} with {others}: all alike, or fp32 first with alike others, is written"
    return next((refused for refused in (lib.refuses("cuda", t) for t in tensors) if refused), None)


REFUSES = {"cuda": _cuda_refuses, "triton": _triton_refuses}


def _fwd(step, x, y, z, sigma, sigma_next, s, t, guidance, backend):
    if x.numel() == 0:
        return torch.empty_like(x)
    launch = lib.kernel(backend, "sampler_steps", "sampler_step_fwd")
    return launch(STEPS.index(step), x, y, z, sigma, sigma_next, s, t, guidance)


def _fwd_fake(step, x, y, z, sigma, sigma_next, s, t, guidance, backend):
    return torch.empty_like(x)


def _bwd(step, of, dout, sigma, sigma_next, s, t, guidance, dtype, backend):
    grad = torch.empty_like(dout, dtype=dtype)
    if dout.numel():
        launch = lib.kernel(backend, "sampler_steps", "sampler_step_bwd")
        launch(STEPS.index(step), "xyz".index(of), dout, grad, sigma, sigma_next, s, t, guidance)
    return grad


def _bwd_fake(step, of, dout, sigma, sigma_next, s, t, guidance, dtype, backend):
    return torch.empty_like(dout, dtype=dtype)


_sampler_step = lib.define(
    "sampler_step(str step, Tensor x, Tensor y, Tensor? z, Tensor? sigma, Tensor? sigma_next, float s, float t, float guidance,"
    " str backend) -> Tensor",
    _fwd,
    _fwd_fake,
)
_sampler_step_bwd = lib.define(
    "sampler_step_bwd(str step, str of, Tensor dout, Tensor? sigma, Tensor? sigma_next, float s, float t, float guidance,"
    " ScalarType dtype, str backend) -> Tensor",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx, inputs, output):
    ctx.step, x, y, z, sigma, sigma_next, *ctx.numbers, ctx.backend = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (x, y, z)]
    of_sigma = any(ctx.needs_input_grad[4:6])  # only then are the values needed
    ctx.save_for_backward(sigma, sigma_next, *((x, y, z) if of_sigma else ()))


def _backward(ctx, dout):
    sigma, sigma_next, *branches = ctx.saved_tensors
    dout = dout.contiguous()
    grads: list[Tensor | None] = [None] * 3
    for i, of in enumerate("xyz"):
        if ctx.needs_input_grad[1 + i]:
            if of == "x" and ctx.step in ("flow_to_x0", "cfg_euler_step"):
                grads[i] = dout
            else:
                tables = (sigma, sigma_next)
                grads[i] = _sampler_step_bwd(ctx.step, of, dout, *tables, *ctx.numbers, ctx.dtypes[i], ctx.backend)
    dsigma = _sigma_gradients(ctx, dout, sigma, sigma_next, *branches) if branches else [None, None]
    return None, *grads, *dsigma, None, None, None, None


def _sigma_gradients(ctx, dout, sigma, sigma_next, x, y, z) -> list[Tensor | None]:
    """Sums of dout times the derivative over a row of the table; plain PyTorch: no model learns its noise levels."""
    s_value, t_value, guidance = ctx.numbers
    s, t = (_spread(v if k is None else k, x) for k, v in ((sigma, s_value), (sigma_next, t_value)))
    x, y, z = (None if b is None else b.float() for b in (x, y, z))
    if ctx.step == "add_noise":
        of_s, of_t = y - x, None
    elif ctx.step == "flow_to_x0":
        of_s, of_t = -y, None
    elif ctx.step == "renoise":
        of_s, of_t = (t - 1) * y, z - (x - s * y)
    else:
        of_t = y if z is None else z + guidance * (y - z)
        of_s = -of_t
    pairs = zip((sigma, sigma_next), (of_s, of_t), ctx.needs_input_grad[4:6], strict=True)
    return [
        (dout.float() * d)[..., None].flatten(k.ndim).sum(-1) if needed and k is not None else None for k, d, needed in pairs
    ]


lib.define_backward("sampler_step", _backward, _setup_context)
