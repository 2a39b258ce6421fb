"""Muon against its formula written out again, alone and over ranks; clipping and the norm; updates that are left out."""

import json

import pytest
import torch
from torch import Tensor, nn
from toy_ranks import relative, wan_engine, whole_state
from toy_stage import ToyStage, toy_engine, write_dataset

from dit_ops.training.optim import Muon, is_matrix, newton_schulz, optimizers


def muon_by_hand(p: Tensor, grads: list[Tensor], lr: float, beta: float, decay: float) -> Tensor:
    p, buffer = p.clone(), torch.zeros_like(p)
    for g in grads:
        buffer = beta * buffer + g
        x = (g + beta * buffer).reshape(len(g), -1).to(torch.bfloat16)
        A, B = x.shape
        x = x if A <= B else x.T
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            y = x @ x.T
            x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
        x = x if A <= B else x.T
        p = p * (1 - lr * decay) - lr * 0.2 * max(A, B) ** 0.5 * x.to(p.dtype).view_as(p)
    return p


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 2, 1, 2, 2)])
def test_muon_is_its_formula(shape):
    p = nn.Parameter(torch.randn(shape))
    start, grads = p.detach().clone(), [torch.randn(shape) for _ in range(3)]
    muon = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.2)
    for g in grads:
        p.grad = g.clone()
        muon.step()
    torch.testing.assert_close(p.detach(), muon_by_hand(start, grads, 0.1, 0.9, 0.2), rtol=1e-6, atol=1e-6)


def test_newton_schulz_brings_singular_values_to_one():
    values = torch.linalg.svdvals(newton_schulz(torch.randn(16, 48)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_matrices_are_muons_and_the_rest_is_adamws():
    p = {"linear": (4, 6), "patch": (4, 2, 1, 2, 2), "bias": (4,), "table": (1, 6, 4)}
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in p.items()}
    assert [name for name, value in parameters.items() if is_matrix(value)] == ["linear", "patch"]
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    muon, adamw = optimizers(parameters.values(), "muon", 0.95, **options)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    assert len(muon.state) == len(adamw.state) == 2
    assert len(optimizers(parameters.values(), "adamw", 0.95, **options)) == 1


MUON = {"optim": {"name": "muon", "lr": 0.05, "betas": [0.9, 0.99], "eps": 1.0, "weight_decay": 0.1}, "steps": 3, "ema": {}}


def _muon(rank: int, ranks: int, data: str, output: str) -> list[dict[str, Tensor]]:
    found = []
    for fsdp in ("none", "full"):
        engine = wan_engine(data, f"{output}/{fsdp}", **MUON, parallel={"fsdp": fsdp})
        engine.train()
        found.append(whole_state(engine))
    return found


@pytest.mark.dist
def test_ranks_that_share_muons_work_equal_one_process(tmp_path, run_ranks):
    """Each orthogonalises its share of the matrices; bf16 rounds the same momentum, so only rounding flips differ."""
    data = write_dataset(tmp_path / "data")
    engine = wan_engine(data, tmp_path / "one", **MUON, grad_accumulation=2)
    before = whole_state(engine)
    engine.train()
    alone = whole_state(engine)
    for rank in run_ranks(_muon, 2, str(data), str(tmp_path)):
        for state in rank:
            assert max(relative(state, alone).values()) < 1e-3
    moved = relative(before, alone)
    assert min(moved[k] for k in moved if k.endswith("attn1.to_q.weight")) > 0.05


@pytest.mark.parametrize("bad", [float("nan"), 1e6], ids=["not finite", "large"])
def test_an_update_with_a_bad_norm_is_left_out(tmp_path, bad):
    stage = ToyStage()
    loss, before = stage.loss, []

    def spoiled(role, batch, draws):
        value, metrics = loss(role, batch, draws)
        if stage.step == 2 and role == "fake_score":
            before.append({name: p.detach().clone() for name, p in stage.roles[role].named_parameters()})
            return value * bad, {}
        if stage.step == 3:
            for name, p in stage.roles["fake_score"].named_parameters():
                assert torch.equal(p, before[0][name]), name
        return value, metrics

    stage.loss = spoiled
    engine = toy_engine(tmp_path, stage, steps=4, log_every=1, skip_norm=100.0)
    assert engine.train() == 4 and before
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped/fake_score"] for line in lines] == [0.0, 0.0, 1.0, 0.0]
    assert ["loss/fake_score" in line for line in lines] == [True, True, False, True]
