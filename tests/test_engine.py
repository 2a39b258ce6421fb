"""The training loop: exact resume, kills, accumulation, averages, and what it writes."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_stage import ToyData, ToyStage, toy_config, toy_engine

from dit_ops.training import checkpoint, metrics
from dit_ops.training.engine import Engine, load_backbones, run


def tensors_of(engine: Engine) -> dict[str, torch.Tensor]:
    flat = {}

    def walk(value, at):
        for key, v in value.items():
            walk(v, f"{at}/{key}") if isinstance(v, dict) else flat.update({f"{at}/{key}": v.clone()})

    walk(engine.state(), "")
    return flat


def lines_of(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def assert_same_run(a: Engine, b: Engine) -> None:
    """Parameters, buffers, optimizer state, averages, metrics: bit for bit."""
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    for name, value in a.ema["generator"].state_dict().items():
        assert torch.equal(value, b.ema["generator"].state_dict()[name]), name
    assert lines_of(a.output) == lines_of(b.output)
    assert a.updates == b.updates


@pytest.fixture
def whole(tmp_path) -> Engine:
    """11 steps in one go."""
    engine = toy_engine(tmp_path / "whole", grad_accumulation=2)
    assert engine.train() == 11
    return engine


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_stopped_and_resumed_equals_one_go(whole, tmp_path, stop):
    toy_engine(tmp_path / "parts", grad_accumulation=2, steps=stop).train()
    torch.manual_seed(99), random.seed(99), np.random.seed(99)  # a resume brings its own
    resumed = toy_engine(tmp_path / "parts", grad_accumulation=2)
    assert resumed.train() == 11
    assert_same_run(whole, resumed)
    assert [line["step"] for line in lines_of(resumed.output)] == [3, 6, 9, 11]


def test_the_comparison_notices_what_a_resume_forgets(whole, tmp_path, monkeypatch):
    toy_engine(tmp_path / "parts", grad_accumulation=2, steps=7).train()
    load = checkpoint.load_meta
    monkeypatch.setattr(checkpoint, "load_meta", lambda path: load(path) | {"updates": 0})
    resumed = toy_engine(tmp_path / "parts", grad_accumulation=2)
    resumed.train()
    with pytest.raises(AssertionError):
        assert_same_run(whole, resumed)


def test_a_finished_run_is_left_as_it_is(whole):
    again = toy_engine(whole.output, grad_accumulation=2)
    assert again.train() == 11
    assert_same_run(whole, again)


KILLED = """
import os, shutil, signal, sys
sys.path[:0] = [os.path.join({root!r}, "tests"), {root!r}]
import torch
from dit_ops.training import checkpoint
from toy_stage import toy_engine

def die_at_call(module, name, n):
    function = getattr(module, name)
    def call(*args, **kwargs):
        nonlocal n
        n -= 1
        if n == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(module, name, call)

# n-th call of a function within the save of step 8 -> newest checkpoint afterwards
FAULTS = {{
    "4 tensors": (torch, "save", 20), "4 data flush": (os, "fsync", 1), "4 metadata flush": (os, "fsync", 2),
    "4 trainer flush": (os, "fsync", 3), "4 folder flush": (os, "fsync", 4), "4 rename": (os, "rename", 2),
    "8 renamed": (os, "fsync", 5), "8 old one": (os, "rename", 3), "8 removal": (shutil, "rmtree", 1),
}}
save = checkpoint.save_checkpoint
for name, fault in FAULTS.items():
    pid = os.fork()
    if pid == 0:
        def armed(folder, step, *args):
            if step == 8:
                die_at_call(*fault)
            return save(folder, step, *args)
        checkpoint.save_checkpoint = armed
        toy_engine(sys.argv[1] + "/" + name, checkpoint={{"every": 4, "keep": 1}}).train()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, name
