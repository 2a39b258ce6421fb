"""Error budgets, and the comparison of a backend with the reference."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_within_rounding(name: str, got: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0) -> None:
    """A kernel may err `factor` times as much as plain PyTorch in the same dtype does, plus one rounding step.

    exact: the reference on fp64 inputs    plain: the reference on the very inputs the kernel got
    """
    assert got.dtype == plain.dtype and got.shape == exact.shape, f"{name}: {got.dtype} {list(got.shape)}"
    if got.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    err, allowed = ((t.double() - exact).abs().max().item() for t in (got, plain))
    step = torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert err <= factor * allowed + step, f"{name}: error {err:.3e}, plain PyTorch {allowed:.3e}, rounding step {step:.3e}"


def run_with_grads(fn: Callable, tensors: dict[str, Tensor | None], cotangents: list[Tensor], **kwargs) -> dict[str, Tensor]:
    """Outputs y0, y1, ... of fn(**tensors, **kwargs) and the gradient d<name> of every tensor that is present."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = fn(**leaves, **kwargs)
    outs = list(out) if isinstance(out, tuple) else [out]
    present = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(outs, list(present.values()), cotangents)
    results = {f"y{i}": y.detach() for i, y in enumerate(outs)}
    return results | {f"d{name}": g for name, g in zip(present, grads, strict=True)}


def check_backend(
    fn: Callable, tensors: dict[str, Tensor | None], cotangents: list[Tensor], backend: str, *, factor: float = 2.0, **kwargs
) -> None:
    """Outputs and gradients of fn on `backend`, each within rounding of the fp64 reference."""
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    exact = run_with_grads(fn, wide, [c.double() for c in cotangents], backend="reference", **kwargs)
    plain = run_with_grads(fn, tensors, cotangents, backend="reference", **kwargs)
    got = run_with_grads(fn, tensors, cotangents, backend=backend, **kwargs)
    for name in exact:
        assert_within_rounding(f"{backend} {name}", got[name], exact[name], plain[name], factor)
