"""Linear weights of a backbone's blocks as 8-bit floats (e4m3) with one scale per output channel, for inference.

`W[n, k] ≈ scale[n] · W8[n, k]`, scale[n] = max_k |W[n, k]| / 448: half the bytes of bf16. An element is off by at most 2⁻⁴ of
itself, or by 2⁻¹⁰·scale where it is smaller than 2⁻⁶·scale (FP8 formats: arXiv 2209.05433).

Where the GPU multiplies 8-bit floats (compute capability 8.9 and newer) the activations are rounded too, with one scale per
token, and the product runs on its fp8 tensor cores; elsewhere the weights of one layer at a time are turned back into the
activations' dtype.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dit_ops.offload import block_modules

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max  # 448
LEFT_ALONE = ("norm", "lora_")  # modules of a block: the modulation's layer of HunyuanVideo, adapters


def to_float8(backbone: Any, device: torch.device | str | None = None, *, activations: bool | None = None) -> None:
    """Replaces the Linear layers of the blocks (attention, MLP) and the camera layers by `Float8Linear`, in place.

    device        where a layer is rounded before it goes back to where it was; None = there
    activations   False: they stay in 16 bits on every GPU, which is more exact; None: they are rounded where that is faster
    Everything that few rows pass or that scales whole streams keeps its dtype: norms, modulation, embeddings, head, biases.
    ValueError: parameters that are trained, blocks that are offloaded or have no such layer.
    """
    if backbone.offloaded:
        raise ValueError("to_float8: backbone must have its blocks in place, but they are offloaded: call to_float8 before")
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    if trained:
        raise ValueError(f"to_float8: backbone must be frozen, float8 is for inference only; {trained[0]} requires grad")
    found = linears(backbone)
    if not found:
        raise ValueError("to_float8: the blocks of backbone must hold Linear layers, got none (they may be float8 already)")
    for owner, name, layer in found:
        owner[name] = Float8Linear(layer, device, activations)


def linears(backbone: Any) -> list[tuple[dict[str, Any], str, nn.Linear]]:
    """What to_float8 replaces, each as (the children of its owner, its name there, the layer)."""
    found = []
    for modules in block_modules(backbone):
        for module in modules:
            for path, owner in module.named_modules():
                for name, layer in owner.named_children():
                    left_alone = any(part.startswith(LEFT_ALONE) for part in (*path.split("."), name))
                    if type(layer) is nn.Linear and not left_alone:
                        found.append((owner._modules, name, layer))
    camera = getattr(backbone, "camera", None)
    if camera is not None:  # a layer itself, not the owner of one
        found += [(camera._modules, name, layer) for name, layer in camera.named_children() if type(layer) is nn.Linear]
    return found


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`[M, K]` → e4m3 `[M, K]` and fp32 scales `[M, 1]`: rows ≈ q · scale, the largest of a row is 448. Zeros stay zeros."""
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (rows / scale).to(FORMAT), scale


class Float8Linear(nn.Module):
    """`y = x·(scale·W8)ᵀ + bias`: x [..., K] in a 16- or 32-bit dtype, W8 [N, K] e4m3, scale [N, 1] fp32, bias [N]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, device: torch.device | str | None = None, activations: bool | None = None):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.activations = activations
        home = linear.weight.device
        for name, tensor in zip(("weight", "scale"), quantise(linear.weight.detach().to(device or home)), strict=True):
            self.register_buffer(name, tensor.to(home))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("float8 weights are for inference only: call the model under torch.no_grad() or inference_mode()")
        if not self._rounds_activations(x):
            return nnf.linear(x, self.weight.to(x.dtype).mul_(self.scale), self.bias)
        rows, scale = quantise(x.flatten(0, -2))
        # row-wise scaling: the second operand is column-major, both of its sizes multiples of 16, the output bf16
        y = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,  # [M, 1]
            scale_b=self.scale.t(),  # [1, N]
            bias=self.bias,
            out_dtype=torch.bfloat16,
        )
        return y.unflatten(0, x.shape[:-1])

    def _rounds_activations(self, x: Tensor) -> bool:
        fits = x.dtype == torch.bfloat16 and self.in_features % 16 == 0 and self.out_features % 16 == 0
        return fits and (has_float8_cores(x.device) if self.activations is None else self.activations)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if (self.weight.dtype, self.scale.dtype) != (FORMAT, torch.float32):
            raise ValueError("float8 weights must keep their dtype: cast the model before to_float8")
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        raise ValueError("float8 weights are made from a model and not saved: save the model before to_float8")

    def _load_from_state_dict(self, *args: Any) -> None:
        raise ValueError("float8 weights are made from a model and not loaded: load the weights before to_float8")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@lru_cache
def has_float8_cores(device: torch.device) -> bool:
    """Whether the GPU multiplies e4m3 matrices with one scale per row: NVIDIA, compute capability 8.9 or newer."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)
