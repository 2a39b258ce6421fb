"""The dense attention kernels that may be here, best first: softmax(scale q k^T) v without a mask, and its backward.

All take q [B, Lq, N, D] and k, v [B, Lk, N, D] at any strides with unit stride over D, and give o like q and the
natural-log log-sum-exp [B, N, Lq]. Their backward recomputes p = exp(scale q k^T - lse) and delta = rowsum(do o) from the o and
lse that it is handed; with those of a wider softmax, of which these keys are a part, it gives exactly this part's share.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class DenseKernel:
    """forward(q, k, v, scale) -> o, lse    backward(do, q, k, v, o, lse, scale, deterministic) -> dq, dk, dv

    refuses(device, dtype, D, deterministic): why it cannot run, or None
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    refuses: Callable[[torch.device, torch.dtype, int, bool], str | None]


def choose_dense(device: torch.device, dtype: torch.dtype, D: int, deterministic: bool) -> DenseKernel:
    """The first kernel that takes the call; none is a NotImplementedError with every reason."""
    reasons = []
    for kernel in KERNELS:
        reason = kernel.refuses(device, dtype, D, deterministic)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise NotImplementedError("no dense kernel takes it (" + "; ".join(reasons) + ")")


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads_first(q, k, v), 0.0, False, scale=scale)
    return o.transpose(1, 2), lse


def _cpu_backward(do, q, k, v, o, lse, scale: float, deterministic: bool) -> Gradients:
    do, q, k, v, o = heads_first(do, q, k, v, o)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = backward(do, q, k, v, o, lse, 0.0, False, scale=scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _cpu_refuses(device: torch.device, dtype: torch.dtype, D: int, deterministic: bool) -> str | None:
    if device.type != "cpu":
        return f"tensors are on {device.type}"
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"dtype is {dtype}"
    return None


def _cuda_refuses(device: torch.device, dtype: torch.dtype, D: int, largest: int) -> str | None:
    if device.type != "cuda":
        return f"tensors are on {device.type}"
    if torch.version.hip:
        return "the device is an AMD GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {dtype}, and it takes bfloat16 and float16"
    if D % 8 or largest < D:
        return f"D = {D}, and it takes multiples of 8 up to {largest}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the device is older than compute capability 8.0"
    return None


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first(q, k, v), None, True, 0.0, False, False, scale=scale)
    return o.transpose(1, 2), lse.view(lse.shape[:3])  # lse: [B, N, Lq, 1]


def _cudnn_backward(do, q, k, v, o, lse, scale: float, deterministic: bool) -> Gradients:
    do, q, k, v, o = heads_first(do, q, k, v, o)
    nothing = torch.empty(0, dtype=torch.long, device=q.device)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse[..., None].contiguous(), nothing, nothing, None, None, None, q.shape[2], k.shape[2], 0.0, False,
        scale=scale,
    )  # fmt: skip
    dq, dk, dv = heads_first(*gradients)
    return dq, dk, dv


def _cudnn_refuses(device: torch.device, dtype: torch.dtype, D: int, deterministic: bool) -> str | None:
    reason = _cuda_refuses(device, dtype, D, 128)
    if reason:
        return reason
    if deterministic:
        return "its backward is not deterministic"
    if torch.cuda.get_device_capability(device)[0] < 9:
        return "FA2 is faster before compute capability 9.0"
    return None if torch.backends.cudnn.is_available() else "cuDNN is not available"


def _fa2_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False, scale=scale
    )  # [B, L, N, D] as they are
    return o, lse


def _fa2_backward(do, q, k, v, o, lse, scale: float, deterministic: bool) -> Gradients:
    state = torch.empty(0, dtype=torch.int64, device=q.device)
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic or was, warn_only=not deterministic and warned)
    try:
        return aten._flash_attention_backward(
            do, q, k, v, o, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, False, state, state, scale=scale
        )
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)


def _fa2_refuses(device: torch.device, dtype: torch.dtype, D: int, deterministic: bool) -> str | None:
    return _cuda_refuses(device, dtype, D, 256)


def _package_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    o, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, False, -1, -1, 0.0, None, False)
    return o, lse


def _package_backward(do, q, k, v, o, lse, scale: float, deterministic: bool) -> Gradients:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    rest = (0.0, scale, False, -1, -1, 0.0, None, deterministic)
    _flash_attn_backward(do, q, k, v, o, lse.contiguous(), dq, dk, dv, *rest)
    return dq, dk, dv


def _package_refuses(device: torch.device, dtype: torch.dtype, D: int, deterministic: bool) -> str | None:
    return _not_installed("flash_attn") or _cuda_refuses(device, dtype, D, 256)


def _fa3_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_forward

    o, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=scale)
    return o, lse


def _fa3_backward(do, q, k, v, o, lse, scale: float, deterministic: bool) -> Gradients:
    from flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    out = {"dq": dq, "dk": dk, "dv": dv}
    _flash_attn_backward(do, q, k, v, o, lse.contiguous(), **out, softmax_scale=scale, deterministic=deterministic)
    return dq, dk, dv


def _fa3_refuses(device: torch.device, dtype: torch.dtype, D: int, deterministic: bool) -> str | None:
    reason = _not_installed("flash_attn_interface") or _cuda_refuses(device, dtype, D, 256)
    if reason:
        return reason
    major = torch.cuda.get_device_capability(device)[0]
    return None if major == 9 else f"it is for compute capability 9, the device has {major}"


@functools.lru_cache
def _not_installed(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else "it is not installed"


KERNELS = (
    DenseKernel("torch's CPU flash attention", _cpu_forward, _cpu_backward, _cpu_refuses),
    DenseKernel("flash-attn 3", _fa3_forward, _fa3_backward, _fa3_refuses),
    DenseKernel("cuDNN", _cudnn_forward, _cudnn_backward, _cudnn_refuses),
    DenseKernel("flash-attn 2", _package_forward, _package_backward, _package_refuses),
    DenseKernel("torch's FA2", _fa2_forward, _fa2_backward, _fa2_refuses),
)
