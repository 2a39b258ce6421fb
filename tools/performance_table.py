"""python tools/performance_table.py: docs/performance.md, and a plot per device, from bench/results/*.jsonl.

A later line of a file replaces an earlier one of the same op, shape, dtype, pass and backend. docs/notes/performance.md says
why something falls short, and is taken over as it stands.
"""

import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEY = ("op", "shape", "dtype", "pass", "backend")
OURS = ("dense", "cuda", "triton", "cpu")
COMPILED = "torch.compile"


@dataclass(frozen=True)
class Goal:
    """What the best of our GPU backends shall reach, in the run that a result file holds."""

    name: str
    ops: tuple[str, ...]
    pass_: str
    of_copy: float = 0.0  # share of the copy bandwidth, of shapes that no cache holds
    faster: dict[str, float] = field(default_factory=dict)  # times as fast as these; below 1: hardly slower
    most_us: float = 0.0  # microseconds, of one streaming chunk
    tflops: float = 0.0  # useful operations
    shape: str = ""  # shapes whose name ends so
    baseline: tuple[str, str, float] | None = None  # our own (op, shape without this ending), and times as fast as it

    def shapes(self, rows: list[dict]) -> Iterator[list[dict]]:
        """The rows of every shape that the goal speaks of."""
        groups: dict[tuple, list[dict]] = {}
        for r in rows:
            if "us" in r and r["op"] in self.ops and r["pass"] == self.pass_ and r["shape"].endswith(self.shape):
                groups.setdefault((r["op"], r["shape"], r["dtype"]), []).append(r)
        for group in groups.values():
            if (self.most_us and "chunk" in group[0]["shape"]) or (not self.most_us and group[0]["bytes"] >= LARGE):
                yield group

    def figures(self, group: list[dict], rows: list[dict]) -> list[tuple[str, bool]]:
        """What is wanted and measured, and whether it is reached; rows: everything measured."""
        ours = best_of_ours(group)
        if ours is None:
            return []
        others = {r["backend"]: r["us"] for r in group}
        found = []
        if self.of_copy:
            found.append((f"{ours['of_copy']:.0%} of copy (≥ {self.of_copy:.0%})", ours["of_copy"] >= self.of_copy))
        if self.tflops:
            found.append((f"{ours['TFLOP/s']:.0f} TFLOP/s (≥ {self.tflops:.0f})", ours["TFLOP/s"] >= self.tflops))
        for other, ratio in self.faster.items():
            if other in others:
                faster = others[other] / ours["us"]
                found.append((f"{faster:.2f}× {other} (≥ {ratio}×)", faster >= ratio))
        if self.baseline:
            op, ending, ratio = self.baseline
            same = {"op": op, "shape": ours["shape"].removesuffix(ending), "dtype": ours["dtype"], "pass": ours["pass"]}
            plain = best_of_ours([r for r in rows if "us" in r and same.items() <= r.items()])
            if plain:
                faster = plain["us"] / ours["us"]
                found.append((f"{faster:.2f}× {op}{f' without{ending}' if ending else ''} (≥ {ratio:.2f}×)", faster >= ratio))
        if self.most_us:
            found.append((f"{ours['us']} µs (≤ {self.most_us} µs)", ours["us"] <= self.most_us))
        return found


def best_of_ours(rows: list[dict]) -> dict | None:
    return min((r for r in rows if r["backend"] in OURS), key=lambda r: r["us"], default=None)


