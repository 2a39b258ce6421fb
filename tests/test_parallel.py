"""A Wan backbone on several gloo ranks against the same one on one: outputs, losses and every gradient, in every mode."""

import pytest
import torch
import torch.distributed as dist

from dit_ops.backbones.wan import WanBackbone
from dit_ops.camera import intrinsics_matrix, parse_trajectory
from dit_ops.layout import VideoLayout
from dit_ops.ops import _ulysses_wire, ulysses
from dit_ops.parallel import SequenceParallel

CONFIG = dict(
    num_layers=2,
    num_attention_heads=3,
    attention_head_dim=16,
    ffn_dim=32,
    text_dim=8,
    freq_dim=16,
    in_channels=4,
    out_channels=4,
)
FRAMES, HEIGHT, WIDTH = 3, 2, 10  # rows of 5 tokens: no number of ranks divides them, nor the 3 heads


def model(camera: bool = True) -> WanBackbone:
    """Weights for which it matters whom a token attends to, and a camera branch that counts."""
    torch.manual_seed(7)
    model = WanBackbone.from_config(CONFIG, camera=camera, block_frames=1)
    for block in model.transformer.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.normal_(norm.weight, mean=2.0, std=0.2)
        torch.nn.init.normal_(block.attn1.to_v.weight, std=0.3)
    for layer in model.camera or ():
        torch.nn.init.normal_(layer.weight, std=0.2)
    return model


def arguments(camera: bool = True, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    pose = parse_trajectory(f"l*{FRAMES - 1}").expand(2, FRAMES, 4, 4)
    cameras = {"viewmats": pose, "Ks": intrinsics_matrix(0.6, 0.8).expand(2, FRAMES, 3, 3)} if camera else {}
    return {
        "latents": draw(2, FRAMES, 4, HEIGHT, WIDTH),
        "timestep": 900 * torch.rand(2, FRAMES, generator=generator),
        "encoder_hidden_states": draw(2, 4, 8),
        "target": draw(2, FRAMES, 4, HEIGHT, WIDTH),
        "clean_latents": draw(2, FRAMES, 4, HEIGHT, WIDTH),
        **cameras,
    }


def run(model: WanBackbone, mode: str) -> torch.Tensor:
    given = arguments(model.camera is not None, model.dtype)
    given.pop("target")
    clean = given.pop("clean_latents")
    if mode == "teacher forcing":
        return model(**given, clean_latents=clean)
    if mode == "bidirectional":
        return model(**given)
    cache = model.new_cache(2, HEIGHT, WIDTH, window_frames=2, rotated=mode != "unrotated cache")
    flows = []
    for f in range(FRAMES):  # the last frame with gradient, on a window that has lost its oldest frame
        at = slice(f, f + 1)
        part = {n: t if n == "encoder_hidden_states" else t[:, at] for n, t in given.items()}
        with torch.set_grad_enabled(f == FRAMES - 1):
            flows.append(model(**part, cache=cache, start_frame=f))
    return torch.cat(flows, 1)


SIZES = (2, 3, 4)
MODES = ("bidirectional", "teacher forcing", "cache", "unrotated cache")


def step(model: WanBackbone, mode: str) -> dict:
    """Output, loss and gradients by name."""
    model.zero_grad()
    out = run(model, mode)
    loss = (out - arguments(dtype=model.dtype)["target"]).square().mean()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "loss": loss.detach(), **grads}


def averaged(results: dict, group: dist.ProcessGroup) -> dict:
    """The mean of every gradient over the ranks."""
    for name, value in results.items():
        if name not in ("out", "loss"):
            dist.all_reduce(value, group=group)
            value /= group.size()
    return results


def identity(flat, sent, received, group):
    """No exchange: a rank keeps what it sends, cut or filled up to the size that it would receive."""
    return lambda: torch.cat((flat, flat.new_zeros(max(0, sum(received) - flat.numel()))))[: sum(received)] * 1


def sizes(rank: int, _: int) -> dict:
    """What this rank has in groups of the first 2, 3 and 4 ranks."""
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    return {size: on_ranks(group, size) for size, group in groups.items() if rank < size}


