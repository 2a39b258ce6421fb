"""The benchmark of streaming: its peers compute the same and are compiled once, its counters see what they count."""

import contextlib
import gc
import json
import time
import warnings
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dit_ops.bench import bench_generate, generate_peers, measure
from dit_ops.bench.counters import MARK, Counter, spans, started_on_gpu
from dit_ops.bench.generate_streams import SPARE, Stream, start_all, take_turns
from dit_ops.ops.prope_output import project_ref
from dit_ops.pipelines import causal, stages

TINY = bench_generate.Model(
    "tiny",
    {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 8, "freq_dim": 16},
    (3, 8),
    32,
    32,
    torch.float32,
)
GUIDED = "guidance in one batch", "guidance in two passes"
OURS, REFERENCE, COMPILED = "dit_ops, eager launches", "reference", "torch.compile"


class Compiler:
    """Runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


def arguments(**changes) -> Namespace:
    return Namespace(**{"device": "cpu", "chunks": 2, "seconds": 600.0, "output": "-"} | changes)


def model() -> torch.nn.Module:
    backbone = bench_generate.random_backbone(TINY, "cpu")
    for p in backbone.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return backbone


def stream(name: str, backbone, compiler=None, **settings) -> Stream:
    way = next(way for group in bench_generate.ways("cpu", compiler or Compiler()) for way in group if way.name == name)
    way.options.update(settings)
    return bench_generate.stream_of(way, backbone, TINY, arguments(chunks=8))


def latents(of: Stream, chunks: int) -> list[torch.Tensor]:
    torch.manual_seed(0)  # the text
    running = of.chunks(lambda *_: None)
    found = []
    for _ in range(chunks):
        with of.inside():
            found.append(next(running).clone())
    return found


def test_every_way_is_recorded_with_what_it_takes_and_costs(tmp_path, capsys):
    bench_generate.main(arguments(output=str(tmp_path / "cpu.jsonl")), TINY, Compiler())
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    names = [way.name for group in bench_generate.ways("cpu", Compiler()) for way in group]
    assert sorted((r["backend"], r["pass"]) for r in rows) == sorted((name, p) for name in names for p in ("chunk", "step"))
    assert {r["shape"] for r in rows} == {
        "tiny with camera, 32×32, window of 20 latent frames, blocks of 4, 4 steps",
    }
    chunk, step = ({r["backend"]: r for r in rows if r["pass"] == p} for p in ("chunk", "step"))
    for r in chunk.values():
        assert r["chunks"] == 2 and len(r["fill_s"]) == 5 and r["fill_s"][0] == r["first_s"]
        assert r["fps"] == pytest.approx(4 * r["latent_fps"], rel=0.01)
        assert r["fps"] == pytest.approx(16 / r["chunk_s"], rel=0.01)
    assert chunk[OURS]["beside"] == [OURS, REFERENCE, COMPILED]
    assert {name: (r["compiled"], r["recompiled"]) for name, r in chunk.items()} == dict.fromkeys(names, (0, 0)) | {
        COMPILED: (2, 0)
    }
    assert "SDPA" in chunk[REFERENCE]["attention"] and "SDPA" in chunk[COMPILED]["attention"]
    weights = sum(p.nbytes for p in model().parameters())
    for name, r in step.items():
        assert r["syncs"] == r["kept"] == 0, name
        cache = TINY.cache_bytes(2 if "guidance" in name else 1)
        assert weights + cache * (0.5 if "compact" in name else 1) < r["memory"] < weights + 4 * cache, name
    assert 0 < step[OURS]["launches"] < step[REFERENCE]["launches"] and "launches" not in step[COMPILED]
    assert 0 < step[OURS]["allocations"] < step[REFERENCE]["allocations"]
    compact, batch, passes = (step[f"{OURS}, {way}"]["launches"] for way in ("compact cache", *GUIDED))
    assert step[OURS]["launches"] < compact < passes and batch < passes  # keys are turned for every layer; two networks


def test_compiled_peer_computes_the_reference_and_is_compiled_once():
    """Also with a window of 7 frames, a sink and blocks of 4: the ring wraps inside a block, and the numbers of keys differ."""
    backbone = model()
    for settings in ({}, {"window_frames": 7, "sink_frames": 1}):
        compiler = Compiler()
        want = latents(stream(REFERENCE, backbone, **settings), 8)
        found = latents(stream(COMPILED, backbone, compiler, **settings), 8)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
        assert not torch.equal(want[0], want[1]) and want[-1].std() > 0.1
        ours = latents(stream(OURS, backbone, **settings), 8)
        torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)
        called = [str(node.target) for graph in compiler.graphs for node in graph.graph.nodes]
        assert len(compiler.graphs) == 2 + bool(settings)  # keys into slots, keys that wrap, what is behind attention
        assert any("linear" in name for name in called)
        assert not any("bmm" in name for name in called)


def test_sums_are_the_matrix_products_of_the_cameras():
    M = torch.randn(2, 3, 4, 4)
    for x in (torch.randn(2, 6, 3, 8), torch.randn(2, 6, 6, 8)[:, :, 3:], torch.randn(2, 6, 3, 8).bfloat16()):
        for halves in (1, 2):
            x = torch.cat([x] * halves, 1)
            torch.testing.assert_close(generate_peers.project_in_sums(x, M, halves), project_ref(x, M, halves))


def test_eager_ways_record_no_graphs_and_the_other_one_does(monkeypatch):
    """A stand-in for CUDA graphs that runs the step again; steady chunks launch and record nothing."""
    done = []

    def capture(step):
        done.append("record")
        out = step()

        def replay():
            done.append("replay")
            out.copy_(step())

        return replay, out

    monkeypatch.setattr(stages, "capture_of", lambda backbone, windowed: capture)
    backbone = model()
    eager = stream(OURS, backbone)
    eager.start()
    assert done == []
    way = bench_generate.ways("cuda")[0][0]
    assert way.name == "dit_ops, graphs" and way not in bench_generate.ways("cpu")[0]
    graphs = bench_generate.stream_of(way, backbone, TINY, arguments())
    run, launched = causal.CausalPass._run, []
    monkeypatch.setattr(causal.CausalPass, "_run", lambda self, step, key: launched.append(key) or run(self, step, key))
    graphs.start()
    assert done.count("record") == 2 * bench_generate.CYCLE
    done.clear(), launched.clear()
    for _ in range(2):
        graphs.chunk()
    assert set(done) == {"replay"} and len(done) == len(launched) == 2 * 5


def test_counter_sees_reads_allocations_and_what_stays(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it is an operator too
    x, kept = torch.randn(64, 64), []
    counter = Counter("cpu")
    with counter:
        for step in range(3):
            (x + x).mul_(2.0)
            if step == 0:
                for _ in range(4):
                    x.cos()
            if step == 1:
                kept.append(x.clone())
                x.sum().item()
            counter.mark()
        torch.zeros(9, 9).nonzero()
    assert len(spans(counter.events)) == 3
    assert counter.most(1) == {"syncs": 0, "allocations": 1, "launches": 2}
    both = counter.most(2)
    assert both == {"syncs": 1, "allocations": 2, "launches": 5}
    assert counter.most(3) == {"syncs": 1, "allocations": 5, "launches": 6}
    assert (counter.kept(1), counter.kept(2)) == (0, x.nbytes)
    assert 2 * x.nbytes <= counter.peak() < 3 * x.nbytes


def test_launches_are_calls_that_start_work():
    def event(name, ts, correlation=0, cat="cuda_runtime"):
        return {"name": name, "ts": ts, "cat": cat, "args": {"correlation": correlation}}

    events = [
        event("cudaLaunchKernel", 1, 1),
        event("cuLaunchKernel", 1.1, 1, "cuda_driver"),  # inside the one before
        event("cuLaunchKernelEx", 2, 2, "cuda_driver"),
        event("cudaGraphLaunch", 3, 3),
        event("cudaMemcpyAsync", 4, 4),
        event("cudaMemsetAsync", 5, 5),
        event("cudaEventRecord", 6, 6),
        event("cudaStreamSynchronize", 7, 7),
        event("kernel", 8, 3, "kernel"),
        event("cudaLaunchKernelExC", 20, 8),
        {"name": "process_name", "ph": "M"},
    ]
    assert started_on_gpu(events, 0, 10) == {"launches": 5}
    assert started_on_gpu(events, 10, 30) == {"launches": 1}
    marks = [{"name": MARK, "ts": ts, "cat": cat} for ts, cat in ((9, "user_annotation"), (9, "gpu_user_annotation"))]
    assert spans([*events, *marks, {"name": MARK, "ts": 25, "cat": "user_annotation"}]) == [(0.0, 9), (9, 25)]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_counter_of_a_gpu_asks_torch(monkeypatch):
    """Four allocations before the first step, then 1, 2 and 3 of them; the second step waits and is given memory."""
    stats, modes = {"allocation.all.allocated": 4, "num_device_alloc": 1}, ["default"]
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: dict(stats))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    counter = Counter("cuda")
    with counter:
        assert modes == ["default", "warn"]
        for step in (1, 2, 3):
            stats["allocation.all.allocated"] += step
            warnings.warn("of something else", stacklevel=1)
            if step == 2:
                stats["num_device_alloc"] += 1
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            counter.mark()
    assert modes[-1] == "default"
    assert counter.most(1) == {"syncs": 0, "allocations": 3, "device_allocations": 0, "launches": 0}
    assert counter.most(3) == {"syncs": 1, "allocations": 3, "device_allocations": 1, "launches": 0}


def fake(name: str, log: list[str], fails: Exception | None = None, need: int = 0, device: str = "cpu") -> Stream:
    def chunks(on_step):
        try:
            while True:
                if fails:
                    raise fails
                log.append(name)
                on_step(1, 0)
                yield torch.zeros(1)
        finally:
            log.append(f"end of {name}")

    return Stream(name, chunks, contextlib.nullcontext, device, fill=2, settle=1, need=need)


def test_streams_take_turns_and_stop_when_time_is_up():
    log = []
    streams, failed, waiting = start_all([fake(name, log) for name in "AB"])
    assert log == [x for name in "AB" for x in (name, f"end of {name}", name, name, name)] and not failed and not waiting
    log.clear()
    take_turns(streams, 4, time.monotonic() + 60)
    assert "".join(log) == "ABBA" * 2 and [len(s.timed) for s in streams] == [4, 4]
    log.clear()
    take_turns(streams, 5, time.monotonic())
    assert "".join(log) == "ABBA"
    assert [len(s.times) for s in streams] == [1 + 2 + 4 + 2] * 2


def test_a_peer_may_fail_and_ours_may_not(monkeypatch, capsys):
    log = []
    streams = [fake("reference", log, RuntimeError("out of\nmemory")), fake("torch.compile", log)]
    monkeypatch.setattr(bench_generate, "counted", lambda stream, weights: {})
    assert bench_generate.race(streams, TINY, 0, arguments(), time.monotonic()) == []
    refused, timed, counted = map(json.loads, capsys.readouterr().out.splitlines())
    assert (refused["backend"], refused["refused"]) == ("reference", "RuntimeError: out of")
    assert (timed["backend"], timed["pass"], timed["chunks"], counted["pass"]) == ("torch.compile", "chunk", 2, "step")
    assert log[-1] == "end of torch.compile"
    broken = bench_generate.race([fake(OURS, log, TypeError()), fake("x", log)], TINY, 0, arguments(), 0)
    assert broken == [OURS]
    monkeypatch.setattr(bench_generate, "race", lambda *_: [OURS])
    with pytest.raises(SystemExit, match=f"failed: {OURS}"):
        bench_generate.main(arguments(), TINY)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        bench_generate.main(arguments(seconds=-1.0), TINY)
    refused = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["backend"].split(", ")[-1] for r in refused] == [
        "compact cache",
        "guidance in one batch",
        "guidance in two passes",
    ]
    assert {r["refused"] for r in refused} == {"no time was left of -1 seconds"}


@pytest.fixture
def gpu_memory(monkeypatch) -> SimpleNamespace:
    """torch's view of a GPU: bytes that are allocated, the most since a reset, and free ones."""
    monkeypatch.setattr(gc, "collect", lambda: None)
    memory = SimpleNamespace(now=1000, most=0, free=20 << 30)
    for name, read in {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: setattr(memory, "most", memory.now),
        "memory_allocated": lambda: memory.now,
        "max_memory_allocated": lambda: memory.most,
        "mem_get_info": lambda: (memory.free, 80 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, read)
    return memory


def test_memory_of_a_stream_is_its_own(gpu_memory):
    """Two streams: A keeps 100 and needs 50 more for a moment, B keeps 7 a chunk and needs 500 more."""

    def chunks(first, each, moment):
        def run(on_step):
            gpu_memory.now += first
            while True:
                gpu_memory.now += each
                gpu_memory.most = gpu_memory.now + moment
                yield None

        return run

    a, b = (Stream(n, chunks(*of), contextlib.nullcontext, "cuda", 1) for n, of in (("A", (100, 0, 50)), ("B", (0, 7, 500))))
    for _ in range(3):
        a.chunk(), b.chunk()
    assert (a.peak, a.kept) == (150, 0) and (b.peak, b.kept) == (521, 7)


def test_streams_without_room_wait_for_the_others(gpu_memory):
    log, need = [], 5 << 30
    streams = [fake(name, log, need=need, device="cuda") for name in "ABC"]
    gpu_memory.free = SPARE + 2 * need + 1
    run = Stream.start

    def start(stream):
        run(stream)
        gpu_memory.free -= need

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stream, "start", start)
        started, _, waiting = start_all(streams)
        assert [s.name for s in started] == ["A", "B"] and [s.name for s in waiting] == ["C"]
    gpu_memory.free = 0
    assert [s.name for s in start_all(waiting)[0]] == ["C"]  # the first of all runs in any case


