"""Training on several ranks: every layout equals one process, reductions are counted, and runs go on after a kill."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import _rank_main
from toy_hunyuan_video15 import conditions, one, tiny, video
from toy_ranks import Collectives, keep_gradients, relative, wan_engine, whole_state
from toy_stage import MODEL, write_dataset

from dit_ops.training import checkpoint
from dit_ops.training.config import load_config, parse_config
from dit_ops.training.engine import run
from dit_ops.training.gradients import average_gradients
from dit_ops.training.parallelize import block_units, full_tensor, is_sharded, parallelize
from dit_ops.training.ranks import process_group, ranks_of

ROOT = Path(__file__).parent.parent

LAYOUTS = {
    "none": {},
    "full": {"fsdp": "full"},
    "full, shards accumulated": {"fsdp": "full", "accumulate": "sharded"},
    "hybrid": {"fsdp": "hybrid", "replicas": 2},
    "offloaded": {"fsdp": "full", "cpu_offload": True},
}
# networks that run without a backward between updates: averages, rollouts, scores
AVERAGED: dict[str, dict] = {
    "consistency": {"ema": {"decay": 0.5}},
    "dmd": {"ema": {"decay": 0.5}, "options": {"generator_every": 1}, "activation_checkpointing": "full"},
}


def _train(data, output, **values):
    engine = wan_engine(data, output, **values)
    gradients = keep_gradients(engine)
    engine.train()
    return engine, gradients


def _layouts(rank: int, ranks: int, data: str, output: str) -> dict:
    """Every layout's gradients and state after 3 steps, the collectives of its last step, and its kinds of modules."""
    found = {}
    for name, parallel in LAYOUTS.items():
        engine = wan_engine(data, f"{output}/{name}", parallel=parallel, grad_accumulation=2, clip_norm=0.05)
        gradients = keep_gradients(engine)
        engine.train()
        state = whole_state(engine)
        before = dict(gradients)
        with Collectives() as count:
            engine._update("generator", 0)
        generator = engine.stage.roles["generator"]
        units = [is_sharded(block) for block, _ in block_units(generator)]
        dtypes = sorted({str(p.dtype) for p in generator.parameters()})
        found[name] = {"state": state, "gradients": before, "calls": count.calls, "units": units, "dtypes": dtypes}
    for stage in AVERAGED:
        engine, _ = _train(data, f"{output}/{stage}", stage=stage, parallel={"fsdp": "full"}, **AVERAGED[stage])
        found[stage] = {"state": whole_state(engine)}
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="module")
def layouts(data, run_ranks, tmp_path_factory):
    return run_ranks(_layouts, 2, str(data), str(tmp_path_factory.mktemp("layouts")))


@pytest.fixture(scope="module")
def accumulated(data, tmp_path_factory):
    """The same run in one process, where the ranks' micro batches are accumulated."""
    output = tmp_path_factory.mktemp("one")
    engine, gradients = _train(data, output / "run", grad_accumulation=4, clip_norm=0.05)
    return {"state": whole_state(engine), "gradients": gradients, "output": output / "run"}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_data_ranks_equal_one_that_accumulates(layouts, accumulated, layout):
    for rank in layouts:
        assert max(relative(rank[layout]["gradients"], accumulated["gradients"]).values()) < 1e-6
        assert max(relative(rank[layout]["state"], accumulated["state"]).values()) < 1e-6


@pytest.mark.dist
@pytest.mark.parametrize("stage", AVERAGED)
def test_sharded_averages_and_rollouts_are_never_stale(layouts, data, tmp_path, stage):
    engine, _ = _train(data, tmp_path, stage=stage, grad_accumulation=2, **AVERAGED[stage])
    for rank in layouts:
        assert max(relative(rank[stage]["state"], whole_state(engine)).values()) < 1e-6


@pytest.mark.dist
def test_gradients_are_reduced_in_the_last_micro_batch_only(layouts):
    """Three units: two blocks and the root. Of two micro batches FSDP reduces the last, or both where it accumulates shards."""
    calls = {layout: result["calls"] for layout, result in layouts[0].items() if layout in LAYOUTS}
    reductions = {layout: (c.get("reduce_scatter", 0), c.get("allreduce", 0)) for layout, c in calls.items()}
    assert reductions["none"] == (0, 1)
    assert reductions["full"] == (3, 1)  # the one is of the norm
    assert reductions["full, shards accumulated"] == (6, 1)
    assert reductions["hybrid"][1] == 3 + 1
    assert "allgather" not in calls["none"] and calls["full"]["allgather"] == 2 * (3 + 3)


