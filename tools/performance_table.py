"""python tools/performance_table.py: docs/performance.md, and a plot per device, from bench/results/*.jsonl.

A later line of a file replaces an earlier one of the same op, shape, dtype, pass and backend. docs/notes/performance.md says
why something falls short, and is taken over as it stands.
"""

import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEY = ("op", "shape", "dtype", "pass", "backend")
OURS = ("cuda", "triton", "cpu")
GOALS = {  # (op, pass) -> share of the copy bandwidth, at full sequence length
    ("qk_norm_rope", "forward"): 0.92,
    ("qk_norm_rope_prope", "forward"): 0.90,
    ("qk_norm_rope", "backward"): 0.85,
    ("qk_norm_rope_prope", "backward"): 0.85,
    ("prope_output", "forward"): 0.92,
    ("prope_output", "backward"): 0.92,
    ("adaln", "forward"): 0.93,
    ("gated_residual_adaln", "forward"): 0.93,
    ("adaln", "backward"): 0.85,
    ("gated_residual_adaln", "backward"): 0.85,
    ("ema_update_", "forward"): 0.93,
} | {(op, "forward"): 0.90 for op in ("cfg_euler_step", "add_noise", "flow_to_x0", "renoise")}
LARGE = 128 << 20  # bytes that no L2 cache holds
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
        lines += [
            "",
            f"### {op}",
            "",
            "| shape | pass | backend | µs | ± | GB/s | of copy | faster |",
            "| --- | --- | --- | --: | --: | --: | --: | --- |",
        ]
        lines += table_rows([r for r in rows if r["op"] == op])
    lines += ["", *short_of_goal(rows), *refusals(rows)]
    return "\n".join(lines).rstrip() + "\n"


def table_rows(rows: list[dict]) -> list[str]:
    lines = []
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r["shape"], r["dtype"], r["pass"]), []).append(r)
    for (shape, dtype, pass_), group in groups.items():
        timed = sorted((r for r in group if "us" in r), key=lambda r: r["us"])
        others = {r["backend"]: r["us"] for r in timed if r["backend"] not in OURS}
        for i, r in enumerate(timed):
            head = f"{shape}, {dtype} | {pass_}" if i == 0 else " | "
            faster = ", ".join(f"{us / r['us']:.2f}× {b}" for b, us in others.items()) if r["backend"] in OURS else ""
            lines.append(
                f"| {head} | {r['backend']} | {r['us']} | {r['iqr_us']} | {r['GB/s']} | {r['of_copy']:.0%} | {faster} |"
            )
    return lines


def short_of_goal(rows: list[dict]) -> list[str]:
    """GPU lines of large shapes whose best backend of ours misses the share of the copy bandwidth that the op aims at."""
    best: dict[tuple, dict] = {}
    for r in rows:
        goal = GOALS.get((r["op"], r["pass"]))
        if goal and r["backend"] in ("cuda", "triton") and "us" in r and r["bytes"] >= LARGE:
            key = (r["op"], r["shape"], r["dtype"], r["pass"])
            best[key] = max(best.get(key, r), r, key=lambda r: r["of_copy"])
    missed = {key: r for key, r in best.items() if r["of_copy"] < GOALS[r["op"], r["pass"]]}
    if not best:
        return []
    if not missed:
        return [f"Every one of the {len(best)} large shapes reaches its goal.", ""]
    lines = [f"### Short of the goal: {len(missed)} of {len(best)} large shapes", ""]
    for (op, shape, dtype, pass_), r in missed.items():
        lines.append(
            f"- {op}, {pass_}, {shape}, {dtype}: {r['of_copy']:.0%} of copy ({r['backend']}), goal {GOALS[op, pass_]:.0%}"
        )
    return [*lines, ""]


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
