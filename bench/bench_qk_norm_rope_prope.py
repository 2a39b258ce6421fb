"""python bench/bench_qk_norm_rope_prope.py [--device cpu] [--tokens N] -> a JSON line per shape, pass and backend."""

import torch

import dit_ops
from dit_ops.bench.runs import arguments, bench_op
from dit_ops.bench.shapes import head_shapes

if __name__ == "__main__":
    args = arguments(__doc__)
    for name, (B, L, N, D), grid, rope in head_shapes(args):
        q, k, v = (torch.randn(B, L, N, D, device=args.device).to(getattr(torch, args.dtype)) for _ in range(3))
        cotangents = [torch.randn(B, L, 2 * N, D, device=args.device).to(q.dtype) for _ in range(3)]
        weights = [torch.ones(N * D, device=args.device) for _ in range(2)]
        P, P_inv = torch.randn(2, B, grid[0], 4, 4, device=args.device)
        leaves = [t.requires_grad_() for t in (q, k, v, *weights)]
        fn = lambda q, k, v, wq, wk, rope=rope, grid=grid, P=P, P_inv=P_inv: dit_ops.qk_norm_rope_prope(
            q, k, v, wq, wk, rope, grid, P, P_inv
        )
        moved = [9 * q.nbytes, 20 * q.nbytes]  # q, k, v -> 2N heads each; then those of 2N heads, q, k -> dq, dk, dv
        bench_op("qk_norm_rope_prope", fn, name, leaves, cotangents, args, moved)