@pytest.mark.dist
def test_every_block_is_a_shard_unit_of_masters_in_their_own_precision(layouts):
    for layout in LAYOUTS:
        result = layouts[0][layout]
        assert result["units"] == [layout != "none"] * 2 and result["dtypes"] == ["torch.float64"]


def _own_gradients(rank: int, ranks: int, data: str, output: str) -> dict:
    from dit_ops.training import engine as module

    module.average_gradients = lambda parameters, world: None
    _, gradients = _train(data, f"{output}/{rank}", steps=1, grad_accumulation=2)
    return gradients


def _kill_in_save(rank: int, ranks: int, data: str, output: str) -> None:
    save = checkpoint.dcp.save

    def killed(tensors, *, checkpoint_id, **options):
        if "step-000003" in str(checkpoint_id):
            write = torch.save
            torch.save = lambda *args, **more: (write(*args, **more), os.kill(os.getpid(), signal.SIGKILL))
        return save(tensors, checkpoint_id=checkpoint_id, **options)

    checkpoint.dcp.save = killed
    _train(data, output, **RESUMED)


RESUMED = {
    "steps": 5,
    "grad_accumulation": 2,
    "checkpoint": {"every": 1, "keep": 1},
    "ema": {"decay": 0.5},
    "parallel": {"fsdp": "full"},
}
ALONE = RESUMED | {"grad_accumulation": 4, "parallel": {}}


def _resume(rank: int, ranks: int, data: str, output: str) -> dict:
    """Whole, killed and resumed, begun by one process and resumed here, and with background saves."""
    whole, _ = _train(data, f"{output}/whole", **RESUMED)
    resumed = wan_engine(data, f"{output}/killed", **RESUMED)
    resumed._begin(True)
    begun = resumed.step
    resumed.train()
    spread, _ = _train(data, f"{output}/alone", **RESUMED)
    saved = RESUMED | {"checkpoint": {"every": 1, "keep": 9, "background": True}, "steps": 3}
    background, _ = _train(data, f"{output}/background", **saved)
    engines = {"whole": whole, "killed": resumed, "alone": spread, "background": background}
    unlike = sum(not torch.equal(a, b) for a, b in zip(*(whole_state(e).values() for e in (whole, resumed)), strict=True))
    state = {name: whole_state(engine) for name, engine in engines.items()}
    return {"begun": begun, "unlike": unlike, "state": state, "model": str(whole.export())}


