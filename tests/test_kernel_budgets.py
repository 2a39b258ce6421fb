"""Every kernel, compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, few registers, 128-bit accesses."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dit_ops import _library as lib

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tools.check_cuda import compile_kernels, nvcc  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
REGISTERS = 128  # per thread: 512 threads fit an SM; in the backward of fp32 rows beyond 16 KB, 256 threads of 255


# What a launch at 480p passes: 21 latent frames of 1560 tokens; strides of modulation rows [1, 21, C].
L, S, F = 32760, 1560, 21


def adaln(C: int, dtype: torch.dtype) -> Iterator:
    from dit_ops.kernels import adaln

    BC, rows = adaln.triton.next_power_of_2(C), (F * C, C)
    options = {"RMS": False, "BC": BC, "num_warps": adaln.warps(BC), "grid": (1,)}
    stats, tables = [FP32] * 2, [FP32] * 4
    yield adaln.adaln_fwd_kernel.warmup(dtype, *tables, dtype, *stats, *rows, *rows, L, C, S, 1e-6, **options)
    tables, sums = [FP32] * 2, [FP32] * 2
    options["num_warps"] = adaln.warps_backward(BC, dtype.itemsize)
    yield adaln.adaln_bwd_kernel.warmup(dtype, dtype, *tables, *stats, dtype, *sums, *rows, L, C, S, 49, BL=32, **options)


def gated_residual(C: int, dtype: torch.dtype) -> Iterator:
    from dit_ops.kernels import gated_residual as op

    rows, NC = (F * C, C), -(-C // op.BC)
    options = {"BL": op.tile(S), "BC": op.BC, "num_warps": 4, "grid": (1,)}
    yield op.gated_residual_fwd_kernel.warmup(dtype, dtype, FP32, dtype, *rows, L, C, S, 390, NC, **options)
    yield op.gated_residual_bwd_kernel.warmup(dtype, dtype, FP32, dtype, FP32, *rows, L, C, S, 25, NC, NT=16, **options)


def gated_residual_adaln(C: int, dtype: torch.dtype) -> Iterator:
    from dit_ops.kernels import gated_residual_adaln as op

    BC, rows = op.triton.next_power_of_2(C), (F * C, C)
    options = {"RMS": False, "BC": BC, "num_warps": op.warps(BC), "grid": (1,)}
    x, stats, sums = [dtype] * 2, [FP32] * 2, [FP32] * 3
    yield op.gated_residual_adaln_fwd_kernel.warmup(*x, *[FP32] * 5, *x, *stats, *rows, *rows, *rows, L, C, S, 1e-6, **options)
    options |= {"BL": 32, "num_warps": op.warps_backward(BC, dtype.itemsize), "maxnreg": op.max_registers(BC)}
    gate = None if op.too_wide_for_the_gate(torch.empty(C, dtype=dtype, device="meta")) else FP32
    yield op.gated_residual_adaln_bwd_kernel.warmup(
        *x, *x, gate, FP32, FP32, *stats, *x, *sums, *rows, *rows, L, C, S, 49, **options
    )


def within_budget(kernel, most: int) -> None:
    from tools.offline_triton import report

    used = report(kernel)
    assert used["stack"] == used["LDL"] == used["STL"] == 0, f"{kernel.name} spills: {used}"
    assert used["registers"] <= most and used["registers"] * used["warps"] <= 16 * REGISTERS, f"{kernel.name}: {used}"
    assert used["LDG.E.128"] and used["STG.E.128"], f"{kernel.name} has no 128-bit accesses: {used}"


@pytest.mark.skipif(
    bool(lib.MISSING["triton"]) or lib.INTERPRETED, reason=lib.MISSING["triton"] or "the interpreter compiles nothing"
)
@pytest.mark.parametrize("C, dtype", [(C, dtype) for C in (1536, 3072, 5120, 8192) for dtype in (BF16, FP32)], ids=str)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernels", [adaln, gated_residual, gated_residual_adaln], ids=lambda kernels: kernels.__name__)
def test_triton(kernels, capability, C, dtype):
    """Tokens in dtype, fp32 modulation per frame and affine weights."""
    from tools.offline_triton import offline_driver

    with offline_driver(capability):
        for kernel in kernels(C, dtype):
            assert kernel.metadata.target.arch == capability
            wide = C * dtype.itemsize > 16384 and "bwd" in kernel.name
            within_budget(kernel, 255 if wide else REGISTERS)


@pytest.mark.skipif(nvcc() is None, reason="nvcc was not found in CUDA_HOME, on PATH or in /usr/local/cuda")
@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda source: source.stem)
def test_cuda(source, arch):
    kernels = compile_kernels(source, arch)
    assert any("fwd" in name for name in kernels) and any("bwd" in name for name in kernels)
    for name, used in kernels.items():
        assert used["stack"] == used["spill"] == 0, f"{name} spills: {used}"
        assert used["registers"] <= REGISTERS, f"{name}: {used}"
        if "LDG.E.128" in used and not name.endswith(", 1>"):  # of a row that is not aligned, a thread takes one value
            assert used["LDG.E.128"] >= (4 if "adaln" in name else 1) and used["STG.E.128"] >= 1, f"{name}: {used}"
