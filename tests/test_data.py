"""Latent data sets: what is written is read, nothing half-written is readable, and batches are pure functions of the step."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_ops.training.data import DatasetWriter, LatentDataset, collate, to_device

NEGATIVE = {"encoder_hidden_states": torch.full((3, 5), 0.5), "encoder_attention_mask": torch.tensor([True, False, False])}


def sample(i: int, frames: int = 4) -> dict:
    generator = torch.Generator().manual_seed(i)
    return {
        "latents": torch.randn(frames, 2, 3, 4, generator=generator),
        "condition": {
            "encoder_hidden_states": torch.randn(3, 5, generator=generator),
            "encoder_attention_mask": torch.arange(3) <= i % 3,
        },
        "viewmats": torch.randn(frames, 4, 4, generator=generator),
        "Ks": torch.randn(frames, 3, 3, generator=generator),
        "prompt": f"sample {i}: «ünïcode»",
        "pose": "w*3",
        "height": 24,
        "width": 32,
    }


def write(directory: Path, count: int = 5, **options) -> Path:
    with DatasetWriter(directory, fps=8, negative=NEGATIVE, condition={"class": "Test"}, **options) as writer:
        for i in range(count):
            writer.add(f"s{i}", **sample(i))
    return directory


def test_what_is_written_is_read(tmp_path):
    dataset = LatentDataset(write(tmp_path, shard_bytes=1500))
    assert len(dataset) == 5 and dataset.meta["fps"] == 8 and dataset.meta["condition"] == {"class": "Test"}
    torch.testing.assert_close(dataset.negative, NEGATIVE, rtol=0, atol=0)
    assert dataset.condition_directory is None
    for i in (3, 0, 4):
        expected = sample(i)
        read = dataset[i]
        assert read["id"] == f"s{i}" and read["prompt"] == expected["prompt"] and read["pose"] == "w*3"
        torch.testing.assert_close(read["condition"], expected["condition"], rtol=0, atol=0)
        for name in ("latents", "viewmats", "Ks"):
            assert torch.equal(read[name], expected[name]), name
        assert "trajectory" not in read
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["dataset.json", "index.jsonl", "negative.safetensors", *(f"shard-0000{n}.safetensors" for n in range(3))]
    line = json.loads((tmp_path / "index.jsonl").read_text(encoding="utf-8").splitlines()[2])
    assert line == {
        "id": "s2", "shard": "shard-00001.safetensors", "prompt": sample(2)["prompt"], "frames": 4,
        "height": 24, "width": 32, "fps": 8, "pose": "w*3",
    }  # fmt: skip


def test_trajectories_splits_and_dtype(tmp_path):
    trajectory = torch.randn(6, 4, 2, 3, 4)
    with DatasetWriter(tmp_path, fps=8, negative=NEGATIVE, dtype=torch.bfloat16) as writer:
        writer.add("a", **sample(0), trajectory=trajectory, split="train")
        writer.add("b", **sample(1), trajectory=trajectory, split="val")
    val = LatentDataset(tmp_path, "val")
    assert len(val) == 1 and val[0]["id"] == "b" and len(LatentDataset(tmp_path)) == 2
    assert torch.equal(val[0]["trajectory"], trajectory.bfloat16())
    assert val[0]["latents"].dtype == val.negative["encoder_hidden_states"].dtype == torch.bfloat16
    assert val[0]["condition"]["encoder_attention_mask"].dtype == torch.bool
    assert val[0]["viewmats"].dtype == torch.float32
    with pytest.raises(ValueError, match="no sample of split 'test'; its splits: train, val"):
        LatentDataset(tmp_path, "test")


def test_views_of_one_tensor_are_stored_as_their_own(tmp_path):
    shared = torch.randn(2, 3, 5)
    with DatasetWriter(tmp_path, fps=8, negative={"a": shared[0]}) as writer:
        for i in range(4):
            writer.add(f"s{i}", **sample(i) | {"condition": {"a": shared[i % 2]}, "Ks": torch.eye(3).expand(4, 3, 3)})
    dataset = LatentDataset(tmp_path)
    assert torch.equal(dataset[3]["condition"]["a"], shared[1]) and torch.equal(dataset[2]["condition"]["a"], shared[0])


KILLED = """
import os, sys
from pathlib import Path
import torch
import dit_ops.training.data as data
from test_data import NEGATIVE, sample