def on_ranks(group: dist.ProcessGroup, size: int) -> dict:
    calls, real = [], dist.all_to_all_single

    def counted(out, flat, *args, **kwargs):
        calls.append(flat.nbytes)
        return real(out, flat, *args, **kwargs)

    dist.all_to_all_single = counted
    backbone = model()
    backbone.sequence_parallel = SequenceParallel(group)
    results = {}
    for mode in MODES:
        calls.clear()
        with torch.no_grad():
            run(backbone, mode)
        results[f"bytes {mode}"] = list(calls)
        results[mode] = averaged(step(backbone, mode), group)
    backbone.gradient_checkpointing = True
    results["checkpointed"] = averaged(step(backbone, "teacher forcing"), group)
    backbone.gradient_checkpointing = False
    if size == 2:
        wide = model().double()
        wide.sequence_parallel = backbone.sequence_parallel
        results["fp64"] = averaged(step(wide, "teacher forcing"), group)
        plain = model(camera=False)
        plain.sequence_parallel = backbone.sequence_parallel
        results["no camera"] = averaged(step(plain, "teacher forcing"), group)
        start = ulysses.start_exchange, ulysses.exchange
        ulysses.start_exchange = identity
        ulysses.exchange = lambda *args: identity(*args)()
        results["no exchange"] = averaged(step(backbone, "bidirectional"), group)
        ulysses.start_exchange, ulysses.exchange = start
    dist.all_to_all_single = real
    return results


def differences(got: dict, want: dict) -> dict[str, float]:
    """|got - want| / |want| of every tensor, in the 2-norm."""
    assert got.keys() == want.keys()
    return {n: ((got[n] - w).norm() / w.norm()).item() for n, w in want.items()}


@pytest.fixture(scope="module")
def one_rank() -> dict:
    modes = {mode: step(model(), mode) for mode in MODES}
    return modes | {"checkpointed": modes["teacher forcing"], "no camera": step(model(camera=False), "teacher forcing")}


@pytest.fixture(scope="module")
def truth() -> dict:
    """On one rank in fp64."""
    modes = {mode: step(model().double(), mode) for mode in MODES}
    plain = step(model(camera=False).double(), "teacher forcing")
    return modes | {"checkpointed": modes["teacher forcing"], "no camera": plain}


@pytest.fixture(scope="module")
def several_ranks(run_ranks) -> list[dict]:
    return run_ranks(sizes, max(SIZES))


@pytest.mark.dist
@pytest.mark.parametrize("size", SIZES)
def test_wan_on_several_ranks_equals_one(several_ranks, one_rank, truth, size):
    """Uneven tokens, uneven heads (none on one of 4 ranks), the camera on, activation checkpointing.

    To 1e-6, plus what fp32 itself costs on one rank: the distance of its gradient from that in fp64.
    """
    wrong = {}
    for rank, results in enumerate(r[size] for r in several_ranks[:size]):
        for name in [*MODES, "checkpointed", *(["no camera"] if size == 2 else [])]:
            want = one_rank[name]
            rounding = differences(want, truth[name])
            assert all(torch.isfinite(t).all() for t in results[name].values())
            wrong |= {
                f"{rank} {name} {n}": d for n, d in differences(results[name], want).items() if not d <= 1e-6 + rounding[n]
            }
        if size == 2:
            wrong |= {
                f"fp64 {n}": d for n, d in differences(results["fp64"], truth["teacher forcing"]).items() if not d <= 1e-6
            }
            lost = differences(results["no exchange"], one_rank["bidirectional"])
            assert lost["out"] > 0.05 and sum(d > 0.05 for d in lost.values()) > 10
        # per block: normed q, k, v of this rank's tokens, then both paths of o of its heads; at the end the projected channels
        tokens, heads = _ulysses_wire.split(5, size)[rank], _ulysses_wire.split(3, size)[rank]
        for mode, rows in (("bidirectional", FRAMES), ("teacher forcing", 2 * FRAMES)):
            q = 4 * 2 * rows * tokens * 3 * 16
            o = 4 * 2 * rows * 5 * heads * 16
            last = 4 * 2 * FRAMES * tokens * 16 * size
            assert results[f"bytes {mode}"] == [3 * q, 2 * o] * 2 + [last]
    assert not wrong


def test_one_rank_has_no_collective(monkeypatch):
    monkeypatch.setattr(dist, "all_to_all_single", None)

    class Alone:
        rank, size = staticmethod(lambda: 0), staticmethod(lambda: 1)

    backbone = model()
    want = step(backbone, "teacher forcing")
    backbone.sequence_parallel = SequenceParallel(Alone())
    got = step(backbone, "teacher forcing")
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_what_a_rank_holds():
    class Group:
        rank, size = staticmethod(lambda: 1), staticmethod(lambda: 4)

    parallel, layout = SequenceParallel(Group()), VideoLayout(3, 1, 5, halves=2)
    assert parallel.tokens(layout) == [12, 6, 6, 6] and parallel.heads(3) == [1, 1, 1, 0]
    x = torch.arange(30).view(1, 30, 1)
    assert parallel.local_tokens(x, layout).flatten().tolist() == [2, 7, 12, 17, 22, 27]