STEPS = ("cfg_euler_step", "add_noise", "flow_to_x0", "renoise")
SCHEDULER = "diffusers FlowMatchEulerDiscreteScheduler"
FOREACH = {"torch._foreach_lerp_": 1.3, "torch._foreach_mul_, _foreach_add_": 1.3}
FLEX, PACKED = "flex_attention, cached BlockMask", "FA2 varlen on packed copies"
RING, TEXT = ", keys behind unused slots of a ring", ", text apart from the ring"
GOALS = (
    Goal(
        "a1",
        ("qk_norm_rope",),
        "forward",
        0.92,
        {"FlashInfer fused_qk_rmsnorm_rope, copies v": 1.1, COMPILED: 1.1, "reference": 10},
    ),
    Goal("a2", ("qk_norm_rope_prope",), "forward", 0.90, {COMPILED: 2}),
    Goal("a3", ("qk_norm_rope", "qk_norm_rope_prope"), "backward", 0.85, {COMPILED: 2}),
    Goal("a4", ("prope_output",), "forward", 0.92, {COMPILED: 1.5}),
    Goal("a4", ("prope_output",), "backward", 0.92, {COMPILED: 1.5}),
    Goal("a5", ("qk_norm_rope_prope",), "forward into slots", faster={"new tensors": 0.97}),
    Goal("c1", ("attention",), "forward", tflops=600, faster={"cuDNN SDPA": 1.05, FLEX: 1.5}, shape="latent frames"),
    Goal("c2", ("attention",), "forward", tflops=560, faster={"cuDNN SDPA": 1.15}, shape="a quarter of the heads"),
    Goal("c3", ("attention",), "forward", shape=RING, baseline=("attention", RING, 0.98)),
    Goal("c3", ("attention",), "forward", shape=TEXT, baseline=("attention", TEXT, 0.98)),
    Goal("c4", ("attention",), "forward", tflops=580, faster={FLEX: 1.45, PACKED: 1.5}, shape="teacher forcing"),
    Goal("c5", ("attention",), "backward", tflops=480, faster={FLEX: 1.6}, shape="teacher forcing"),
    Goal("c6", ("attention, deterministic",), "backward", tflops=410, shape="forcing", baseline=("attention", "", 1 / 1.15)),
    Goal("d1", ("adaln", "adaln, rms"), "forward", 0.93, {COMPILED: 1.15, "QuACK rmsnorm, no modulation": 1.0}),
    Goal("d2", ("gated_residual_adaln",), "forward", 0.93, {COMPILED: 1.15}),
    Goal("d3", ("adaln", "adaln, rms", "gated_residual_adaln"), "backward", 0.85, {COMPILED: 2, "Liger modulated_rms_norm": 3}),
    Goal("e1", STEPS, "forward", 0.90, {"reference": 5, SCHEDULER: 1.0}),
    Goal("e1", STEPS, "forward, 20 calls in a graph", most_us=3.0),
    Goal("e2", ("ema_update_",), "forward", 0.93, FOREACH),
)
LARGE = 128 << 20  # bytes that no L2 cache holds
STREAM = "wan2.1-1.3b with camera, 480×832, window of 20 latent frames, blocks of 4, 4 steps"
GRAPHS = "dit_ops, graphs"
STREAM_GOALS = (("f1", "reference", 2.0), ("f2", COMPILED, 1.3), ("f3", "", 16.0))  # times as fast as a peer; frames per second
STREAM_HEAD = """Streams of one model without text encoder and VAE. All ways share the weights; once their caches were full they
took turns chunk by chunk. Frames are pixel frames, four per latent frame. *First chunk* is that of a new stream, in brackets
the first at all, which compiles kernels; *filling* are the chunks until the cache is full. The rest is of a steady chunk: of
its costliest network step the reads that the host waits for, allocations and launches (on a CPU operators), and the bytes that
the chunk leaves behind.

| shape | way | frames/s | s a chunk | ± | faster | first chunk, s | filling, s | GiB | syncs | allocations | launches | left |
| --- | --- | --: | --: | --: | --- | --: | --: | --: | --: | --: | --: | --: |"""
HEAD = """# Performance

Made by `python tools/performance_table.py` from `bench/results/*.jsonl`, which `dit-ops bench` writes. Times are medians in
microseconds with the interquartile range; all backends of a row were timed in turns in one process, on a GPU with a flushed
L2 cache. GB/s counts the fewest bytes that the op must move; *of copy* is that rate over the bandwidth of a large copy,
measured in the same run. `reference` is plain PyTorch, `torch.compile` the same code compiled.
"""


def load(lines: Iterable[str]) -> dict[tuple, dict]:
    """The last record of every key."""
    records: dict[tuple, dict] = {}
    for line in lines:
        if line.strip():
            record = json.loads(line)
            key = tuple(record.get(name, "") for name in KEY)
            records.pop(key, None)
            records[key] = record
    return records


def page(files: dict[str, dict[tuple, dict]], plots: dict[str, str], notes: str = "") -> str:
    """Markdown. files: name of a result file -> its records; plots: the same name -> path of its plot."""
    parts = [HEAD]
    if not any(files.values()):
        parts.append("No results are committed yet.\n")
    for name, records in files.items():
        if records:
            parts.append(device_section(name, list(records.values()), plots.get(name)))
    return "\n".join(parts + ([notes.strip() + "\n"] if notes.strip() else []))