@pytest.mark.gpu
def test_a_gpu_replays_graphs_and_waits_for_nothing(tmp_path):
    tiny = bench_generate.Model(
        "tiny", TINY.config | {"num_attention_heads": 2, "attention_head_dim": 64}, TINY.text, 64, 64, torch.bfloat16
    )
    bench_generate.main(arguments(device="cuda", output=str(tmp_path / "gpu.jsonl")), tiny, Compiler())
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert not [r for r in rows if "refused" in r]
    chunk, step = ({r["backend"]: r for r in rows if r["pass"] == p} for p in ("chunk", "step"))
    assert len(chunk) == len(step) == 7 and chunk["dit_ops, graphs"]["kept"] == 0
    graphs = step["dit_ops, graphs"]
    assert graphs["syncs"] == graphs["device_allocations"] == 0
    assert 0 < graphs["launches"] < step[OURS]["launches"] < step[REFERENCE]["launches"]
    assert (chunk[COMPILED]["compiled"], chunk[COMPILED]["recompiled"]) == (2, 0)
    assert all(r["memory"] > tiny.cache_bytes(1) / 2 for r in chunk.values())


def test_full_size_is_the_published_model():
    with torch.device("meta"):
        backbone = bench_generate.random_backbone(bench_generate.WAN, "meta")
    layers = bench_generate.WAN.config["num_layers"]
    weights = sum(p.numel() for p in backbone.parameters()) - sum(p.numel() for p in backbone.camera.parameters())
    assert layers == len(backbone.blocks) and round(weights / 1e9, 2) == 1.42
    assert bench_generate.WAN.cache_bytes(1) == 2 * layers * 20 * 1560 * 24 * 128 * 2
    assert Path(measure.RESULTS).name == "results"
