"""python bench/bench_sampler_steps.py [--device cpu] [--tokens N] -> a JSON line per step, shape, pass and backend.

The noise levels are a table per frame. On a GPU there is a pass of twenty calls in a graph, whose inputs stay in the L2 cache.
"""

import functools

import torch

import dit_ops
from dit_ops.bench import measure, peers
from dit_ops.bench.runs import arguments, bench_group, bench_op, forward_makers

SHAPES = {  # B, F, Cz, h, w
    "wan2.1, 480p, 21 latent frames, batch of 32": (32, 21, 16, 60, 104),
    "wan2.1, 480p, 21 latent frames": (1, 21, 16, 60, 104),
    "wan2.1, 480p, one streaming chunk of 3 latent frames": (1, 3, 16, 60, 104),
    "wan2.1, 720p, 21 latent frames": (1, 21, 16, 90, 160),
}
GRAPH = 20
GUIDANCE = 5.0


def steps(x, y, z, s, t):
    """op -> the call, the tensors that it differentiates, and the bytes of its forward and of its backward."""
    yield "add_noise", lambda a, b: dit_ops.add_noise(a, b, s), [y, z], 3 * y.nbytes, 3 * y.nbytes
    yield "flow_to_x0", lambda f: dit_ops.flow_to_x0(y, f, s), [z], 3 * y.nbytes, 2 * y.nbytes
    yield "renoise", lambda f: dit_ops.renoise(y, f, z, s, t), [z], 4 * y.nbytes, 2 * y.nbytes
    step = lambda c, u: dit_ops.cfg_euler_step(x, c, u, GUIDANCE, s, t)
    yield "cfg_euler_step", step, [y, z], 2 * (x.nbytes + y.nbytes), x.nbytes + 2 * y.nbytes


def graph(make):
    return measure.graphed(make(), GRAPH)


if __name__ == "__main__":
    args = arguments(__doc__)
    for name, (B, F, Cz, h, w) in [*SHAPES.items()][: args.shapes]:
        if args.tokens is not None and args.tokens < F * h * w // 4:
            name, F = f"{name}, first", max(1, min(F, args.tokens // (h * w // 4)))
        x = torch.randn(B, F, Cz, h, w, device=args.device)
        y, z = (torch.randn_like(x).to(getattr(torch, args.dtype)).requires_grad_() for _ in range(2))
        s, t = torch.rand(2, B, F, device=args.device)
        others = peers.flow_matching(x, GUIDANCE)
        for op, fn, leaves, forward, backward in steps(x, y, z, s, t):
            out = x if op == "cfg_euler_step" else y
            bench_op(op, fn, name, leaves, [torch.randn_like(out)], args, [forward, forward + backward], others.get(op))
            if args.device != "cpu":
                makers = forward_makers(fn, leaves, args.backends)
                group = {b: functools.partial(graph, make) for b, make in makers.items()}
                key = {"op": op, "shape": name, "dtype": args.dtype, "pass": f"forward, {GRAPH} calls in a graph"}
                bench_group(key, group, args, forward, calls=GRAPH)
