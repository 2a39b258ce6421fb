"""Steps that are recorded once and replayed: the bits of a stream that launches every step anew; what a step leaves behind."""

import pytest
import torch
from test_pipelines import make_backbone
from test_pipelines_hunyuan_video15 import model as make_hunyuan
from toy_tape import Calls, Tapes, recorded

import dit_ops
from dit_ops.conditions.linear import LinearCondition
from dit_ops.memory import Alive
from dit_ops.pipelines import stages
from dit_ops.pipelines.autoregressive import AutoregressivePipeline
from dit_ops.pipelines.causal import CausalPass, capture_of
from dit_ops.pipelines.few_step import FewStepPipeline
from dit_ops.pipelines.settings import Settings

PROMPT = 'a red room with a sign saying "open"'
POSE = "w*3,w+l*2,stay*1,k*2,a*3,d+j*2,s*2,u*3,l*2,w*1"  # 22 latent frames
SETTINGS = Settings(num_steps=3, height=32, width=48, denoising_steps=(1000, 750, 500), fps=8)
SMALL = {"height": 24, "width": 32}


@pytest.fixture(scope="module")
def condition() -> LinearCondition:
    return LinearCondition.fit(torch.rand(2, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1)


@pytest.fixture(scope="module")
def narrow() -> LinearCondition:
    return LinearCondition.fit(torch.rand(2, 3, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, 8, 4)


@pytest.fixture(scope="module")
def wan():
    return make_backbone()


@pytest.fixture(scope="module")
def hunyuan():
    torch.manual_seed(3)
    return make_hunyuan(block_frames=2, action=True).eval().requires_grad_(False)


def random_channels(state, backbone, condition) -> None:
    """Condition latents that differ in every frame."""
    Cz, h, w = state.latent_size
    for given in state.conditions:
        generator = torch.Generator().manual_seed(7)
        given["condition_latents"] = torch.randn(len(state.prompts), state.frames, Cz + 1, h, w, generator=generator)


class LinearMultistep(AutoregressivePipeline):
    """A sampler that keeps the flows it was given: x ← x + (σ' − σ)·(3·v_i − v_{i−1}) / 2."""

    def denoise_block(self, state, first, last, passes):
        sigmas = [t / 1000 for t in state.timesteps] + [0.0]
        x, before = stages.initial_noise(state, first, last), None
        for i, t in enumerate(state.timesteps):
            flow, _ = stages.predict_flow(self.backbone, state, x, t, first, passes)
            mean = flow if before is None else 1.5 * flow - 0.5 * before
            x, before = x + (sigmas[i + 1] - sigmas[i]) * mean, flow
        return x


FEW = (FewStepPipeline, {})
GUIDED = (AutoregressivePipeline, {"guidance": 2.0})
BATCHED = (AutoregressivePipeline, {"guidance": 2.0, "batched_guidance": True, "solver": "unipc"})
CASES = {
    "few-step": (*FEW, 4, 0),
    "few-step, sink": (*FEW, 4, 1),  # a ring of three frames: chunks of two wrap around
    "few-step, compact": (*FEW, 5, 1),
    "guided": (*GUIDED, 4, 1),
    "guided, UniPC": (AutoregressivePipeline, {"guidance": 2.0, "solver": "unipc"}, 4, 0),
    "batched": (*BATCHED, 4, 1),
    "batched, compact": (*BATCHED, 4, 1),
    "flows kept": (LinearMultistep, {}, 4, 0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_replays_give_the_bits_of_launches(family, name, wan, hunyuan, condition, narrow, monkeypatch):
    cls, options, window, sink = CASES[name]
    options = options | {"window_frames": window, "sink_frames": sink, "compact_cache": "compact" in name}
    backbone, codec, size = (wan, condition, {}) if family == "wan" else (hunyuan, narrow, SMALL)
    pipeline = cls(backbone, codec, SETTINGS.override(options | size))
    if family == "hunyuan" and "batched" not in name:
        pipeline.stages = (*pipeline.stages, random_channels)
    with recorded(monkeypatch, None):
        launched = pipeline(PROMPT, pose=POSE, seed=3)
    steps: list[tuple[int, int]] = []
    with recorded(monkeypatch, Tapes()) as tapes:
        for again in (False, True):  # the second request records anew
            tapes.clear()
            steps.clear()
            replayed = pipeline(PROMPT, pose=POSE, seed=3, on_step=lambda *step: steps.append(step))
            assert torch.equal(replayed, launched), again
    ring, passes, few = window - sink, 2 if name.startswith("guided") else 1, len(steps) // 11
    keys = 2 * (ring // 2 if ring % 2 == 0 else ring)  # every phase of the ring, as a step and as a rerun
    full = 11 - (-(-window // 2) - 1)  # chunks with which the ring is full
    assert len(tapes) == passes * keys
    assert sum(tape.replays for tape in tapes) == passes * (full * few + full - 1 - keys)  # all but one launch of each


def test_poses_that_come_while_streaming_and_a_known_start_replay_the_same(wan, condition, monkeypatch):
    pipeline = FewStepPipeline(wan, condition, SETTINGS.override({"window_frames": 4, "sink_frames": 1}))
    video = torch.rand(5, 3, 32, 48) * 2 - 1  # the last chunk is shorter, as the known ones are
    with recorded(monkeypatch, None):
        launched = pipeline(PROMPT, pose=POSE, video=video)
    with recorded(monkeypatch, Tapes()) as tapes:
        pieces = (f"{piece.split('*')[0]}*1" for piece in POSE.split(",") for _ in range(int(piece.split("*")[1])))
        replayed = pipeline(PROMPT, pose=pieces, video=video, overlap=True)
    assert torch.equal(replayed, launched) and sum(tape.replays for tape in tapes) > 20


class Ring:
    """A cache's host side, and one buffer that a step writes to."""

    def __init__(self, window: int) -> None:
        self.window, self.chunk, self.commits, self.seen = window, (0, 0), 0, torch.zeros(()).double()

    @property
    def phase(self):
        return tuple(frame % self.window for frame in range(*self.chunk))

    @property
    def full(self) -> bool:
        return self.chunk[1] >= self.window

    def commit(self) -> None:
        self.commits += 1


class Sum:
    """A backbone that adds up whatever it is given, and the chunks that were announced."""

    dtype = torch.float64

    def __init__(self) -> None:
        self.announced, self.inputs = [], []

    def announce(self, cache, start_frame, frames, height, width, **cameras) -> None:
        assert (height, width) == (2, 3)
        cache.chunk = (start_frame, start_frame + frames)
        self.announced.append((cache.chunk, {name: value.clone() for name, value in cameras.items()}))

    def predict(self, latents, timestep, text, *, cache, keys_only, **given):
        self.inputs.append({"latents": latents, "timestep": timestep, "text": text, **given})
        cache.seen.copy_(latents.sum())
        per_frame = sum(map(of_each_frame, given.values()))
        flow = latents + (timestep[:, None] + text[:, :1].double() + per_frame)[:, :, None, None, None]
        return flow.new_empty(0) if keys_only else flow


def of_each_frame(value: torch.Tensor) -> torch.Tensor:
    """[B, F, …] → [B, F]."""
    return value.double().flatten(1).unflatten(1, (value.shape[1], -1)).sum(2)


def of_pass(window: int = 4, copies: int = 1, capture=None) -> CausalPass:
    condition = {
        "text": torch.arange(2.0 * copies)[:, None],
        "condition_latents": torch.arange(2.0 * copies * 40).view(2 * copies, 40, 1),
    }
    return CausalPass(Sum(), condition, Ring(window), capture)


def chunk_at(first: int, frames: int = 2, B: int = 2):
    generator = torch.Generator().manual_seed(first)
    given = {"viewmats": torch.randn(B, frames, 4, 4, generator=generator), "Ks": torch.randn(B, frames, 3, 3)}
    return torch.randn(B, frames, 1, 2, 3, generator=generator), given | {"action": torch.randint(9, (B, frames))}


def expected(of_pass: CausalPass, x, t, first, given):
    copies = of_pass.rows // len(x)
    per_frame = of_pass.per_frame["condition_latents"][:, first : first + x.shape[1]].double().sum(2)
    per_frame = per_frame + sum(map(of_each_frame, given.values())).repeat(copies, 1)
    whole = t + of_pass.whole["text"].double()
    return x.double().repeat(copies, 1, 1, 1, 1) + (whole + per_frame)[:, :, None, None, None]


@pytest.mark.parametrize("copies", [1, 2])
def test_every_input_of_a_step_is_that_of_its_chunk(copies):
    tapes = Tapes()
    a_pass = of_pass(copies=copies, capture=tapes)
    kept = []
    for first in range(0, 30, 2):
        x, given = chunk_at(first)
        for t in (900.0, 400.0):
            kept.append((a_pass(x * t, t, first, given), expected(a_pass, x * t, t, first, given)))
        steered = {name: value for name, value in given.items() if name != "action"}
        assert a_pass(x, 0.0, first, steered, keys_only=True).numel() == 0
        torch.testing.assert_close(a_pass.cache.seen, x.double().sum() * copies)
    for got, want in kept:  # the flows of earlier chunks too
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    assert sum(tape.replays for tape in tapes) == 14 * 3 - 4
    assert a_pass.cache.commits == 15 * 3


def test_a_chunk_is_announced_once_with_its_cameras():
    a_pass = of_pass()
    for first, frames in ((0, 2), (2, 2), (4, 1)):
        x, given = chunk_at(first, frames)
        for t in (900.0, 0.0):
            a_pass(x, t, first, given, keys_only=t == 0)
        chunk, cameras = a_pass.backbone.announced[-1]
        assert chunk == (first, first + frames)
        assert torch.equal(cameras["viewmats"], given["viewmats"]) and torch.equal(cameras["Ks"], given["Ks"])
    assert len(a_pass.backbone.announced) == 3
    assert ["action" in inputs for inputs in a_pass.backbone.inputs] == [True, False] * 3


def test_inputs_stay_where_they_are():
    a_pass = of_pass()
    for first, frames in ((0, 2), (2, 2), (4, 1), (5, 2), (7, 2)):
        a_pass(*(chunk := chunk_at(first, frames))[:1], 500.0, first, chunk[1])
    places = [{name: t.data_ptr() for name, t in inputs.items()} for inputs in a_pass.backbone.inputs]
    assert places[0] == places[1] == places[3] == places[4]  # per number of frames
    assert not set(places[0].values()) & (set(places[2].values()) - {places[2]["text"]})


def test_what_is_recorded_and_when():
    made = []

    def capture(step):
        made.append((a_pass.cache.phase, len(a_pass.backbone.inputs)))
        return (lambda: None), step()

    a_pass = of_pass(window=4, capture=capture)
    for first in range(0, 12, 2):
        x, given = chunk_at(first)
        a_pass(x, 900.0, first, given)
        a_pass(x, 0.0, first, given, keys_only=True)
    # chunks from frame 2 on fill the ring: phase (2, 3) is met at 2, 6, 10 and (0, 1) at 4, 8
    assert [phase for phase, _ in made] == [(2, 3), (2, 3), (0, 1), (0, 1)]
    assert len(a_pass.steps) == 4 and all(a_pass.steps.values())
    x, given = chunk_at(12, 1)
    a_pass(x, 900.0, 12, given)  # a shorter chunk is another step
    assert len(made) == 4


def test_where_steps_are_not_recorded(wan, monkeypatch):
    assert capture_of(wan, True) is None  # no GPU
    monkeypatch.setattr("dit_ops.pipelines.causal.CudaGraphs", lambda device: "graphs")
    monkeypatch.setattr(type(wan), "device", torch.device("cuda"))
    assert capture_of(wan, True) == "graphs"
    assert capture_of(wan, False) is None
    for name in ("sequence_parallel", "offloaded"):
        with monkeypatch.context() as patch:
            patch.setattr(wan, name, True)
            assert capture_of(wan, True) is None


# what a step leaves behind and waits for


def held(owner: object, seen: set[int] | None = None) -> dict[int, int]:
    """Storages that an object holds: address → bytes."""
    seen = set() if seen is None else seen
    if id(owner) in seen or isinstance(owner, torch.nn.Module):
        return {}
    seen.add(id(owner))
    if isinstance(owner, torch.Tensor):
        return {owner.untyped_storage().data_ptr(): owner.untyped_storage().nbytes()}
    inside = owner.values() if isinstance(owner, dict) else owner if isinstance(owner, (list, tuple)) else vars(owner).values()
    found: dict[int, int] = {}
    for value in inside:
        if isinstance(value, (dict, list, tuple, torch.Tensor)) or hasattr(value, "__dict__"):
            found |= held(value, seen)
    return found


@pytest.mark.parametrize(("family", "compact"), [("wan", False), ("hunyuan", True)], ids=["wan", "hunyuan, compact"])
def test_no_step_leaves_memory_behind_once_the_ring_is_full(family, compact, wan, hunyuan, condition, narrow, monkeypatch):
    backbone, codec, size = (wan, condition, {}) if family == "wan" else (hunyuan, narrow, SMALL)
    options = {"window_frames": 4, "sink_frames": 1, "compact_cache": compact, "guidance": 2.0, "num_steps": 2}
    pipeline = AutoregressivePipeline(backbone, codec, SETTINGS.override(options | size))
    passes, kept, alive_after = [], [], []
    make = stages.causal_passes
    monkeypatch.setattr(stages, "causal_passes", lambda *args: passes.extend(make(*args)) or passes)

    def step(done: int, total: int) -> None:
        kept.append([held(a_pass) for a_pass in passes])
        alive_after.append(alive.now)

    with Alive() as alive:
        for chunk in pipeline.stream(PROMPT, pose=iter(["w*1", "l*1", "s*1", "j*1"] * 3), on_step=step):
            del chunk
    assert len(kept) == 7 * 2 + 6 and len(passes) == 2  # six chunks of two frames, and one of one
    start, end = 2 + 3, -3  # from the third chunk on, which comes behind a rerun in a full ring, to the last of two frames
    assert sum(kept[start][0].values()) > 10_000
    assert all(at == kept[start] for at in kept[start:end])
    for i in range(3):
        assert len(set(alive_after[start + i : end : 3])) == 1, f"step {i} of a chunk"


class Transfers(Calls):
    """Copies between the host and a device that stands for a GPU: the meta device, of which nothing can be read at all."""

    def __init__(self, pinned: list[torch.Tensor]) -> None:
        super().__init__()
        self.pinned, self.waiting, self.beside = pinned, [], 0

    def call(self, func, args, kwargs):
        out = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and out.is_meta:
            source = args[func is torch.ops.aten.copy_.default]
            free = kwargs.get("non_blocking") and any(source is tensor for tensor in self.pinned)
            self.beside += bool(free)
            if not free and not source.is_meta:
                self.waiting.append((func, source.shape))
        return out


CALM = {
    "few-step": (*FEW, {}),
    "guided": (*GUIDED, {}),
    "batched, compact": (AutoregressivePipeline, {"guidance": 2.0, "batched_guidance": True}, {"compact_cache": True}),
}


@pytest.mark.parametrize("name", CALM)
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_no_step_waits_for_the_device(family, name, condition, narrow, monkeypatch):
    cls, options, more = CALM[name]
    make, codec, size = (make_backbone, condition, {}) if family == "wan" else (make_hunyuan, narrow, SMALL)
    options = options | more | size | {"window_frames": 4, "sink_frames": 1}
    codec = LinearCondition(codec.codec, codec.text).to("meta")
    pipeline = cls(make(block_frames=2).to("meta"), codec, SETTINGS.override(options))
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    counts = lambda given: ((0,) * len(given.llm), (0,) * len(given.llm), (16,) * len(given.llm))
    monkeypatch.setattr("dit_ops.backbones.hunyuan_video15_text._counts", counts)  # the one read, of a new text
    with dit_ops.use_backend("reference"):
        stream = pipeline.stream(PROMPT, pose=iter(["w*1", "l*1"] * 4))
        next(stream)
        for _ in range(3):  # the last of them in a full ring
            with Transfers(pinned) as transfers:
                next(stream)
            assert transfers.waiting == []
            assert transfers.beside >= (5 if cls is FewStepPipeline else 3)  # noise, poses
        with Transfers(pinned) as transfers:
            torch.ones(2).to("meta", non_blocking=True)
            torch.empty(2, device="meta").copy_(torch.ones(2).pin_memory())
        assert len(transfers.waiting) == 2
        with pytest.raises(RuntimeError, match="meta"):
            torch.ones(1, device="meta").item()
