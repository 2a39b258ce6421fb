"""Rooms and mp4 folders become data sets whose latents, cameras and captions belong together."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_ops import rooms
from dit_ops.actions import action_labels
from dit_ops.camera import DEFAULT_INTRINSICS, intrinsics_matrix, invert_rigid, parse_trajectory
from dit_ops.conditions import load
from dit_ops.conditions.linear import LinearCondition
from dit_ops.training.data import LatentDataset
from dit_ops.training.preprocess import crop_intrinsics, find_clips, make_rooms, preprocess
from dit_ops.video import write_mp4

PROMPTS = rooms.PROMPTS[:2]


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def decoded(dataset: LatentDataset, i: int) -> Tensor:
    return load(dataset.condition_directory).decode_to_pixel(dataset[i]["latents"][None])[0]


def encoded(condition, prompt: str) -> Tensor:
    return condition.encode_text([prompt])["encoder_hidden_states"][0]


class EveryFourth(LinearCondition):
    """A codec that, like a causal video VAE, has one latent frame for the first and for every fourth frame after it."""

    temporal_stride = 4

    def latent_frames(self, pixel_frames: int) -> int:
        if (pixel_frames - 1) % 4:
            raise ValueError(f"pixel frames must be 1 + a multiple of 4 but are {pixel_frames}")
        return 1 + (pixel_frames - 1) // 4

    def encode_to_latent(self, pixel: Tensor) -> Tensor:
        self.latent_frames(pixel.shape[1])
        return super().encode_to_latent(pixel[:, ::4])


def test_rooms_data_set_holds_what_its_prompts_and_poses_say(tmp_path):
    dataset = make_rooms(tmp_path / "a", prompts=PROMPTS, count=6, frames=4, size=32, seed=3)
    assert [entry["prompt"] for entry in dataset.entries] == [*PROMPTS] * 3
    assert dataset.entries[0]["split"] == "train" and dataset.entries[0]["frames"] == 4
    condition = load(dataset.condition_directory)
    for i in range(6):
        sample = dataset[i]
        truth = rooms.film(sample["prompt"], sample["pose"], 32)
        assert torch.equal(sample["latents"], condition.encode_to_latent(truth[None])[0])
        assert torch.equal(sample["viewmats"], parse_trajectory(sample["pose"]))
        assert torch.equal(sample["Ks"], intrinsics_matrix(*rooms.INTRINSICS).expand(4, 3, 3))
        assert torch.equal(sample["condition"]["encoder_hidden_states"], encoded(condition, sample["prompt"]))
        assert psnr(decoded(dataset, i), truth) > 24
    assert torch.equal(dataset.negative["encoder_hidden_states"], encoded(condition, ""))
    again = make_rooms(tmp_path / "b", prompts=PROMPTS, count=6, frames=4, size=32, seed=3)
    other = make_rooms(tmp_path / "c", prompts=PROMPTS, count=6, frames=4, size=32, seed=4)
    poses = [[d[i]["pose"] for i in range(6)] for d in (dataset, again, other)]
    assert poses[0] == poses[1] != poses[2]
    assert torch.equal(again[5]["latents"], dataset[5]["latents"])


def test_rooms_exclude_held_out_poses_and_add_a_split(tmp_path):
    held_out = ("w*2", "l*1,d*1")
    train = make_rooms(tmp_path, prompts=PROMPTS, count=60, frames=3, size=16, exclude=held_out)
    assert not {train[i]["pose"] for i in range(60)} & set(held_out)
    options = {"prompts": PROMPTS, "count": 4, "frames": 3, "size": 16, "split": "val", "poses": held_out}
    val = make_rooms(tmp_path, mode="resume", **options)
    assert [(e["prompt"], e["pose"]) for e in val.entries] == [(p, pose) for pose in held_out for p in PROMPTS]
    assert len(LatentDataset(tmp_path)) == 64 and len(LatentDataset(tmp_path, "train")) == 60
    assert psnr(decoded(val, 3), rooms.film(PROMPTS[1], held_out[1], 16)) > 20
    with pytest.raises(ValueError, match="pose 'w\\*2' has 3 frames but frames is 8"):
        make_rooms(tmp_path / "x", poses=held_out)
    with pytest.raises(FileExistsError, match="already holds a data set"):
        make_rooms(tmp_path, prompts=PROMPTS, count=1, frames=3, size=16)


def clip(
    folder: Path, name: str, pose: str, size=(48, 64), caption: str | None = None, pose_file: bool = True, fps: float = 8
) -> Tensor:
    video = rooms.render(PROMPTS[0], parse_trajectory(pose), intrinsics_matrix(0.4, 0.6, 0.5, 0.5), size)
    write_mp4(folder / f"{name}.mp4", video, fps)
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    if pose_file:
        (folder / f"{name}.pose").write_text(pose + "\n", encoding="utf-8")
    return video


def pose_json(viewmats: Tensor, width: int = 64, height: int = 48) -> str:
    k = [[0.4 * width, 0, width / 2], [0, 0.6 * height, height / 2], [0, 0, 1]]
    return json.dumps({str(i): {"extrinsic": c2w.tolist(), "K": k} for i, c2w in enumerate(invert_rigid(viewmats))})


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def test_mp4_folder_becomes_a_data_set(source, tmp_path):
    video = clip(source, "one", "w*2,l*3", caption="a first room")
    clip(source, "two", "d*5", pose_file=False)
    clip(source, "three", "a*5", pose_file=False)
    away = parse_trajectory("l*9,w*4,d*5")[-6:]  # a world whose origin is elsewhere
    (source / "away.json").write_text(pose_json(away))
    lines = [
        {"video": "two.mp4", "caption": "a second room", "pose": "d*5"},
        {"video": "three.mp4", "caption": "a third", "pose": "away.json"},
    ]
    (source / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    seen: list[tuple[int, int]] = []
    options = {"size": (48, 64), "intrinsics": (0.4, 0.6, 0.5, 0.5), "progress": lambda done, total: seen.append((done, total))}
    dataset = preprocess(source, tmp_path / "out", **options)
    assert [(e["id"], e["prompt"], e["pose"], e["frames"]) for e in dataset.entries] == [
        ("one", "a first room", "w*2,l*3", 6), ("three", "a third", "away.json", 6), ("two", "a second room", "d*5", 6)
    ]  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)] and dataset.meta["fps"] == 8
    assert torch.equal(dataset[0]["viewmats"], parse_trajectory("w*2,l*3"))
    torch.testing.assert_close(dataset[1]["viewmats"], parse_trajectory("d*5"), atol=1e-5, rtol=0)
    for i in range(3):
        torch.testing.assert_close(dataset[i]["Ks"], intrinsics_matrix(0.4, 0.6, 0.5, 0.5).expand(6, 3, 3))
    assert psnr(decoded(dataset, 0), video) > 25


def test_cropped_videos_get_the_intrinsics_of_the_crop(source, tmp_path):
    clip(source, "one", "d*2,j*2", size=(96, 160), caption="a")
    dataset = preprocess(source, tmp_path / "out", size=64, intrinsics=(0.4, 0.6, 0.5, 0.5))
    K = dataset[0]["Ks"][0]
    truth = rooms.render(PROMPTS[0], dataset[0]["viewmats"], K, 64)
    assert psnr(decoded(dataset, 0), truth) > 25
    uncropped = rooms.render(PROMPTS[0], dataset[0]["viewmats"], intrinsics_matrix(0.4, 0.6, 0.5, 0.5), 64)
    assert psnr(decoded(dataset, 0), uncropped) < 20, "and the intrinsics matter"
    off_centre = crop_intrinsics(intrinsics_matrix(0.5, 0.9, 0.4, 0.7), (100, 200), (100, 100))
    torch.testing.assert_close(off_centre, intrinsics_matrix(1.0, 0.9, 0.3, 0.7))


def test_poses_per_latent_frame_per_frame_read_or_per_frame_of_the_file(source, tmp_path):
    pose = "w*4,d*4,l*2"  # 11 frames in the file, 9 fill three latent frames
    clip(source, "one", pose, caption="a")
    condition = EveryFourth.fit(rooms.film(PROMPTS[0], pose, 48)[None])
    whole = parse_trajectory(pose)
    for name, text, expected in (
        ("file", pose, whole[[0, 4, 8]]),
        ("read", "w*4,d*4", whole[[0, 4, 8]]),
        ("latent", "w*1,d*1", parse_trajectory("w*1,d*1")),
    ):
        (source / "one.pose").write_text(text)
        dataset = preprocess(source, tmp_path / name, condition, size=48)
        assert dataset[0]["latents"].shape == (3, 16, 6, 6)
        assert torch.equal(dataset[0]["viewmats"], expected)
        torch.testing.assert_close(
            dataset[0]["Ks"][0], crop_intrinsics(intrinsics_matrix(*DEFAULT_INTRINSICS), (48, 64), (48, 48))
        )
    (source / "one.pose").write_text("w*3")
    with pytest.raises(ValueError, match=r"one.mp4 has 4 poses but 3 latent frames \(9 frames read of 11\)"):
        preprocess(source, tmp_path / "bad", condition, size=48)
    with pytest.raises(ValueError, match="1 \\+ a multiple of 4 but are 8"):
        preprocess(source, tmp_path / "bad", condition, size=48, frames=8)
    with pytest.raises(ValueError, match="has 11 frames at 8 per second, fewer than the 13 asked for"):
        preprocess(source, tmp_path / "bad", condition, size=48, frames=13)
    assert not (tmp_path / "bad").exists(), "clips are checked before anything is written"


def test_faster_videos_are_thinned_out(source, tmp_path):
    pose = "w*8"
    video = clip(source, "one", pose, caption="a", fps=24)
    dataset = preprocess(source, tmp_path / "out", size=(48, 64), fps=12)
    assert dataset.meta["fps"] == 12 and len(dataset[0]["latents"]) == 5
    assert torch.equal(dataset[0]["viewmats"], parse_trajectory(pose)[::2])
    assert psnr(decoded(dataset, 0), video[::2]) > 25
    with pytest.raises(ValueError, match="has 24 frames per second, fewer than the 30 asked for"):
        preprocess(source, tmp_path / "bad", size=(48, 64), fps=30)


def test_a_second_run_continues_where_the_first_stopped(source, tmp_path):
    for name in ("a", "b", "c"):
        clip(source, name, "w*2", caption=name)
    encoded: list[int] = []

    class Breaks(LinearCondition):
        def encode_to_latent(self, pixel: Tensor) -> Tensor:
            if len(encoded) == 2:
                raise MemoryError
            encoded.append(1)
            return super().encode_to_latent(pixel)

    videos = rooms.film(PROMPTS[0], "w*2", 32)[None]
    with pytest.raises(MemoryError):
        preprocess(source, tmp_path / "out", Breaks.fit(videos), size=32, shard_bytes=1)
    with pytest.raises(FileNotFoundError, match="stopped early"):
        LatentDataset(tmp_path / "out")
    encoded[:] = [1]
    dataset = preprocess(source, tmp_path / "out", Breaks.fit(videos), size=32, shard_bytes=1)
    assert [entry["id"] for entry in dataset.entries] == ["a", "b", "c"] and len(encoded) == 2, "only the third was encoded"
    with pytest.raises(ValueError, match="cannot be resumed: condition was"):
        preprocess(source, tmp_path / "out", LinearCondition.fit(videos, channels=8), size=32)
    encoded[:] = [1, 1]
    assert len(preprocess(source, tmp_path / "out", size=32)) == 3, "the data set's own condition, and nothing left to do"


def test_unclear_folders_are_refused_before_any_work(source, tmp_path):
    with pytest.raises(ValueError, match="must be a folder with .mp4 files but has none"):
        find_clips(source)
    clip(source, "one", "w*1")
    with pytest.raises(ValueError, match=r"one.mp4 must have one caption \(in captions.jsonl or one.txt\) but has 0"):
        find_clips(source)
    (source / "one.txt").write_text("a")
    (source / "one.json").write_text(pose_json(parse_trajectory("w*1")))
    with pytest.raises(ValueError, match=r"one.mp4 must have one pose \(in captions.jsonl or one.pose or one.json\) but has 2"):
        find_clips(source)
    (source / "one.json").unlink()
    assert [found.id for found in find_clips(source)] == ["one"]
    for text, message in (
        ("{", "captions.jsonl line 1 is not JSON"),
        ('{"caption": "a"}', "line 1 must be an object with the file name in 'video'"),
        ('{"video": "one.mp4", "captoin": "a"}', r"line 1 has unknown keys \['captoin'\]"),
        ('{"video": "two.mp4", "caption": "a"}', "names 'two.mp4', which is not in"),
    ):
        (source / "captions.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_clips(source)
    (source / "captions.jsonl").unlink()
    with pytest.raises(ValueError, match="size must be multiples of 8 but is 20 x 48"):
        preprocess(source, tmp_path / "out", LinearCondition.fit(torch.rand(1, 1, 3, 64, 64)), size=(20, 48))
    (source / "one.mp4").write_bytes(b"not a video")
    with pytest.raises(ValueError, match="one.mp4 is not a video"):
        find_clips(source)


def test_parts_join_to_the_data_set_of_one_run(source, tmp_path):
    """Any order, one of them stopped and run again; the last one to finish joins them."""
    for name in "abcde":
        clip(source, name, "w*2", caption=name)
    options = {"size": 32, "condition": LinearCondition.fit(rooms.film(PROMPTS[0], "w*2", 32)[None]), "shard_bytes": 1}
    whole = preprocess(source, tmp_path / "whole", **options)
    for i in (1, 0):
        preprocess(source, tmp_path / "parts", part=(i, 3), **options)
        with pytest.raises(FileNotFoundError, match="has no index.jsonl"):
            LatentDataset(tmp_path / "parts")
    joined = preprocess(source, tmp_path / "parts", part=(2, 3), **options)
    assert [entry["id"] for entry in joined.entries] == list("abcde") and joined.meta == whole.meta
    for i in range(5):
        assert torch.equal(joined[i]["latents"], whole[i]["latents"]) and joined[i]["prompt"] == whole[i]["prompt"]
    assert load(joined.condition_directory).summary() == load(whole.condition_directory).summary()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "source", "whole"], "no part is left"
    assert len(preprocess(source, tmp_path / "parts", part=(0, 3), **options)) == 5, "nothing left to do"
    for part in ((3, 3), (0, 6)):
        with pytest.raises(ValueError, match="part must be"):
            preprocess(source, tmp_path / "bad", **options, part=part if part == (3, 3) else (5, 6))
    assert not (tmp_path / "bad").exists()


def test_clips_go_to_the_nearest_bucket(source, tmp_path):
    clip(source, "wide", "w*8", size=(32, 64), caption="a")
    clip(source, "tall", "w*4", size=(64, 32), caption="b")
    condition = LinearCondition.fit(torch.rand(1, 1, 3, 64, 64))
    (source / "wide.pose").write_text("w*5")
    (source / "tall.pose").write_text("w*3")
    dataset = preprocess(source, tmp_path / "out", condition, size=[(32, 48), (48, 32)], frames=[4, 6], image=True, action=True)
    shapes = {entry["id"]: (entry["height"], entry["width"], entry["frames"]) for entry in dataset.entries}
    assert shapes == {"wide": (32, 48, 6), "tall": (48, 32, 4)}
    for i in range(2):
        sample = dataset[i]
        known = sample["condition"]["condition_latents"]
        assert torch.equal(sample["condition"]["action"], action_labels(sample["viewmats"]))
        assert torch.equal(known[0, :16], sample["latents"][0]) and not known[1:].any() and known[0, 16].eq(1).all()
    with pytest.raises(ValueError, match="tall.mp4 has 5 frames at 8 per second, fewer than the 6 asked for"):
        preprocess(source, tmp_path / "bad", condition, size=32, frames=[8, 6])
