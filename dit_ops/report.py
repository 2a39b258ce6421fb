"""A self-contained HTML page of a run: headline number, videos, score table, loss curves (inline SVG), configuration."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dit_ops.files import atomic_path

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Strip:
    """One video file whose panels stand side by side (so they always play in step), with a label and a note per panel."""

    title: str
    video: str  # path relative to the page
    panels: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Score:
    """A line of the score table, in dB; `wrong` is None where there is no control."""

    name: str
    sampling: str
    right: float
    wrong: float | None = None


@dataclass(frozen=True)
class Report:
    title: str
    subtitle: str
    headline: str  # the one number
    claim: str  # the sentence that says what it means
    hero: Strip
    scores: Sequence[Score]
    score_note: str
    strips: Sequence[Strip] = ()
    charts: dict[str, dict[str, Points]] = field(default_factory=dict)  # title → line name → (step, value)
    configs: dict[str, str] = field(default_factory=dict)  # title → text
    facts: dict[str, str] = field(default_factory=dict)  # versions, hardware, times


def write_report(path: str | Path, report: Report) -> None:
    """Writes the page in one atomic step. Videos must lie beside it."""
    with atomic_path(path) as temporary:
        temporary.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    e = html.escape
    charts = "".join(
        f"<figure><figcaption>{e(title)}</figcaption>{line_chart(c)}</figure>" for title, c in report.charts.items()
    )
    configs = "".join(
        f"<details><summary>{e(title)}</summary><pre>{e(text)}</pre></details>" for title, text in report.configs.items()
    )
    facts = "".join(f"<tr><th>{e(name)}</th><td>{e(value)}</td></tr>" for name, value in report.facts.items())
    strips = "".join(_strip(strip) for strip in report.strips)
    sections = [
        ("More held-out samples", strips),
        ("Loss per stage", f'<div class="charts">{charts}</div>' if charts else ""),
        ("Configuration", configs),
        ("Versions and hardware", f'<table class="facts">{facts}</table>' if facts else ""),
    ]
    body = "".join(f"<section><h2>{e(title)}</h2>{content}</section>" for title, content in sections if content)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{e(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{e(report.title)}</h1><p class="quiet">{e(report.subtitle)}</p></header>
<div class="top">
<div class="headline"><strong>{e(report.headline)}</strong><p>{e(report.claim)}</p></div>
{_strip(report.hero)}
</div>
{_score_table(report.scores)}
<p class="quiet">{e(report.score_note)}</p>
{body}
</main>
</body>
</html>
"""


def _strip(strip: Strip) -> str:
    e = html.escape
    labels = "".join(f"<div>{e(label)}<small>{e(note)}</small></div>" for label, note in strip.panels)
    columns = f"grid-template-columns: repeat({len(strip.panels)}, 1fr)"
    return (
        f'<figure class="strip"><figcaption>{e(strip.title)}</figcaption>'
        f'<video autoplay loop muted playsinline src="{e(strip.video)}"></video>'
        f'<div class="labels" style="{columns}">{labels}</div></figure>'
    )


