"""Queries, keys and values of both attention paths, RoPE and ProPE, from one read of q, k and v."""

from collections.abc import Callable

import torch
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.ops.adaln import cpu_refuses, kernel_tables
from dit_ops.ops.prope_output import check_cameras, project_ref
from dit_ops.ops.qk_norm_rope import (
    Grid,
    Rope,
    check_heads,
    check_outputs,
    dweight_fake,
    heads_refuse,
    kernel_heads,
    needs_gradient,
    rms_norm_ref,
    rope_factors_ref,
    rotate_ref,
    rstd_fake,
    weight_gradients,
    write_into,
)


def qk_norm_rope_prope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope,
    grid: Grid,
    P: Tensor,
    P_inv: Tensor,
    *,
    eps: float = 1e-6,
    start_frame: int = 0,
    halves: int = 1,
    k_out: Tensor | None = None,
    v_out: Tensor | None = None,
    turn_keys: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads [0, N): qk_norm_rope(q, k) and v. Heads [N, 2N): P^T q, P^-1 k, P^-1 v of the normed, un-rotated q, k and v.

    q, k, v: [B, L, N, D], any strides, L = halves * F * H * W    grid: (F, H, W)    weights, rope: as in qk_norm_rope
    P, P_inv: [B, F, 4, 4], applied to groups of 4 consecutive channels with the camera of the token's frame
    k_out, v_out: [B, L, 2N, D] views, such as the slots of a ring cache, to write k and v into; without gradient
    turn_keys: False writes normed keys and plain values, N heads, as turn_keys_values reads them
    returns q, k, v, each [B, L, 2N, D]; computed in fp32; differentiable in every tensor    (PRoPE: arXiv 2507.10496)
    """
    op = "qk_norm_rope_prope"
    check_heads(op, {"q": q, "k": k, "v": v}, {"q_weight": q_weight, "k_weight": k_weight}, rope, grid, start_frame, halves)
    check_cameras(op, {"P": P, "P_inv": P_inv}, q, halves)
    if P.shape[1] != grid[0]:
        raise ValueError(f"{op}: P must have F = {grid[0]} frames, as grid says, got {P.shape[1]}")
    lib.check_shape(op, "P_inv", P_inv, "B, F, 4, 4", tuple(P.shape))
    if (k_out is None) != (v_out is None):
        raise ValueError(f"{op}: k_out and v_out come together, got only {'k_out' if v_out is None else 'v_out'}")
    check_outputs(op, k, v, k_out, v_out, 1 + turn_keys, (q, k, v, q_weight, k_weight))
    backend = lib.choose(op, backend, REFUSES, q, k, v, P, P_inv, *rope)
    if k_out is not None and v_out is not None:
        rest = (rope, grid, P, P_inv, k_out, v_out, eps, start_frame, halves, turn_keys)
        return write_into(backend, q, k, v, q_weight, k_weight, *rest), k_out, v_out
    if not turn_keys:
        raise ValueError(f"{op}: turn_keys = False needs k_out and v_out, got None")
    if backend == "reference":
        return qk_norm_rope_prope_ref(q, k, v, q_weight, k_weight, rope, grid, P, P_inv, eps, start_frame, halves)
    heads = (kernel_heads(backend, t) for t in (q, k, v))
    tables = kernel_tables(backend, q, q_weight, k_weight, *(t.contiguous() for t in rope), P.float(), P_inv.float())
    q2, k2, v2, _, _ = _qk_norm_rope_prope(*heads, *tables, *grid, eps, start_frame, backend)
    return q2, k2, v2


def turn_keys_values(
    k: Tensor,
    v: Tensor | None,
    rope: Rope,
    grid: Grid,
    P_inv: Tensor | None,
    k_out: Tensor,
    v_out: Tensor | None,
    *,
    backend: str | None = None,
) -> None:
    """What a cache of normed, unturned keys and plain values gives to attention: k_out = rope(k), with P_inv both paths.

    k, v: [B, L, N, D], L = F * H * W    rope, grid, P_inv: as in qk_norm_rope_prope, the rope's frame table has a row per frame
    k_out, v_out: [B, L, N, D], with P_inv [B, L, 2N, D]: heads [0, N) rope(k) and v, heads [N, 2N) P^-1 k and P^-1 v
    v and v_out: None where the values are read as they are; without gradient
    """
    op = "turn_keys_values"
    check_heads(op, {"k": k} if v is None else {"k": k, "v": v}, {}, rope, grid, 0, 1)
    if P_inv is not None:
        check_cameras(op, {"P_inv": P_inv}, k, 1)
        lib.check_shape(op, "P_inv", P_inv, "B, F, 4, 4", (k.shape[0], grid[0], 4, 4))
    check_outputs(op, k, v, k_out, v_out, 1 if P_inv is None else 2, (k, v, P_inv))
    given = [t for t in (v, P_inv) if t is not None]
    backend = lib.choose(op, backend, REFUSES_KEYS, k, *given, *rope)
    write_into(backend, None, k, v, None, None, rope, grid, None, P_inv, k_out, v_out, 0.0, 0, 1, True)


def qk_norm_rope_prope_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope,
    grid: Grid,
    P: Tensor,
    P_inv: Tensor,
    eps: float,
    start_frame: int,
    halves: int,
) -> tuple[Tensor, Tensor, Tensor]:
    factors = rope_factors_ref(rope, grid, start_frame, halves, torch.promote_types(q.dtype, torch.float32))
    qn, kn = rms_norm_ref(q, q_weight, eps), rms_norm_ref(k, k_weight, eps)
    q2 = torch.cat((rotate_ref(qn, factors), project_ref(qn, P.mT, halves)), 2).to(q.dtype)
    k2 = torch.cat((rotate_ref(kn, factors), project_ref(kn, P_inv, halves)), 2).to(k.dtype)
    v2 = torch.cat((v, project_ref(v, P_inv, halves).to(v.dtype)), 2)
    return q2, k2, v2


def _cpu_refuses(q: Tensor, k: Tensor, v: Tensor, *constants: Tensor) -> str | None:
    return cpu_refuses(q, k, v) or needs_gradient(*constants)


def _triton_refuses(q: Tensor, k: Tensor, v: Tensor, *constants: Tensor) -> str | None:
    return heads_refuse(q, k, v) or needs_gradient(*constants)


def _keys_refuse(check: Callable[..., str | None]) -> Callable[..., str | None]:
    return lambda k, *rest: check(k) or needs_gradient(*rest)


REFUSES = {"triton": _triton_refuses, "cpu": _cpu_refuses}
REFUSES_KEYS = {"triton": _keys_refuse(heads_refuse), "cpu": _keys_refuse(cpu_refuses)}


def _fwd(q, k, v, q_weight, k_weight, rope_t, rope_h, rope_w, P, P_inv, F, H, W, eps, start_frame, backend):
    args = (q, k, v, q_weight, k_weight, rope_t, rope_h, rope_w, P, P_inv, F, H, W, eps, start_frame)
    if q.numel() == 0:
        return _fwd_fake(*args, backend)
    return lib.kernel(backend, "qk_norm_rope_prope", "qk_norm_rope_prope_fwd")(*args)


def _fwd_fake(q, k, v, q_weight, k_weight, rope_t, rope_h, rope_w, P, P_inv, F, H, W, eps, start_frame, backend):
    B, L, N, D = q.shape
    return *(t.new_empty(B, L, 2 * N, D) for t in (q, k, v)), rstd_fake(q, q_weight), rstd_fake(k, k_weight)


def _bwd(
    dq2, dk2, dv2, q, k, v, q_weight, k_weight, q_rstd, k_rstd, rope_t, rope_h, rope_w, P, P_inv, F, H, W, start_frame, backend
):
    args = (dq2, dk2, dv2, q, k, v, q_weight, k_weight, q_rstd, k_rstd, rope_t, rope_h, rope_w, P, P_inv, F, H, W, start_frame)
    if q.numel() == 0:
        return tuple(t.zero_() for t in _bwd_fake(*args, backend))
    return lib.kernel(backend, "qk_norm_rope_prope", "qk_norm_rope_prope_bwd")(*args)


def _bwd_fake(
    dq2, dk2, dv2, q, k, v, q_weight, k_weight, q_rstd, k_rstd, rope_t, rope_h, rope_w, P, P_inv, F, H, W, start_frame, backend
):
    return *(t.new_empty(t.shape) for t in (q, k, v)), dweight_fake(q, q_weight), dweight_fake(k, k_weight)


_qk_norm_rope_prope = lib.define(
    "qk_norm_rope_prope(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor rope_t, Tensor rope_h,"
    " Tensor rope_w, Tensor P, Tensor P_inv, SymInt F, SymInt H, SymInt W, float eps, SymInt start_frame, str backend)"
    " -> (Tensor q2, Tensor k2, Tensor v2, Tensor q_rstd, Tensor k_rstd)",
    _fwd,
    _fwd_fake,
)
_qk_norm_rope_prope_bwd = lib.define(
    "qk_norm_rope_prope_bwd(Tensor dq2, Tensor dk2, Tensor dv2, Tensor q, Tensor k, Tensor v, Tensor? q_weight,"
    " Tensor? k_weight, Tensor q_rstd, Tensor k_rstd, Tensor rope_t, Tensor rope_h, Tensor rope_w, Tensor P, Tensor P_inv,"
    " SymInt F, SymInt H, SymInt W, SymInt start_frame, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_weight, Tensor dk_weight)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx, inputs, output):
    q, k, v, q_weight, k_weight, *constants, F, H, W, _, start_frame, backend = inputs
    ctx.rest = (F, H, W, start_frame, backend)
    ctx.save_for_backward(q, k, v, q_weight, k_weight, *output[3:], *constants)


def _backward(ctx, dq2, dk2, dv2, _dq_rstd, _dk_rstd):
    cotangents = (t.contiguous() for t in (dq2, dk2, dv2))
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes on the first access and forbids a second
    dq, dk, dv, *dweights = _qk_norm_rope_prope_bwd(*cotangents, *saved, *ctx.rest)
    return dq, dk, dv, *weight_gradients(saved[3:5], dweights), *[None] * 11


lib.define_backward("qk_norm_rope_prope", _backward, _setup_context)
