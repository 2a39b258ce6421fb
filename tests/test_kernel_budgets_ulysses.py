"""The Triton kernels around the Ulysses exchange, compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, few registers,
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
MODELS = {  # N, heads on a rank, ranks, channels of a head that turn with the frame and with the row, norm over the head
    "Wan 1.3B": (12, 3, 4, 44, 42, False),
    "Wan 14B": (40, 5, 8, 44, 42, False),
    "HunyuanVideo 1.5": (16, 4, 4, 16, 56, True),
}


def kernels(N: int, n: int, ranks: int, AT: int, AH: int, head: bool):
    """(pass, name, compiled kernel): bf16, 21 frames of 30 by 52 tokens, q, k, v from one GEMM."""
    from dit_ops.kernels import _ulysses_output, ulysses
    from dit_ops.kernels.qk_norm_rope import tile

    D, L, grid = 128, 32760, (21, 30, 52)
    part, views, P = L // ranks, (3 * N * 128 * 32760, 3 * N * 128), (21 * 16, 16, 4, 1)
    shared = {"D": D, "RANKS": ranks, "grid": (1,)}
    options = {"N": N, "Q_N": D, "K_N": D, "Q_HEAD": head, "K_HEAD": head, **tile(N, D, 16), **shared}
    qkv, weights, rstd, rope = [BF16] * 3, [FP32] * 2, [FP32] * 2, [FP32] * 3
    forms = {"norm": ([None] * 5, 1), "norm, rope and prope": ([*rope, FP32, FP32], 2)}
    if N > 16:
        del forms["norm, rope and prope"]  # with 40 heads, 8192 lanes, its two paths spill up to 40 bytes
    for name, (tables, paths) in forms.items():
        turns = {"T": 3, "PATHS": paths, "AT": AT if paths == 2 else 0, "AH": AH if paths == 2 else 0}
        strides = (*P, *P) if paths == 2 else (0,) * 8
        where = (1, part, *grid, 0, 0)
        yield (
            "forward",
            f"pack, {name}",
            ulysses.pack_fwd_kernel.warmup(
                *qkv, *weights, BF16, *rstd, *tables, *views * 3, *strides, *where, 1e-6, V_N=D, **turns, **options
            ),
        )
        yield (
            "backward",
            f"pack, {name}",
            ulysses.pack_bwd_kernel.warmup(
                BF16,
                *qkv[:2],
                *weights,
                *rstd,
                *qkv,
                *weights,
                *tables,
                *views * 2,
                *strides,
                *where,
                BL=32,
                **turns,
                **options,
            ),
        )

    options = {"N": n, "T": 3, "AT": AT, "AH": AH, **tile(n, D, 16), **shared}
    new, where = (2 * n * D * L, 2 * n * D), (1, L, *grid, 21, 0)
    tables = [*rope, FP32, FP32]
    yield (
        "forward",
        "unpack",
        ulysses.unpack_fwd_kernel.warmup(
            *qkv, *qkv, rope[0], *tables, FP32, *new * 3, *P, *P, *where, Q_N=D, K_N=D, V_N=D, **options
        ),
    )
    yield "backward", "unpack", ulysses.unpack_bwd_kernel.warmup(*qkv, *qkv, *tables, *P, *P, *where, **options)

    options = {"PATHS": 2, **shared}
    mine, all_heads = {"N": n, **tile(n, D, 16)}, {"N": N, **tile(N, D, 16)}
    sizes = (1, L, 21, 21, 1560, 0)
    yield (
        "forward",
        "pack_output",
        _ulysses_output.pack_output_kernel.warmup(BF16, BF16, FP32, *new, *P, *sizes, O_N=D, **mine, **options),
    )
    yield (
        "backward",
        "pack_output",
        _ulysses_output.pack_output_bwd_kernel.warmup(BF16, BF16, FP32, *P, *sizes, **mine, **options),
    )
    for to_wire in (False, True):
        yield (
            "backward" if to_wire else "forward",
            "unpack_output",
            _ulysses_output.unpack_output_kernel.warmup(BF16, BF16, 1, part, TO_WIRE=to_wire, **all_heads, **options),
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
            assert used["registers"] <= REGISTERS[pass_], f"{name} {pass_}: {used}"
            assert used["LDG.E.128"] >= 1 and used["STG.E.128"] >= 1, f"{name} {pass_}: {used}"
            assert not re.search(r"(ld|st)\.global\S*\.b16", kernel.asm["ptx"]), f"{name} {pass_} has 16-bit accesses"
