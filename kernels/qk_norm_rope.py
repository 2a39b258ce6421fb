"""RMS norm and 3D RoPE of queries and keys; the functions on one token serve qk_norm_rope_prope as well.

x: [B, L, N, D], unit stride over D    weight: [N * D] or [D]    rstd: [B, L, 1] or [B, L, N] fp32
rope_t, rope_h, rope_w: contiguous [positions, D_axis / 2, 2]: a row is the (cos, sin) of the axis's channels, pair by pair
Forward: one program per token and tensor, its heads [BN, BD] in registers; "into" writes keys and values into views, such as
the slots of a cache. Backward: one program per chunk of BL tokens of one frame and per tensor; it sums its share of the
weight's gradient, the chunks are summed after it: the same bits every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def head_mask(N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    return (tl.arange(0, BN)[:, None] < N) & (tl.arange(0, BD)[None, :] < D)


@triton.jit
def load_heads(x, N: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """[BN, BD] fp32 of one token, heads STRIDE apart; zeros outside [N, D]."""
    o_n, o_d = tl.arange(0, BN)[:, None], tl.arange(0, BD)[None, :]
    return tl.load(x + o_n * STRIDE + o_d, mask=head_mask(N, D, BN, BD), other=0.0).to(tl.float32)


@triton.jit
def store_heads(out, b_x, N: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    o_n, o_d = tl.arange(0, BN)[:, None], tl.arange(0, BD)[None, :]
    tl.store(out + o_n * STRIDE + o_d, b_x.to(out.dtype.element_ty), mask=head_mask(N, D, BN, BD))


@triton.jit
def load_weight(weight, HEAD: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """[1, BD] of a norm over the head, [BN, BD] of one over all channels."""
    return load_heads(weight, 1, D, D, 1, BD) if HEAD else load_heads(weight, N, D, D, BN, BD)


@triton.jit
def sum_norm(b_x, HEAD: tl.constexpr):
    """The sum over what one norm spans: [BN, 1] or [1, 1]."""
    b_sum = tl.sum(b_x, 1, keep_dims=True)
    if not HEAD:
        b_sum = tl.sum(b_sum, 0, keep_dims=True)
    return b_sum


@triton.jit
def rstd_offsets(rstd, i_row, HEAD: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    if HEAD:
        p_rstd = rstd + i_row * N + tl.arange(0, BN)[:, None]
        m_rstd = tl.arange(0, BN)[:, None] < N
    else:
        p_rstd = rstd + i_row + tl.arange(0, 1)[:, None]
        m_rstd = tl.arange(0, 1)[:, None] < 1
    return p_rstd, m_rstd


@triton.jit
def split_pairs(b_x):
    """[BN, BD] as its even and its odd channels, [BN, BD / 2] each."""
    return tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2]))


@triton.jit
def join_pairs(b_even, b_odd):
    return tl.reshape(tl.join(b_even, b_odd), [b_even.shape[0], b_even.shape[1] * 2])


@triton.jit
def load_angles(
    rope_t, rope_h, rope_w, i_s, i_t, H, W, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """cos and sin [1, BD / 2] of token i_s of a frame whose position is i_t; the axes have AT, AH, D - AT - AH channels."""
    AW: tl.constexpr = D - AT - AH
    o_d = tl.arange(0, BD)[None, :]
    b_angles = tl.load(rope_t + i_t * AT + o_d, mask=o_d < AT, other=0.0).to(tl.float32)
    m_h = (o_d >= AT) & (o_d < AT + AH)
    b_angles += tl.load(rope_h + (i_s // W) * AH + o_d - AT, mask=m_h, other=0.0).to(tl.float32)
    m_w = (o_d >= AT + AH) & (o_d < D)
    b_angles += tl.load(rope_w + (i_s % W) * AW + o_d - (AT + AH), mask=m_w, other=0.0).to(tl.float32)
    return split_pairs(b_angles)


@triton.jit
def load_camera(M, stride_r, stride_c):
    """The 16 entries of a matrix, row by row."""
    r1, r2, r3 = M + stride_r, M + 2 * stride_r, M + 3 * stride_r
    c1, c2, c3 = stride_c, 2 * stride_c, 3 * stride_c
    m00, m01, m02, m03 = tl.load(M), tl.load(M + c1), tl.load(M + c2), tl.load(M + c3)
    m10, m11, m12, m13 = tl.load(r1), tl.load(r1 + c1), tl.load(r1 + c2), tl.load(r1 + c3)
    m20, m21, m22, m23 = tl.load(r2), tl.load(r2 + c1), tl.load(r2 + c2), tl.load(r2 + c3)
    m30, m31, m32, m33 = tl.load(r3), tl.load(r3 + c1), tl.load(r3 + c2), tl.load(r3 + c3)
    return m00, m01, m02, m03, m10, m11, m12, m13, m20, m21, m22, m23, m30, m31, m32, m33


@triton.jit
def project(b_even, b_odd, camera):
    """M x in groups of 4 channels of even and odd channels, as even and odd channels."""
    m00, m01, m02, m03, m10, m11, m12, m13, m20, m21, m22, m23, m30, m31, m32, m33 = camera
    b_0, b_2 = split_pairs(b_even)
    b_1, b_3 = split_pairs(b_odd)
    b_y0 = m00 * b_0 + m01 * b_1 + m02 * b_2 + m03 * b_3
    b_y1 = m10 * b_0 + m11 * b_1 + m12 * b_2 + m13 * b_3
    b_y2 = m20 * b_0 + m21 * b_1 + m22 * b_2 + m23 * b_3
    b_y3 = m30 * b_0 + m31 * b_1 + m32 * b_2 + m33 * b_3
    return join_pairs(b_y0, b_y2), join_pairs(b_y1, b_y3)


@triton.jit
def heads_fwd(
    x, weight, out, rstd, rope_t, rope_h, rope_w, M,
    x_b, x_l, out_b, out_l, M_b, M_f, M_r, M_c, L, F, H, W, start_frame, eps,
    X_N: tl.constexpr, OUT_N: tl.constexpr, N: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr,
    HEAD: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One token of heads: n = x * rstd * weight to heads [0, N), turned if there is rope; with M, M n to heads [N, 2N)."""
    i_b, i_l = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64)
    i_f, i_s = i_l // (H * W) % F, i_l % (H * W)
    b_n = load_heads(x + i_b * x_b + i_l * x_l, N, D, X_N, BN, BD)
    if weight is not None:
        SPAN: tl.constexpr = D if HEAD else N * D
        b_rstd = 1 / tl.sqrt(sum_norm(b_n * b_n, HEAD) / SPAN + eps)
        if rstd is not None:
            p_rstd, m_rstd = rstd_offsets(rstd, i_b * L + i_l, HEAD, N, BN)
            tl.store(p_rstd, b_rstd, mask=m_rstd)
        b_n = b_n * b_rstd * load_weight(weight, HEAD, N, D, BN, BD)

    p_out = out + i_b * out_b + i_l * out_l
    if rope_t is None:
        store_heads(p_out, b_n, N, D, OUT_N, BN, BD)
    b_even, b_odd = split_pairs(b_n)
    if rope_t is not None:
        b_cos, b_sin = load_angles(rope_t, rope_h, rope_w, i_s, start_frame + i_f, H, W, D, AT, AH, BD)
        b_turned = join_pairs(b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin)
        store_heads(p_out, b_turned, N, D, OUT_N, BN, BD)
    if M is not None:
        b_even, b_odd = project(b_even, b_odd, load_camera(M + i_b * M_b + i_f * M_f, M_r, M_c))
        store_heads(p_out + N * OUT_N, join_pairs(b_even, b_odd), N, D, OUT_N, BN, BD)


