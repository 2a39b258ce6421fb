"""python tools/sanitize_ops.py [--device cpu]: every op on every backend that takes it, forward and backward, on small shapes.
An op that no kernel takes on a GPU, and an error of a kernel, end it with a status other than 0.

For compute-sanitizer: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tools/sanitize_ops.py
Nothing is compared here. Sizes are odd, so that the last block of a row, of tokens and of a list is a partial one.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dit_ops  # noqa: E402
from dit_ops import doctor  # noqa: E402
from dit_ops.masks import Intervals  # noqa: E402
from dit_ops.rope import Rope3D  # noqa: E402

REFERENCE_ONLY = ("ulysses_gather_heads", "ulysses_scatter_heads")  # collectives, without a kernel of their own


def calls(device: torch.device) -> Iterator[tuple[str, object, dict]]:
    """name, op, arguments: the small call of every op, and a larger odd one of those that have sizes of their own."""
    for name, op in doctor.public_ops().items():
        yield name, op, doctor.sample_arguments(op, device)
    # three query blocks, odd lengths, a row without keys, keys in the slots of a longer cache
    mask = Intervals(((0, 70, ((0, 33), (40, 181))), (70, 71, ()), (71, 150, ((5, 190),))), 150, 190)
    heads = torch.randn(3, 2, 201, 3, 32, device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    yield (
        "attention",
        dit_ops.attention,
        {"q": heads[0, :, :150], "k": heads[1, :, 7:197], "v": heads[2, :, 7:197], "mask": mask},
    )
    x, y = torch.randn(2, 2, 39, 104, device=device)
    table = torch.randn(2, 3, 104, device=device)
    yield "adaln", dit_ops.adaln, {"x": x, "scale": table, "shift": table, "norm": "rms"}
    yield "gated_residual", dit_ops.gated_residual, {"x": x, "y": y, "gate": table}
    yield "gated_residual_adaln", dit_ops.gated_residual_adaln, {"x": x, "y": y, "gate": table, "scale": table, "shift": table}
    q, k, v = torch.randn(3, 2, 45, 3, 32, device=device)
    rope, w = Rope3D(32).tables(3, 3, 5, device), torch.ones(96, device=device)
    norm = {"q": q, "k": k, "q_weight": w, "k_weight": w, "rope": rope, "grid": (3, 3, 5)}
    camera = torch.eye(4, device=device).repeat(2, 3, 1, 1)
    yield "qk_norm_rope", dit_ops.qk_norm_rope, norm
    yield "qk_norm_rope_prope", dit_ops.qk_norm_rope_prope, norm | {"v": v, "P": camera, "P_inv": camera}
    yield "prope_output", dit_ops.prope_output, {"o": q, "P": camera}
    z, s = torch.randn(2, 3, 1033, device=device), torch.rand(2, 3, device=device)
    yield (
        "cfg_euler_step",
        dit_ops.cfg_euler_step,
        {"x": z, "cond": z, "uncond": z, "guidance": 3.0, "sigma": s, "sigma_next": 0.1},
    )
    half = z.bfloat16() if device.type == "cuda" else z
    yield "renoise", dit_ops.renoise, {"x": z, "flow": half, "noise": half, "sigma": s, "sigma_next": 0.1}
    params = [torch.randn(n, device=device).bfloat16() for n in (1, 4097, 0, 12289)]
    yield "ema_update_", dit_ops.ema_update_, {"shadow": [p.float() for p in params], "params": params, "decay": 0.9}


def run(op, arguments: dict, backend: str) -> None:
    leaves = {k: v.detach().clone().requires_grad_() if differentiable(k, v) else v for k, v in arguments.items()}
    out = op(**leaves, backend=backend)
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor) and t.requires_grad]
    if outs:
        inputs = [t for t in leaves.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        torch.autograd.grad(outs, inputs, [torch.randn_like(t) for t in outs], allow_unused=True)


def differentiable(name: str, value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and name not in ("P", "P_inv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    kernels: dict[str, int] = {}
    for name, op, arguments in calls(device):
        kernels.setdefault(name, 0)
        for backend in ("cuda", "triton") if device.type == "cuda" else ("triton", "cpu"):
            refusal = dit_ops.explain(op, **arguments, backend=backend).refused.get(backend)
            if refusal is None:
                run(op, arguments, backend)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                kernels[name] += 1
            print(f"{name} {backend}: {refusal or 'ran'}")
    without = [name for name, ran in kernels.items() if not ran and name not in REFERENCE_ONLY]
    if not any(kernels.values()) or (device.type == "cuda" and without):
        sys.exit(f"no kernel ran of {', '.join(without)}")


if __name__ == "__main__":
    main()
