"""python bench/bench_gated_residual_adaln.py [--device cpu] [--tokens N] -> a JSON line per shape, pass and backend."""

import torch

import dit_ops
from dit_ops.bench.runs import arguments, bench_op
from dit_ops.bench.shapes import shapes

if __name__ == "__main__":
    args = arguments(__doc__)
    for name, B, L, C, F in shapes(args):
        x, y, dx, dh = (torch.randn(B, L, C, device=args.device).to(getattr(torch, args.dtype)) for _ in range(4))
        gate, scale, shift = (torch.randn(B, F, C, device=args.device) for _ in range(3))
        leaves = [t.requires_grad_() for t in (x, y, gate, scale, shift)]
        tables = 3 * gate.nbytes
        moved = [4 * x.nbytes + tables, 10 * x.nbytes + 3 * tables]  # x, y -> x', h; then dx', dh, x', y -> dx, dy
        bench_op("gated_residual_adaln", dit_ops.gated_residual_adaln, name, leaves, [dx, dh], args, moved)
