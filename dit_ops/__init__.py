"""Fused operators for video diffusion transformers, with autograd, torch.compile and a plain-PyTorch reference."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from dit_ops._library import BACKENDS, explain, use_backend
from dit_ops.fuse import fuse, unfuse
from dit_ops.ops.adaln import adaln
from dit_ops.ops.attention import attention
from dit_ops.ops.ema_update import ema_update_
from dit_ops.ops.gated_residual import gated_residual
from dit_ops.ops.gated_residual_adaln import gated_residual_adaln
from dit_ops.ops.prope_output import prope_output
from dit_ops.ops.qk_norm_rope import qk_norm_rope
from dit_ops.ops.qk_norm_rope_prope import qk_norm_rope_prope
from dit_ops.ops.sampler_steps import add_noise, cfg_euler_step, flow_to_x0, renoise
from dit_ops.ops.ulysses import ulysses_gather_heads, ulysses_scatter_heads

__all__ = [
    "BACKENDS",
    "adaln",
    "add_noise",
    "attention",
    "cfg_euler_step",
    "ema_update_",
    "explain",
    "flow_to_x0",
    "fuse",
    "gated_residual",
    "gated_residual_adaln",
    "prope_output",
    "qk_norm_rope",
    "qk_norm_rope_prope",
    "renoise",
    "ulysses_gather_heads",
    "ulysses_scatter_heads",
    "unfuse",
    "use_backend",
]


def _lazily(module: str, function: str) -> Callable[..., Any]:
    def load(directory: Any, *args: Any, **options: Any) -> Any:
        return getattr(import_module(module), function)(directory, *args, **options)

    load.__doc__ = f"{module}.{function}, imported when it is called."
    return load


# dit_ops.backbones.load(dir) and dit_ops.pipelines.load(dir): the folders have no __init__.py that could hold them
vars(import_module("dit_ops.backbones"))["load"] = _lazily("dit_ops.registry", "load_backbone")
vars(import_module("dit_ops.pipelines"))["load"] = _lazily("dit_ops.pipelines.loading", "load")
