"""The report: charts that show the data, a page that is whole, and figures of merit."""

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch

from dit_ops.evaluate import Sample, generate_samples, psnr, score
from dit_ops.report import Report, Score, Strip, line_chart, page, write_report

HERO = Strip("hero <1>", "videos/student.mp4", [("Generated", "20.1 dB"), ("Truth", "")])


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    root = ET.fromstring(svg)
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in root.iter("polyline")]


def labels(svg: str, anchor: str) -> list[float]:
    return [float(t.text) for t in ET.fromstring(svg).iter("text") if t.get("text-anchor") == anchor]


def test_a_chart_maps_values_linearly_and_stays_inside():
    raw, smooth = polylines(line_chart({"loss": [(0, 1.0), (50, 2.0), (100, 3.0)]}))
    assert raw == smooth  # three points need no smoothing
    (x0, y0), (x1, y1), (x2, y2) = raw
    assert x1 - x0 == pytest.approx(x2 - x1) and y0 - y1 == pytest.approx(y1 - y2) and y0 > y2
    assert all(0 < x < 440 and 0 < y < 220 for x, y in raw)
    svg = line_chart({"loss": [(0, 1.0), (50, 2.0), (100, 3.0)]})
    assert labels(svg, "middle") == [0, 20, 40, 60, 80, 100] and labels(svg, "end") == [1, 1.5, 2, 2.5, 3]


def test_a_chart_is_logarithmic_where_values_span_decades():
    raw, _ = polylines(line_chart({"loss": [(0, 1.0), (1, 0.1), (2, 0.01)]}))
    assert raw[1][1] - raw[0][1] == pytest.approx(raw[2][1] - raw[1][1], abs=0.2)
    assert 0.1 in labels(line_chart({"loss": [(0, 1.0), (1, 0.1), (2, 0.01)]}), "end")


def test_two_lines_have_a_legend_and_share_axes():
    svg = line_chart({"generator": [(0, 1.0), (10, 1.0)], "fake score": [(0, 2.0), (10, 2.0)]})
    assert "generator" in svg and "fake score" in svg
    lines = polylines(svg)
    assert len(lines) == 4 and lines[0][0][1] > lines[2][0][1]


@pytest.mark.parametrize("points", [[], [(0, math.nan)], [(0, math.inf)]])
def test_a_chart_without_values_says_so(points):
    assert "no values" in line_chart({"loss": points})


@pytest.mark.parametrize(
    "points", [[(5, 2.0)], [(0, 0.0), (1, 0.0)], [(0, -1.0), (1, 1.0)], [(0, 1.0), (1, math.nan), (2, 3.0)]]
)
def test_degenerate_charts_are_drawn(points):
    for line in polylines(line_chart({"loss": points})):
        assert all(math.isfinite(x) and math.isfinite(y) for x, y in line)


def test_long_curves_are_thinned_to_their_mean():
    raw, smooth = polylines(line_chart({"loss": [(i, 1.0 + (-1) ** i) for i in range(20000)]}))
    assert len(raw) <= 600
    assert max(y for _, y in smooth) - min(y for _, y in smooth) < 1


class Balanced(HTMLParser):
    """Every tag that is opened is closed, in order."""

    VOID = {"meta", "line", "polyline"}

    def __init__(self):
        super().__init__()
        self.open, self.videos = [], []

    def handle_starttag(self, tag, attrs):
        if tag == "video":
            self.videos.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def make_report(**changes) -> Report:
    fields = {
        "title": "A <b>title</b>",
        "subtitle": "preset tiny & seed 0",
        "headline": "+3.21 dB",
        "claim": "The student follows.",
        "hero": HERO,
        "scores": [Score("DMD", "4 steps", 21.5, 18.25), Score("Codec", "truth", 30.0)],
        "score_note": "Mean over 8 videos.",
        "strips": [HERO],
        "charts": {"dmd": {"generator": [(1, 0.5), (2, 0.25)]}},
        "configs": {"dmd": "steps: 60\nstage: <dmd>"},
        "facts": {"torch": "2.13"},
    }
    return Report(**fields | changes)


def test_the_page_is_whole_and_escaped(tmp_path):
    write_report(tmp_path / "index.html", make_report())
    text = (tmp_path / "index.html").read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert [v["src"] for v in parser.videos] == ["videos/student.mp4"] * 2
    assert all({"autoplay", "loop", "muted"} <= v.keys() for v in parser.videos)
    assert "<b>title" not in text and "stage: &lt;dmd&gt;" in text and "hero &lt;1&gt;" in text
    assert "+3.25" in text and "18.25" in text and "+3.21 dB" in text
    assert not re.search(r"https?://|<script|<link", text)  # nothing from elsewhere


def test_a_page_without_extras_has_no_empty_sections():
    text = page(make_report(strips=(), charts={}, configs={}, facts={}))
    assert "<h2>" not in text


def test_psnr_of_known_errors():
    truth = torch.zeros(2, 3, 4, 4)
    assert psnr(truth + 0.2, truth) == pytest.approx(20.0, abs=1e-5)  # 10·log10(4 / 0.04)
    assert psnr(truth, truth) > 100
    with pytest.raises(ValueError, match="as the truth"):
        psnr(truth[:1], truth)


def test_scores_compare_the_truth_with_the_wrong_trajectory():
    truth, wrong = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    samples = [Sample("a", "w*0", truth, wrong), Sample("b", "w*0", wrong, truth)]
    result = score(torch.stack([truth + 0.2, truth + 0.2]), samples)
    near, far = psnr(truth + 0.2, truth), psnr(truth + 0.2, wrong)
    assert [s["psnr"] for s in result["samples"]] == pytest.approx([near, far], abs=1e-4)
    assert result["psnr"] == result["psnr_wrong"] and result["difference"] == 0
    assert score(truth[None] + 0.2, samples[:1])["difference"] == pytest.approx(near - far, abs=1e-3)


def test_samples_are_generated_alike_in_any_batches():
    samples = [Sample(str(i), "w*0", torch.zeros(1), torch.zeros(1)) for i in range(5)]
    pipeline = lambda prompts, pose, seed: torch.tensor([[float(p), float(s)] for p, s in zip(prompts, seed, strict=True)])
    for batch in (1, 2, 8):
        assert generate_samples(pipeline, samples, seed=7, batch=batch).tolist() == [[i, 7 + i] for i in range(5)]