torch.set_num_threads(1)
for text in sys.argv[2:]:
    if os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
        continue
    steps, replace = int(text), os.replace
    def counted(source, target):
        global steps
        steps -= 1
        if steps < 0:
            os._exit(9)  # as SIGKILL: no handler, no cleanup
        replace(source, target)
    os.replace = counted
    with data.DatasetWriter(Path(sys.argv[1], text), fps=8, negative=NEGATIVE, shard_bytes=1500) as writer:
        for i in range(6):
            writer.add(f"s{i}", **sample(i))
    os._exit(0)
"""


def test_a_killed_writer_leaves_no_readable_half_and_resumes(tmp_path):
    """The writer dies just before its n-th rename, for every n; then another finishes, and nothing is lost or doubled."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{here}"}
    kills = {2: 0, 3: 0, 4: 2, 8: 6}  # after the metadata, the first shard, its partial index, all but the index: samples kept
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *map(str, kills)], env=environment, check=True)
    for steps, kept in kills.items():
        directory = tmp_path / str(steps)
        with pytest.raises(FileNotFoundError, match="no index.jsonl"):
            LatentDataset(directory)
        with DatasetWriter(directory, fps=8, negative=NEGATIVE, mode="resume", shard_bytes=1500) as writer:
            done = writer.done
            for i in range(6):
                if f"s{i}" not in done:
                    writer.add(f"s{i}", **sample(i))
        assert len(done) == kept
        dataset = LatentDataset(directory)
        assert sorted(entry["id"] for entry in dataset.entries) == [f"s{i}" for i in range(6)]
        for i in range(6):
            assert torch.equal(dataset[i]["latents"], sample(int(dataset[i]["id"][1:]))["latents"])
        assert not list(directory.glob("*.partial"))


def test_an_error_inside_the_block_leaves_the_work_for_a_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path, fps=8, negative=NEGATIVE) as writer:
        writer.add("s0", **sample(0))
        writer.flush()
        writer.add("s1", **sample(1))
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError, match="its writer was stopped early"):
        LatentDataset(tmp_path)
    with DatasetWriter(tmp_path, fps=8, negative=NEGATIVE, mode="resume") as writer:
        assert writer.done == {"s0"}


def test_modes_of_the_writer(tmp_path):
    write(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a data set"):
        write(tmp_path)
    with pytest.raises(ValueError, match="cannot be resumed: fps was 8 and is now 9"):
        DatasetWriter(tmp_path, fps=9, negative=NEGATIVE, condition={"class": "Test"}, mode="resume").__enter__()
    with DatasetWriter(tmp_path, fps=8, negative=NEGATIVE, condition={"class": "Test"}, mode="resume") as writer:
        writer.add("s9", **sample(9))
        assert len(LatentDataset(tmp_path)) == 5, "the old data set stays readable until the new one is complete"
    assert len(LatentDataset(tmp_path)) == 6
    assert len(LatentDataset(write(tmp_path, 2, mode="overwrite"))) == 2
    assert len(list(tmp_path.glob("shard-*"))) == 1
    with pytest.raises(ValueError, match="mode must be"):
        DatasetWriter(tmp_path, fps=8, negative=NEGATIVE, mode="append")


def test_damaged_data_sets_say_what_is_wrong(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    whole = shard.read_bytes()
    for size in (len(whole) - 100, 50, 4, 0):
        shard.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="shard-00000.safetensors is truncated or not a safetensors file"):
            LatentDataset(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="shard-00000.safetensors is named in index.jsonl but missing"):
        LatentDataset(tmp_path)
    shard.write_bytes(whole)
    index = (tmp_path / "index.jsonl").read_text(encoding="utf-8")
    (tmp_path / "index.jsonl").write_text(index.replace('"s1"', '"other"', 1), encoding="utf-8")
    with pytest.raises(ValueError, match="lacks 'other.latents'"):
        LatentDataset(tmp_path)[1]
    (tmp_path / "index.jsonl").write_text(index[:-20], encoding="utf-8")
    with pytest.raises(ValueError, match="index.jsonl line 5 is not JSON"):
        LatentDataset(tmp_path)
    (tmp_path / "index.jsonl").write_text('{"id": "a", "shard": "x"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 lacks prompt, frames, pose"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"viewmats": torch.zeros(3, 4, 4)}, r"sample 'x': viewmats must have shape \[4, 4, 4\] but got \[3, 4, 4\]"),
        ({"Ks": torch.zeros(4, 4)}, r"Ks must have shape \[4, 3, 3\] but got \[4, 4\]"),
        (
            {"condition": NEGATIVE | {"encoder_hidden_states": torch.zeros(2, 5)}},
            r"states must have shape \[3, 5\] but got \[2, 5\]",
        ),
        ({"condition": {"encoder_hidden_states": torch.zeros(3, 5)}}, "must have encoder_attention_mask as the negative"),
        ({"latents": torch.zeros(2, 3, 4)}, r"latents must have shape \[F, Cz, h, w\] but got \[2, 3, 4\]"),
        ({"trajectory": torch.zeros(6, 4, 2, 3, 5)}, r"trajectory must have shape \[6, 4, 2, 3, 4\]"),
        ({"Ks": torch.full((4, 3, 3), float("nan"))}, "Ks must be finite"),
    ],
)
def test_bad_samples_are_refused(tmp_path, change, message):
    with DatasetWriter(tmp_path, fps=8, negative=NEGATIVE) as writer:
        writer.add("s0", **sample(0))
        with pytest.raises(ValueError, match=message):
            writer.add("x", **sample(1) | change)
        with pytest.raises(ValueError, match="id 's0' is already"):
            writer.add("s0", **sample(1))
    assert [entry["id"] for entry in LatentDataset(tmp_path).entries] == ["s0"]
    assert len(load_file(tmp_path / "shard-00000.safetensors")) == 5, "nothing of a refused sample is stored"
    assert set(LatentDataset(tmp_path)[0]) == {"id", "prompt", "pose", "latents", "condition", "viewmats", "Ks"}


