"""The notebook-style examples run as plain scripts, with random models in the place of the demo's."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from toy_demo import STAGES, demo_folder

from dit_ops import rooms
from dit_ops.camera import intrinsics_matrix, invert_rigid, parse_trajectory, trajectory_from_json
from dit_ops.video import read_mp4

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ["compare_stages", "follow_trajectory", "image_to_world", "text_to_world"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return demo_folder(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def run(demo, monkeypatch, capsys):
    """run(name): what an example printed, and its variables."""
    monkeypatch.chdir(demo)

    def run_example(name: str) -> tuple[str, dict]:
        scope = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, scope

    return run_example


def test_every_example_is_short_and_made_of_cells():
    assert sorted(path.stem for path in ROOT.glob("examples/*.py")) == sorted([*NOTEBOOKS, "custom_pipeline"])
    for name in NOTEBOOKS:
        text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) < 100, name
        assert text.startswith("# %% [markdown]\n# # ") and f"python examples/{name}.py" in text
        cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
        for cell in cells:
            words = cell.startswith(" [markdown]\n")
            assert all(line.startswith("#") or not line for line in cell.splitlines()[1:]) == words, f"{name}: {cell}"


def test_text_to_world(run):
    printed, scope = run("text_to_world")
    assert scope["video"].shape == (1, 8, 3, 64, 64) and printed.count("  2 frames after ") == 4
    assert "largest difference: 0.0\n" in printed
    assert read_mp4("out/examples/room.mp4")[0].shape == (8, 3, 64, 64) == tuple(scope["video"].shape[1:])
    assert len(scope["given"]) == 23 and len(read_mp4("out/examples/explored.mp4")[0]) == 24
    again = scope["pipeline"](scope["PROMPT"], pose=",".join(scope["given"]), seed=1, window_frames=8, sink_frames=1)
    torch.testing.assert_close(torch.cat(scope["seen"], 1), again, rtol=0, atol=0)


def test_image_to_world(run):
    printed, scope = run("image_to_world")
    codec = scope["pipeline"].condition
    camera = torch.eye(4)[None], intrinsics_matrix(*scope["settings"].intrinsics)
    seen = rooms.render(scope["PROMPT"], *camera, 64)[0]  # by the camera that the model knows
    torch.testing.assert_close(scope["image"], seen, atol=0.01, rtol=0)
    first = codec.decode_to_pixel(codec.encode_to_latent(scope["image"][None, None]))[0, 0]
    for video in (scope["video"], *scope["worlds"]):
        torch.testing.assert_close(video[0], first, atol=1e-5, rtol=0)
    before = codec.decode_to_pixel(codec.encode_to_latent(scope["video"][None]))[0]
    torch.testing.assert_close(scope["longer"][:8], before, atol=1e-4, rtol=0)
    assert read_mp4("out/examples/continued.mp4")[0].shape == (16, 3, 64, 64)
    assert read_mp4("out/examples/worlds.mp4")[0].shape == (8, 3, 64, 256)
    assert "8 known frames, 16 in out/examples/continued.mp4" in printed


def test_follow_trajectory(run):
    printed, scope = run("follow_trajectory")
    assert read_mp4("out/examples/followed.mp4")[0].shape == (8, 3, 64, 192)
    assert re.search(r"path \d+\.\d\d dB, along its mirror image \d+\.\d\d dB", printed)
    viewmats, Ks = trajectory_from_json("out/examples/arc.json")
    poses = json.loads(Path("out/examples/arc.json").read_text())
    recorded = torch.tensor([poses[str(i)]["extrinsic"] for i in range(8)])
    torch.testing.assert_close(invert_rigid(viewmats), recorded, atol=1e-6, rtol=0)
    assert Ks[:, 0, 0].unique().tolist() == pytest.approx([scope["settings"].intrinsics[0]])
    # the control is the other way round: right is left, and ahead stays ahead
    mirror, flip = scope["mirror"], lambda w2c: invert_rigid(scope["mirror"] @ invert_rigid(w2c) @ scope["mirror"])
    assert mirror.tolist() == torch.diag(torch.tensor([-1.0, 1, 1, 1])).tolist()
    torch.testing.assert_close(flip(parse_trajectory("d*2,j*3,w*1")), parse_trajectory("a*2,l*3,w*1"))


def test_compare_stages(run):
    printed, scope = run("compare_stages")
    table = [line.split() for line in printed.splitlines()]
    assert [row[0] for row in table[1:6]] == list(STAGES)
    assert read_mp4("out/examples/stages.mp4")[0].shape == (8, 3, 128, 6 * 64)
    same = scope["videos"]["causal_ode"]
    torch.testing.assert_close(same, scope["videos"]["dmd"], rtol=0, atol=0)  # the same model: the same seeds
    assert not torch.equal(same, scope["videos"]["bidirectional"])


def test_compare_stages_without_a_model_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="no model below out/demo: make demo trains them"):
        runpy.run_path(str(ROOT / "examples" / "compare_stages.py"))
