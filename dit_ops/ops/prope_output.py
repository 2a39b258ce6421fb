"""The output side of projective positional encoding (ProPE)."""

import torch
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.ops.adaln import cpu_refuses


def prope_output(o: Tensor, P: Tensor, *, halves: int = 1, backend: str | None = None) -> Tensor:
    """P o in groups of 4 consecutive channels, with the camera of the token's frame; differentiable in o and P.

    o: [B, L, N, D], L = halves * F * S    P: [B, F, 4, 4]    returns [B, L, N, D] in o's dtype; computed in fp32
    """
    lib.check_tensor("prope_output", "o", o, "B, L, N, D")
    check_cameras("prope_output", {"P": P}, o, halves)
    backend = lib.choose("prope_output", backend, REFUSES, o, P)
    if backend == "reference":
        return project_ref(o, P, halves).to(o.dtype)
    M = P.float().contiguous() if backend == "cpu" else P.float()
    return _prope_output(channels_together(o), M, halves, backend)


def project_ref(x: Tensor, M: Tensor, halves: int) -> Tensor:
    """M x for every group of 4 channels, in fp32 (fp64 for fp64).    x: [B, L, N, D]    M: [B, F, 4, 4]"""
    dtype = torch.promote_types(x.dtype, torch.float32)
    B, L, N, D = x.shape
    F = M.shape[1]
    M = M.to(dtype).mT[:, None].expand(B, halves, F, 4, 4).reshape(-1, 4, 4)
    rows = x.to(dtype).reshape(B * halves * F, L // (halves * F) * N * D // 4, 4)
    return torch.bmm(rows, M).view(B, L, N, D)  # a row of the product is (M x)^T = x^T M^T


def check_cameras(op: str, cameras: dict[str, Tensor], x: Tensor, halves: int) -> None:
    B, L, _, D = x.shape
    if D % 4:
        raise ValueError(f"{op}: the head size D must be a multiple of 4, got {D}")
    if halves not in (1, 2):
        raise ValueError(f"{op}: halves must be 1 or 2, got {halves}")
    for name, M in cameras.items():
        if M.ndim != 4 or M.shape[0] != B or M.shape[2:] != (4, 4) or M.shape[1] < 1 or L % (halves * M.shape[1]):
            expected = f"[B, F, 4, 4] with B = {B} and halves * F dividing L = {L}, halves = {halves}"
            raise ValueError(f"{op}: {name} must be {expected}, got {list(M.shape)}")


def channels_together(o: Tensor) -> Tensor:
    """As the kernels read it: the channels of a token side by side, tokens at any stride."""
    return o if o.stride(-1) == 1 and o.stride(-2) == o.shape[-1] else o.contiguous()


def camera_gradient(P: Tensor) -> str | None:
    if torch.is_grad_enabled() and P.requires_grad:
        return "the gradient of P is written in the reference only"
    return None


def _triton_refuses(o: Tensor, P: Tensor) -> str | None:
    return lib.refuses("triton", o) or camera_gradient(P)


def _cpu_refuses(o: Tensor, P: Tensor) -> str | None:
    return cpu_refuses(o) or camera_gradient(P)


REFUSES = {"triton": _triton_refuses, "cpu": _cpu_refuses}


def _fwd(o, P, halves, backend):
    if o.numel() == 0:
        return _fwd_fake(o, P, halves, backend)
    return lib.kernel(backend, "prope_output", "prope_output_fwd")(o, P, halves)


def _fwd_fake(o, P, halves, backend):
    return o.new_empty(o.shape)


_prope_output = lib.define("prope_output(Tensor o, Tensor P, SymInt halves, str backend) -> Tensor", _fwd, _fwd_fake)


def _setup_context(ctx, inputs, output):
    _, P, ctx.halves, ctx.backend = inputs
    ctx.save_for_backward(P)


def _backward(ctx, dout):
    (P,) = ctx.saved_tensors
    M = P.mT.contiguous() if ctx.backend == "cpu" else P.mT
    return _prope_output(channels_together(dout), M, ctx.halves, ctx.backend), None, None, None


lib.define_backward("prope_output", _backward, _setup_context)
