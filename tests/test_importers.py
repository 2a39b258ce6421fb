"""Tiny files in minWM's layouts become data sets: same numbers, our names, cameras that start at the identity."""

import json

import pytest
import torch

from dit_ops.camera import invert_rigid, parse_trajectory
from dit_ops.conditions.linear import LinearCondition
from dit_ops.training.importers_lmdb import import_lmdb
from dit_ops.training.importers_pt import import_pt

POSE = "l*2,w*1"
# world-to-camera quaternions [tx, ty, tz, qx, qy, qz, qw] of Ry(0), Ry(3°), Ry(6°) and the step forward, in a moved world
AWAY = parse_trajectory("d*5,j*9")[-1]


@pytest.fixture(scope="module")
def condition() -> LinearCondition:
    return LinearCondition.fit(torch.rand(1, 1, 3, 32, 48))


def quaternions(viewmats: torch.Tensor) -> torch.Tensor:
    """[tx, ty, tz, qx, qy, qz, qw] of rigid matrices whose trace is positive."""
    R, t = viewmats[..., :3, :3], viewmats[..., :3, 3]
    w = (1 + R.diagonal(dim1=-2, dim2=-1).sum(-1)).sqrt() / 2
    x, y, z = R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]
    return torch.cat([t, torch.stack([x, y, z], -1) / (4 * w[..., None]), w[..., None]], -1)


def moved() -> torch.Tensor:
    """The trajectory in a world whose origin is elsewhere."""
    return parse_trajectory(POSE) @ invert_rigid(AWAY)


def put(folder, arrays: dict) -> None:
    lmdb = pytest.importorskip("lmdb", reason="lmdb is an extra")
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 22) as database, database.begin(write=True) as transaction:
        for name, rows in arrays.items():
            text = name == "prompts"
            shape = [len(rows)] if text else list(rows.shape)
            transaction.put(f"{name}_shape".encode(), " ".join(map(str, shape)).encode())
            for i, row in enumerate(rows):
                transaction.put(f"{name}_{i}_data".encode(), row.encode() if text else row.numpy().tobytes())


def sft(n: int = 2) -> dict:
    return {
        "latents": torch.randn(n, 4, 16, 4, 6).half(),
        "prompts": [f"prompt {i} «ü»" for i in range(n)],
        "intrinsics": torch.tensor([[0.5, 0.9, 0.5, 0.5]]).repeat(n, 1),
        "poses": quaternions(moved()).float().expand(n, 4, 7),
    }


