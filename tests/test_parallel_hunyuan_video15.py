"""A HunyuanVideo 1.5 backbone on several gloo ranks against the same one on one: outputs, losses and every gradient.

Two samples with texts of different lengths, cameras, actions and image latents, in every mode. 5 tokens a frame: no number
of ranks divides them, nor do 2 ranks divide 3 heads; of 3 ranks with 2 heads the last one has none.
"""

import pytest
import torch
import torch.distributed as dist
from toy_hunyuan_video15 import CONDITIONED, conditions, tiny, video

from dit_ops.actions import action_labels
from dit_ops.backbones.hunyuan_video15 import HunyuanVideo15Backbone
from dit_ops.ops import _ulysses_wire, ulysses
from dit_ops.parallel import SequenceParallel

B, FRAMES, HEIGHT, WIDTH, PATCH, TOKENS, T, D = 2, 5, 2, 10, 2, 5, 8, 16
CHUNKS = (2, 2, 1)  # the second wraps around a ring of 3 frames
HEADS = {2: 3, 3: 2}  # by ranks
MODES = ("bidirectional", "teacher forcing", "cache", "unrotated cache", "shared cache")
NARROW = ("bidirectional", "teacher forcing", "cache")  # also in fp32: the kernels instead of the reference


def model(ranks: int, camera: bool = True, dtype: torch.dtype = torch.float64) -> HunyuanVideo15Backbone:
    torch.manual_seed(3)
    config = CONDITIONED | {"num_attention_heads": HEADS[ranks], "patch_size": PATCH}
    return tiny(camera, block_frames=1, config=config, action=True).to(dtype)


def arguments(model: HunyuanVideo15Backbone) -> dict:
    torch.manual_seed(4)
    latents, clean, cameras = video(B, FRAMES, HEIGHT, WIDTH)
    given = {
        "latents": latents,
        "timestep": 100 + 800 * torch.rand(B, FRAMES),
        "clean_latents": clean,
        "target": torch.randn_like(latents),
        "condition_latents": torch.randn(B, FRAMES, 5, HEIGHT, WIDTH),
        "action": action_labels(cameras["viewmats"]),
        **(cameras if model.camera is not None else {}),
        **conditions(),
    }
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in given.items()}


def run(model: HunyuanVideo15Backbone, mode: str) -> torch.Tensor:
    given = arguments(model)
    clean = given.pop("clean_latents")
    given.pop("target")
    if mode == "teacher forcing":
        return model(**given, clean_latents=clean)
    if mode == "bidirectional":
        return model(**given)
    model.prope_cache = "shared" if mode == "shared cache" else "separate"
    cache = model.new_cache(B, HEIGHT, WIDTH, window_frames=3, rotated=mode != "unrotated cache")
    text, flows, start = conditions().keys(), [], 0
    for frames in CHUNKS:  # the last one with gradient, on a window that has lost its oldest frames
        part = {name: t if name in text else t[:, start : start + frames] for name, t in given.items()}
        with torch.set_grad_enabled(start + frames == FRAMES):
            flows.append(model(**part, cache=cache, start_frame=start))
        start += frames
    return torch.cat(flows, 1)


def step(model: HunyuanVideo15Backbone, mode: str) -> dict:
    """Output, loss and gradients by name."""
    model.zero_grad()
    out = run(model, mode)
    loss = (out - arguments(model)["target"]).square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "loss": loss.detach(), **grads}


def steps(ranks: int, group: dist.ProcessGroup | None) -> dict:
    """The results of every case."""
    wide, plain, narrow = model(ranks), model(ranks, camera=False), model(ranks, dtype=torch.float32)
    for backbone in (wide, plain, narrow):
        backbone.sequence_parallel = None if group is None else SequenceParallel(group)
    results = {mode: step(wide, mode) for mode in MODES}
    results |= {f"{mode} without cameras": step(plain, mode) for mode in ("teacher forcing", "cache")}
    results |= {f"{mode} in fp32": step(narrow, mode) for mode in NARROW}
    for mode, recompute in (("bidirectional", "full"), ("teacher forcing", "selective")):
        wide.gradient_checkpointing = recompute
        results[f"{mode} recomputed"] = results[mode] if group is None else step(wide, mode)
    return results


def identity(flat, sent, received, group):
    """No exchange: a rank keeps what it sends, cut or filled up to the size that it would receive."""
    return lambda: torch.cat((flat, flat.new_zeros(max(0, sum(received) - flat.numel()))))[: sum(received)] * 1


def on_a_rank(rank: int, _: int) -> dict:
    """What this rank has in groups of the first 2 and 3 ranks."""
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in HEADS}
    return {ranks: in_a_group(group, ranks) for ranks, group in groups.items() if rank < ranks}