@triton.jit
def heads_bwd(
    dout, x, weight, rstd, dx, dweight, rope_t, rope_h, rope_w, M,
    x_b, x_l, M_b, M_f, M_r, M_c, L, F, H, W, start_frame, NL,
    X_N: tl.constexpr, N: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr,
    HEAD: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A chunk of tokens of one frame. M is the transpose of the forward's matrix: dn = (turned back) dout_0 + M dout_1."""
    i_b, i_p = tl.program_id(2).to(tl.int64), tl.program_id(0)
    i_r, i_n, S = i_p // NL, i_p % NL, H * W
    i_f = i_r % F
    PATHS: tl.constexpr = 1 if M is None else 2
    SPAN: tl.constexpr = D if HEAD else N * D
    if weight is not None:
        b_weight = load_weight(weight, HEAD, N, D, BN, BD)
        b_dweight = tl.zeros([BN, BD], dtype=tl.float32)

    for i_s in range(i_n * BL, min((i_n + 1) * BL, S)):
        i_l = i_r.to(tl.int64) * S + i_s
        i_row = i_b * L + i_l
        p_dout = dout + i_row * (PATHS * N * D)
        b_dn = load_heads(p_dout, N, D, D, BN, BD)
        if M is not None:
            b_dprope = load_heads(p_dout + N * D, N, D, D, BN, BD)
        if weight is not None:
            b_x = load_heads(x + i_b * x_b + i_l * x_l, N, D, X_N, BN, BD)
        b_even, b_odd = split_pairs(b_dn)
        if rope_t is not None:
            b_cos, b_sin = load_angles(rope_t, rope_h, rope_w, i_s, start_frame + i_f, H, W, D, AT, AH, BD)
            b_turned = b_even * b_cos + b_odd * b_sin
            b_odd = b_odd * b_cos - b_even * b_sin
            b_even = b_turned
        if M is not None:
            b_even_prope, b_odd_prope = split_pairs(b_dprope)
            b_even_prope, b_odd_prope = project(b_even_prope, b_odd_prope, load_camera(M + i_b * M_b + i_f * M_f, M_r, M_c))
            b_even += b_even_prope
            b_odd += b_odd_prope
        b_dx = join_pairs(b_even, b_odd)
        if weight is not None:
            # g = dn * weight, dx = rstd * (g - xhat * mean(g * xhat)), dweight = sum of dn * xhat
            p_rstd, m_rstd = rstd_offsets(rstd, i_row, HEAD, N, BN)
            b_rstd = tl.load(p_rstd, mask=m_rstd, other=0.0)
            b_xhat = b_x * b_rstd
            b_dweight += b_dx * b_xhat
            b_dx *= b_weight
            b_dx = (b_dx - b_xhat * (sum_norm(b_dx * b_xhat, HEAD) / SPAN)) * b_rstd
        store_heads(dx + i_row * (N * D), b_dx, N, D, D, BN, BD)

    if weight is not None:
        p_sum = dweight + (i_b * tl.num_programs(0) + i_p) * SPAN
        if HEAD:
            store_heads(p_sum, tl.sum(b_dweight, 0, keep_dims=True), 1, D, D, 1, BD)
        else:
            store_heads(p_sum, b_dweight, N, D, D, BN, BD)


RUNTIME = ("L", "F", "H", "W", "start_frame", "NL")  # not worth a compilation of their own


@triton.jit(do_not_specialize=RUNTIME[:-1])
def qk_norm_rope_fwd_kernel(
    q, k, q_weight, k_weight, q_out, k_out, q_rstd, k_rstd, rope_t, rope_h, rope_w,
    q_b, q_l, k_b, k_l, out_b, L, F, H, W, start_frame, eps,
    Q_N: tl.constexpr, K_N: tl.constexpr, N: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr,
    Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        heads_fwd(
            q, q_weight, q_out, q_rstd, rope_t, rope_h, rope_w, None,
            q_b, q_l, out_b, N * D, 0, 0, 0, 0, L, F, H, W, start_frame, eps, Q_N, D, N, D, AT, AH, Q_HEAD, BN, BD,
        )  # fmt: skip
    else:
        heads_fwd(
            k, k_weight, k_out, k_rstd, rope_t, rope_h, rope_w, None,
            k_b, k_l, out_b, N * D, 0, 0, 0, 0, L, F, H, W, start_frame, eps, K_N, D, N, D, AT, AH, K_HEAD, BN, BD,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME[:-1])
def qk_norm_rope_into_kernel(
    q, k, v, q_weight, k_weight, q_out, k_out, v_out, q_rope_t, k_rope_t, rope_h, rope_w, P, P_inv,
    q_b, q_l, k_b, k_l, v_b, v_l, q_out_b, q_out_l, k_out_b, k_out_l, v_out_b, v_out_l,
    P_b, P_f, P_r, P_c, I_b, I_f, I_r, I_c, L, F, H, W, start_frame, eps,
    Q_N: tl.constexpr, K_N: tl.constexpr, V_N: tl.constexpr, K_OUT_N: tl.constexpr, V_OUT_N: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Keys and values into views k_out, v_out of any strides. May be absent: q, v, P, P_inv; k_rope_t: keys are not turned."""
    V_PROGRAM: tl.constexpr = -1 if v is None else 1
    if tl.program_id(1) == 0:
        heads_fwd(
            k, k_weight, k_out, None, k_rope_t, rope_h, rope_w, P_inv, k_b, k_l, k_out_b, k_out_l, I_b, I_f, I_r, I_c,
            L, F, H, W, start_frame, eps, K_N, K_OUT_N, N, D, AT, AH, K_HEAD, BN, BD,
        )  # fmt: skip
    elif tl.program_id(1) == V_PROGRAM:
        if v is not None:
            heads_fwd(
                v, None, v_out, None, None, None, None, P_inv, v_b, v_l, v_out_b, v_out_l, I_b, I_f, I_r, I_c,
                L, F, H, W, start_frame, eps, V_N, V_OUT_N, N, D, AT, AH, False, BN, BD,
            )  # fmt: skip
    else:
        if q is not None:
            heads_fwd(
                q, q_weight, q_out, None, q_rope_t, rope_h, rope_w, P, q_b, q_l, q_out_b, q_out_l, P_b, P_f, P_c, P_r,
                L, F, H, W, start_frame, eps, Q_N, D, N, D, AT, AH, Q_HEAD, BN, BD,
            )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def qk_norm_rope_bwd_kernel(
    dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, dq, dk, dq_weight, dk_weight, rope_t, rope_h, rope_w,
    q_b, q_l, k_b, k_l, L, F, H, W, start_frame, NL,
    Q_N: tl.constexpr, K_N: tl.constexpr, N: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, AH: tl.constexpr,
    Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        heads_bwd(
            dq_out, q, q_weight, q_rstd, dq, dq_weight, rope_t, rope_h, rope_w, None,
            q_b, q_l, 0, 0, 0, 0, L, F, H, W, start_frame, NL, Q_N, N, D, AT, AH, Q_HEAD, BL, BN, BD,
        )  # fmt: skip
    else:
        heads_bwd(
            dk_out, k, k_weight, k_rstd, dk, dk_weight, rope_t, rope_h, rope_w, None,
            k_b, k_l, 0, 0, 0, 0, L, F, H, W, start_frame, NL, K_N, N, D, AT, AH, K_HEAD, BL, BN, BD,
        )  # fmt: skip


def tile(N: int, D: int, values: int) -> dict[str, int]:
    """The heads of a token as powers of two, and warps for `values` of them per thread."""
    BN, BD = triton.next_power_of_2(N), triton.next_power_of_2(D)
    return {"BN": BN, "BD": BD, "num_warps": min(16, max(1, BN * BD // (32 * values)))}


def axes(rope_t: Tensor, rope_h: Tensor) -> dict[str, int]:
    return {"AT": 2 * rope_t.shape[1], "AH": 2 * rope_h.shape[1]}


def is_per_head(weight: Tensor | None, D: int) -> bool:
    return weight is not None and weight.shape[0] == D


def tokens_per_program(tokens: int) -> int:
    """Enough programs for two waves of 132 SMs; from 16 tokens on the partial sums are under 5 % of the traffic."""
    return 8 if tokens < 16384 else 32


def new_rstd(x: Tensor, weight: Tensor | None) -> Tensor:
    means = 0 if weight is None else x.shape[2] * x.shape[3] // weight.shape[0]
    return torch.empty(*x.shape[:2], means, dtype=torch.float32, device=x.device)


def new_sums(x: Tensor, weight: Tensor | None, chunks: int) -> Tensor:
    """One row per program of the backward, to be summed over its first axis."""
    return torch.empty(chunks, 0 if weight is None else weight.shape[0], dtype=torch.float32, device=x.device)


def qk_norm_rope_fwd(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rope_t: Tensor, rope_h: Tensor, rope_w: Tensor,
    F: int, H: int, W: int, eps: float, start_frame: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, L, N, D = q.shape
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    q_rstd, k_rstd = new_rstd(q, q_weight), new_rstd(k, k_weight)
    qk_norm_rope_fwd_kernel[(L, 2, B)](
        q, k, q_weight, k_weight, q_out, k_out, q_rstd, k_rstd, rope_t, rope_h, rope_w,
        *q.stride()[:2], *k.stride()[:2], L * N * D, L, F, H, W, start_frame, eps,
        Q_N=q.stride(2), K_N=k.stride(2), N=N, D=D, **axes(rope_t, rope_h),
        Q_HEAD=is_per_head(q_weight, D), K_HEAD=is_per_head(k_weight, D), **tile(N, D, 16),
    )  # fmt: skip
    return q_out, k_out, q_rstd, k_rstd


def qk_norm_rope_into_fwd(
    q: Tensor | None, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    rope_t: Tensor, rope_h: Tensor, rope_w: Tensor, P: Tensor | None, P_inv: Tensor | None,
    k_out: Tensor, v_out: Tensor | None, F: int, H: int, W: int, eps: float, start_frame: int, turn_keys: bool,
) -> Tensor:  # fmt: skip
    B, L, N, D = k.shape
    paths = 1 if P is None else 2
    q_out = k.new_empty(0) if q is None else q.new_empty(B, L, paths * N, D)
    tensors = (q, k, v, None if q is None else q_out, k_out, v_out)
    strides = [stride for t in tensors for stride in ((0, 0) if t is None else t.stride()[:2])]
    k_rope_t, P_inv = (rope_t, P_inv) if turn_keys else (None, None)
    cameras = [stride for M in (P, P_inv) for stride in ((0,) * 4 if M is None else M.stride())]
    q_n, k_n, v_n, _, k_out_n, v_out_n = (0 if t is None else t.stride(2) for t in tensors)
    qk_norm_rope_into_kernel[(L, 1 + (v is not None) + (q is not None), B)](
        q, k, v, q_weight, k_weight, q_out, k_out, v_out, rope_t, k_rope_t, rope_h, rope_w, P, P_inv,
        *strides, *cameras, L, F, H, W, start_frame, eps,
        Q_N=q_n, K_N=k_n, V_N=v_n, K_OUT_N=k_out_n, V_OUT_N=v_out_n, N=N, D=D, **axes(rope_t, rope_h),
        Q_HEAD=is_per_head(q_weight, D), K_HEAD=is_per_head(k_weight, D), **tile(N, D, 16),
    )  # fmt: skip
    return q_out


def qk_norm_rope_bwd(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    q_rstd: Tensor, k_rstd: Tensor, rope_t: Tensor, rope_h: Tensor, rope_w: Tensor,
    F: int, H: int, W: int, start_frame: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, L, N, D = q.shape
    BL = tokens_per_program(B * L)
    NL = triton.cdiv(H * W, BL)
    chunks = L // (H * W) * NL
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dq_weight, dk_weight = new_sums(q, q_weight, B * chunks), new_sums(k, k_weight, B * chunks)
    qk_norm_rope_bwd_kernel[(chunks, 2, B)](
        dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, dq, dk, dq_weight, dk_weight, rope_t, rope_h, rope_w,
        *q.stride()[:2], *k.stride()[:2], L, F, H, W, start_frame, NL,
        Q_N=q.stride(2), K_N=k.stride(2), N=N, D=D, **axes(rope_t, rope_h),
        Q_HEAD=is_per_head(q_weight, D), K_HEAD=is_per_head(k_weight, D), BL=BL, **tile(N, D, 16),
    )  # fmt: skip
    return dq, dk, dq_weight.sum(0), dk_weight.sum(0)
