"""Throughput: phases, tokens, utilisation, and that they are in the metrics of a run."""

import json
import time

import pytest
import torch
from toy_backbones import tiny_batch, tiny_wan
from toy_ranks import wan_engine
from toy_stage import write_dataset

from dit_ops.training.flops import forward_flops
from dit_ops.training.meters import Meters, peak_flops, video_tokens


def test_phases_add_up_and_begin_forgets_the_last_step():
    meters = Meters(torch.device("cpu"), None)
    for seconds in (0.01, 0.02):
        meters.begin()
        for _ in range(2):
            with meters.phase("data"):
                time.sleep(seconds)
        values = meters.take()
        assert 2 * seconds <= values["data_seconds"] <= values["step_seconds"] < 2 * seconds + 0.2
    assert "mfu" not in values and values["tokens_per_second"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_utilisation_counts_backward_twice_and_the_share_of_a_rank(ranks):
    model, batch = tiny_wan(2).train(), tiny_batch(1, 4)
    call = {"latents": batch["latents"], "timestep": torch.full((1,), 500.0), **batch["condition"]}
    call |= {key: batch[key] for key in ("viewmats", "Ks")}
    meters = Meters(torch.device("cpu"), 1e9)
    meters.watch(model, ranks)
    meters.watch(torch.nn.Linear(2, 2), 1)
    meters.begin()
    model(**call)
    with torch.no_grad():
        model(**call)
    assert meters.flops == 4 * forward_flops(model, **call) / ranks
    flops, values = meters.flops, meters.take()
    assert values["mfu"] == pytest.approx(flops / (values["step_seconds"] * 1e9))


def test_what_is_not_known_is_left_out(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(cuda, "bf16") == 989e12 and peak_flops(cuda, "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert peak_flops(cuda, "bf16") is None


def test_a_run_logs_its_throughput(tmp_path):
    engine = wan_engine(write_dataset(tmp_path / "data"), tmp_path / "run", steps=2, grad_accumulation=3, peak_flops=1e12)
    engine.train()
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    names = ("step", "data", "forward", "backward", "optimizer")
    assert all(line[f"speed/{name}_seconds"] > 0 for name in names) and 0 < line["speed/mfu"] < 1
    assert line["speed/peak_memory_gb"] > 0.05
    tokens = 3 * video_tokens(engine.stage.roles["generator"], torch.zeros(1, 4, 2, 4, 4))
    assert tokens == 3 * 16
    assert line["speed/tokens_per_second"] == pytest.approx(tokens / line["speed/step_seconds"])
