"""Runs of a tiny Wan on several ranks, and what they left behind, whole and by name."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_backbones import tiny_wan
from toy_stage import run_config

from dit_ops.training.config import stage_class
from dit_ops.training.data import LatentDataset
from dit_ops.training.engine import Engine
from dit_ops.training.parallelize import full_tensor

# a large eps: the update is proportional to the gradient, so a gradient of rounding errors moves nothing
SMOOTH = {"lr": 0.2, "betas": [0.9, 0.99], "eps": 1.0, "weight_decay": 0.01}
ROLES = {
    "bidirectional": {"generator": None},
    "teacher_forcing": {"generator": 2},
    "causal_ode": {"generator": 2},
    "consistency": {"generator": 2, "teacher": 2},
    "dmd": {"generator": 2, "real_score": None, "fake_score": None},
}


def wan_engine(data: Path | str, output: Path | str, stage: str = "bidirectional", **values) -> Engine:
    """The engine of a stage on random tiny Wans, the same in every process; fp64, so that nothing hides behind rounding."""
    defaults = {"optim": SMOOTH, "data": {"path": str(data), "batch_size": 1}, "steps": 3, "log_every": 1}
    config = run_config(Path(data), str(output), **({"stage": stage} | defaults | values))
    dataset = LatentDataset(config.data.path)
    backbones = {role: tiny_wan(blocks, seed=i).double() for i, (role, blocks) in enumerate(ROLES[stage].items())}
    for backbone in backbones.values():
        backbone.gradient_checkpointing = config.activation_checkpointing
    made = stage_class(stage)(config.options, backbones, dataset.negative)
    return Engine(config, made, dataset, Path(config.output), progress=False)


def whole_state(engine: Engine) -> dict[str, Tensor]:
    """Parameters, optimizer state and averages, gathered. Collective."""
    flat: dict[str, Tensor] = {}

    def walk(value: dict, at: str) -> None:
        for key, v in value.items():
            if isinstance(v, dict):
                walk(v, f"{at}/{key}")
            else:
                flat[f"{at}/{key}"] = full_tensor(v).detach().clone()

    walk(engine.state(), "")
    return flat


def keep_gradients(engine: Engine) -> dict[str, Tensor]:
    """Fills up with the gradients of every role's latest update, as its optimizer sees them."""
    seen: dict[str, Tensor] = {}
    for role, parameters in engine.parameters.items():

        def keep(*_, role=role, parameters=parameters) -> None:
            seen.update({f"{role}/{n}": full_tensor(p.grad).clone() for n, p in parameters.items() if p.grad is not None})

        engine.optimizers[role][0].register_step_pre_hook(keep)
    return seen


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """‖a − b‖ / ‖b‖ by name; both must hold the same names."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    norm = lambda t: float(t.double().norm())
    return {name: norm(a[name] - b[name]) / max(norm(b[name]), 1e-12) for name in a}


class Collectives(TorchDispatchMode):
    """Counts collectives by name, and the bytes of their tensors: what a rank gets or gives in all."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            name = name.strip("_").removesuffix("_base")
            tensors = [t for a in args[:2] for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0) + max(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))
