"""shadow <- shadow + (1 - decay) (param - shadow) for a whole list of tensors in one launch, in fp32.

A table row describes one program: the addresses of up to BN values of a shadow and of its parameter, their number, and the
parameter's dtype. The table is kept on the device and made again only when an address, a size or a dtype changes, so that a
captured graph holds the launch alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BN = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_tables: dict[tuple, tuple[Tensor, bool]] = {}


@triton.jit
def lerp(b_s, b_p, weight):
    """Both ends are exact, and param = shadow is a fixed point."""
    b_d = b_p - b_s
    return tl.where(weight < 0.5, b_s + weight * b_d, b_p - (1 - weight) * b_d)


@triton.jit
def update(shadow, param, n, weight, ALIGNED: tl.constexpr, BN: tl.constexpr):
    o_n = tl.arange(0, BN)
    if n == BN:
        p_s, p_p = shadow + o_n, param + o_n
        if ALIGNED:  # an address from memory says nothing of itself
            p_s = tl.max_contiguous(tl.multiple_of(p_s, 16), BN)
            p_p = tl.max_contiguous(tl.multiple_of(p_p, 16), BN)
        b_s, b_p = tl.load(p_s), tl.load(p_p).to(tl.float32)
        tl.store(p_s, lerp(b_s, b_p, weight))
    else:
        m_n = o_n < n
        b_s = tl.load(shadow + o_n, mask=m_n, other=0.0)
        b_p = tl.load(param + o_n, mask=m_n, other=0.0).to(tl.float32)
        tl.store(shadow + o_n, lerp(b_s, b_p, weight), mask=m_n)


@triton.jit
def ema_update_kernel(table, weight, ALIGNED: tl.constexpr, BN: tl.constexpr):
    row = table + tl.program_id(0).to(tl.int64) * 4
    shadow = tl.load(row).to(tl.pointer_type(tl.float32))
    address, n, dtype = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    if dtype == 0:
        update(shadow, address.to(tl.pointer_type(tl.float32)), n, weight, ALIGNED, BN)
    elif dtype == 1:
        update(shadow, address.to(tl.pointer_type(tl.bfloat16)), n, weight, ALIGNED, BN)
    else:
        update(shadow, address.to(tl.pointer_type(tl.float16)), n, weight, ALIGNED, BN)


def make_table(shadow: list[Tensor], params: list[Tensor]) -> tuple[Tensor, bool]:
    """[programs, 4] int64 and whether every address is a multiple of 16."""
    pairs = [(s, p) for s, p in zip(shadow, params, strict=True) if s.numel()]
    key = (shadow[0].device, *((s.data_ptr(), p.data_ptr(), s.numel(), DTYPES.index(p.dtype)) for s, p in pairs))
    if key not in _tables:
        columns = torch.tensor(key[1:], dtype=torch.int64).view(-1, 4)
        programs = (columns[:, 2] + BN - 1) // BN
        row = columns.repeat_interleave(programs, 0)
        first = (programs.cumsum(0) - programs).repeat_interleave(programs)
        done = (torch.arange(len(row)) - first) * BN
        size = torch.tensor([dtype.itemsize for dtype in DTYPES])[row[:, 3]]
        table = torch.stack([row[:, 0] + 4 * done, row[:, 1] + size * done, (row[:, 2] - done).clamp(max=BN), row[:, 3]], 1)
        aligned = not (columns[:, :2] % 16).any()
        if len(_tables) >= 8:
            _tables.pop(next(iter(_tables)))
        _tables[key] = table.to(shadow[0].device), aligned
    return _tables[key]


def ema_update(shadow: list[Tensor], params: list[Tensor], decay: float) -> None:
    if not any(s.numel() for s in shadow):
        return
    table, aligned = make_table(shadow, params)
    ema_update_kernel[(len(table),)](table, 1 - decay, ALIGNED=aligned, BN=BN, num_warps=8)
