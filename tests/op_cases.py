"""Inputs shared by the tests of adaln and its relatives, in the interpreter and out of it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dit_ops import _library as lib


@dataclass(frozen=True)
class Case:
    """rows: F of the modulation, 0 = [B, C], None = absent."""

    B: int
    L: int
    C: int
    rows: int | None
    norm: str
    affine: bool

    def __str__(self) -> str:
        return f"{self.B}x{self.L}x{self.C}-rows{self.rows}-{self.norm}{'-affine' if self.affine else ''}"


CASES = [
    Case(1, 1, 64, 0, "layer", False),
    Case(2, 130, 32, 1, "layer", False),  # several chunks of a row: 130 = 64 + 64 + 2
    Case(2, 6, 100, 3, "layer", True),
    Case(2, 6, 100, 3, "rms", False),
    Case(1, 7, 36, None, "rms", True),
    Case(2, 5, 36, None, "layer", False),
]
DTYPES = [torch.float32, torch.bfloat16]


def tensors(
    case: Case, dtype: torch.dtype, device: str, tables: tuple[str, ...], branches: tuple[str, ...] = ("x",)
) -> dict[str, Tensor | None]:
    """Random branches [B, L, C] in dtype, tables in fp32 as in Wan, weight and bias near 1 and 0; absent ones are None."""
    rows = () if not case.rows else (case.rows,)
    out: dict[str, Tensor | None] = {n: torch.randn(case.B, case.L, case.C, device=device).to(dtype) for n in branches}
    for name in tables:
        out[name] = None if case.rows is None else torch.randn(case.B, *rows, case.C, device=device)
    if "scale" in tables:
        out["weight"] = 1 + 0.1 * torch.randn(case.C, device=device) if case.affine else None
        out["bias"] = torch.randn(case.C, device=device) if case.affine and case.norm == "layer" else None
    return out


def kernel_backends(device: str, *written: str) -> list[str]:
    """The written backends that can run here; skips the test where there is none."""
    here = [b for b in written if lib.MISSING[b] is None and (b == "cpu") == (device == "cpu")]
    if not here:
        pytest.skip("; ".join(f"{b}: {lib.MISSING[b] or f'tensors are on {device}'}" for b in written))
    return here


def head_case(
    norm: str, dtype: torch.dtype, names: str, B: int, L: int, N: int, D: int, device: str = "cpu"
) -> dict[str, Tensor | None]:
    """Heads [B, L, N, D] by the letters of names, and q_weight, k_weight of a norm over channels, over the head, or none."""
    out: dict[str, Tensor | None] = {name: torch.randn(B, L, N, D, device=device).to(dtype) for name in names}
    size = {"channels": N * D, "head": D, "no norm": 0}[norm]
    for name in ("q_weight", "k_weight"):
        out[name] = 1 + 0.1 * torch.randn(size, device=device) if size else None
    return out
