"""python bench/bench_qk_norm_rope_prope.py [--device cpu] [--tokens N] -> a JSON line per shape, pass and backend.

A third pass writes keys and values into views of a cache twice as long; against it stand the same kernel
writing new tensors, and the same kernel followed by a copy into the views.
"""

import torch

import dit_ops
from dit_ops.bench.runs import Peer, arguments, bench_group, bench_op, forward_makers
from dit_ops.bench.shapes import head_shapes

if __name__ == "__main__":
    args = arguments(__doc__)
    for name, (B, L, N, D), grid, rope in head_shapes(args):
        q, k, v = (torch.randn(B, L, N, D, device=args.device).to(getattr(torch, args.dtype)) for _ in range(3))
        cotangents = [torch.randn(B, L, 2 * N, D, device=args.device).to(q.dtype) for _ in range(3)]
        weights = [torch.ones(N * D, device=args.device) for _ in range(2)]
        P, P_inv = torch.randn(2, B, grid[0], 4, 4, device=args.device)
        leaves = [t.requires_grad_() for t in (q, k, v, *weights)]
        fn = lambda q, k, v, wq, wk, rope=rope, grid=grid, P=P, P_inv=P_inv, **out: dit_ops.qk_norm_rope_prope(
            q, k, v, wq, wk, rope, grid, P, P_inv, **out
        )
        moved = [9 * q.nbytes, 20 * q.nbytes]  # q, k, v -> 2N heads each; then those of 2N heads, q, k -> dq, dk, dv
        bench_op("qk_norm_rope_prope", fn, name, leaves, cotangents, args, moved)

        k_slots, v_slots = torch.empty(2, B, 2 * L, 2 * N, D, device=args.device, dtype=q.dtype)[:, :, L:]
        into = lambda *leaves, fn=fn, k=k_slots, v=v_slots: fn(*leaves, k_out=k, v_out=v)

        def copied(*leaves, fn=fn, slots=(k_slots, v_slots)):
            out = fn(*leaves)
            return out[0], *(slot.copy_(new) for slot, new in zip(slots, out[1:], strict=True))

        makers = forward_makers(into, leaves, [b for b in args.backends if b not in ("reference", "torch.compile")])
        makers |= forward_makers(fn, leaves, [], {"new tensors": Peer(fn), "new tensors, then copied": Peer(copied)})
        key = {"op": "qk_norm_rope_prope", "shape": name, "dtype": args.dtype, "pass": "forward into slots"}
        bench_group(key, makers, args, moved[0])
