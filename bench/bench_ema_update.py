"""python bench/bench_ema_update.py [--device cpu] [--tokens N] -> a JSON line per parameter list and backend."""

import torch

import dit_ops
from dit_ops.bench.runs import Peer, arguments, bench_group, forward_makers

MODELS = {  # C, hidden width of the MLP, blocks
    "wan2.1-1.3b, 30 blocks": (1536, 8960, 30),
    "wan2.1-14b, 4 of 40 blocks": (5120, 13824, 4),
}
DECAY = 0.999


def parameters(C: int, hidden: int, blocks: int) -> list[tuple[int, ...]]:
    """Two attentions with q and k norms, an MLP, the cross-attention norm and the modulation of every block."""
    attention = [(C, C), (C,)] * 4 + [(C,), (C,)]
    return (attention * 2 + [(hidden, C), (hidden,), (C, hidden), (C,), (C,), (C,), (6, C)]) * blocks


def lerp(shadow, params):
    torch._foreach_lerp_(shadow, [p.float() for p in params], 1 - DECAY)


def mul_add(shadow, params):
    torch._foreach_mul_(shadow, DECAY)
    torch._foreach_add_(shadow, params, alpha=1 - DECAY)


if __name__ == "__main__":
    args = arguments(__doc__)
    for name, (C, hidden, blocks) in MODELS.items():
        if args.tokens is not None:
            name, C, hidden, blocks = "small parameters", args.tokens, 4 * args.tokens, 2
        shapes = parameters(C, hidden, blocks)
        params = [torch.randn(shape, device=args.device).to(getattr(torch, args.dtype)) for shape in shapes]
        shadow = [torch.randn(shape, device=args.device) for shape in shapes]
        moved = sum(2 * s.nbytes + p.nbytes for s, p in zip(shadow, params, strict=True))
        fn = lambda shadow=shadow, params=params: dit_ops.ema_update_(shadow, params, DECAY)
        peers = {
            "torch._foreach_lerp_": Peer(lambda shadow=shadow, params=params: lerp(shadow, params)),
            "torch._foreach_mul_, _foreach_add_": Peer(lambda shadow=shadow, params=params: mul_add(shadow, params)),
        }
        # what a compiler can fuse: the reference in one graph would be unrolled over every tensor
        makers = forward_makers(fn, [], [b for b in args.backends if b != "torch.compile"], peers)
        if "torch.compile" in args.backends:
            compiled = torch.compile(lambda shadow=shadow, params=params: mul_add(shadow, params), dynamic=False)
            makers |= forward_makers(compiled, [], [], {"torch.compile": Peer(compiled)})
        key = {"op": "ema_update_", "shape": name, "dtype": args.dtype, "pass": "forward"}
        bench_group(key, makers, args, moved)
        if args.tokens is not None:
            break
