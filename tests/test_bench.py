"""The record that a benchmark writes, the turns it takes, and the page made from it."""

import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dit_ops.bench import bench_generate, measure, runs

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tools import performance_table as table  # noqa: E402

KEY = {"op": "adaln", "shape": "small", "dtype": "float32", "pass": "forward"}


def arguments(output: Path) -> Namespace:
    return Namespace(device="cpu", repeats=4, output=str(output), backends=["triton", "reference"])


def test_backends_take_turns():
    order = []
    times = measure.interleaved({name: lambda name=name: order.append(name) for name in "ABC"}, "cpu", 4)
    assert "".join(order) == "ABCCBA" * 2
    assert all(len(t) == 4 and t == sorted(t) for t in times.values())


def test_record_has_every_figure_and_says_where_it_was_measured(monkeypatch):
    monkeypatch.setattr(measure, "copy_rate", lambda device: 10.0)
    row = measure.row({**KEY, "backend": "cpu"}, "cpu", 40_000, [4.0, 8.0, 10.0, 12.0, 20.0])
    assert (row["us"], row["iqr_us"], row["min_us"], row["GB/s"], row["of_copy"]) == (10.0, 4.0, 4.0, 4.0, 0.4)
    assert {"device", "torch", "triton", "date", "copy_GB/s", *KEY, "backend"} <= set(row)
    in_graph = measure.row({**KEY, "backend": "cpu"}, "cpu", 40_000, [200.0], calls=20)
    assert in_graph["us"] == 10.0 and in_graph["of_copy"] == 0.4


