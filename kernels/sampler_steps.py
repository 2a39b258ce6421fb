"""The elementwise steps of samplers, x, y, z -> out, with s, t the rows of sigma and sigma_next (tables in memory, or numbers):

add_noise   (1 - s) x + s y                     flow_to_x0      x - s y
renoise     (1 - t) (x - s y) + t z             cfg_euler_step  x + (t - s) (z + guidance (y - z)), or x + (t - s) y

All are linear in x, y, z, so that a gradient is a number per row times dout. One program per block of a row, in fp32.
x, y, z, out: [R, n] contiguous    sigma: [R / sigma_rows], row r reads sigma[r // sigma_rows]; sigma_next likewise
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_value(table, value, rows, i_r):
    b = value
    if table is not None:
        b = tl.load(table + i_r // rows).to(tl.float32)
    return b


@triton.jit
def sampler_step_fwd_kernel(
    x, y, z, out, sigma, sigma_next, s_value, t_value, guidance, sigma_rows, next_rows, n, NN,
    STEP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_r, i_n = tl.program_id(0).to(tl.int64) // NN, tl.program_id(0) % NN
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < n
    p_n = i_r * n + o_n
    b_s = row_value(sigma, s_value, sigma_rows, i_r)
    b_t = row_value(sigma_next, t_value, next_rows, i_r)
    b_x = tl.load(x + p_n, mask=m_n, other=0.0).to(tl.float32)
    b_y = tl.load(y + p_n, mask=m_n, other=0.0).to(tl.float32)
    if z is not None:
        b_z = tl.load(z + p_n, mask=m_n, other=0.0).to(tl.float32)
    if STEP == "add_noise":
        b_out = (1 - b_s) * b_x + b_s * b_y
    elif STEP == "flow_to_x0":
        b_out = b_x - b_s * b_y
    elif STEP == "renoise":
        b_out = (1 - b_t) * (b_x - b_s * b_y) + b_t * b_z
    else:
        tl.static_assert(STEP == "cfg_euler_step")
        b_v = b_y
        if z is not None:
            b_v = b_z + guidance * (b_y - b_z)
        b_out = b_x + (b_t - b_s) * b_v
    tl.store(out + p_n, b_out.to(out.dtype.element_ty), mask=m_n)


@triton.jit
def sampler_step_bwd_kernel(
    dout, grad, sigma, sigma_next, s_value, t_value, guidance, sigma_rows, next_rows, n, NN,
    STEP: tl.constexpr, OF: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """grad = (d out / d OF) dout, OF: x, y or z"""
    i_r, i_n = tl.program_id(0).to(tl.int64) // NN, tl.program_id(0) % NN
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < n
    p_n = i_r * n + o_n
    b_s = row_value(sigma, s_value, sigma_rows, i_r)
    b_t = row_value(sigma_next, t_value, next_rows, i_r)
    if STEP == "add_noise":
        b_k = (1 - b_s) if OF == "x" else b_s
    elif STEP == "flow_to_x0":
        b_k = -b_s
    elif STEP == "renoise":
        if OF == "x":
            b_k = 1 - b_t
        elif OF == "y":
            b_k = (b_t - 1) * b_s
        else:
            b_k = b_t
    else:
        tl.static_assert(STEP == "cfg_euler_step")
        b_k = (b_t - b_s) * (guidance if OF == "y" else 1 - guidance)
    b_dout = tl.load(dout + p_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(grad + p_n, (b_k * b_dout).to(grad.dtype.element_ty), mask=m_n)


def rows(*tables: Tensor | None) -> tuple[int, int, int]:
    """R, the finest number of rows, and how many of them share an element of each table."""
    R = max([t.numel() for t in tables if t is not None], default=1)
    shared = [R if t is None else R // t.numel() for t in tables]
    return R, shared[0], shared[1]


def block(n: int) -> int:
    """Eight values per thread of four warps: one 16-byte access in 16 bits, two in fp32."""
    return min(1024, max(128, triton.next_power_of_2(n)))


STEPS = ("add_noise", "flow_to_x0", "renoise", "cfg_euler_step")  # a number in the launchers: csrc/ takes no strings


def sampler_step_fwd(
    step: int, x: Tensor, y: Tensor, z: Tensor | None, sigma: Tensor | None, sigma_next: Tensor | None,
    s_value: float, t_value: float, guidance: float,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x)
    R, *shared = rows(sigma, sigma_next)
    n = x.numel() // R
    BN = block(n)
    NN = triton.cdiv(n, BN)
    sampler_step_fwd_kernel[(R * NN,)](
        x, y, z, out, sigma, sigma_next, s_value, t_value, guidance, *shared, n, NN, STEP=STEPS[step], BN=BN
    )  # fmt: skip
    return out


def sampler_step_bwd(
    step: int, of: int, dout: Tensor, grad: Tensor, sigma: Tensor | None, sigma_next: Tensor | None,
    s_value: float, t_value: float, guidance: float,
) -> None:  # fmt: skip
    """Writes grad, the gradient of the of-th of x, y, z."""
    R, *shared = rows(sigma, sigma_next)
    n = dout.numel() // R
    BN = block(n)
    NN = triton.cdiv(n, BN)
    sampler_step_bwd_kernel[(R * NN,)](
        dout, grad, sigma, sigma_next, s_value, t_value, guidance, *shared, n, NN, STEP=STEPS[step], OF="xyz"[of], BN=BN
    )  # fmt: skip