def _score_table(scores: Sequence[Score]) -> str:
    e = html.escape
    gaps = [s.right - s.wrong for s in scores if s.wrong is not None]
    widest = max([abs(gap) for gap in gaps] or [1.0]) or 1.0
    rows = []
    for s in scores:
        wrong, gap, bar = "–", "–", ""
        if s.wrong is not None:
            difference = s.right - s.wrong
            wrong, gap = f"{s.wrong:.2f}", f"{difference:+.2f}"
            tone = "good" if difference > 0 else "bad"
            bar = f'<span class="bar {tone}" style="width: {100 * abs(difference) / widest:.1f}%"></span>'
        rows.append(
            f"<tr><th>{e(s.name)}</th><td>{e(s.sampling)}</td><td class=number>{s.right:.2f}</td>"
            f"<td class=number>{wrong}</td><td class=number>{gap}</td><td class=bars>{bar}</td></tr>"
        )
    return (
        '<table class="scores"><thead><tr><th>Model</th><th>Sampler</th><th class=number>PSNR to the truth</th>'
        "<th class=number>to the wrong trajectory</th><th class=number>difference (dB)</th><th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 22, 28


def line_chart(lines: dict[str, Points]) -> str:
    """Inline SVG of one or more lines (x, y): raw values faint, a running mean strong; logarithmic beyond a factor 20."""
    kept = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in lines.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return '<p class="quiet">no values</p>'
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    log = min(ys) > 0 and max(ys) / min(ys) > 20
    scale = (lambda y: math.log10(y)) if log else (lambda y: y)
    x0, x1 = min(xs), max(xs)
    y0, y1 = scale(min(ys)), scale(max(ys))
    margin = 0.05 * (y1 - y0) or 0.05 * abs(y1) or 1.0
    y0, y1, x1 = y0 - margin, y1 + margin, x1 if x1 > x0 else x0 + 1

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _log_ticks(y0, y1) if log else _ticks(y0, y1):
        y = py(scale(tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(x0, x1):
        parts.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:g}</text>')
    for i, (name, points) in enumerate(kept.items()):
        points = _thin(points)
        smooth = _running_mean([y for _, y in points])
        for kind, values in (("raw", [y for _, y in points]), ("smooth", smooth)):
            path = " ".join(f"{px(x):.1f},{py(scale(y)):.1f}" for (x, _), y in zip(points, values, strict=True))
            parts.append(f'<polyline class="line{i % 4} {kind}" points="{path}"/>')
        if len(kept) > 1:  # legend, in the band above the plot
            x = LEFT + 110 * i
            parts.append(f'<line class="line{i % 4}" x1="{x}" x2="{x + 16}" y1="8" y2="8"/>')
            parts.append(f'<text x="{x + 22}" y="12">{html.escape(name)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten in [10^low, 10^high]; only the powers where that would be crowded."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= math.log10(m) + p <= high]
    return ticks if len(ticks) <= 7 else [10.0**p for p in powers if low <= p <= high]


def _thin(points: Points, limit: int = 600) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of its neighbours, so that long runs stay small on the page."""
    group = -(-len(points) // limit)
    groups = [points[i : i + group] for i in range(0, len(points), group)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a twentieth of the curve."""
    half = len(values) // 40
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --quiet: #667085; --paper: #fff; --card: #f6f7f9; --rule: #e3e6eb;
  --good: #0f8a5f; --bad: #c2413b; --c0: #2563eb; --c1: #d97706; --c2: #0f8a5f; --c3: #9333ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --quiet: #98a2b3; --paper: #11151c; --card: #1a202a;
  --rule: #2b3340; --good: #34c38f; --bad: #f0716b; --c0: #6ea8fe; --c1: #f5b14c; --c2: #34c38f; --c3: #c58cf5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
header { margin-bottom: 16px; }
h1 { margin: 0; font-size: 24px; font-weight: 650; }
h2 { margin: 36px 0 12px; font-size: 17px; font-weight: 600; }
p { margin: 4px 0; }
.quiet, small { color: var(--quiet); font-size: 13px; }
.top { display: grid; grid-template-columns: minmax(220px, 300px) 1fr; gap: 20px; align-items: stretch; margin-bottom: 20px; }
.headline, .strip, .charts figure { background: var(--card); border-radius: 10px; padding: 16px; }
.headline { display: flex; flex-direction: column; justify-content: center; }
.headline strong { font-size: 44px; line-height: 1.1; font-weight: 680; color: var(--good);
  font-variant-numeric: tabular-nums; }
figure { margin: 0 0 14px; }
.top .strip { margin: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 8px; }
video { display: block; width: 100%; border-radius: 6px; image-rendering: pixelated; background: #0008; }
.labels { display: grid; gap: 4px; margin-top: 6px; font-size: 13px; text-align: center; }
.labels small { display: block; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 7px 10px; border-bottom: 1px solid var(--rule); font-weight: 400; }
thead th { font-size: 13px; color: var(--quiet); }
tbody th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.bars { width: 18%; }
.bar { display: block; height: 10px; border-radius: 5px; min-width: 2px; }
.bar.good { background: var(--good); } .bar.bad { background: var(--bad); }
.facts th { width: 220px; color: var(--quiet); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px; }
.charts figure { margin: 0; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--quiet); } svg .grid { stroke: var(--rule); }
polyline, svg line { fill: none; stroke-width: 1.6; stroke-linejoin: round; } .raw { opacity: .28; stroke-width: 1; }
.line0 { stroke: var(--c0); } .line1 { stroke: var(--c1); } .line2 { stroke: var(--c2); } .line3 { stroke: var(--c3); }
details { border-bottom: 1px solid var(--rule); padding: 6px 0; } summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--card); border-radius: 8px; padding: 12px; font-size: 12.5px; }
@media (max-width: 760px) { .top { grid-template-columns: 1fr; } .bars { display: none; } }
"""
