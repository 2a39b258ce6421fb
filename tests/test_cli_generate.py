"""`dit-ops generate` beyond one video: batches with seeds of their own, continued files, ranks, and its arguments."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_pipelines import SETTINGS, make_backbone
from torch.testing._internal.distributed.fake_pg import FakeStore
from toy_ranks import Collectives

from dit_ops import cli_generate
from dit_ops.cli import main, parser
from dit_ops.conditions.linear import LinearCondition
from dit_ops.pipelines import files, loading
from dit_ops.video import read_mp4, to_uint8, write_mp4

LINES = [
    {"prompt": "a red room", "pose": "w*2,l*2"},
    {"prompt": "a blue room", "pose": "s*2,l*2", "seed": 5},
    {"prompt": "a red room", "pose": "w*2,l*2"},
    {"prompt": "a red room", "pose": "w*2,l*2", "seed": 4},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "model"
    condition = LinearCondition.fit(torch.rand(2, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    loading.save(folder, "few_step", make_backbone(), condition, SETTINGS)
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


def generate(model: Path | str, output: Path | str, *arguments: str) -> int:
    return main(["generate", "--model", str(model), "--output", str(output), "--device", "cpu", *arguments])


def one(model: Path, output: Path, line: dict, *arguments: str) -> Path:
    """The video of one line, made by a run of its own."""
    words = ["--prompt", line["prompt"], "--pose", line["pose"], "--seed", str(line.get("seed", 0))]
    assert generate(model, output, *words, *arguments) == 0
    return output


def test_every_item_of_a_batch_is_what_it_is_alone(model, prompts, tmp_path, capsys):
    assert generate(model, tmp_path / "out", "--prompts", str(prompts)) == 0
    printed = capsys.readouterr().out.split()
    videos = sorted((tmp_path / "out").glob("*.mp4"))
    assert sorted(map(Path, printed)) == videos and len(videos) == 3, "equal lines are one video, made once"
    for line in LINES:
        alone = one(model, tmp_path / "alone.mp4", line, "--overwrite").read_bytes()
        request = json.loads((tmp_path / "alone.json").read_text())["request"]
        (same,) = [v for v in videos if json.loads(v.with_suffix(".json").read_text())["request"] == request]
        assert same.read_bytes() == alone
    assert len({v.read_bytes() for v in videos}) == 3


def test_a_batch_that_was_stopped_goes_on_with_what_is_missing(model, prompts, tmp_path, capsys, monkeypatch):
    made = files.generate_file

    def stop_at_the_second(pipeline, item, *rest, **given):
        if item.seed == 5:
            raise KeyboardInterrupt
        return made(pipeline, item, *rest, **given)

    monkeypatch.setattr(files, "generate_file", stop_at_the_second)
    assert generate(model, tmp_path / "out", "--prompts", str(prompts)) == 130
    captured = capsys.readouterr()
    first = Path(captured.out.strip())
    assert captured.err.endswith("dit-ops generate: stopped\n") and sorted((tmp_path / "out").glob("*.mp4")) == [first]
    monkeypatch.setattr(files, "generate_file", made)
    before = first.stat().st_mtime_ns
    assert generate(model, tmp_path / "out", "--prompts", str(prompts)) == 0
    captured = capsys.readouterr()
    assert f"{first}: finished before" in captured.err and captured.err.count("finished before") == 1
    assert first.stat().st_mtime_ns == before and len(captured.out.split()) == 2
    monkeypatch.setattr(cli_generate, "load_pipeline", lambda *_: pytest.fail("nothing is left to do: no model is loaded"))
    assert generate(model, tmp_path / "out", "--prompts", str(prompts)) == 0


def test_what_is_wrong_with_the_last_line_is_said_before_the_first_is_made(model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli_generate, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    with prompts.open("a") as file:
        file.write('\n{"prompt": "a", "pose": "w*2,x*1"}')
    assert generate(model, tmp_path / "out", "--prompts", str(prompts)) == 2
    assert "line 5: pose string 'w*2,x*1': segment 2" in capsys.readouterr().err


def test_a_named_file_is_not_replaced_by_another_video(model, tmp_path, capsys):
    path = one(model, tmp_path / "a.mp4", LINES[0])
    before = path.read_bytes()
    words = ["--prompt", "a blue room", "--pose", "w*2"]
    assert generate(model, path, *words) == 2
    assert "is there already, and not from this request" in capsys.readouterr().err and path.read_bytes() == before
    assert generate(model, path, *words, "--overwrite") == 0 and path.read_bytes() != before


def test_a_picture_or_the_end_of_a_video_is_continued(model, tmp_path):
    """Known frames come first, as the codec gives them back, and the others follow from them."""
    known = one(model, tmp_path / "a.mp4", LINES[0])
    frames = read_mp4(known)[0]
    Image.fromarray(to_uint8(frames[-1:])[0].numpy()).save(tmp_path / "a.png")
    pipeline = loading.load(model, device="cpu")
    codec = lambda video: pipeline.condition.decode_to_pixel(pipeline.condition.encode_to_latent(video[None]))[0]
    words = ["--prompt", "a red room", "--pose", "w*2,l*4"]
    for option, file, given in (("--video", known, frames), ("--image", tmp_path / "a.png", frames[-1:])):
        made = tmp_path / f"{option}.mp4"
        assert generate(model, made, *words, option, str(file)) == 0
        video = read_mp4(made)[0]
        assert len(video) == 7
        write_mp4(tmp_path / "known.mp4", torch.cat([codec(given), video[len(given) :]]), SETTINGS.fps)
        assert (video - read_mp4(tmp_path / "known.mp4")[0])[: len(given)].abs().mean() < 0.02
        name = option.strip("-")
        expected = pipeline("a red room", pose="w*2,l*4", **{name: given if name == "video" else given[0]})
        write_mp4(tmp_path / "expected.mp4", expected[0], SETTINGS.fps)
        assert made.read_bytes() == (tmp_path / "expected.mp4").read_bytes()
        request = json.loads(made.with_suffix(".json").read_text())["request"]
        assert request[name] == str(file) and len(request["sha256"][name]) == 64
    line = {"prompt": "a red room", "pose": "w*3", "video": str(known)}
    (tmp_path / "continue.jsonl").write_text(json.dumps(line))
    assert generate(model, tmp_path / "out", "--prompts", str(tmp_path / "continue.jsonl")) == 2, "no frame is left to make"


def test_arguments_reach_the_loader_and_the_stream(model, tmp_path, monkeypatch):
    seen: dict = {}
    load = loading.load

    def spy(*given, **named):
        seen.update(named)
        pipeline = load(*given, mode=named["mode"])
        stream = pipeline.stream
        pipeline.stream = lambda *a, overlap=None, **k: (seen.update(k, overlap=overlap), stream(*a, **k))[1]
        return pipeline

    monkeypatch.setattr(loading, "load", spy)
    words = ["--prompt", "a room", "--pose", "w*2", "--mode", "few_step", "--no-overlap", "--compact-cache"]
    low = ["--offload", "--float8", "--vae-tiling"]
    assert generate(model, tmp_path, *words, *low, "--window-frames", "4", "--sink-frames", "1") == 0
    expected = {"mode": "few_step", "condition": None, "offload": True, "float8": True, "vae_tiling": True, "overlap": False}
    expected |= {"compact_cache": True, "window_frames": 4, "sink_frames": 1}
    assert {name: seen[name] for name in expected} == expected
    (record,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    request = record["request"]
    assert request["options"] == {"compact_cache": True, "window_frames": 4, "sink_frames": 1}
    assert request["model"]["float8"] is True and request["model"]["vae_tiling"] is True
    assert "offload" not in request["model"], "it gives the same video"


def test_play_takes_the_same_arguments_of_the_model(model, monkeypatch):
    served: dict = {}
    monkeypatch.setattr("dit_ops.play.server.serve", lambda pipeline, *_, **given: served.update(given, pipeline=pipeline))
    words = ["--mode", "autoregressive", "--condition", str(model / "condition"), "--compact-cache", "--device", "cpu"]
    assert main(["play", "--model", str(model), *words, "--sink-frames", "1", "--block-frames", "3", "--overlap"]) == 0
    assert type(served["pipeline"]).__name__ == "AutoregressivePipeline"
    given = {name: value for name, value in served["options"].items() if value is not None}
    assert given == {"window_frames": SETTINGS.frames, "sink_frames": 1, "block_frames": 3, "compact_cache": True}
    assert served["overlap"] is True
    assert parser().parse_args(["play", "--model", "m"]).overlap is False
    assert tuple(loading.MODES) == cli_generate.MODES
    shared = {"mode", "condition", "device", "dtype", "compact_cache", "offload", "float8", "vae_tiling"}
    for command in (["play", "--model", "m"], ["generate", "--model", "m", "--prompt", "p"]):
        assert shared <= vars(parser().parse_args(command)).keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sequence-parallel", "2"], "must divide the number of processes, 1, got 2; start with torchrun"),
        (["--sequence-parallel", "0"], "must divide the number of processes, 1, got 0"),
        (["--preview"], "preview needs a terminal to draw in, but standard error is none"),
        (["--seed", "3", "--video", "gone.mp4"], "no such file: gone.mp4"),
        (["--pose", "gone.txt"], "no such file: gone.txt"),
        (["--device", "gpu"], "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:99"], "--device must be one that torch can use, "),
        (["--steps", "7", "--solver", "unipc"], "--steps, --solver: not used by FewStepPipeline"),
        (["--mode", "bidirectional", "--window-frames", "8"], "--window-frames: not used by BidirectionalPipeline"),
        (["--image", "picture.png"], "picture.png is not a picture that can be read"),
        (["--image", "broken.png"], "broken.png is not a picture that can be read"),
        (["--video", "picture.png"], "picture.png is not a video that FFmpeg can read"),
        (["--pose", "pose.json"], "pose file pose.json is not one that can be read (Expecting property name"),
        (["--pose", "zero.json"], "pose file zero.json is not one that can be read (float division by zero)"),
        (["--pose", "nan.json"], "pose: the camera of frame 1 must be a rotation and a shift"),
        (["--pose", "scaled.JSON"], "pose: the camera of frame 1 must be a rotation and a shift"),
        (["--pose", "flat.json"], "pose: the camera of frame 1 must be a rotation and a shift, with positive focal lengths"),
        (["--output", "a.avi"], "output must be a folder, or a file with the suffix .mp4, got a.avi"),
        (["--output", "picture.png"], "output must be in a folder, picture.png is a file"),
        (["--output", "picture.png/a.mp4"], "output must be in a folder, picture.png is a file"),
        (["--video", "known.mp4"], "more than the 3 latent frames of the video, got 3"),
        (["--height", "33"], "height must be a multiple of "),
    ],
)
def test_mistakes_are_named(model, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_mp4("known.mp4", torch.zeros(3, 3, 32, 48), SETTINGS.fps)
    for name, content in (("picture.png", b"none"), ("broken.png", b"\x89PNG\r\n\x1a\n\0\0\0"), ("pose.json", b"{")):
        Path(name).write_bytes(content)
    for name, place, value in (
        ("zero.json", ("K", 0, 2), 0.0),
        ("nan.json", ("extrinsic", 0, 3), float("nan")),
        ("scaled.JSON", ("extrinsic", 0, 0), 2.0),
        ("flat.json", ("K", 0, 0), 0.0),
    ):
        frames = [{"extrinsic": torch.eye(4).tolist(), "K": [[24.0, 0, 24], [0, 16.0, 16], [0, 0, 1]]} for _ in range(3)]
        matrix, row, column = place
        frames[1][matrix][row][column] = value
        Path(name).write_text(json.dumps({str(i): frame for i, frame in enumerate(frames)}))
    before = sorted(tmp_path.iterdir())
    assert generate(model, tmp_path / "out", "--prompt", "a room", "--pose", "w*2", *words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("dit-ops generate: ") and message in line and captured.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_all_items_are_checked_before_the_first_is_made(model, tmp_path, capsys):
    lines = [LINES[0], {"prompt": "a long corridor", "pose": "w*2", "image": str(tmp_path / "a.png")}, {"prompt": "no pose"}]
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert generate(model, tmp_path / "out", "--prompts", str(tmp_path / "items.jsonl")) == 2
    assert "the video of 'no pose' along no pose: this model follows a camera" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    (tmp_path / "model").mkdir()
    assert generate(tmp_path / "model", tmp_path / "a" / "b", "--prompt", "a room", "--pose", "w*2") == 2
    assert f"in a folder that can be written to, {tmp_path} cannot" in capsys.readouterr().err


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def run_progress(stream: StringIO, monkeypatch, **options) -> str:
    """Two chunks, and what they leave on standard error."""
    monkeypatch.setattr("sys.stderr", stream)
    with cli_generate.Progress("2 of 3: ", 9, None, **options) as progress:
        progress.on_step(1, 4)
        progress.on_chunk(torch.zeros(1, 5, 3, 2, 2))
        progress.on_step(2, 4)
        progress.on_chunk(torch.zeros(1, 4, 3, 2, 2))
        progress.on_step(4, 4)
    return stream.getvalue()


@pytest.mark.parametrize("columns", [40, 200])
def test_the_bar_counts_frames_and_steps(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (columns, 24))
    bars = run_progress(Terminal(), monkeypatch).split("\r")
    assert bars[1].startswith("2 of 3: 0/9 frames, ? left |")
    assert re.match(r"2 of 3: 9/9 frames, [\d.]+ fps, 00:00", bars[-1].strip()), "also in a narrow terminal"
    assert columns == 40 or bars[-1].strip().endswith("| 100%")
    assert max(len(bar.strip()) for bar in bars) <= columns


def test_a_log_file_gets_lines_and_not_many(monkeypatch):
    assert run_progress(StringIO(), monkeypatch) == "", "no line before ten seconds"
    text = run_progress(StringIO(), monkeypatch, interval=0)
    assert "\r" not in text and re.fullmatch(r"2 of 3: 9/9 frames, [\d.]+ fps, 0 s left", text.splitlines()[-1])
    assert len(text.splitlines()) == 3, "one per step"
    assert run_progress(StringIO(), monkeypatch, interval=0, silent=True) == ""


def test_a_mistake_takes_the_bar_with_it(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with pytest.raises(ValueError), cli_generate.Progress("", 9, None):
        raise ValueError("something")
    assert stream.getvalue().split("\r")[-2].strip() == "", "the last thing is a cleared line"


@pytest.mark.gpu
def test_the_side_car_of_a_gpu(model, tmp_path):
    words = ["--model", str(model), "--prompt", "a room", "--pose", "w*30", "--window-frames", "6"]
    for name, extra in (("a", []), ("b", ["--no-overlap"])):
        assert main(["generate", *words, "--output", str(tmp_path / f"{name}.mp4"), "--device", "cuda", *extra]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["device"].startswith("cuda") and 0 < record["peak_memory_gb"] < 2, "the device's, not the process's"
    assert record["timings"]["first_chunk_seconds"] < record["timings"]["seconds"] and record["chunks"] == 16
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


# ranks


@contextmanager
def quietly() -> Iterator[StringIO]:
    text = StringIO()
    with redirect_stderr(text), redirect_stdout(text):
        yield text


class Decoded:
    """Counts the chunks that a condition decodes in this process."""

    def __init__(self) -> None:
        self.chunks = 0
        self.whole = LinearCondition.decode_to_pixel

    def __enter__(self) -> "Decoded":
        def count(condition, latent):
            self.chunks += 1
            return self.whole(condition, latent)

        LinearCondition.decode_to_pixel = count
        return self

    def __exit__(self, *error) -> None:
        LinearCondition.decode_to_pixel = self.whole


def _on_ranks(rank: int, ranks: int, runs: list[list[str]]) -> list[dict]:
    """Every run's exit code, what was printed, how many chunks were decoded and which collectives ran, on this rank."""
    found = []
    for words in runs:
        with quietly() as text, Decoded() as decoded, Collectives() as collectives:
            code = main(words)
        found.append({"code": code, "text": text.getvalue(), "decoded": decoded.chunks, "collectives": collectives.calls})
    return found


