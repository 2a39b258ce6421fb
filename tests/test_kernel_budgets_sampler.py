"""The kernels of the sampler steps and of the moving average, compiled for sm_80, sm_90 and sm_100 without a GPU."""

import sys
from pathlib import Path

import pytest
import torch

from dit_ops import _library as lib

sys.path.append(str(Path(__file__).resolve().parents[1]))

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
STEPS = {"add_noise": False, "flow_to_x0": False, "renoise": True, "cfg_euler_step": True}  # whether z is there
REGISTERS = {"ema_update": 80}  # per thread, else 32: bandwidth needs many programs per SM


def sampler_kernels():
    """Latents in bf16 and in fp32 with noise levels per frame, and a step of two numbers."""
    from dit_ops.kernels.sampler_steps import sampler_step_bwd_kernel, sampler_step_fwd_kernel

    n = 16 * 60 * 104
    NN = -(-n // 1024)
    for x in (BF16, FP32):
        for step, has_z in STEPS.items():
            for sigma in (FP32, None):
                tables, values = (sigma, sigma if has_z else None), (0.75, 0.5, 3.0, 1, 1, n, NN)
                branches = (x, BF16, BF16 if has_z else None)
                name = f"{step} {x} {'table' if sigma else 'numbers'}"
                options = {"STEP": step, "BN": 1024, "grid": (1,)}
                yield name, sampler_step_fwd_kernel.warmup(*branches, x, *tables, *values, **options)
                yield f"{name} backward", sampler_step_bwd_kernel.warmup(x, BF16, *tables, *values, OF="y", **options)


def ema_kernels():
    from dit_ops.kernels.ema_update import BN, ema_update_kernel

    yield "ema_update", ema_update_kernel.warmup(INT64, 1e-3, ALIGNED=True, BN=BN, num_warps=8, grid=(1,))


@pytest.mark.skipif(
    bool(lib.MISSING["triton"]) or lib.INTERPRETED, reason=lib.MISSING["triton"] or "the interpreter compiles nothing"
)
@pytest.mark.parametrize("kernels", [sampler_kernels, ema_kernels], ids=lambda f: f.__name__)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton(capability, kernels):
    from tools.offline_triton import offline_driver, report

    with offline_driver(capability):
        for name, kernel in kernels():
            assert kernel.metadata.target.arch == capability
            used = report(kernel)
            assert used["stack"] == used["LDL"] == used["STL"] == 0, f"{name} spills: {used}"
            assert used["registers"] <= REGISTERS.get(name, 32), f"{name}: {used}"
            wanted = 4 if name == "ema_update" else 1
            assert used["LDG.E.128"] >= wanted and used["STG.E.128"] >= 1, f"{name} has no 128-bit accesses: {used}"
