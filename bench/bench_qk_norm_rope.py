"""python bench/bench_qk_norm_rope.py [--device cpu] [--tokens N] -> a JSON line per shape, pass and backend."""

import torch

import dit_ops
from dit_ops.bench import peers
from dit_ops.bench.runs import arguments, bench_op
from dit_ops.bench.shapes import head_shapes

if __name__ == "__main__":
    args = arguments(__doc__)
    for name, shape, grid, rope in head_shapes(args):
        q, k, dq, dk = (torch.randn(shape, device=args.device).to(getattr(torch, args.dtype)) for _ in range(4))
        weights = [torch.ones(shape[2] * shape[3], device=args.device) for _ in range(2)]
        leaves = [t.requires_grad_() for t in (q, k, *weights)]
        fn = lambda q, k, wq, wk, rope=rope, grid=grid: dit_ops.qk_norm_rope(q, k, wq, wk, rope, grid)
        moved = [4 * q.nbytes, 10 * q.nbytes]  # q, k -> q, k; then dq, dk, q, k -> dq, dk
        packed = torch.cat([q, k, k], 2).detach().flatten(2)
        others = peers.qk_norm_rope(grid, shape[2], shape[3], packed)
        bench_op("qk_norm_rope", fn, name, leaves, [dq, dk], args, moved, others)
