"""python bench/bench_prope_output.py [--device cpu] [--tokens N] -> a JSON line per shape, pass and backend."""

import torch

import dit_ops
from dit_ops.bench.runs import arguments, bench_op
from dit_ops.bench.shapes import head_shapes

if __name__ == "__main__":
    args = arguments(__doc__)
    for name, shape, grid, _ in head_shapes(args):
        o, do = (torch.randn(shape, device=args.device).to(getattr(torch, args.dtype)) for _ in range(2))
        P = torch.randn(shape[0], grid[0], 4, 4, device=args.device)
        fn = lambda o, P=P: dit_ops.prope_output(o, P)
        bench_op("prope_output", fn, name, [o.requires_grad_()], [do], args, [2 * o.nbytes, 4 * o.nbytes])
