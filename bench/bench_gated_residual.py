"""python bench/bench_gated_residual.py [--device cpu] [--tokens N] -> a JSON line per shape, pass and backend."""

import torch

import dit_ops
from dit_ops.bench.runs import arguments, bench_op
from dit_ops.bench.shapes import shapes

if __name__ == "__main__":
    args = arguments(__doc__)
    for name, B, L, C, F in shapes(args):
        x, y, dout = (torch.randn(B, L, C, device=args.device).to(getattr(torch, args.dtype)) for _ in range(3))
        gate = torch.randn(B, F, C, device=args.device)
        leaves = [t.requires_grad_() for t in (x, y, gate)]
        moved = [3 * x.nbytes + gate.nbytes, 6 * x.nbytes + 3 * gate.nbytes]  # x, y -> out; then dout, y -> dy
        bench_op("gated_residual", dit_ops.gated_residual, name, leaves, [dout], args, moved)
