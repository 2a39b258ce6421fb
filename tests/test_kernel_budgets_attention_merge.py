"""The merge of attention's parts, compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, 128-bit accesses."""

import sys
from pathlib import Path

import pytest
import torch

from dit_ops import _library as lib

sys.path.append(str(Path(__file__).resolve().parents[1]))


@pytest.mark.skipif(
    bool(lib.MISSING["triton"]) or lib.INTERPRETED, reason=lib.MISSING["triton"] or "the interpreter compiles nothing"
)
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("D", [64, 96, 128])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_merge(capability, D, parts):
    from dit_ops.kernels import _attention_merge as merge
    from tools.offline_triton import offline_driver, report

    L, n, N, BF16, FP32 = 65520, 4680, 12, torch.bfloat16, torch.float32
    options = {"D": D, "BD": merge.triton.next_power_of_2(D), "BL": merge.BLOCK, "PARTS": parts, "num_warps": 4, "grid": (1,)}
    with offline_driver(capability):
        kernel = merge.attention_merge_parts_kernel.warmup(
            *[BF16] * 4, *[FP32] * 4, BF16, FP32, L * N * D, N * D, D, N * L, L, n, N, **options
        )
        used = report(kernel)
    assert used["stack"] == used["LDL"] == used["STL"] == 0 and used["registers"] <= 128, used
    assert used["LDG.E.128"] >= parts and used["STG.E.128"], used