@pytest.mark.dist
def test_a_killed_run_goes_on_bitwise_and_on_any_number_of_ranks(data, tmp_path, run_ranks):
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        given = (str(data), str(tmp_path / "killed"))
        processes = [context.Process(target=_rank_main, args=(rank, 2, folder, _kill_in_save, given)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
    assert -signal.SIGKILL in [process.exitcode for process in processes]
    assert checkpoint.checkpoint_steps(tmp_path / "killed/checkpoints") == [2]
    shutil.copytree(tmp_path / "killed", tmp_path / "by one")
    _train(data, tmp_path / "alone", **(ALONE | {"steps": 2}))
    alone, _ = _train(data, tmp_path / "whole alone", **ALONE)

    first, second = run_ranks(_resume, 2, str(data), str(tmp_path))
    for rank in (first, second):
        assert rank["begun"] == 2 and rank["unlike"] == 0
        assert max(relative(rank["state"]["alone"], whole_state(alone)).values()) < 1e-6
    by_one, _ = _train(data, tmp_path / "by one", **ALONE)
    assert max(relative(whole_state(by_one), first["state"]["whole"]).values()) < 1e-6

    assert checkpoint.checkpoint_steps(tmp_path / "background/checkpoints") == [1, 2, 3]
    early = wan_engine(data, tmp_path / "background", **(ALONE | {"steps": 3}))
    early._load(tmp_path / "background/checkpoints/step-000003")
    assert all(torch.equal(v, first["state"]["background"][k]) for k, v in whole_state(early).items())

    from dit_ops.registry import load_backbone

    exported = load_backbone(tmp_path / "whole/model").state_dict()
    expected = {k.removeprefix("/ema/generator/"): v for k, v in first["state"]["whole"].items() if k.startswith("/ema/")}
    assert expected and all(torch.equal(exported[name], v.to(exported[name].dtype)) for name, v in expected.items())


@pytest.mark.dist
def test_the_comparison_notices_a_missing_reduction(data, accumulated, tmp_path, run_ranks):
    for gradients in run_ranks(_own_gradients, 2, str(data), str(tmp_path)):
        assert max(relative(gradients, accumulated["gradients"]).values()) > 1e-2


@pytest.mark.dist
def test_torchrun_trains_and_one_process_goes_on(data, tmp_path):
    """The command line as the page says, on the CPU; rank 0 alone prints the model's directory and writes the run."""
    values = {"steps": 2, "stage": "bidirectional", "output": str(tmp_path / "run"), "device": "cpu", "tensorboard": False}
    values |= {"data": {"path": str(data)}, "model": {"config": MODEL}, "parallel": {"fsdp": "full"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dit_ops", "train"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "run.yaml")], check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert (tmp_path / "run/model/transformer/config.json").is_file()
    alone = load_config(tmp_path / "run.yaml", ["steps=3", "parallel.fsdp=none", "grad_accumulation=2"])
    run(alone, progress=False)
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def _hunyuan(rank: int, ranks: int, fsdp: str) -> dict[str, torch.Tensor]:
    """Gradients of a teacher-forced and a rollout-like loss, on the mean of two ranks' samples."""
    torch.manual_seed(0)
    model, (latents, clean, cameras), given = tiny().double(), video(2), conditions(2)
    config = parse_config(
        {"stage": "bidirectional", "output": "out", "steps": 1, "data": {"path": "x"}, "device": "cpu"}
        | {"parallel": {"fsdp": fsdp}}
    )
    samples = [rank] if ranks > 1 else [0, 1]
    model.gradient_checkpointing = "full"
    with process_group(config):
        here = ranks_of(config)
        parallelize(model, config, here, torch.device("cpu"))
        loss = 0.0
        for i in samples:
            t = torch.full((1,), 500.0)
            part = one(given, i) | one(cameras, i)
            flow = model(latents[i : i + 1], t, clean_latents=clean[i : i + 1], **part)
            loss = loss + flow.square().mean() / len(samples)
            whole = flow.detach()
            with torch.no_grad():
                model(whole, t, clean_latents=clean[i : i + 1], **part)
        loss.backward()
        average_gradients(model.parameters(), here.world)
        return {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.dist
@pytest.mark.parametrize("fsdp", ["none", "full"])
def test_hunyuan_video_on_two_ranks_equals_one(run_ranks, fsdp):
    alone = _hunyuan(0, 1, "none")
    for gradients in run_ranks(_hunyuan, 2, fsdp):
        assert max(relative(gradients, alone).values()) < 1e-6


def test_a_layout_that_does_not_fit_is_explained(monkeypatch):
    config = lambda **parallel: parse_config(values | {"parallel": parallel})
    values = {"stage": "bidirectional", "output": "out", "steps": 1, "data": {"path": "x"}, "device": "cpu"}
    with pytest.raises(ValueError, match="sequence 2, fsdp 'none' need a process group: start with torchrun"):
        ranks_of(config(sequence=2))
    for wrong, message in (
        ({"replicas": 2}, "replicas belongs to fsdp 'hybrid', got fsdp 'none'"),
        ({"cpu_offload": True}, "cpu_offload needs fsdp 'full' or 'hybrid', got True"),
        ({"sequence": 0}, "sequence must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**wrong)
    with process_group(config(fsdp="full")):
        assert ranks_of(config(fsdp="full")).world == 1
        with pytest.raises(ValueError, match="data × sequence must be the 1 processes, got 1 × 2"):
            ranks_of(config(sequence=2))
        with pytest.raises(ValueError, match="replicas must divide the 1 processes, got 2"):
            ranks_of(config(fsdp="hybrid", replicas=2))
    assert not torch.distributed.is_initialized()
