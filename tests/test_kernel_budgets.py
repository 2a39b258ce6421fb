"""Every kernel, compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, few registers, 128-bit accesses."""

import sys
from pathlib import Path

import pytest
import torch

from dit_ops import _library as lib

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tools.check_cuda import compile_kernels, nvcc  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
REGISTERS = 128  # per thread: 512 threads fit an SM


def triton_kernels(C: int):
    """(name, compiled kernel) of adaln at C channels: bf16 tokens, fp32 modulation per frame and affine weights, as at 480p."""
    import triton

    from dit_ops.kernels import adaln

    L, S, BC = 32760, 1560, triton.next_power_of_2(C)
    options = {"RMS": False, "BC": BC, "num_warps": adaln.warps(BC), "grid": (1,)}
    tables, rows = [FP32] * 4, (21 * C, C)
    yield "forward", adaln.adaln_fwd_kernel.warmup(BF16, *tables, BF16, FP32, FP32, *rows, *rows, L, C, S, 1e-6, **options)
    sums = [BF16, FP32, FP32]
    yield "backward", adaln.adaln_bwd_kernel.warmup(BF16, BF16, *tables, *sums, *rows, L, C, S, 49, BL=32, **options)


@pytest.mark.skipif(
    bool(lib.MISSING["triton"]) or lib.INTERPRETED, reason=lib.MISSING["triton"] or "the interpreter compiles nothing"
)
@pytest.mark.parametrize("C", [1536, 5120, 8192])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_adaln(capability, C):
    from tools.offline_triton import offline_driver, report

    with offline_driver(capability):
        for name, kernel in triton_kernels(C):
            assert kernel.metadata.target.arch == capability
            used = report(kernel)
            assert used["stack"] == used["LDL"] == used["STL"] == 0, f"{name} spills: {used}"
            assert used["registers"] <= REGISTERS, f"{name}: {used}"
            assert used["LDG.E.128"] and used["STG.E.128"], f"{name} has no 128-bit accesses: {used}"


@pytest.mark.skipif(nvcc() is None, reason="nvcc was not found in CUDA_HOME, on PATH or in /usr/local/cuda")
@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda source: source.stem)
def test_cuda(source, arch):
    kernels = compile_kernels(source, arch)
    assert kernels
    for name, used in kernels.items():
        assert used["stack"] == used["spill"] == 0, f"{name} spills: {used}"
        assert used["registers"] <= REGISTERS, f"{name}: {used}"
        if "LDG.E.128" in used:
            assert used["LDG.E.128"] >= 4 and used["STG.E.128"] >= 1, f"{name}: {used}"