@pytest.mark.dist
def test_ranks_share_a_video_or_deal_out_the_items(model, prompts, tmp_path, run_ranks):
    base = ["generate", "--model", str(model), "--device", "cpu", "--prompts", str(prompts), "--output"]
    split, dealt = tmp_path / "split", tmp_path / "dealt"
    taken = tmp_path / "taken.mp4"
    taken.write_text("a video of somebody else")
    lone = ["generate", "--model", str(model), "--device", "cpu", "--prompt", "a", "--pose", "w*2", "--output", str(taken)]
    runs = [
        [*base, str(split), "--sequence-parallel", "2"],
        [*base, str(split), "--sequence-parallel", "2"],
        [*base, str(dealt)],
        [*base, str(dealt), "--sequence-parallel", "3"],
        lone,
    ]
    first, second = run_ranks(_on_ranks, 2, runs)
    names = {path.name for path in split.glob("*.mp4")}
    assert len(names) == 3 and {path.name for path in dealt.glob("*.mp4")} == names

    # a group's first rank alone decodes, writes and speaks
    assert first[0]["code"] == second[0]["code"] == 0 and first[0]["decoded"] == 9 and second[0]["decoded"] == 0
    assert second[0]["text"] == "" and all(name in first[0]["text"] for name in names)
    # both work on every video: two exchanges per layer of a step and one of its result; a rerun ends in the last layer's first
    for one_rank in (first, second):
        assert one_rank[0]["collectives"]["alltoall"] == 3 * (6 * 5 + 2 * 3)
        assert "alltoall" not in one_rank[2]["collectives"]
    # finished before
    assert first[1]["text"].count("finished before") == 3 and first[1]["decoded"] == 0 and second[1]["text"] == ""
    # one item after the other to each process
    assert (first[2]["decoded"], second[2]["decoded"]) == (6, 3)
    assert sum(name in first[2]["text"] for name in names) == 2 and sum(name in second[2]["text"] for name in names) == 1
    assert " left" not in second[2]["text"], "one process shows progress"
    # errors, on every rank
    for one_rank in (first, second):
        assert one_rank[3]["code"] == 2 and "must divide the number of processes, 2, got 3" in one_rank[3]["text"]
        assert one_rank[4]["code"] == 2 and "taken.mp4 is there already" in one_rank[4]["text"]

    alone = tmp_path / "alone"
    assert generate(model, alone, "--prompts", str(prompts)) == 0
    for name in names:
        assert (dealt / name).read_bytes() == (alone / name).read_bytes()
        torch.testing.assert_close(read_mp4(split / name)[0], read_mp4(alone / name)[0], atol=0.02, rtol=0)


@pytest.mark.parametrize(("rank", "group", "writes"), [(0, 0, True), (1, 0, False), (4, 2, True), (5, 2, False)])
def test_neighbouring_ranks_form_a_group(rank, group, writes):
    """Six processes in three groups, in one process that plays one of them."""
    dist.init_process_group("fake", rank=rank, world_size=6, store=FakeStore())
    try:
        place = cli_generate.Place.of(2, torch.device("cpu"))
        assert (place.rank, place.group, place.groups, place.writes) == (rank, group, 3, writes)
        assert dist.get_process_group_ranks(place.parallel.group) == [2 * group, 2 * group + 1]
        each = cli_generate.Place.of(1, torch.device("cpu"))
        assert (each.group, each.groups, each.writes, each.parallel) == (rank, 6, True, None)
    finally:
        dist.destroy_process_group()