def device_section(name: str, records: list[dict], plot: str | None) -> str:
    machine = [r for r in records if r["op"] == "machine"]
    rows = [r for r in records if r["op"] != "machine"]
    last = records[-1]
    lines = [f"## {last['device']}", ""]
    dates = sorted({r["date"] for r in records})
    lines.append(f"`bench/results/{name}.jsonl`, torch {last['torch']}, triton {last['triton']}, {' and '.join(dates)}.")
    if machine:
        lines.append(f"Copy {machine[-1]['copy_GB/s']} GB/s, bf16 matrix product {machine[-1]['matmul_TFLOP/s']} TFLOP/s.")
    if plot:
        lines += ["", f"![Share of the copy bandwidth]({plot})"]
    if "cpu" in {r["backend"] for r in rows if "us" in r}:
        lines += ["", "On a CPU, caches are not flushed: where a shape fits in them, the share can pass 1."]
    for op in dict.fromkeys(r["op"] for r in rows):
        of_op = [r for r in rows if r["op"] == op]
        lines += ["", f"### {op}", "", *TABLES.get(op, table_rows)(of_op)]
    lines += ["", *goals(rows), *refusals(rows)]
    return "\n".join(lines).rstrip() + "\n"


def memory_rows(rows: list[dict]) -> list[str]:
    """Bytes of a full cache of keys and values."""
    lines = ["| shape, dtype | holds | GiB |", "| --- | --- | --: |"]
    return lines + [f"| {r['shape']}, {r['dtype']} | {r['backend']} | {r['bytes'] / 2**30:.2f} |" for r in rows]


def table_rows(rows: list[dict]) -> list[str]:
    """An op that computes more than it moves has the rate of its useful operations too."""
    computes = any("TFLOP/s" in r for r in rows)
    lines = [
        f"| shape | pass | backend | µs | ± | GB/s | of copy |{' TFLOP/s | of product |' if computes else ''} faster |",
        f"| --- | --- | --- | --: | --: | --: | --: |{' --: | --: |' if computes else ''} --- |",
    ]
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r["shape"], r["dtype"], r["pass"]), []).append(r)
    for (shape, dtype, pass_), group in groups.items():
        timed = sorted((r for r in group if "us" in r), key=lambda r: r["us"])
        others = {r["backend"]: r["us"] for r in timed if r["backend"] not in OURS}
        for i, r in enumerate(timed):
            head = f"{shape}, {dtype} | {pass_}" if i == 0 else " | "
            faster = ", ".join(f"{us / r['us']:.2f}× {b}" for b, us in others.items()) if r["backend"] in OURS else ""
            rates = f" {r.get('TFLOP/s', '')} | {r.get('of_matmul', 0):.0%} |" if computes else ""
            lines.append(
                f"| {head} | {r['backend']} | {r['us']} | {r['iqr_us']} | {r['GB/s']} | {r['of_copy']:.0%} |{rates} {faster} |"
            )
    return lines


