"""The output side of projective positional encoding (ProPE)."""

import torch
from torch import Tensor

from dit_ops import _library as lib


def prope_output(o: Tensor, P: Tensor, *, halves: int = 1, backend: str | None = None) -> Tensor:
    """P o in groups of 4 consecutive channels, with the camera of the token's frame; differentiable in o and P.

    o: [B, L, N, D], L = halves * F * S    P: [B, F, 4, 4]    returns [B, L, N, D] in o's dtype; computed in fp32
    """
    lib.check_tensor("prope_output", "o", o, "B, L, N, D")
    check_cameras("prope_output", {"P": P}, o, halves)
    lib.choose("prope_output", backend, {}, o)
    return project_ref(o, P, halves).to(o.dtype)


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