def test_a_training_lmdb(tmp_path, condition):
    given = sft()
    put(tmp_path / "lmdb", given)
    dataset = import_lmdb(tmp_path / "lmdb", tmp_path / "out", condition, fps=12)
    assert len(dataset) == 2 and dataset.meta["fps"] == 12
    for i in range(2):
        sample = dataset[i]
        assert sample["prompt"] == given["prompts"][i] and torch.equal(sample["latents"], given["latents"][i].float())
        torch.testing.assert_close(sample["viewmats"], parse_trajectory(POSE), atol=1e-5, rtol=0)
        torch.testing.assert_close(sample["Ks"][3], torch.tensor([[0.5, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]))
        text = condition.encode_text([given["prompts"][i]])["encoder_hidden_states"][0]
        assert torch.equal(sample["condition"]["encoder_hidden_states"], text)
    assert (dataset.entries[0]["height"], dataset.entries[0]["width"]) == (32, 48)


def test_sharded_trajectories(tmp_path, condition):
    """A folder of LMDBs without a data.mdb of its own; states of a sample, the last of them its ground truth."""
    for shard in ("b", "a"):
        given = {
            "latents": torch.randn(1, 6, 4, 16, 4, 6).half(),
            "prompts": [shard],
            "viewmats": moved().float()[None],
            "Ks": torch.eye(3).expand(1, 4, 3, 3),
        }
        put(tmp_path / "lmdb" / shard, given)
    dataset = import_lmdb(tmp_path / "lmdb", tmp_path / "out", condition)
    assert [dataset[i]["prompt"] for i in range(2)] == ["a", "b"]
    assert torch.equal(dataset[0]["trajectory"], given["latents"][0].float())
    assert torch.equal(dataset[0]["latents"], given["latents"][0, -1].float())
    torch.testing.assert_close(dataset[1]["viewmats"], parse_trajectory(POSE), atol=1e-5, rtol=0)


def test_damaged_lmdbs_are_named(tmp_path, condition):
    with pytest.raises(FileNotFoundError, match="must be an LMDB folder with data.mdb"):
        import_lmdb(tmp_path, tmp_path / "out", condition)
    put(tmp_path / "short", sft() | {"poses": torch.zeros(2, 3, 7)} | {"latents": torch.zeros(2, 4, 16, 4, 6)})
    with pytest.raises(ValueError, match=r"'latents_0_data' must be \[4, 16, 4, 6\] of float16 but has 6144 bytes"):
        import_lmdb(tmp_path / "short", tmp_path / "out", condition)
    put(tmp_path / "nothing", {name: value for name, value in sft().items() if name != "poses"})
    with pytest.raises(ValueError, match="must have latents with poses and intrinsics, or with viewmats and Ks"):
        import_lmdb(tmp_path / "nothing", tmp_path / "out2", condition)
    assert not (tmp_path / "out" / "index.jsonl").exists()


def pt_sample(ode: bool = False) -> dict:
    content = {
        "latent": torch.randn(1, 32, 4, 2, 3).bfloat16(),
        "image_cond": torch.randn(1, 32, 1, 2, 3).bfloat16(),
        "prompt_embeds": torch.randn(1, 5, 8),
        "prompt_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "vision_states": torch.randn(1, 3, 6),
        "byt5_text_states": torch.zeros(1, 2, 4),
        "byt5_text_mask": torch.zeros(1, 2, dtype=torch.long),
        "intrinsics": torch.tensor([0.5, 0.9, 0.5, 0.5]),
        "poses": quaternions(moved()).float(),
        "video_id": "clip 1",
    }
    if ode:
        content["ode_trajectory"] = torch.randn(1, 6, 32, 4, 2, 3)
        content |= {"viewmats": moved().float()[None], "Ks": torch.eye(3).expand(1, 4, 3, 3)}
    return content


@pytest.fixture
def folder(tmp_path):
    """index, samples and negatives as minWM leaves them."""
    torch.manual_seed(1)
    torch.save(pt_sample(), tmp_path / "a.pt")
    torch.save(pt_sample(ode=True), tmp_path / "b.pt")
    (tmp_path / "train_index.json").write_text(json.dumps([{"latent_path": "a.pt"}, {"latent_path": str(tmp_path / "b.pt")}]))
    embeds = {"negative_prompt_embeds": torch.ones(1, 5, 8), "negative_prompt_mask": torch.tensor([[1, 0, 0, 0, 0]])}
    torch.save(embeds, tmp_path / "neg.pt")
    byt5 = {"byt5_text_states": torch.zeros(1, 2, 4), "byt5_text_mask": torch.zeros(1, 2, dtype=torch.long)}
    torch.save(byt5, tmp_path / "byt5.pt")
    return tmp_path


def run(folder):
    return import_pt(folder / "train_index.json", folder / "out", negative=folder / "neg.pt", negative_byt5=folder / "byt5.pt")


def test_pt_files(folder):
    dataset = run(folder)
    content = torch.load(folder / "a.pt")
    sample = dataset[0]
    assert torch.equal(sample["latents"], content["latent"][0].transpose(0, 1)) and sample["prompt"] == "clip 1"
    condition = sample["condition"]
    assert torch.equal(condition["encoder_hidden_states"], content["prompt_embeds"][0])
    assert condition["encoder_attention_mask"].tolist() == [True, True, True, False, False]
    assert torch.equal(condition["image_embeds"], content["vision_states"][0])
    known = condition["condition_latents"]
    assert known.shape == (4, 33, 2, 3) and torch.equal(known[0, :32], content["image_cond"][0, :, 0])
    assert known[0, 32].eq(1).all() and not known[1:].any()
    torch.testing.assert_close(sample["viewmats"], parse_trajectory(POSE), atol=1e-5, rtol=0)
    assert "trajectory" not in sample and dataset[1]["trajectory"].shape == (6, 4, 32, 2, 3)
    torch.testing.assert_close(dataset[1]["viewmats"], parse_trajectory(POSE), atol=1e-5, rtol=0)
    names = {"encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_2", "encoder_attention_mask_2"}
    assert dataset.negative.keys() == names and dataset.negative["encoder_attention_mask"].tolist() == [True] + [False] * 4


class Code:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_pt_files_that_are_wrong_are_named(folder, capsys):
    whole = torch.load(folder / "a.pt")
    for change, message in (
        (lambda c: c.pop("prompt_mask"), "a.pt lacks prompt_mask; it has byt5_text_mask"),
        (lambda c: c.pop("poses"), "a.pt lacks its cameras"),
        (lambda c: c.update(code=Code()), "not a plain torch weight file"),
        (
            lambda c: c.update(latent=torch.zeros(2, 32, 4, 2, 3)),
            r"latent must be \[1, Cz, F, h, w\] but is \[2, 32, 4, 2, 3\]",
        ),
    ):
        content = dict(whole)
        change(content)
        torch.save(content, folder / "a.pt")
        with pytest.raises(ValueError, match=message):
            run(folder)
        assert not (folder / "out" / "index.jsonl").exists()
    assert "this code must not run" not in capsys.readouterr().out
    (folder / "a.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_index.json names .*a.pt, which does not exist"):
        run(folder)
