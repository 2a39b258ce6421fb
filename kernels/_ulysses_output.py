"""The outputs of attention around the Ulysses exchange: pack_output (P o) -> all-to-all -> unpack_output.

o: [B, prefix + L, PATHS * N, D], N heads of this rank, with PATHS = 2 those of ProPE behind those of RoPE; prefix tokens go to
every rank and have no camera. _ulysses_wire.py has the layout of the wire. One program per token.
"""

import triton
import triton.language as tl
from torch import Tensor

from dit_ops.kernels._ulysses_wire import load_at, prefix_row, store_at, wire_by_head, wire_row
from dit_ops.kernels.qk_norm_rope import join_pairs, load_camera, load_heads, project, split_pairs, store_heads, tile


@triton.jit
def projected(b_x, P, P_r, P_c):
    b_even, b_odd = split_pairs(b_x)
    b_even, b_odd = project(b_even, b_odd, load_camera(P, P_r, P_c))
    return join_pairs(b_even, b_odd)


@triton.jit(do_not_specialize=("B", "L", "F", "R", "S", "prefix"))
def pack_output_kernel(
    o, wire, P, o_b, o_l, P_b, P_f, P_r, P_c, B, L, F, R, S, prefix,
    O_N: tl.constexpr, PATHS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, RANKS: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs [0, L): video tokens; RANKS * prefix more: a prefix token for one rank."""
    i_b, i_p = tl.program_id(1).to(tl.int64), tl.program_id(0)
    if i_p < L:
        p_o = o + i_b * o_b + (prefix + i_p).to(tl.int64) * o_l
        p_wire = wire + wire_row(i_b, i_p, B, R, S, prefix, RANKS) * (PATHS * N * D)
        store_heads(p_wire, load_heads(p_o, N, D, O_N, BN, BD), N, D, D, BN, BD)
        if PATHS == 2:
            b_o = load_heads(p_o + N * O_N, N, D, O_N, BN, BD)
            b_o = projected(b_o, P + i_b * P_b + i_p // S % F * P_f, P_r, P_c)
            store_heads(p_wire + N * D, b_o, N, D, D, BN, BD)
    else:
        i_l = (i_p - L) % prefix
        p_o = o + i_b * o_b + i_l.to(tl.int64) * o_l
        p_wire = wire + prefix_row((i_p - L) // prefix, i_b, i_l, B, R, S, prefix, RANKS) * (PATHS * N * D)
        for i_path in tl.static_range(PATHS):
            b_o = load_heads(p_o + i_path * N * O_N, N, D, O_N, BN, BD)
            store_heads(p_wire + i_path * N * D, b_o, N, D, D, BN, BD)


@triton.jit(do_not_specialize=("B", "L", "F", "R", "S", "prefix"))
def pack_output_bwd_kernel(
    wire, do, P, P_b, P_f, P_r, P_c, B, L, F, R, S, prefix,
    PATHS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, RANKS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """P is the transpose of the forward's. The gradients of a prefix token from all ranks are summed in their order."""
    i_b, i_p = tl.program_id(1).to(tl.int64), tl.program_id(0)
    p_do = do + (i_b * (prefix + L) + i_p) * (PATHS * N * D)
    if i_p >= prefix:
        p_wire = wire + wire_row(i_b, i_p - prefix, B, R, S, prefix, RANKS) * (PATHS * N * D)
        store_heads(p_do, load_heads(p_wire, N, D, D, BN, BD), N, D, D, BN, BD)
        if PATHS == 2:
            b_do = load_heads(p_wire + N * D, N, D, D, BN, BD)
            b_do = projected(b_do, P + i_b * P_b + (i_p - prefix) // S % F * P_f, P_r, P_c)
            store_heads(p_do + N * D, b_do, N, D, D, BN, BD)
    else:
        for i_path in tl.static_range(PATHS):
            b_do = tl.zeros([BN, BD], dtype=tl.float32)
            for i_rank in range(RANKS):
                p_wire = wire + prefix_row(i_rank, i_b, i_p, B, R, S, prefix, RANKS) * (PATHS * N * D)
                b_do += load_heads(p_wire + i_path * N * D, N, D, D, BN, BD)
            store_heads(p_do + i_path * N * D, b_do, N, D, D, BN, BD)


@triton.jit(do_not_specialize=("B", "L"))
def unpack_output_kernel(
    wire, o, B, L, TO_WIRE: tl.constexpr, PATHS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, RANKS: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """o: [B, L, PATHS, N, D], from the wire or to it"""
    i_row = tl.program_id(2).to(tl.int64) * L + tl.program_id(0)
    p_o = o + (i_row * PATHS + tl.program_id(1)) * (N * D)
    p_wire = wire_by_head(wire, B * L, i_row, tl.program_id(1), PATHS, N, D, RANKS, BN)
    if TO_WIRE:
        store_at(p_wire, load_heads(p_o, N, D, D, BN, BD), N, D, BN, BD)
    else:
        store_heads(p_o, load_at(p_wire, N, D, BN, BD), N, D, D, BN, BD)


def ulysses_pack_output_fwd(o: Tensor, P: Tensor | None, F: int, halves: int, prefix: int, ranks: int) -> Tensor:
    B, L, N, D = o.shape
    PATHS, L, R = 1 if P is None else 2, L - prefix, halves * F
    N //= PATHS
    wire = o.new_empty(B * (L + ranks * prefix) * PATHS * N * D)
    pack_output_kernel[(L + ranks * prefix, B)](
        o, wire, P, *o.stride()[:2], *((0,) * 4 if P is None else P.stride()), B, L, F, R, L // R, prefix,
        O_N=o.stride(2), PATHS=PATHS, N=N, D=D, RANKS=ranks, **tile(N, D, 16),
    )  # fmt: skip
    return wire


def ulysses_pack_output_bwd(
    dwire: Tensor, P: Tensor | None, B: int, L: int, N: int, D: int, F: int, halves: int, prefix: int, ranks: int
) -> Tensor:
    """L: all tokens, prefix included    N: heads of one path"""
    PATHS, R = 1 if P is None else 2, halves * F
    do = dwire.new_empty(B, L, PATHS * N, D)
    strides = (0,) * 4 if P is None else P.mT.stride()
    pack_output_bwd_kernel[(L, B)](
        dwire, do, P, *strides, B, L - prefix, F, R, (L - prefix) // R, prefix,
        PATHS=PATHS, N=N, D=D, RANKS=ranks, **tile(N, D, 16),
    )  # fmt: skip
    return do


def ulysses_unpack_output_fwd(wire: Tensor, B: int, L: int, paths: int, N: int, D: int, ranks: int) -> Tensor:
    o = wire.new_empty(B, L, paths, N, D)
    unpack_output_kernel[(L, paths, B)](
        wire, o, B, L, TO_WIRE=False, PATHS=paths, N=N, D=D, RANKS=ranks, **tile(N, D, 16)
    )  # fmt: skip
    return o


def ulysses_unpack_output_bwd(do: Tensor, ranks: int) -> Tensor:
    B, L, paths, N, D = do.shape
    wire = do.new_empty(do.numel())
    unpack_output_kernel[(L, paths, B)](wire, do, B, L, TO_WIRE=True, PATHS=paths, N=N, D=D, RANKS=ranks, **tile(N, D, 16))
    return wire
