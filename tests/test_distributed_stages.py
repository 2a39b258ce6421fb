"""Every stage on data × sequence ranks: losses and every parameter's gradient are those of one process."""

import json

import pytest
import torch
from toy_backbones import LATENT, NEGATIVE, tiny_batch
from toy_ranks import ROLES, Collectives, keep_gradients, relative, wan_engine

from dit_ops.conditions.arguments import per_sample
from dit_ops.training.data import DatasetWriter

FRAMES = 5  # blocks of 2, 2 and 1 frames; 20 tokens, 40 in teacher forcing
LAYOUTS = {3: {"sequence": 3}, 4: {"sequence": 2, "fsdp": "full"}}  # by ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six samples, with trajectories of the four few-step levels, the sample and the ground truth."""
    directory = tmp_path_factory.mktemp("data")
    samples = tiny_batch(6, FRAMES)
    with DatasetWriter(directory, fps=8, negative=NEGATIVE) as writer:
        for i, condition in enumerate(per_sample(samples["condition"])):
            sample = {key: samples[key][i] for key in ("latents", "viewmats", "Ks")} | {"condition": condition}
            trajectory = torch.randn(6, FRAMES, *LATENT, generator=torch.Generator().manual_seed(i))
            writer.add(f"s{i}", **sample, trajectory=trajectory, prompt="", pose="w*4", height=32, width=32)
    return str(directory)


def _one_step(data: str, output: str, stage: str, parallel: dict, accumulation: int) -> dict:
    values = {"steps": 1, "grad_accumulation": accumulation, "parallel": parallel, "ema": {"decay": 0.5}}
    engine = wan_engine(data, output, stage, activation_checkpointing="full", **values)
    gradients = keep_gradients(engine)
    with Collectives() as count:
        engine.train()
    line = json.loads(engine.metrics.path.read_text())
    losses = {name: value for name, value in line.items() if name.startswith("loss/")}
    return {"gradients": gradients, "losses": losses, "calls": count.calls}


def _stages(rank: int, ranks: int, data: str, output: str) -> dict:
    parallel = LAYOUTS[ranks]
    return {stage: _one_step(data, f"{output}/{stage}", stage, parallel, 1) for stage in ROLES}


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """By the number of data ranks that the accumulated micro batches stand for."""
    output = tmp_path_factory.mktemp("one")
    return {n: {stage: _one_step(data, f"{output}/{stage}{n}", stage, {}, n) for stage in ROLES} for n in (1, 2)}


@pytest.mark.dist
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_stage_equals_one_process(data, one, tmp_path, run_ranks, ranks):
    """sequence 3, which divides neither the 4 tokens of a frame nor the 2 heads; data 2 × sequence 2 with FSDP."""
    alone = one[ranks // LAYOUTS[ranks]["sequence"]]
    for result in run_ranks(_stages, ranks, data, str(tmp_path)):
        for stage, found in result.items():
            assert found["losses"] == pytest.approx(alone[stage]["losses"], rel=1e-6), stage
            worst = relative(found["gradients"], alone[stage]["gradients"])
            assert max(worst.values()) < 1e-6, (stage, max(worst, key=lambda name: worst[name]))
            assert found["calls"].get("alltoall", 0) > 0, "nothing was exchanged: this was no test of the exchange"