def test_both_passes_are_recorded_and_refusals_and_missing_peers_give_reasons(monkeypatch, tmp_path, capsys):
    import dit_ops

    monkeypatch.setattr(measure, "copy_rate", lambda device: 10.0)
    x = torch.randn(1, 4, 8).double().requires_grad_()

    def broken(x):
        raise TypeError("unexpected argument")

    peers = {"absent": runs.Peer(None, "absent is not installed"), "broken": runs.Peer(broken)}
    peers["norm alone"] = runs.Peer(lambda x: x * 2, forward_only=True)
    runs.bench_op(
        "adaln", dit_ops.adaln, "small", [x], [x.detach()], arguments(tmp_path / "r" / "cpu.jsonl"), [1000, 3000], peers
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed == (tmp_path / "r" / "cpu.jsonl").read_text().splitlines()
    rows = {(r["pass"], r["backend"]): r for r in map(json.loads, printed)}
    assert len(rows) == len(printed) == 10
    assert rows["forward", "reference"]["bytes"] == 1000 and rows["backward", "reference"]["bytes"] == 2000
    assert rows["forward", "norm alone"]["us"] > 0 and rows["backward", "norm alone"]["refused"] == "it has no backward"
    assert "backend 'triton' cannot run this call" in rows["forward", "triton"]["refused"]
    assert rows["backward", "absent"]["refused"] == "absent is not installed"
    assert rows["forward", "broken"]["refused"] == "TypeError: unexpected argument"


def test_an_error_of_ours_is_not_a_refusal(tmp_path):
    def wrong():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        runs.bench_group(KEY, {"reference": lambda: wrong}, arguments(tmp_path / "x.jsonl"), 1)


def test_results_are_named_by_the_device(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.write({"op": "x", "device": "NVIDIA H100 80GB HBM3"}, None)
    measure.write({"op": "y", "device": "NVIDIA H100 80GB HBM3"}, "-")
    assert [p.name for p in tmp_path.iterdir()] == ["nvidia-h100-80gb-hbm3.jsonl"]
    assert len((tmp_path / "nvidia-h100-80gb-hbm3.jsonl").read_text().splitlines()) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2


def result(backend: str, us: float, of_copy: float, **changes) -> dict:
    figures = {"us": us, "iqr_us": 1.0, "min_us": us, "GB/s": 2000.0, "copy_GB/s": 3000.0, "of_copy": of_copy, "bytes": 1 << 28}
    about = {"device": "GPU 1", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-02"}
    return {**KEY, "backend": backend, **figures, **about, **changes}


def test_page_shows_the_last_record_the_ratios_and_what_falls_short():
    refused = {**KEY, "backend": "cpu", "refused": "adaln: backend 'cpu' cannot run this call: tensors are on cuda"}
    records = [
        result("cuda", 50.0, 0.5),
        result("cuda", 10.0, 0.9),
        result("torch.compile", 15.0, 0.6),
        result("reference", 60.0, 0.15),
    ]
    about = {"device": "GPU 1", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-02"}
    machine = {"op": "machine", "copy_GB/s": 3000.0, "matmul_TFLOP/s": 798.0, **about}
    lines = [json.dumps(r) for r in [machine, *records, refused | about]]
    page = table.page({"gpu-1": table.load(lines)}, {"gpu-1": "performance-gpu-1.png"}, "## Why\n\nBecause.")
    assert "| small, float32 | forward | cuda | 10.0 | 1.0 | 2000.0 | 90% | 1.50× torch.compile, 6.00× reference |" in page
    assert "50.0" not in page and page.count("## GPU 1") == 1
    what = "**90% of copy (≥ 93%)**; 1.50× torch.compile (≥ 1.15×)"
    assert f"| d1 | adaln, forward | small, float32 | {what} | short of goal |" in page
    assert "- cpu (adaln): tensors are on cuda" in page
    assert "Copy 3000.0 GB/s, bf16 matrix product 798.0 TFLOP/s." in page
    assert "![Share of the copy bandwidth](performance-gpu-1.png)" in page and page.endswith("Because.\n")
    assert "No results are committed yet." in table.page({}, {})


def test_page_shows_operations_and_memory():
    about = {"device": "GPU 1", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-02"}
    attention = result("dense", 10.0, 0.1, **KEY | {"op": "attention", "TFLOP/s": 600.5, "of_matmul": 0.75})
    cache = {"op": "cache", "shape": "a model", "dtype": "bfloat16", "pass": "memory", "backend": "keys", "bytes": 3 << 30}
    page = table.page({"gpu-1": table.load([json.dumps(r) for r in (attention, cache | about)])}, {})
    assert "| GB/s | of copy | TFLOP/s | of product | faster |" in page
    assert "| dense | 10.0 | 1.0 | 2000.0 | 10% | 600.5 | 75% |  |" in page
    assert "| a model, bfloat16 | keys | 3.00 |" in page


GOAL_ROWS = {  # goal -> op, pass, shape, peers that it is compared with and by how much it has to be faster
    "a1": ("qk_norm_rope", "forward", "full", {"torch.compile": 1.1, "reference": 10}),
    "a2": ("qk_norm_rope_prope", "forward", "full", {"torch.compile": 2}),
    "a3": ("qk_norm_rope_prope", "backward", "full", {"torch.compile": 2}),
    "a4": ("prope_output", "backward", "full", {"torch.compile": 1.5}),
    "a5": ("qk_norm_rope_prope", "forward into slots", "full", {"new tensors": 1 / 1.03}),
    "c1": ("attention", "forward", "one chunk of 3 of 21 latent frames", {"cuDNN SDPA": 1.05}),
    "c2": ("attention", "forward", "a chunk, a quarter of the heads", {"cuDNN SDPA": 1.15}),
    "c3": ("attention", "forward", f"a chunk{table.RING}", {}),
    "c4": ("attention", "forward", "teacher forcing", {table.FLEX: 1.45, table.PACKED: 1.5}),
    "c5": ("attention", "backward", "teacher forcing", {table.FLEX: 1.6}),
    "c6": ("attention, deterministic", "backward", "teacher forcing", {}),
    "d1": ("adaln, rms", "forward", "full", {"torch.compile": 1.15, "QuACK rmsnorm, no modulation": 1}),
    "d2": ("gated_residual_adaln", "forward", "full", {"torch.compile": 1.15}),
    "d3": ("gated_residual_adaln", "backward", "full", {"torch.compile": 2}),
    "e1": ("cfg_euler_step", "forward, 20 calls in a graph", "one streaming chunk", {}),
    "e2": ("ema_update_", "forward", "full", {"torch._foreach_lerp_": 1.3}),
}


def goal_rows(name: str, better: float) -> list[dict]:
    """Our line and its peers', all at the goal when better is 1."""
    op, pass_, shape, peers = GOAL_ROWS[name]
    key = {"op": op, "pass": pass_, "shape": shape}
    rate = {"c2": 560, "c4": 580, "c5": 480, "c6": 410}.get(name, 600)
    ours = result("triton", 3.0 / better, 0.96 * better, **{"TFLOP/s": rate * better}, **key)
    beside = {"c3": [result("dense", 2.95, 0.1, **key | {"shape": "a chunk"})]}  # 1.7 % faster without the ring
    beside["c6"] = [result("dense", 2.7, 0.1, **key | {"op": "attention"}, **{"TFLOP/s": 480})]
    return [ours, *beside.get(name, []), *(result(peer, 3.0 * ratio * 1.001, 0.1, **key) for peer, ratio in peers.items())]


@pytest.mark.parametrize("name", GOAL_ROWS)
def test_page_maps_every_goal_to_its_figure(name):
    op, pass_, shape, _ = GOAL_ROWS[name]
    for better, mark in ((1.0, "reached"), (0.8, "short of goal")):
        page = table.page({"gpu-1": table.load([json.dumps(r) for r in goal_rows(name, better)])}, {})
        lines = [line for line in page.splitlines() if line.startswith(f"| {name} | {op}, {pass_} | {shape}, float32 |")]
        assert len(lines) == 1 and lines[0].endswith(f"| {mark} |"), page
        assert ("**" in lines[0]) == (mark == "short of goal")
        assert f"{page.count('| reached |')} reached, {page.count('| short of goal |')} short of the goal." in page
        for other in GOAL_ROWS.keys() - {name}:
            assert f"| {other} |" in page and "not measured" in page


def test_goals_are_of_gpus_and_of_shapes_that_no_cache_holds():
    on_cpu = [result("cpu", 1.0, 0.1), result("reference", 1.0, 0.1)]
    assert "Goals" not in table.page({"cpu-1": table.load([json.dumps(r) for r in on_cpu])}, {})
    small = [r | {"bytes": 1 << 20} for r in goal_rows("d2", 0.5)]
    assert "0 reached, 0 short of the goal." in table.page({"gpu-1": table.load([json.dumps(r) for r in small])}, {})


def test_benches_measure_what_the_goals_speak_of():
    """A renamed op, pass or peer would leave its goal unmeasured for ever."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py"))
    names = {op for goal in table.GOALS for op in goal.ops} | {peer for goal in table.GOALS for peer in goal.faster}
    names |= {goal.pass_.replace("20 calls", "{GRAPH} calls") for goal in table.GOALS}
    assert not [name for name in names if f'"{name}"' not in sources]
    assert {goal.name for goal in table.GOALS} == GOAL_ROWS.keys()
    first, _ = bench_generate.ways("cuda")
    assert {way.name for way in first} >= {table.GRAPHS, *(peer for _, peer, _ in table.STREAM_GOALS if peer)}
    assert bench_generate.WAN.shape == table.STREAM


RIVALS = ("reference", "torch.compile")


def stream_rows(way: str, seconds: float, **changes) -> list[dict]:
    """What bench_generate writes of one way: a line that was timed and one that was counted."""
    about = {"device": "GPU 1", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-02"}
    key = {"op": "generate", "shape": table.STREAM, "dtype": "bfloat16", "backend": way, **about}
    timed = {"chunk_s": seconds, "iqr_s": 0.01, "fps": round(16 / seconds, 2), "first_s": 0.4, "cold_first_s": 9.5}
    timed |= {"fill_s": [0.4, 0.5, 0.7], "memory": 3 << 30, "attention": "SDPA", "beside": ["dit_ops, graphs", *RIVALS]}
    counted = {"syncs": 0, "allocations": 7, "launches": 12, "kept": 0}
    return [key | {"pass": "chunk"} | timed | changes, key | {"pass": "step"} | counted]


def streams(seconds: dict[str, float], **changes) -> str:
    rows = [r for way, s in seconds.items() for r in stream_rows(way, s, **changes)]
    return table.page({"gpu-1": table.load([json.dumps(r) for r in rows])}, {})


def test_page_shows_streams_with_what_a_step_costs():
    page = streams({"torch.compile": 1.3, "dit_ops, graphs": 1.0, "reference": 2.0})
    names, ours, compiled, reference = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line][:4]
    assert ours == (
        f"| {table.STREAM}, bfloat16 | dit_ops, graphs | 16.0 | 1.0 | 0.01 | 1.30× torch.compile, 2.00× reference "
        "| 0.4 (9.5) | 0.5–0.7 | 3.00 | 0 | 7 | 12 | 0 |"
    )
    assert compiled.startswith("|  | torch.compile | 12.31 | 1.3 | 0.01 |  |") and "| reference |" in reference
    assert names.count("|") == ours.count("|") == reference.count("|")
    assert "- SDPA: torch.compile; dit_ops, graphs; reference" in page
    alone = streams({"reference": 2.0, "dit_ops, graphs": 1.0}, beside=["dit_ops, graphs"])
    assert "2.00×" not in alone.split("### Goals")[0]


@pytest.mark.parametrize(
    ("name", "peer", "limit"), [("f1", "reference", 2.0), ("f2", "torch.compile", 1.3), ("f3", "frames/s", 16.0)]
)
def test_page_maps_the_goals_of_streaming(name, peer, limit):
    full = f"| {name} | generate, chunk | {table.STREAM} |"
    assert f"| {name} | generate, chunk | | | not measured |" in streams({"dit_ops, graphs": 1.0}, shape="another one")
    reached = streams({"dit_ops, graphs": 1.0, "torch.compile": 1.3, "reference": 2.0})
    short = streams({"dit_ops, graphs": 1.01, "torch.compile": 1.3, "reference": 2.0})
    for page, mark in ((reached, "reached"), (short, "short of goal")):
        (line,) = [line for line in page.splitlines() if line.startswith(full)]
        assert peer in line and f"(≥ {limit:g}" in line.replace("2.0×", "2×") and line.endswith(f"| {mark} |")
        assert f"{page.count('| reached |')} reached, {page.count('| short of goal |')} short of the goal." in page
    alone = streams({"dit_ops, graphs": 1.0})
    assert (full in alone) == (name == "f3") and "Goals" not in streams({"dit_ops, eager launches": 1.0})


def test_rows_hold_the_sensors_of_a_gpu_and_null_where_they_are_silent(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "copy_rate", lambda device: 10.0)
    names = ["sm_MHz", "power_W", "temperature_C"]
    assert measure.sensors("cpu") == {}
    for query, value in (("clock_rate", 1755), ("power_draw", 650_000), ("temperature", 60)):
        monkeypatch.setattr(torch.cuda, query, lambda value=value: value)
    sensed = measure.sensors("cuda")
    assert sensed == dict(zip(names, (1755, 650.0, 60), strict=True))
    assert sensed.items() <= measure.row({**KEY, "backend": "cpu"}, "cpu", 1, [1.0], sensed=sensed).items()

    def silent():
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "clock_rate", silent)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.sensors("cuda") == dict.fromkeys(names)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '1980, 512.25, [N/A]'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert measure.sensors("cuda:0") == dict(zip(names, (1980.0, 512.25, None), strict=True))


def test_scheduler_peer_takes_the_same_step():
    from diffusers import FlowMatchEulerDiscreteScheduler

    import dit_ops
    from dit_ops.bench import peers

    x, cond, uncond = torch.randn(3, 1, 2, 4)
    fns = {op: [*named.values()][0].fn for op, named in peers.flow_matching(x, 5.0).items()}
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    s, t = scheduler.sigmas[1].item(), scheduler.sigmas[2].item()
    for _ in range(2):
        torch.testing.assert_close(fns["cfg_euler_step"](cond, uncond), dit_ops.cfg_euler_step(x, cond, uncond, 5.0, s, t))
        torch.testing.assert_close(fns["add_noise"](x, cond), dit_ops.add_noise(x, cond, s))


def test_page_and_plot_are_made_from_the_files(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    rows = [result("triton", 10.0, 0.9), result("reference", 60.0, 0.15), result("triton", 9.0, 0.8, **{"pass": "backward"})]
    (tmp_path / "results/gpu-1.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table.main(tmp_path / "results", tmp_path / "docs")
    assert (tmp_path / "docs/performance-gpu-1.png").read_bytes()[:4] == b"\x89PNG"
    assert "(performance-gpu-1.png)" in (tmp_path / "docs/performance.md").read_text()


def test_committed_page_is_the_generated_one():
    """After a run that adds to a committed result file: python tools/performance_table.py"""
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    named = [p for p in sorted((ROOT / "bench/results").glob("*.jsonl")) if f"bench/results/{p.name}`" in page]
    files = {p.stem: table.load(p.read_text(encoding="utf-8").splitlines()) for p in named}
    plots = {name: f"performance-{name}.png" for name in files if (ROOT / f"docs/performance-{name}.png").exists()}
    notes = ROOT / "docs/notes/performance.md"
    assert page == table.page(files, plots, notes.read_text(encoding="utf-8") if notes.exists() else "")


def test_sanitizer_script_runs_kernels():
    done = subprocess.run(
        [sys.executable, "tools/sanitize_ops.py", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert ("adaln cpu: ran" in done.stdout and done.returncode == 0) or "no kernel ran" in done.stderr, done.stderr
    from dit_ops import doctor

    assert {line.split()[0] for line in done.stdout.splitlines()} == set(doctor.public_ops())


def test_make_gpu_is_a_plan_of_five_steps():
    outside = {name: value for name, value in os.environ.items() if name != "GPU_END"}  # this may run inside make gpu
    done = subprocess.run(["make", "-n", "gpu", "GPU_SECONDS=539"], cwd=ROOT, capture_output=True, text=True, env=outside)
    assert done.returncode == 0, done.stderr
    for step in (
        "build_ext --inplace",
        "-m pytest",
        "tools/sanitize_ops.py",
        "dit_ops bench generate --device cuda",
        "dit_ops bench $op",
        "tools/performance_table.py",
    ):
        assert step in done.stdout, step
    limits = [int(seconds) for seconds in re.findall(r"timeout (\d+)", done.stdout)]
    assert len(limits) == 6
    end = int(re.search(r"left=\$\(\((\d+) - \$\(date \+%s\)\)\)", done.stdout)[1])
    assert 530 < end - time.time() <= 539  # what the benches have is what is left
    whole = int(re.search(r"GPU_SECONDS \?= (\d+)", (ROOT / "Makefile").read_text())[1])
    assert whole < 9 * 60 and whole - sum(limits) >= 60
    for op in ("adaln", "qk_norm_rope_prope", "sampler_steps", "ema_update"):
        assert re.search(rf"for op in [^;]*\b{op}\b", done.stdout), op
    assert not re.search(r"for op in [^;]*\bgenerate\b", done.stdout)