def stream_rows(rows: list[dict]) -> list[str]:
    """A line per way to stream; what it was timed and what it was counted with are two records."""
    lines = [STREAM_HEAD]
    groups: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        if "refused" not in r:
            merged = groups.setdefault((r["shape"], r["dtype"]), {}).setdefault(r["backend"], {})
            merged |= r
    for (shape, dtype), ways in groups.items():
        timed = sorted((r for r in ways.values() if "chunk_s" in r), key=lambda r: r["chunk_s"])
        for i, r in enumerate(timed):
            ours = r["backend"].startswith("dit_ops")
            peers = [p for p in timed if ours and not p["backend"].startswith("dit_ops") and p["backend"] in r["beside"]]
            faster = ", ".join(f"{p['chunk_s'] / r['chunk_s']:.2f}× {p['backend']}" for p in peers)
            filling = r["fill_s"][1:]
            cells = [
                *(f"{shape}, {dtype}" if i == 0 else "", r["backend"], r["fps"], r["chunk_s"], r["iqr_s"]),
                *(faster, f"{r['first_s']} ({r['cold_first_s']})", f"{min(filling)}–{max(filling)}"),
                *(f"{r['memory'] / 2**30:.2f}" if "memory" in r else "",),
                *(r.get(name, "") for name in ("syncs", "allocations", "launches", "kept")),
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    kernels: dict[str, list[str]] = {}
    for r in rows:
        if "attention" in r and r["backend"] not in kernels.setdefault(r["attention"], []):
            kernels[r["attention"]].append(r["backend"])
    return [*lines, "", "Attention:", "", *(f"- {kernel}: {'; '.join(ways)}" for kernel, ways in kernels.items())]


TABLES = {"cache": memory_rows, "generate": stream_rows}


def stream_goals(rows: list[dict]) -> Iterator[tuple[str, str, bool | None]]:
    """(goal, figure (wanted), whether it is reached: None where it is not measured)"""
    ways = {r["backend"]: r for r in rows if r["op"] == "generate" and r["shape"] == STREAM and "chunk_s" in r}
    for name, peer, wanted in STREAM_GOALS:
        if GRAPHS not in ways or (peer and peer not in ways):
            yield name, "", None
        elif peer:
            faster = ways[peer]["chunk_s"] / ways[GRAPHS]["chunk_s"]
            yield name, f"{faster:.2f}× {peer} (≥ {wanted}×)", faster >= wanted
        else:
            fps = ways[GRAPHS]["fps"]
            yield name, f"{fps} frames/s (≥ {wanted:g})", fps >= wanted


def goals(rows: list[dict]) -> list[str]:
    """Every goal with its figures, of a file that holds measurements of ours on a GPU."""
    if not any((r["backend"] in ("cuda", "triton") and "us" in r) or (r["backend"] == GRAPHS and "fps" in r) for r in rows):
        return []
    lines = ["### Goals", "", "| goal | op and pass | shape | measured (wanted) | |", "| --- | --- | --- | --- | --- |"]
    counts = [0, 0]
    for goal in GOALS:
        measured = False
        for group in goal.shapes(rows):
            figures = goal.figures(group, rows)
            if figures:
                measured = True
                reached = all(ok for _, ok in figures)
                counts[reached] += 1
                what = "; ".join(text if ok else f"**{text}**" for text, ok in figures)
                r = group[0]
                mark = "reached" if reached else "short of goal"
                lines.append(f"| {goal.name} | {r['op']}, {r['pass']} | {r['shape']}, {r['dtype']} | {what} | {mark} |")
        if not measured:
            lines.append(f"| {goal.name} | {', '.join(goal.ops)}, {goal.pass_} | | | not measured |")
    for name, figure, reached in stream_goals(rows):
        if reached is None:
            lines.append(f"| {name} | generate, chunk | | | not measured |")
        else:
            counts[reached] += 1
            what, mark = (figure, "reached") if reached else (f"**{figure}**", "short of goal")
            lines.append(f"| {name} | generate, chunk | {STREAM} | {what} | {mark} |")
    return [*lines, "", f"{counts[True]} reached, {counts[False]} short of the goal.", ""]


def refusals(rows: list[dict]) -> list[str]:
    """One line per reason, with the ops that it stopped."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if "refused" in r:
            reason = r["refused"].removeprefix(f"{r['op']}: backend {r['backend']!r} cannot run this call: ")
            ops = reasons.setdefault((r["backend"], reason), [])
            if r["op"] not in ops:
                ops.append(r["op"])
    return ["Not measured:", ""] + [f"- {b} ({', '.join(ops)}): {why}" for (b, why), ops in reasons.items()] if reasons else []


def plot(records: list[dict], path: Path) -> None:
    """Bars of the share of the copy bandwidth at the largest shape of every op and pass: the best of ours, and the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, str], dict[str, dict]] = {}
    for r in records:
        if "us" in r and "graph" not in r["pass"]:
            groups.setdefault((r["op"], r["pass"]), {})
    for op, pass_ in groups:
        rows = [r for r in records if "us" in r and (r["op"], r["pass"]) == (op, pass_)]
        largest = max(rows, key=lambda r: r["bytes"])["shape"]
        for r in rows:
            if r["shape"] == largest:
                name = "dit_ops" if r["backend"] in OURS else r["backend"]
                kept = groups[op, pass_].get(name)
                groups[op, pass_][name] = r if kept is None or r["of_copy"] > kept["of_copy"] else kept
    measured = {name for group in groups.values() for name in group}
    first = [name for name in ("dit_ops", "torch.compile", "reference") if name in measured]
    names = first + sorted(measured - set(first))
    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(groups) * (len(names) / 2.5) + 1.5))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [j + i * height for j, g in enumerate(groups.values()) if name in g]
        axes.barh(at, [g[name]["of_copy"] for g in groups.values() if name in g], height, label=name)
    axes.set_yticks([j + 0.4 - height / 2 for j in range(len(groups))], [f"{op}, {pass_}" for op, pass_ in groups])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("share of the measured copy bandwidth, largest shape")
    axes.set_title(records[-1]["device"])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(results: Path = ROOT / "bench/results", docs: Path = ROOT / "docs") -> None:
    files = {path.stem: load(path.read_text(encoding="utf-8").splitlines()) for path in sorted(results.glob("*.jsonl"))}
    plots = {}
    for name, records in files.items():
        timed = [r for r in records.values() if "us" in r]
        if timed and importlib.util.find_spec("matplotlib"):
            plots[name] = f"performance-{name}.png"
            plot(timed, docs / plots[name])
    notes = docs / "notes/performance.md"
    text = page(files, plots, notes.read_text(encoding="utf-8") if notes.exists() else "")
    (docs / "performance.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
