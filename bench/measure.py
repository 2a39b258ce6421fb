"""Timing and the record of a benchmark: a JSON line per op, shape, pass and backend, printed and kept in bench/results/.

The backends of one op, shape and pass take turns, A B … B A, so that a drift of the clocks meets all of them alike. On a GPU
every call starts with a flushed L2 cache, behind a pause that hides the host's work; on a CPU caches stay as they are.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results" if (ROOT / "pyproject.toml").exists() else Path("bench-results")
PAUSE = 2_000_000  # GPU clock cycles, about a millisecond
Run = Callable[[], object]


def interleaved(runs: dict[str, Run], device: str, repeats: int = 50) -> dict[str, list[float]]:
    """Sorted times in microseconds by name."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    flush = None if device == "cpu" else torch.empty(256 << 20, dtype=torch.uint8, device=device)
    for _ in range(max(1, repeats // 2)):
        for name in [*runs, *reversed(runs)]:
            times[name].append(_time_cpu(runs[name]) if flush is None else _time_gpu(runs[name], flush))
    return {name: sorted(t) for name, t in times.items()}


def _time_cpu(run: Run) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e3


def _time_gpu(run: Run, flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(PAUSE)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def warm_up(run: Run, device: str, calls: int = 3) -> None:
    for _ in range(calls):
        run()
    if device != "cpu":
        torch.cuda.synchronize()


def graphed(run: Run, calls: int = 20) -> Run:
    """One replay of a CUDA graph of `calls` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up(run, "cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def quartiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


@functools.lru_cache
def copy_rate(device: str) -> float:
    """GB/s, bytes read plus bytes written, of a copy far larger than the caches."""
    source = torch.randn((64 if device == "cpu" else 512) << 20, device=device)
    target = torch.empty_like(source)
    run = lambda: target.copy_(source)
    warm_up(run, device, 2)
    times = interleaved({"copy": run}, device, 10 if device == "cpu" else 30)["copy"]
    return 2 * source.nbytes / statistics.median(times) / 1e3


@functools.lru_cache
def matmul_rate(device: str) -> float:
    """TFLOP/s of a large matrix product of random bf16 numbers."""
    n = 1024 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    run = lambda: a @ b
    warm_up(run, device, 2)
    return 2 * n**3 / statistics.median(interleaved({"matmul": run}, device, 10)["matmul"]) / 1e6


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")
    return f"{model}, {torch.get_num_threads()} threads"


def sensors(device: str) -> dict[str, float | None]:
    """SM clock, power and temperature of a GPU now, null where neither NVML nor nvidia-smi tells them; nothing for a CPU."""
    if device == "cpu":
        return {}
    names = ("sm_MHz", "power_W", "temperature_C")
    try:
        clock, power, temperature = torch.cuda.clock_rate(), torch.cuda.power_draw(), torch.cuda.temperature()
        return dict(zip(names, (clock, power / 1000, temperature), strict=True))
    except (ImportError, RuntimeError):  # pynvml is not installed, or the driver does not answer
        return dict(zip(names, _nvidia_smi(torch.device(device).index or 0), strict=True))


def _nvidia_smi(index: int) -> list[float | None]:
    if shutil.which("nvidia-smi") is None:
        return [None] * 3
    query = ["--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader,nounits", f"--id={index}"]
    told = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True).stdout.strip().split(", ")
    return [float(value) if re.fullmatch(r"[\d.]+", value) else None for value in (told + [""] * 3)[:3]]


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def version(distribution: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def about(device: str) -> dict[str, object]:
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": version("triton"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def row(
    key: dict[str, str],
    device: str,
    moved_bytes: int,
    times: list[float] | None,
    reason: str | None = None,
    calls: int = 1,
    sensed: dict[str, float | None] | None = None,
) -> dict[str, object]:
    """The record of one backend: figures of one of `calls` calls, or why there are none. sensed: `sensors` after the timing."""
    if times is None:
        return {**key, "refused": reason, **about(device)}
    low, median, high = (t / calls for t in quartiles(times))
    rate, copy = moved_bytes / median / 1e3, copy_rate(device)
    return {
        **key,
        "us": round(median, 2),
        "iqr_us": round(high - low, 2),
        "min_us": round(times[0] / calls, 2),
        "GB/s": round(rate, 1),
        "copy_GB/s": round(copy, 1),
        "of_copy": round(rate / copy, 3),
        "bytes": moved_bytes,
        **(sensed or {}),
        **about(device),
    }


def compute_rates(record: dict[str, object], device: str, flops: float) -> dict[str, object]:
    """The rate of `flops` useful operations and its share of a large matrix product's; nothing without flops or time."""
    if not flops or "us" not in record:
        return {}
    rate, matmul = flops / float(str(record["us"])) / 1e6, matmul_rate(device)
    figures = {"TFLOP/s": round(rate, 2), "matmul_TFLOP/s": round(matmul, 2), "of_matmul": round(rate / matmul, 3)}
    return {**figures, "flops": flops}


def write(record: dict[str, object], output: str | None) -> None:
    """Prints the record and appends it to `output`: a file, by default the device's in bench/results; "-" is stdout alone."""
    line = json.dumps(record, ensure_ascii=False)
    print(line, flush=True)
    if output == "-":
        return
    path = Path(output) if output else RESULTS / f"{slug(str(record['device']))}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
