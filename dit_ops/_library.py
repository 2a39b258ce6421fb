"""The one place that talks to torch.library, and the one place that picks a backend.

Ops are registered with Library.define/impl, not with @torch.library.custom_op: both compile and both pass
opcheck, but host time per call in inference_mode is 4.4 us against 8.4 (measured on CPU).
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("dense", "cuda", "triton", "cpu", "reference")  # in order of preference
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton kernels run on the CPU, for tests
HAS_TRITON = importlib.util.find_spec("triton") is not None

_lib = torch.library.Library("dit_ops", "DEF")
_forced: str | None = os.environ.get("DIT_OPS_BACKEND") or None
_log = bool(os.environ.get("DIT_OPS_LOG"))
_explaining = False


def _load(stem: str) -> str | None:
    """Loads dit_ops/<stem>.abi3.so; returns why it is missing, or None."""
    path = Path(__file__).with_name(f"{stem}.abi3.so")
    if not path.exists():
        return f"dit_ops/{path.name} is not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"dit_ops/{path.name} does not load: {error}"
    return None


MISSING = {
    "dense": None,  # other libraries' dense kernels, those of torch among them
    "cpu": _load("_C_cpu"),
    "cuda": _load("_C_cuda") if torch.version.cuda else "this torch is built without CUDA",
    "triton": None if HAS_TRITON else "triton is not installed",
}


def define(schema: str, impl: Callable, fake: Callable) -> Callable:
    """Registers one op and returns its callable, torch.ops.dit_ops.<name>.default."""
    name = schema.split("(", 1)[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dit_ops::{name}", fake, lib=_lib)
    return getattr(torch.ops.dit_ops, name).default


def define_backward(name: str, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(f"dit_ops::{name}", backward, setup_context=setup_context, lib=_lib)


def kernel(backend: str, module: str, name: str) -> Callable:
    """The launcher `name` of a backend: one signature in kernels/<module>.py, csrc/<module>.* and ops/_<module>_dense.py."""
    if backend in ("triton", "dense"):
        path = f"kernels.{module}" if backend == "triton" else f"ops._{module}_dense"
        launcher = getattr(importlib.import_module(f"dit_ops.{path}"), name)
        return partial(_on_its_device, launcher) if backend == "triton" else launcher
    try:
        return getattr(getattr(torch.ops, f"dit_ops_{backend}"), name)
    except AttributeError as error:
        raise NotImplementedError(f"{module}: dit_ops/_C_{backend}.abi3.so has no {name}: build it again") from error


def _on_its_device(launcher: Callable, *args: Any) -> Any:
    """Triton launches on the current device, wherever the tensors are; the other backends look at their tensors."""
    first = next((a for a in args if isinstance(a, Tensor)), None)
    device = (args[0][0] if first is None else first).get_device()  # of lists of tensors, or of tensors
    if device < 0 or device == torch.cuda.current_device():
        return launcher(*args)
    with torch.cuda.device(device):
        return launcher(*args)


def refuses(backend: str, tensor: Tensor) -> str | None:
    """What every kernel of a backend needs: its library, its device and a floating dtype of at most 32 bits."""
    if MISSING[backend]:
        return MISSING[backend]
    device = "cpu" if backend == "cpu" or (backend == "triton" and INTERPRETED) else "cuda"
    if tensor.device.type != device:
        return f"tensors are on {tensor.device.type}"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype is {tensor.dtype}"
    return None


@dataclass(frozen=True)
class Explanation:
    """What a call would run on, and why not on the other backends."""

    op: str
    backend: str | None
    refused: dict[str, str]
    detail: str = ""

    def __str__(self) -> str:
        runs = f"runs on {self.backend!r}" if self.backend else "cannot run on the backend asked for"
        runs += f" ({self.detail})" if self.detail else ""
        return f"{self.op} {runs}" + "".join(f"\n  not on {name!r}: {reason}" for name, reason in self.refused.items())


class _Explained(Exception):  # noqa: N818
    """Carries an Explanation out of a public function before it computes anything."""


def choose(
    op: str,
    asked: str | None,
    refusals: dict[str, Callable[..., str | None]],
    *args: object,
    describe: Callable[..., str] | None = None,
) -> str:
    """The backend asked for, or the first that does not refuse. Being refused is an error, never a silent fallback.

    describe(backend, *args): what `explain` adds about the backend, such as whose kernel it would call
    """
    asked = asked or _forced
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {asked!r}")
    if _explaining:
        explanation = _explanation(op, asked, refusals, *args)
        if describe and explanation.backend:
            explanation = replace(explanation, detail=describe(explanation.backend, *args))
        raise _Explained(explanation)
    if asked is None:
        chosen = next((b for b in BACKENDS if b in refusals and refusals[b](*args) is None), "reference")
    else:
        reason = _reason(asked, refusals, *args)
        if reason:
            raise NotImplementedError(f"{op}: backend {asked!r} cannot run this call: {reason}")
        chosen = asked
    if _log and not torch.compiler.is_compiling():
        shapes = " ".join(f"{a.dtype}{list(a.shape)}" for a in args if isinstance(a, Tensor))
        sys.stderr.write(f"dit_ops {op} {chosen} {shapes}\n")
        sys.stderr.flush()
    return chosen


def _reason(backend: str, refusals: dict[str, Callable[..., str | None]], *args: object) -> str | None:
    if backend == "reference":
        return None
    if backend not in refusals:
        return "it has dense attention only" if backend == "dense" else "not written yet"
    return refusals[backend](*args)


def _explanation(op: str, asked: str | None, refusals: dict[str, Callable[..., str | None]], *args: object) -> Explanation:
    reasons = {b: _reason(b, refusals, *args) for b in BACKENDS}
    if asked is None:
        chosen: str | None = next(b for b in BACKENDS if reasons[b] is None)
    else:
        chosen = None if reasons[asked] else asked
    refused = {b: r for b, r in reasons.items() if r}
    if chosen:
        why = f"{chosen!r} " + ("is asked for" if asked else "comes first")
        refused |= {b: why for b in BACKENDS if b != chosen and b not in refused}
    return Explanation(op, chosen, refused)


def explain(op: str | Callable, *args: object, **kwargs: object) -> Explanation:
    """Which backend `op` would run these arguments on, and why not the others; runs the op's checks but no kernel."""
    global _explaining
    function = getattr(importlib.import_module("dit_ops"), op) if isinstance(op, str) else op
    _explaining = True
    try:
        function(*args, **kwargs)
    except _Explained as explained:
        return explained.args[0]
    finally:
        _explaining = False
    return Explanation(function.__name__, None, {b: "the call needs no backend" for b in BACKENDS})


def check_shape(op: str, name: str, tensor: Tensor, dims: str, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must be [{dims}] = {list(shape)}, got {list(tensor.shape)}")


def check_tensor(op: str, name: str, tensor: Tensor, dims: str) -> None:
    """A floating tensor with the axes that `dims` names, such as "B, L, C"."""
    if tensor.ndim != dims.count(",") + 1:
        raise ValueError(f"{op}: {name} must be [{dims}], got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces a backend for every op inside the block: `with dit_ops.use_backend("reference"): ...`"""
    global _forced
    if name is not None and name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
