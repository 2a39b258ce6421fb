"""Running a block: recomputation in backward, what "selective" stores, and the hooks of a shard unit."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_backbones import tiny_batch, tiny_wan

from dit_ops.backbones._block import SAVED, call_block, make_shard_unit
from dit_ops.training.parallelize import fp32_modules, parallelize
from dit_ops.training.ranks import Ranks


class Attentions(TorchDispatchMode):
    """Counts forward calls of attention, under whatever backend."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.name().startswith(SAVED) and "backward" not in func.name() and "bwd" not in func.name()
        return func(*args, **(kwargs or {}))


def gradients(recompute: str, autocast: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Of two forwards and one backward, and the attentions that the backward ran. Cached casts would sum them in bf16."""
    model, batch = tiny_wan(2), tiny_batch(1, 4)
    model.gradient_checkpointing = recompute
    given = {key: batch[key] for key in ("viewmats", "Ks")} | batch["condition"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        loss = sum(
            model(batch["latents"], torch.full((1,), t), clean_latents=batch["latents"], **given).square().mean()
            for t in (500.0, 900.0)
        )
    with Attentions() as count:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, count.calls


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_recomputation_changes_no_gradient_and_selective_runs_attention_once(autocast):
    plain, none = gradients("none", autocast)
    full, again = gradients("full", autocast)
    selective, stored = gradients("selective", autocast)
    assert none == stored == 0 and again > 0
    for name, g in plain.items():
        assert torch.equal(g, full[name]) and torch.equal(g, selective[name]), name


def test_a_shard_unit_runs_the_function_between_its_own_hooks():
    block = torch.nn.Linear(2, 2)
    x, seen = torch.randn(3, 2, requires_grad=True), []
    assert torch.equal(call_block(block, block.forward, x), block.forward(x))
    make_shard_unit(block)
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    block.register_forward_hook(lambda *_: seen.append("after"))
    twin = copy.deepcopy(block)
    for module in (block, twin):
        weight = module.weight
        y = call_block(module, lambda x, weight=weight: seen.append("run") or x @ weight, x, recompute="full")
        assert isinstance(module, torch.nn.Linear) and type(module).__name__ == "Linear"
        assert seen == ["before", "run", "after"]
        y.sum().backward()
        assert seen.pop() == "run" and list(module.state_dict()) == ["weight", "bias"]
        seen.clear()
    with torch.no_grad():
        call_block(block, lambda x: x, x, recompute="full")
    assert seen == ["before", "after"]


def test_autocast_leaves_the_time_embedder_in_fp32():
    from dit_ops.training.config import parse_config

    values = {"stage": "bidirectional", "output": "out", "steps": 1, "data": {"path": "x"}, "precision": "bf16"}
    model, batch, seen = tiny_wan(None), tiny_batch(1, 2), []
    parallelize(model, parse_config(values), Ranks(), torch.device("cpu"))
    (embedder,) = fp32_modules(model)
    assert embedder is model.transformer.condition_embedder.time_embedder
    embedder.linear_2.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model.transformer.proj_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    given = {key: batch[key] for key in ("viewmats", "Ks")} | batch["condition"]
    with torch.autocast("cpu", torch.bfloat16):
        model(batch["latents"], torch.full((1,), 500.0), **given)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [torch.float32, torch.bfloat16]
