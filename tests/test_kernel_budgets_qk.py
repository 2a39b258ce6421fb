"""The Triton kernels of queries, keys and values, compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, few registers,
128-bit accesses."""

import re
import sys
from pathlib import Path

import pytest
import torch

from dit_ops import _library as lib

sys.path.append(str(Path(__file__).resolve().parents[1]))

pytestmark = pytest.mark.skipif(
    bool(lib.MISSING["triton"]) or lib.INTERPRETED, reason=lib.MISSING["triton"] or "the interpreter compiles nothing"
)
BF16, FP32 = torch.bfloat16, torch.float32
REGISTERS = {"forward": 64, "backward": 128}  # per thread: 1024 and 512 threads fit an SM
MODELS = {  # N, channels of a head that turn with the frame and with the row, norm over the head
    "Wan 1.3B": (12, 44, 42, False),
    "Wan 14B": (40, 44, 42, False),
    "HunyuanVideo 1.5": (16, 16, 56, True),
    "40 heads, norm over the head": (40, 44, 42, True),
}


def kernels(N: int, AT: int, AH: int, head: bool):
    """(pass, name, loads and stores of a row, compiled kernel): bf16 views of a packed QKV, 21 frames of 30 by 52 tokens."""
    from dit_ops.kernels import prope_output, qk_norm_rope, qk_norm_rope_prope

    D, L, grid, views, P = 128, 32760, (21, 30, 52), (3 * N * 128 * 32760, 3 * N * 128), (21 * 16, 16, 4, 1)
    options = {"N": N, "D": D, "AT": AT, "AH": AH, "Q_HEAD": head, "K_HEAD": head, "Q_N": D, "K_N": D, "grid": (1,)}
    options |= qk_norm_rope.tile(N, D, 16)
    weights, rstd, rope, cameras = [FP32] * 2, [FP32] * 2, [FP32] * 3, [FP32] * 2
    forward, backward = qk_norm_rope.qk_norm_rope_fwd_kernel, qk_norm_rope.qk_norm_rope_bwd_kernel
    qk, scalars = [BF16] * 2, (*views, *views, L, *grid, 0)
    out = (*views, *views, N * D * L, L, *grid, 0)
    yield "forward", "rope", forward.warmup(*qk, *weights, *qk, *rstd, *rope, *out, 1e-6, **options)
    yield "backward", "rope", backward.warmup(*qk, *qk, *weights, *rstd, *qk, *weights, *rope, *scalars, 49, BL=32, **options)

    forward, backward = qk_norm_rope_prope.qk_norm_rope_prope_fwd_kernel, qk_norm_rope_prope.qk_norm_rope_prope_bwd_kernel
    qkv, tables, scalars = [BF16] * 3, [*rope, *cameras], (*P, *P, L, *grid, 0)
    options |= {"V_N": D}
    outs = (*views * 3, 2 * N * D * L, *scalars, 1e-6)
    yield "forward", "prope", forward.warmup(*qkv, *weights, *qkv, *rstd, *tables, *outs, **options)

    into, slots = qk_norm_rope.qk_norm_rope_into_kernel, {"K_OUT_N": D, "V_OUT_N": D}
    outs, rope = (*views * 3, *(2 * N * D * L, 2 * N * D) * 3, *scalars, 1e-6), [FP32, *rope]
    yield "forward", "prope into slots", into.warmup(*qkv, *weights, *qkv, *rope, *cameras, *outs, **options, **slots)
    rope[1] = None
    unturned = into.warmup(*qkv, *weights, *qkv, *rope, FP32, None, *outs, **options, **slots)
    yield "forward", "unturned into slots", unturned
    keys = (None, *qkv[1:], None, None, *qkv, *[FP32] * 4, None, FP32)
    yield "forward", "turned when read", into.warmup(*keys, *outs, **options, **slots)
    scalars = (*views * 3, *scalars)
    sums = [*rstd, *qkv, *weights]
    options |= qk_norm_rope_prope.backward_tile(N, D, head)
    yield "backward", "prope", backward.warmup(*qkv, *qkv, *weights, *sums, *tables, *scalars, 49, BL=32, **options)

    kernel, C = prope_output.prope_output_kernel, N * D
    yield (
        "forward",
        "output",
        kernel.warmup(BF16, FP32, BF16, 2 * L * C, 2 * C, *P, 21, 1560, 1170, C=C, **prope_output.TILE, grid=(1,)),
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_kernels(capability, model):
    from tools.offline_triton import offline_driver, report

    with offline_driver(capability):
        for pass_, name, kernel in kernels(*MODELS[model]):
            assert kernel.metadata.target.arch == capability
            used = report(kernel)
            assert used["stack"] == used["LDL"] == used["STL"] == 0, f"{name} {pass_} spills: {used}"
            fewer_warps = 2 if used["warps"] == 8 and MODELS[model][0] * 128 > 4096 else 1  # the same registers on an SM
            assert used["registers"] <= fewer_warps * REGISTERS[pass_], f"{name} {pass_}: {used}"
            assert used["LDG.E.128"] >= 2 and used["STG.E.128"] >= 2, f"{name} {pass_}: 16 bf16 values are 2 accesses: {used}"
            assert not re.search(r"(ld|st)\.global\S*\.b16", kernel.asm["ptx"]), f"{name} {pass_} has 16-bit accesses"
