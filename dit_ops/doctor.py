"""What this machine offers to dit_ops, and which backend every op would run on here: the text of `dit-ops doctor`."""

import inspect
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dit_ops
from dit_ops import _library as lib

PACKAGES = ("diffusers", "transformers", "accelerate", "safetensors", "av", "tensorboard")


def doctor() -> str:
    """One line per thing found or missing, then one block per op: the backend of a small call, and why not the others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"{name:<13}{found}" for name, found in _machine(device).items()]
    lines += ["", f"Backends, in order of preference: {', '.join(lib.BACKENDS)}. A small call on {device.type} would run so:"]
    return "\n".join(lines + [_op_line(name, op, device) for name, op in public_ops().items()])


def public_ops() -> dict[str, Callable]:
    """Every function that dit_ops exports and that takes a backend."""
    exported = {name: getattr(dit_ops, name) for name in dit_ops.__all__}
    return {name: f for name, f in exported.items() if inspect.isfunction(f) and "backend" in inspect.signature(f).parameters}


def sample_arguments(op: Callable, device: torch.device) -> dict[str, Any]:
    """A small call of any op: arguments are named alike everywhere, so their names say what they are."""
    B, F, H, W, N, D = 1, 2, 2, 2, 2, 16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = torch.zeros(B, F * H * W, N * D, dtype=dtype, device=device)
    heads = tokens.view(B, F * H * W, N, D)
    latents = torch.zeros(B, F, 4, H, W, dtype=dtype, device=device)
    camera = torch.eye(4, device=device).expand(B, F, 4, 4)
    axes = zip((F, H, W), (D - 8, 4, 4), strict=True)
    samples = {
        **dict.fromkeys(("x", "y"), tokens),
        **dict.fromkeys(("gate", "scale", "shift"), tokens[:, :F]),
        **dict.fromkeys(("q", "k", "v", "o"), heads),
        **dict.fromkeys(("q_weight", "k_weight"), torch.ones(N * D, dtype=dtype, device=device)),
        **dict.fromkeys(("P", "P_inv"), camera),
        **dict.fromkeys(("x0", "flow", "noise", "cond", "uncond"), latents),
        **dict.fromkeys(("shadow", "params"), [torch.zeros(4, device=device)]),
        **{"sigma": 0.5, "sigma_next": 0.25, "guidance": 1.0, "decay": 0.9},
        "grid": (F, H, W),
        "heads": N // 2,  # of each of the two paths that o holds
        "rope": tuple(torch.ones(length, size // 2, 2, device=device) for length, size in axes),
    }
    parameters = inspect.signature(op).parameters
    if parameters.keys() & {"flow", "cond"}:  # the sampler steps move latents
        samples["x"] = latents
    return {
        name: samples[name]
        for name, p in parameters.items()
        if name in samples and (p.kind is not p.KEYWORD_ONLY or p.default is p.empty)
    }


def _op_line(name: str, op: Callable, device: torch.device) -> str:
    try:
        explained = lib.explain(op, **sample_arguments(op, device))
    except ValueError as error:  # DIT_OPS_BACKEND names no backend
        return f"{name:<24}{error}"
    backends: dict[str, list[str]] = {}
    for backend, reason in explained.refused.items():
        if backend != "reference":
            backends.setdefault(reason, []).append(backend)
    refusals = "; ".join(f"not {', '.join(names)}: {reason}" for reason, names in backends.items())
    return f"{name:<24}{explained.backend or 'none':<11}{refusals}"


def _machine(device: torch.device) -> dict[str, str]:
    package = Path(__file__).parent
    found = {
        "dit_ops": f"{_version('dit-ops')}, imported from {package}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "CUDA": _cuda(),
    }
    if device.type == "cuda":
        found["device"] = _device(device)
    if lib.MISSING["triton"]:
        found["triton"] = lib.MISSING["triton"]
    else:
        needs = "kernels run in the interpreter, on the CPU" if lib.INTERPRETED else "kernels need a CUDA device"
        found["triton"] = _version("triton") + ("" if device.type == "cuda" else f", {needs}")
    for backend in ("cpu", "cuda"):
        found[f"_C_{backend}"] = lib.MISSING[backend] or str(package / f"_C_{backend}.abi3.so")
    found["flash-attn"] = _version("flash-attn")
    found |= {name: _version(name) for name in PACKAGES}
    found |= {name: os.environ[name] for name in ("DIT_OPS_BACKEND", "DIT_OPS_LOG", "TRITON_INTERPRET") if name in os.environ}
    return found


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but no device was found (no GPU, no driver, or CUDA_VISIBLE_DEVICES hides it)"
    return f"{torch.version.cuda}, {torch.cuda.device_count()} device(s)"


def _device(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