"""


def test_a_kill_within_a_save_leaves_a_whole_checkpoint(tmp_path):
    script = KILLED.format(root=str(Path(__file__).parent.parent))
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    killed = sorted(tmp_path.iterdir())
    assert len(killed) == 9
    whole = toy_engine(tmp_path / "whole")
    whole.train()
    for output in killed:
        assert checkpoint.checkpoint_steps(output / "checkpoints")[-1] == int(output.name[0]), output.name
        resumed = toy_engine(output)
        assert resumed.train() == 11
        assert_same_run(whole, resumed)
        assert not any((output / "checkpoints").glob(".step-*")), "leftovers of the kill"


def test_only_the_newest_checkpoints_stay(whole):
    assert checkpoint.checkpoint_steps(whole.checkpoints) == [8, 11]
    assert sorted(path.name for path in whole.output.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl"]


def test_a_line_cut_short_and_lines_after_the_checkpoint_are_dropped(tmp_path):
    engine = toy_engine(tmp_path, log_every=1, steps=4)
    engine.train()
    before = lines_of(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/generator": 1}\n{"step": 6, "loss/gen')
    log = metrics.MetricsLog(tmp_path, tensorboard=False)
    log.start(checkpoint.load_meta(engine.checkpoints / "step-000004")["metrics"])
    assert lines_of(tmp_path) == before and [line["step"] for line in before] == [1, 2, 3, 4]


def test_a_line_is_the_mean_since_the_line_before(tmp_path):
    toy_engine(tmp_path / "each", log_every=1, steps=6).train()
    toy_engine(tmp_path / "third", log_every=3, steps=6).train()
    each, third = lines_of(tmp_path / "each"), lines_of(tmp_path / "third")
    for i, line in enumerate(third):
        for name in ("loss/generator", "grad_norm/fake_score", "output/fake_score"):
            values = [part[name] for part in each[3 * i : 3 * i + 3] if name in part]
            assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-12)


class NoiseFreeStage(ToyStage):
    """A loss without draws and batch statistics, so that batches can be cut anywhere."""

    def __init__(self):
        super().__init__()
        self.roles = {"generator": torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))}
        for i, p in enumerate(self.roles["generator"].parameters()):
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))

    def updates(self, step):
        return ["generator"]

    def loss(self, role, batch, draws):
        x = batch["latents"]
        return (self.roles[role](x) - x).square().mean(), {}


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_equal_one_batch(tmp_path, accumulation):
    """k micro batches = one batch k times as large, to fp32 rounding, and one optimizer step."""
    gradients, steps = {}, {}
    for k in (1, accumulation):
        data = {"path": "toy", "batch_size": 8 // k}
        config = toy_config(tmp_path / str(k), steps=3, grad_accumulation=k, data=data, ema={}, clip_norm=None)
        engine = Engine(config, NoiseFreeStage(), ToyData(8), config.output, progress=False)
        gradients[k] = []
        keep = lambda optimizer, *_, k=k: gradients[k].append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        engine.optimizers["generator"][0].register_step_pre_hook(keep)
        engine.train()
        steps[k] = [state["step"].item() for state in engine.optimizers["generator"][0].state.values()]
    assert steps[1] == steps[accumulation] == [3.0] * 4
    for one, many in zip(gradients[1][0], gradients[accumulation][0], strict=True):
        torch.testing.assert_close(one, many, rtol=2e-6, atol=2e-7)


def test_each_update_has_its_own_batches_and_an_epoch_repeats_none(tmp_path):
    stage = ToyStage()
    toy_engine(tmp_path, stage, steps=8, data={"path": "toy", "batch_size": 3}).train()
    assert [(step, role) for step, role, _ in stage.seen[:3]] == [(0, "generator"), (0, "fake_score"), (1, "fake_score")]
    batches = [ids for *_, ids in stage.seen]
    assert len(batches) == 12
    for epoch in range(4):
        assert sorted(sum(batches[3 * epoch : 3 * epoch + 3], [])) == sorted(map(str, range(9)))
    assert batches[0:3] != batches[3:6]


def test_draws_depend_on_step_update_and_micro_batch(tmp_path):
    stage, counters = ToyStage(), []
    loss = stage.loss
    stage.loss = lambda role, batch, draws: (counters.append((draws.seed, *draws.counters)), loss(role, batch, draws))[1]
    toy_engine(tmp_path, stage, steps=2, seed=5, grad_accumulation=2).train()
    assert counters == [(5, 0, 0, 0), (5, 0, 0, 1), (5, 0, 1, 0), (5, 0, 1, 1), (5, 1, 0, 0), (5, 1, 0, 1)]


def test_average_follows_its_formula(tmp_path):
    """shadow = decay·shadow + (1 − decay)·p at updates of the role from start_step on; a copy before."""
    stage = ToyStage()
    engine = toy_engine(tmp_path, stage, steps=7, ema={"decay": 0.9, "start_step": 3})
    expected = None
    update = engine._update

    def watched(role, index):
        nonlocal expected
        update(role, index)
        if role == "generator":
            p = [p.detach().double().clone() for p in stage.roles["generator"].parameters()]
            decay = 0.9 if engine.step >= 3 else 0.0
            expected = p if expected is None else [decay * s + (1 - decay) * q for s, q in zip(expected, p, strict=True)]

    engine._update = watched
    engine.train()
    assert set(engine.ema) == {"generator"}
    for shadow, value in zip(engine.ema["generator"].parameters(), expected, strict=True):
        assert shadow.dtype == torch.float32 and not shadow.requires_grad
        torch.testing.assert_close(shadow.double(), value, rtol=1e-6, atol=1e-7)
    running_mean = engine.ema["generator"][2].running_mean
    assert torch.equal(running_mean, stage.roles["generator"][2].running_mean) and running_mean.any()
    assert engine.exported_model() is engine.ema["generator"]


def test_average_that_a_stage_needs(tmp_path):
    stage = ToyStage()
    stage.needs_ema = True
    with pytest.raises(ValueError, match="needs an average of its generator: set ema.decay"):
        toy_engine(tmp_path, stage, ema={})
    engine = toy_engine(tmp_path, stage)
    assert stage.ema is engine.ema
    with pytest.raises(ValueError, match=r"ema\.roles: .*\['fake_score', 'generator'\], got \['real_score'\]"):
        toy_engine(tmp_path, ema={"decay": 0.9, "roles": ["real_score"]})


def test_roles_learn_at_their_own_rate_and_frozen_ones_stay(tmp_path):
    stage = ToyStage()
    frozen = {k: v.clone() for k, v in stage.roles["real_score"].state_dict().items()}
    optim = {"lr": 1e-2, "roles": {"fake_score": {"lr": 1e-3}}}
    toy_engine(tmp_path, stage, steps=4, log_every=1, optim=optim, schedule={"warmup_steps": 2}).train()
    lines = lines_of(tmp_path)
    assert [line["lr/fake_score"] for line in lines] == [5e-4, 1e-3, 1e-3, 1e-3]
    assert lines[0]["lr/generator"] == 5e-3 and lines[2]["lr/generator"] == 1e-2
    assert all(torch.equal(frozen[k], v) for k, v in stage.roles["real_score"].state_dict().items())
    assert not stage.roles["real_score"].training and stage.roles["generator"].training
    with pytest.raises(ValueError, match=r"optim\.roles\.real_score: this stage trains the roles"):
        toy_engine(tmp_path, optim={"roles": {"real_score": {"lr": 1.0}}})


def test_gradients_are_clipped_and_their_norm_is_the_unclipped_one(tmp_path):
    norms = {}
    for limit in (None, 0.01):
        engine = toy_engine(tmp_path / str(limit), steps=1, log_every=1, clip_norm=limit)
        seen = []
        keep = lambda optimizer, *_, seen=seen: seen.append(
            torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]))
        )
        engine.optimizers["generator"][0].register_step_pre_hook(keep)
        engine.train()
        norms[limit] = seen[0].item(), lines_of(tmp_path / str(limit))[0]["grad_norm/generator"]
    assert norms[None][0] == pytest.approx(norms[None][1], rel=1e-6)
    assert norms[0.01][1] == norms[None][1] > 0.01
    assert norms[0.01][0] == pytest.approx(0.01, rel=1e-4)


def test_ctrl_c_saves_and_the_same_call_goes_on(whole, tmp_path):
    stage = ToyStage()
    loss = stage.loss

    def interrupted(role, batch, draws):
        if stage.step == 5 and draws.counters[-1] == 0:
            signal.raise_signal(signal.SIGINT)
        return loss(role, batch, draws)

    stage.loss = interrupted
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 6; run the same command again"):
        toy_engine(tmp_path / "parts", stage, grad_accumulation=2).train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.checkpoint_steps(tmp_path / "parts/checkpoints") == [4, 6]
    resumed = toy_engine(tmp_path / "parts", grad_accumulation=2)
    resumed.train()
    assert_same_run(whole, resumed)


@pytest.mark.parametrize(("log_every", "found"), [(3, 6), (11, 8)], ids=["by a line", "by a save"])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, log_every, found):
    stage = ToyStage()
    loss = stage.loss
    stage.loss = lambda role, batch, draws: (loss(role, batch, draws)[0] * (float("nan") if stage.step == 5 else 1), {})
    with pytest.raises(FloatingPointError, match=rf"loss/fake_score is not finite in the steps up to {found}"):
        toy_engine(tmp_path, stage, log_every=log_every).train()
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [4]


@pytest.mark.parametrize("ema", [{"decay": 0.9}, {}], ids=["average", "raw"])
def test_validation_runs_on_what_is_exported_and_changes_nothing(tmp_path, ema):
    calls = []

    def validate(model, step, folder):
        calls.append((model, step, folder.name, model.training, torch.is_grad_enabled()))
        return {"psnr": torch.randn(3).sum().item() + random.random()}

    values = {"validate": {"every": 2}, "log_every": 1, "steps": 5, "ema": ema}
    config = toy_config(tmp_path / "with", **values)
    watched = Engine(config, ToyStage(), ToyData(), config.output, progress=False, validate=validate)
    watched.train()
    plain = toy_engine(tmp_path / "without", **values)
    plain.train()
    model = watched.ema["generator"] if ema else watched.stage.roles["generator"]
    assert calls == [(model, 2, "step-000002", False, False), (model, 4, "step-000004", False, False)]
    assert watched.stage.roles["generator"].training
    assert ["validate/psnr" in line for line in lines_of(watched.output)] == [False, True, False, True, False]
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(watched).values(), tensors_of(plain).values(), strict=True))


def test_a_run_that_is_there_is_not_overwritten(whole):
    with pytest.raises(FileExistsError, match="holds a run of 11 steps: resume it, or choose another output"):
        toy_engine(whole.output).train(resume=False)


def test_a_checkpoint_of_another_run_is_refused(whole, caplog):
    with pytest.raises(ValueError, match=r"belongs to another run: model\.block_frames None → 2"):
        toy_engine(whole.output, model={"block_frames": 2}).train()
    with pytest.raises(ValueError, match="is past the 5 steps that were asked for"):
        toy_engine(whole.output, steps=5).train()
    with caplog.at_level(logging.WARNING):
        toy_engine(whole.output, grad_accumulation=2, steps=12, optim={"lr": 1e-3, "betas": [0.9, 0.99]}).train()
    assert "with changed settings: optim.lr 0.01 → 0.001, steps 11 → 12" in caplog.text


def test_nothing_to_train_is_an_error(tmp_path):
    stage = ToyStage()
    del stage.roles["generator"], stage.roles["fake_score"]
    with pytest.raises(ValueError, match=r"stage 'bidirectional' has nothing to train in its roles \['real_score'\]"):
        toy_engine(tmp_path, stage)


def test_tensorboard_is_optional(tmp_path, monkeypatch, caplog):
    toy_engine(tmp_path / "with", steps=2, tensorboard=True).train()
    assert len(list((tmp_path / "with/tensorboard").glob("events.*"))) == 1
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    toy_engine(tmp_path / "without", steps=2, tensorboard=True).train()
    assert "TensorBoard is not installed (pip install tensorboard)" in caplog.text
    assert not (tmp_path / "without/tensorboard").exists() and lines_of(tmp_path / "without")


def test_a_stage_may_replace_the_engine(tmp_path, monkeypatch):
    class Sampling:
        @staticmethod
        def run(config, *, resume, progress):
            return Path(config.output) / f"{resume}-{progress}"

    config = toy_config(tmp_path)
    monkeypatch.setattr("dit_ops.training.engine.stage_class", lambda name: Sampling)
    assert run(config, resume=False, progress=False) == tmp_path / "False-False"


def test_a_generator_needs_weights_or_a_config(tmp_path):
    with pytest.raises(ValueError, match=r"give init\.generator or model\.config"):
        load_backbones(toy_config(tmp_path))