def in_a_group(group: dist.ProcessGroup, ranks: int) -> dict:
    results = steps(ranks, group)
    backbone, calls, real = model(ranks), [], dist.all_to_all_single
    backbone.sequence_parallel = SequenceParallel(group)

    def counted(out, flat, *args, **kwargs):
        calls.append(flat.nbytes)
        return real(out, flat, *args, **kwargs)

    dist.all_to_all_single = counted
    for mode in NARROW:
        calls.clear()
        with torch.no_grad():
            run(backbone, mode)
        results[f"bytes {mode}"] = list(calls)
    dist.all_to_all_single = real
    if ranks == 2:
        start = ulysses.start_exchange, ulysses.exchange
        ulysses.start_exchange, ulysses.exchange = identity, lambda *args: identity(*args)()
        results["no exchange"] = step(backbone, "bidirectional")
        ulysses.start_exchange, ulysses.exchange = start
    return results


def with_mean_gradients(results: list[dict], rank: int) -> dict:
    """A rank's output and loss, and the mean over the ranks of every gradient, which all of them have."""
    assert all(r.keys() == results[rank].keys() for r in results)
    grads = results[rank].keys() - {"out", "loss"}
    return results[rank] | {name: sum(r[name] for r in results) / len(results) for name in grads}


def differences(got: dict, want: dict) -> dict[str, float]:
    """|got - want| / |want| of every tensor, in the 2-norm.

    Against the queries' bias for the keys' bias of the refiner, whose gradient is zero: softmax does not see what keys share.
    """
    assert got.keys() == want.keys()
    scales = {name: want[name.replace("refiner_blocks.0.attn.to_k.bias", "refiner_blocks.0.attn.to_q.bias")] for name in want}
    return {name: ((got[name] - w).norm() / scales[name].norm()).item() for name, w in want.items()}


@pytest.fixture(scope="module")
def several_ranks(run_ranks) -> list[dict]:
    return run_ranks(on_a_rank, max(HEADS))


@pytest.mark.dist
@pytest.mark.parametrize("ranks", HEADS)
def test_several_ranks_equal_one(several_ranks, ranks):
    """fp64 to 1e-6; fp32 to 1e-6 plus what fp32 costs on one rank, the distance of its gradient from that in fp64."""
    expected, wrong = steps(ranks, None), {}
    rounding = {f"{mode} in fp32": differences(expected[f"{mode} in fp32"], expected[mode]) for mode in NARROW}
    every_rank = [results[ranks] for results in several_ranks[:ranks]]
    for rank, results in enumerate(every_rank):
        for case, want in expected.items():
            got = with_mean_gradients([r[case] for r in every_rank], rank)
            for name, difference in differences(got, want).items():
                if not difference <= 1e-6 + rounding.get(case, {}).get(name, 0):
                    wrong[f"{rank} {case} {name}"] = difference
        for mode in NARROW:
            assert results[f"bytes {mode}"] == expected_bytes(rank, ranks, mode)
    assert not wrong
    if ranks == 2:
        lost = with_mean_gradients([r["no exchange"] for r in every_rank], 0)
        lost = differences(lost, expected["bidirectional"])
        assert lost["out"] > 0.05 and sum(d > 0.05 for d in lost.values()) > 100


def expected_bytes(rank: int, ranks: int, mode: str) -> list[int]:
    """Per block normed q, k, v of this rank's tokens, then both paths of o of its heads; at the end the projected channels.

    The text's output crosses only where it has seen the video and another block reads it.
    """
    tokens, N = _ulysses_wire.split(TOKENS, ranks)[rank], HEADS[ranks]
    heads, sent = _ulysses_wire.split(N, ranks)[rank], []
    for frames in CHUNKS if mode == "cache" else (FRAMES,):
        rows = 2 * frames if mode == "teacher forcing" else frames
        for text in (T if mode == "bidirectional" else 0, 0):  # of two blocks
            sent += [8 * B * 3 * rows * tokens * N * D, 8 * B * 2 * (rows * TOKENS + ranks * text) * heads * D]
        sent.append(8 * B * frames * tokens * 4 * PATCH**2 * ranks)
    return sent


def test_a_group_of_one_rank_has_no_collective(monkeypatch):
    monkeypatch.setattr(dist, "all_to_all_single", None)

    class Alone:
        rank, size = staticmethod(lambda: 0), staticmethod(lambda: 1)

    backbone = model(2)
    want = run(backbone, "bidirectional")
    backbone.sequence_parallel = SequenceParallel(Alone())
    assert torch.equal(run(backbone, "bidirectional"), want)
