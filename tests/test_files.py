"""Requests to files: JSONL lines, names, what counts as finished, what is never replaced, known frames, the side-car."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from dit_ops.pipelines import files
from dit_ops.pipelines.files import Item, read_items
from dit_ops.pipelines.inputs import deal_poses
from dit_ops.pipelines.settings import Settings
from dit_ops.video import read_mp4, write_mp4

POSE = {str(i): {"extrinsic": torch.eye(4).tolist(), "K": [[50, 0, 50], [0, 90, 50], [0, 0, 1]]} for i in range(3)}
MODEL = {"path": "model", "weights": "1"}


class Stub:
    """A pipeline that makes two chunks of grey frames, and keeps what it was asked for."""

    settings = Settings(height=16, width=24, fps=8, frames=3)
    backbone = SimpleNamespace(device=torch.device("cpu"))
    condition = SimpleNamespace(temporal_stride=4, pixel_frames=lambda frames: 4 * frames - 3)

    def __init__(self, error: BaseException | None = None):
        self.error = error
        self.asked: list[dict] = []

    def stream(self, prompt: str, **given) -> Iterator[Tensor]:
        self.asked.append({"prompt": prompt, **given})
        yield torch.zeros(1, 1, 3, 16, 24)
        if self.error is not None:
            raise self.error
        yield torch.zeros(1, 8, 3, 16, 24)


def wanted(item: Item, model: dict = MODEL, **options) -> dict:
    return files.request(item, model, options)


def make(folder: Path, item: Item, **options) -> Path:
    """The video of an item in a folder, as it is after a run."""
    w = wanted(item, **options)
    (path,) = files.output_paths(folder, [w])
    files.generate_file(Stub(), item, path, w)
    return path


def stem(*item, model: dict = MODEL, **options) -> str:
    return files.file_stem(wanted(Item(*item), model, **options))


def write_lines(path: Path, *lines: dict | str) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def test_a_line_takes_what_it_does_not_say_from_the_defaults(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = write_lines(
        tmp_path / "items.jsonl",
        {"prompt": "a"},
        "",
        {"prompt": "b", "pose": "s*1", "seed": 7, "image": str(tmp_path / "a.png")},
        {"prompt": "c", "pose": None},
    )
    read = read_items(path, pose="w*2", seed=3)
    assert read == [Item("a", "w*2", 3), Item("b", "s*1", 7, str(tmp_path / "a.png")), Item("c", None, 3)]


@pytest.mark.parametrize(("name", "file"), [("image", "a.png"), ("video", "a.mp4"), ("pose", "a.json"), ("pose", "A.JSON")])
def test_files_that_cannot_be_read_are_found_with_their_line(tmp_path, name, file):
    (tmp_path / file).write_bytes(b"no")
    path = write_lines(tmp_path / "items.jsonl", {"prompt": "a"}, {"prompt": "b", name: str(tmp_path / file)})
    with pytest.raises(ValueError, match=f"line 2: .*{file} is not .* that .*can"):
        read_items(path)


def test_a_trajectory_file_has_a_line_for_every_prompt_or_one_for_all(tmp_path):
    prompts = write_lines(tmp_path / "a.jsonl", '{"prompt": "a"}', '{"prompt": "b", "pose": "s*1"}', '{"prompt": "c"}')
    poses = write_lines(tmp_path / "POSES.TXT", "w*1", "  ", " l*2 ", "d*3")
    assert [item.pose for item in read_items(prompts, pose=str(poses))] == ["w*1", "s*1", "d*3"]
    one = write_lines(tmp_path / "one.txt", "w*4")
    assert [item.pose for item in read_items(prompts, pose=str(one))] == ["w*4", "s*1", "w*4"]
    assert deal_poses(str(one), 1) == ["w*4"] and deal_poses("w*2", 2) == ["w*2", "w*2"] and deal_poses(None, 1) == [None]
    for count in (1, 4):
        with pytest.raises(ValueError, match=f"must have one line, or one for each of {count} videos, got 3"):
            deal_poses(str(poses), count)
    with pytest.raises(FileNotFoundError, match=r"no such file: gone\.txt"):
        deal_poses("gone.txt", 1)
    bad = write_lines(tmp_path / "bad.txt", "w*1", "x*2", "d*3")
    with pytest.raises(ValueError, match="line 3: pose string 'x"):
        read_items(
            write_lines(tmp_path / "b.jsonl", '{"prompt": "a"}', "", '{"prompt": "b"}', '{"prompt": "c"}'), pose=str(bad)
        )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_only(tmp_path, end):
    """U+2028 and U+0085 may stand in a JSON string as they are; a byte order mark may come first."""
    prompts = ["a\u2028b", "c\u0085d\x7f", "ein größerer Raum, 部屋"]
    lines = end.join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    (tmp_path / "items.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + end.encode())
    assert [item.prompt for item in read_items(tmp_path / "items.jsonl")] == prompts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "line 2: not valid JSON"),
        ('["a"]', "line 2: expected an object with a prompt"),
        ('{"prompt": 3}', "line 2: expected an object with a prompt"),
        ('{"prompt": "a", "sede": 3}', r"line 2: unknown keys \['sede'\]; known: prompt, pose, seed, image, video"),
        ('{"prompt": "a", "seed": 1.5}', "line 2: seed must be a whole number, got 1.5"),
        ('{"prompt": "a", "seed": true}', "line 2: seed must be a whole number, got True"),
        ('{"prompt": "a", "pose": 4}', "line 2: pose must be a string, got 4"),
        ('{"prompt": "a", "pose": "w*2,q*1"}', "line 2: pose string 'w\\*2,q\\*1': segment 2"),
        ('{"prompt": "a", "pose": "gone.json"}', "line 2: no such file: gone.json"),
        ('{"prompt": "a", "video": "gone.mp4"}', "line 2: no such file: gone.mp4"),
    ],
)
def test_a_mistake_is_named_by_its_line_before_anything_is_made(tmp_path, line, message):
    path = write_lines(tmp_path / "items.jsonl", {"prompt": "a"}, line)
    with pytest.raises(ValueError, match=message):
        read_items(path)


def test_a_file_that_is_no_text_or_empty(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="a.jsonl must be UTF-8 text"):
        read_items(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_items(write_lines(tmp_path / "b.jsonl", "", "  "))


def test_names_are_safe_whatever_the_prompt_is():
    for prompt in ("../../etc/passwd", "a" * 5000, "..", "", "CON", "部屋" * 100, "\ud800", "a\nb\0c", "-rf *", "$(reboot)"):
        for seed in (0, -1, 10**400):
            name = stem(prompt, "w*2," * 500 + "w*2", seed)
            assert name[0].isalnum() and len(name) < 130 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")
    assert stem("Ein größerer Raum").startswith("ein-groerer-raum_seed0_")


def test_different_requests_have_different_names_also_where_case_does_not_count():
    near = [
        stem("a room", "w*2"),
        stem("A room", "w*2"),
        stem("a room!", "w*2"),
        stem("a room", "w*2 "),
        stem("a room", "w*2", 1),
        stem("a room", "w*2", -1),
        stem("a room", None),
        stem("x" * 60 + "a"),
        stem("x" * 60 + "b"),
        stem("a room", "w*2", guidance=3.0),
        stem("a room", "w*2", model={"path": "Model", "weights": "1"}),
        stem("部屋"),
        stem("へや"),
    ]
    assert len({name.casefold() for name in near}) == len(near)
    assert stem("a room", "w*2", model={"path": "model", "weights": "2"}) == near[0]  # trained further: the same file
    assert stem("a room", "w*2", frames=None) == near[0]


def test_what_a_file_holds_is_part_of_the_request(tmp_path):
    (tmp_path / "pose.json").write_text(json.dumps(POSE))
    (tmp_path / "a.png").write_bytes(b"1")
    item = Item("a room", str(tmp_path / "pose.json"), image=str(tmp_path / "a.png"))
    before = wanted(item)
    assert before["sha256"].keys() == {"pose", "image"} and wanted(item) == before
    (tmp_path / "a.png").write_bytes(b"2")
    os.utime(tmp_path / "a.png", ns=(1, 10**18))
    after = wanted(item)
    assert after != before and files.file_stem(after) != files.file_stem(before)


def test_a_model_counts_as_another_one_when_any_of_its_files_changes(tmp_path):
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "codec").write_text("1")
    (model / "condition").symlink_to(tmp_path / "shared")
    (model / "model_index.json").write_text("{}")
    seen = [files.fingerprint(model)]
    for path in (model / "model_index.json", model / "transformer" / "weights", tmp_path / "shared" / "codec"):
        path.write_text("other")
        os.utime(path, ns=(1, 10**18))
        seen.append(files.fingerprint(model))
    (model / ".cache").mkdir()
    (model / ".cache" / "download").write_text("not part of the model")
    assert files.fingerprint(model) == seen[-1]
    seen += [files.fingerprint(model, mode="few_step"), files.fingerprint(model, condition=tmp_path / "shared")]
    (tmp_path / "shared" / "codec").write_text("a third one")
    seen.append(files.fingerprint(model, condition=tmp_path / "shared"))
    assert len({json.dumps(one) for one in seen}) == len(seen)


def test_only_a_whole_video_with_its_own_side_car_is_finished(tmp_path):
    item = Item("a room", "w*2")
    path = make(tmp_path, item)
    assert files.is_finished(path, wanted(item))
    assert not files.is_finished(path, wanted(item, {"path": "model", "weights": "2"}))
    record = json.loads(path.with_suffix(".json").read_text())

    def finished_with(sidecar: str) -> bool:
        path.with_suffix(".json").write_text(sidecar)
        return files.is_finished(path, wanted(item))

    assert finished_with(json.dumps(record))
    for broken in ("", json.dumps(record)[:40], "[]", "{}", json.dumps(record | {"request": None}), "\x00"):
        assert not finished_with(broken), broken
    assert finished_with(json.dumps(record))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert not files.is_finished(path, wanted(item))
    path.write_bytes(whole)
    path.with_suffix(".json").unlink()
    assert not files.is_finished(path, wanted(item))
    path.with_suffix(".json").write_text(json.dumps(record))
    path.unlink()
    assert not files.is_finished(path, wanted(item))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no memory")], ids=["Ctrl-C", "an error"])
def test_an_interrupted_video_leaves_nothing_behind_and_keeps_an_older_one(tmp_path, error):
    item = Item("a room", "w*2")
    path = tmp_path / "a.mp4"
    with pytest.raises(type(error)):
        files.generate_file(Stub(error), item, path, wanted(item))
    assert list(tmp_path.iterdir()) == []
    files.generate_file(Stub(), item, path, wanted(item))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(type(error)):
        files.generate_file(Stub(error), item, path, wanted(item))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before and before.keys() == {"a.mp4", "a.json"}


def test_a_named_file_never_replaces_what_was_not_asked_to_be_replaced(tmp_path):
    item, other = wanted(Item("a room", "w*2")), wanted(Item("a room", "s*2"))
    path = tmp_path / "mine.mp4"
    files.check_free(path, item)
    files.generate_file(Stub(), Item("a room", "w*2"), path, item)
    for made_from in (other, wanted(Item("a room", "w*2"), {"path": "model", "weights": "2"})):
        with pytest.raises(ValueError, match="mine.mp4 is there already, and not from this request; --overwrite replaces it"):
            files.check_free(path, made_from)
        files.check_free(path, made_from, overwrite=True)
    (tmp_path / "pose.json").write_text(json.dumps(POSE))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="pose.json would be replaced by the side-car of pose.mp4"):
            files.check_free(tmp_path / "pose.mp4", item, overwrite=overwrite)
    in_folder = make(tmp_path / "out", Item("a room", "w*2"))  # its name says what it is: a new version may replace it
    in_folder.with_suffix(".json").write_text("torn")
    files.check_free(in_folder, item)


def test_output_is_a_folder_or_one_file(tmp_path):
    two = [wanted(Item("a")), wanted(Item("b"))]
    assert files.output_paths(tmp_path / "a.MP4", two[:1]) == [tmp_path / "a.MP4"]
    assert {path.parent for path in files.output_paths(tmp_path / "v1.5", two)} == {tmp_path / "v1.5"}
    with pytest.raises(ValueError, match="output must be a folder for 2 videos, got the file name"):
        files.output_paths(tmp_path / "a.mp4", two)
    (tmp_path / "a.mp4").mkdir()
    assert {path.parent for path in files.output_paths(tmp_path / "a.mp4", two)} == {tmp_path / "a.mp4"}


def test_the_side_car_says_what_was_made_and_how_long_it_took(tmp_path):
    stub, shown = Stub(), []
    item = Item("a room", "w*2", 5)
    w = wanted(item, num_steps=7)
    record = files.generate_file(stub, item, tmp_path / "a.mp4", w, on_chunk=lambda chunk: shown.append(len(chunk[0])))
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(record)) and shown == [1, 8]
    assert record["request"] == w and record["request"]["seed"] == 5 and record["settings"]["num_steps"] == 7
    assert record["pixel_frames"] == 9 == len(read_mp4(tmp_path / "a.mp4")[0]) and record["chunks"] == 2
    assert stub.asked == [{"prompt": "a room", "pose": "w*2", "seed": 5, "num_steps": 7}]
    assert record["bytes"] == (tmp_path / "a.mp4").stat().st_size and 0.05 < record["peak_memory_gb"] < 100
    assert files.pixel_frames(stub, item, {}) == 9 and files.pixel_frames(stub, Item("a"), {"frames": 2}) == 5


def test_timings_add_up():
    #         arrived, written, frames
    times = [(2.0, 2.5, 1), (3.0, 3.25, 4), (4.0, 4.5, 4)]
    assert files._timings(times, 5.0) == {
        "first_chunk_seconds": 2.0,
        "seconds": 5.0,
        "encode_seconds": 1.25,
        "frames_per_second": 4.0,  # 8 frames in the 2 seconds after the first chunk
    }
    assert files._timings(times[:1], 4.0)["frames_per_second"] == 0.25


def test_files_of_an_item_reach_the_pipeline(tmp_path):
    stub = Stub()
    (tmp_path / "pose.json").write_text(json.dumps(POSE))
    Image.new("RGB", (24, 16), (255, 0, 0)).save(tmp_path / "a.png")
    write_mp4(tmp_path / "a.mp4", torch.zeros(5, 3, 16, 24), 8)
    item = Item("a", str(tmp_path / "pose.json"), image=str(tmp_path / "a.png"), video=str(tmp_path / "a.mp4"))
    assert len(list(files.chunks_of(stub, item, {"frames": 3}, overlap=True))) == 2
    (asked,) = stub.asked
    viewmats, Ks = asked["pose"]
    assert viewmats.shape == (3, 4, 4) and Ks.shape == (3, 3, 3) and asked["frames"] == 3 and asked["overlap"] is True
    assert asked["image"].shape == (3, 16, 24) and asked["video"].shape == (5, 3, 16, 24)
    torch.testing.assert_close(asked["image"][:, 0, 0], torch.tensor([1.0, -1, -1]))


def test_a_picture_is_scaled_to_cover_and_cropped_and_stands_upright(tmp_path):
    picture = Image.new("RGB", (40, 20), (0, 0, 0))
    picture.paste((255, 255, 255), (10, 0, 30, 20))  # the middle is white, and all that is left of a square
    picture.save(tmp_path / "a.png")
    assert files.read_image(tmp_path / "a.png", 10, 10).min() > 0.5
    lying = Image.new("RGB", (20, 10), (255, 0, 0))
    lying.paste((0, 0, 255), (10, 0, 20, 10))
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise: the left side is the upper one
    lying.save(tmp_path / "b.jpg", exif=exif, quality=95)
    upright = files.read_image(tmp_path / "b.jpg", 20, 10)
    assert upright[0, 2].min() > 0.5 and upright[2, 2].max() < -0.5 and upright[2, -3].min() > 0.5
    (tmp_path / "c.png").write_text("no picture")
    with pytest.raises(ValueError, match="c.png is not a picture that can be read"):
        files.read_image(tmp_path / "c.png", 10, 10)


def ramp(path: Path, frames: int, fps: float, height: int = 16, width: int = 16) -> list[float]:
    """A video whose frames become brighter; their levels as they are read back."""
    levels = torch.linspace(-0.9, 0.9, frames)
    write_mp4(path, levels.view(-1, 1, 1, 1).expand(-1, 3, height, width), fps, quality=1)
    return read_mp4(path)[0].mean((1, 2, 3)).tolist()


@pytest.mark.parametrize(
    ("frames", "rate", "fps", "stride", "expected"),
    [
        (9, 8, 8, 4, range(9)),
        (12, 8, 8, 4, range(3, 12)),  # the end counts: frames are left out at the start
        (3, 8, 8, 4, [2]),
        (9, 16, 8, 1, [0, 2, 4, 6, 8]),  # twice as fast as wanted
        (3, 4, 8, 1, [0, 0, 1, 2, 2]),  # half as fast; round half to even
        (10, 24, 16, 1, [0, 1, 3, 5, 6, 7, 9]),
    ],
)
def test_a_video_is_read_up_to_its_end_in_whole_latent_frames_at_the_rate_of_the_model(
    tmp_path, frames, rate, fps, stride, expected
):
    levels = ramp(tmp_path / "a.mp4", frames, rate)
    read = files.read_video(tmp_path / "a.mp4", 16, 16, fps, stride)
    assert read.shape == (len(expected), 3, 16, 16)
    torch.testing.assert_close(read.mean((1, 2, 3)), torch.tensor([levels[i] for i in expected]), atol=1e-5, rtol=0)


def test_a_video_of_another_size_is_cropped_at_the_centre(tmp_path):
    frame = torch.full((3, 20, 40), -1.0)
    frame[:, :, 10:30] = 1  # the middle square
    write_mp4(tmp_path / "a.mp4", frame[None], 8, quality=1)
    read = files.read_video(tmp_path / "a.mp4", 10, 10, 8, 1)
    assert read.shape == (1, 3, 10, 10) and read.min() > 0.8
    with pytest.raises(ValueError, match="is not a video that FFmpeg can read"):
        (tmp_path / "b.mp4").write_text("no video")
        files.read_video(tmp_path / "b.mp4", 10, 10, 8, 1)