def test_a_data_set_goes_to_worker_processes(tmp_path):
    dataset = LatentDataset(write(tmp_path))
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[2]["latents"], dataset[2]["latents"])


def test_collate_stacks_and_names_what_does_not_fit(tmp_path):
    dataset = LatentDataset(write(tmp_path))
    batch = collate([dataset[2], dataset[0]])
    assert batch["latents"].shape == (2, 4, 2, 3, 4) and batch["prompt"] == [sample(2)["prompt"], sample(0)["prompt"]]
    assert torch.equal(batch["Ks"][1], sample(0)["Ks"]) and "trajectory" not in batch
    longer = {"id": "long", **sample(1, frames=5)}
    with pytest.raises(ValueError, match=r"equal shapes of latents but got \{'s2': \[4, 2, 3, 4\], 'long': \[5, 2, 3, 4\]\}"):
        collate([dataset[2], longer])
    with pytest.raises(ValueError, match="equal shapes of trajectory"):
        collate([dataset[2] | {"trajectory": torch.zeros(1)}, dataset[1]])


def test_a_data_set_of_format_1_is_read(tmp_path):
    """Its one condition was called text."""
    write(tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    old = {key.replace("condition.encoder_hidden_states", "text"): value for key, value in load_file(shard).items()}
    save_file({key: value for key, value in old.items() if "mask" not in key}, shard)
    save_file({"text": NEGATIVE["encoder_hidden_states"]}, tmp_path / "negative.safetensors")
    meta = json.loads((tmp_path / "dataset.json").read_text()) | {"format": 1}
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    dataset = LatentDataset(tmp_path)
    assert dataset.negative.keys() == dataset[1]["condition"].keys() == {"encoder_hidden_states"}
    assert torch.equal(dataset[1]["condition"]["encoder_hidden_states"], sample(1)["condition"]["encoder_hidden_states"])


def test_a_data_set_without_cameras(tmp_path):
    given = {key: value for key, value in sample(0).items() if key not in ("viewmats", "Ks")}
    with DatasetWriter(tmp_path, fps=8, negative=NEGATIVE) as writer:
        writer.add("a.b.c", **given)
    assert set(LatentDataset(tmp_path)[0]) == {"id", "prompt", "pose", "latents", "condition"}
    assert set(collate([LatentDataset(tmp_path)[0]])) == {"id", "prompt", "pose", "latents", "condition"}


def test_moving_a_batch_reaches_its_conditions():
    batch = to_device(collate([{"id": "a", **sample(0)}]), "meta")
    assert batch["pose"] == ["w*3"] and batch["latents"].is_meta
    assert all(value.is_meta for value in batch["condition"].values()) and len(batch["condition"]) == 2
