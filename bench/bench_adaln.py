"""python bench/bench_adaln.py [--device cpu] [--tokens N] -> a JSON line per shape, pass and backend."""

import torch

import dit_ops
from dit_ops.bench import peers
from dit_ops.bench.runs import arguments, bench_op
from dit_ops.bench.shapes import shapes

if __name__ == "__main__":
    args = arguments(__doc__)
    for name, B, L, C, F in shapes(args):
        x, dy = (torch.randn(B, L, C, device=args.device).to(getattr(torch, args.dtype)) for _ in range(2))
        scale, shift = (torch.randn(B, F, C, device=args.device) for _ in range(2))
        leaves = [t.requires_grad_() for t in (x, scale, shift)]
        tables = 2 * scale.nbytes
        moved = [2 * x.nbytes + tables, 5 * x.nbytes + 3 * tables]  # x -> y; then dy, x -> dx
        bench_op("adaln", dit_ops.adaln, name, leaves, [dy], args, moved)
        rms = lambda x, scale, shift: dit_ops.adaln(x, scale, shift, norm="rms")
        bench_op("adaln, rms", rms, name, leaves, [dy], args, moved, peers.adaln_rms())
