"""The wire of the Ulysses exchange: addresses of heads and tokens in it.

A video is R rows of S = H * W tokens. Every row and the heads are split over RANKS ranks; the first ranks hold one more where
that does not divide. One block per other rank and no padding, T tensors per token:
  by head   [B, L, T, N_d, D]: L tokens of this rank, the heads of rank d
  by token  [B, prefix + R * S_d, T, N, D]: the tokens of rank d behind a prefix that all ranks get, the N heads of this rank
"""

import triton
import triton.language as tl

from dit_ops.kernels.qk_norm_rope import head_mask


@triton.jit
def first_of(i_p, n, RANKS: tl.constexpr):
    """The first of n things that rank i_p holds."""
    return i_p * (n // RANKS) + tl.minimum(i_p, n % RANKS)


@triton.jit
def rank_of(i, n, RANKS: tl.constexpr):
    """The rank that holds thing i of n."""
    size, longer = n // RANKS, n % RANKS
    edge = longer * (size + 1)
    return tl.where(i < edge, i // (size + 1), longer + (i - edge) // (size + (size == 0)))


@triton.jit
def wire_by_head(
    wire, rows, i_row, i_t, T: tl.constexpr, N: tl.constexpr, D: tl.constexpr, RANKS: tl.constexpr, BN: tl.constexpr
):
    """[BN, 1]: where each head of tensor i_t stands, for row i_row of the rows = B * L tokens."""
    o_n = tl.arange(0, BN)[:, None]
    i_p = rank_of(o_n, N, RANKS)
    o_first = first_of(i_p, N, RANKS)
    heads = first_of(i_p + 1, N, RANKS) - o_first
    return wire + (rows.to(tl.int64) * T * o_first + (i_row * T + i_t) * heads + o_n - o_first) * D


@triton.jit
def wire_row(i_b, i_l, B, R, S, prefix, RANKS: tl.constexpr):
    """The row of video token i_l in the blocks [B, prefix + R * S_d] by token."""
    i_r, i_s = i_l // S, i_l % S
    i_p = rank_of(i_s, S, RANKS)
    o_first = first_of(i_p, S, RANKS)
    tokens = first_of(i_p + 1, S, RANKS) - o_first
    block = B.to(tl.int64) * (i_p * prefix + R * o_first)
    return block + i_b * (prefix + R * tokens) + prefix + i_r * tokens + i_s - o_first


@triton.jit
def prefix_row(i_p, i_b, i_l, B, R, S, prefix, RANKS: tl.constexpr):
    """The row of prefix token i_l in the block of rank i_p."""
    o_first = first_of(i_p, S, RANKS)
    tokens = first_of(i_p + 1, S, RANKS) - o_first
    return B.to(tl.int64) * (i_p * prefix + R * o_first) + i_b * (prefix + R * tokens) + i_l


@triton.jit
def load_at(p_x, N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """[BN, BD] fp32 of heads that start at p_x [BN, 1]."""
    return tl.load(p_x + tl.arange(0, BD)[None, :], mask=head_mask(N, D, BN, BD), other=0.0).to(tl.float32)


@triton.jit
def store_at(p_x, b_x, N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    tl.store(p_x + tl.arange(0, BD)[None, :], b_x.to(p_x.dtype.element_ty), mask=head_mask(N, D, BN, BD))
