"""Streaming in two halves, `announce` and `predict`, and reruns for keys and values alone, of every backbone."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy_hunyuan_video15
from test_parallel import CONFIG
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from toy_tape import READS
from toy_wan import I2V as IMAGE
from toy_wan_ti2v_directory import CONFIG as TI2V

from dit_ops.actions import action_labels
from dit_ops.backbones import hunyuan_video15_block, wan_block
from dit_ops.backbones._block import make_shard_unit
from dit_ops.backbones.wan import WanBackbone
from dit_ops.backbones.wan_ti2v import WanTI2VBackbone
from dit_ops.cache import KVCache
from dit_ops.camera import intrinsics_matrix, parse_trajectory
from dit_ops.conditions.arguments import image_condition, of_clean, of_frames
from dit_ops.parallel import SequenceParallel

B, F, H, W = 2, 14, 4, 6  # latents; 6 tokens per frame
WAN = CONFIG | dict(num_layers=3)
I2V = WAN | IMAGE
HUNYUAN = dict(num_layers=3, num_attention_heads=3, patch_size=2, in_channels=9)


@dataclass
class Case:
    """A model, the latents of a stream, and its conditions; `frames` have an entry per frame."""

    model: Any
    latents: torch.Tensor
    clean: torch.Tensor
    whole: dict[str, torch.Tensor]
    frames: dict[str, torch.Tensor] = field(default_factory=dict)

    def chunk(self, first: int, last: int) -> dict[str, Any]:
        return self.whole | of_frames(self.frames, first, last) | self.cameras(first, last)

    def cameras(self, first: int, last: int) -> dict[str, torch.Tensor]:
        return {name: self.frames[name][:, first:last] for name in ("viewmats", "Ks") if name in self.frames}


def make(name: str) -> Case:
    torch.manual_seed(5)
    camera = "camera" in name
    pose = torch.stack([parse_trajectory(f"{key}*{F - 1}") for key in ("l", "w")])
    frames = {"viewmats": pose, "Ks": intrinsics_matrix(0.6, 0.8).expand(B, F, 3, 3)} if camera else {}
    if "hunyuan" in name:
        options = {"prope_cache": "shared"} if "shared" in name else {}
        model = toy_hunyuan_video15.tiny(camera, config=HUNYUAN, action="action" in name, **options)
        frames["condition_latents"] = torch.randn(B, F, 5, H, W)
        if "action" in name:
            frames["action"] = action_labels(pose)
        return Case(model, *torch.randn(2, B, F, 4, H, W), toy_hunyuan_video15.conditions(), frames)
    cls, config = (WanTI2VBackbone, TI2V) if "TI2V" in name else (WanBackbone, I2V if "I2V" in name else WAN)
    model = cls.from_config(config, camera=camera, block_frames=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    latents, clean = torch.randn(2, B, F, config["out_channels"], H, W)
    whole = {"encoder_hidden_states": torch.randn(B, 4, config["text_dim"])}
    if "I2V" in name and "T" not in name:
        whole["encoder_hidden_states_image"] = torch.randn(B, 5, 10)
        frames["condition_latents"] = torch.randn(B, F, 5, H, W)
    if "TI2V" in name:
        frames["condition_latents"] = image_condition(clean[:, :1], F)
    return Case(model, latents, clean, whole, frames)


NAMES = (
    "wan",
    "wan, camera",
    "wan I2V, camera",
    "wan TI2V",
    "hunyuan",
    "hunyuan, camera, action",
    "hunyuan, camera, shared",
)
CHUNKS = (1, 3, 3, 3, 3, 1)  # the first and the last shorter; in a ring of 4 slots some wrap around
WINDOW = {"window_frames": 5, "sink_frames": 1}


def caches_of(name: str) -> list[dict[str, Any]]:
    rotated = [WINDOW, {}]
    return rotated if "shared" in name else [*rotated, WINDOW | {"rotated": False}, {"rotated": False}]


CASES = [(name, options) for name in NAMES for options in caches_of(name)]
every_case = pytest.mark.parametrize("name, options", CASES, ids=lambda value: "" if isinstance(value, str) else str(value))


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8).clone()


def contents(cache: KVCache) -> dict[str, Any]:
    """All that later chunks depend on: no slot that was never written."""
    filled = cache.ring.filled(cache.end_frame)
    seen = slice(cache.prefix - cache._text_tokens, cache._tokens(0, filled).stop)
    found = {f"{'kv'[j]} {i}": bits(pair[j][:, seen]) for i, pair in enumerate(cache._buffers) for j in range(2)}
    found["rows"] = bits(cache.announced(cache._chunk[1] - cache._chunk[0])[0])
    found |= {f"turning {i}": bits(t) for i, t in enumerate(cache._turning or ()) if isinstance(t, torch.Tensor)}
    found |= {f"text {i}.{j}": bits(t) for i, keys in enumerate(cache.text) for j, t in enumerate(keys or ())}
    return found | {"cursors": (cache.end_frame, cache._last, cache.prefix, cache._text_tokens, cache.text_lengths)}


def same(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    assert a.keys() == b.keys()
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return [name for name in a if not equal(a[name], b[name])]


@torch.no_grad()
def stream(case: Case, keys_only: bool, options: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Every chunk at t = 500, then again at 0 on its clean latents: the flows, and the cache after the rerun."""
    cache, found, first = case.model.new_cache(B, H, W, **options), [], 0
    for frames in CHUNKS:
        last = first + frames
        given = {**case.chunk(first, last), "cache": cache, "start_frame": first}
        flow = case.model(case.latents[:, first:last], torch.full((B,), 500.0), **given)
        again = case.model(case.clean[:, first:last], torch.zeros(B), **of_clean(given), keys_only=keys_only)
        assert again.shape == ((0,) if keys_only else flow.shape)
        found.append((flow, contents(cache)))
        first = last
    return found


def differences(one: list[tuple[torch.Tensor, dict[str, Any]]], other: list[tuple[torch.Tensor, dict[str, Any]]]) -> list[str]:
    """Names of what differs in two streams."""
    found = []
    for (flow, kept), (other_flow, other_kept) in zip(one, other, strict=True):
        found += [*same(kept, other_kept), *([] if torch.equal(flow, other_flow) else ["flow"])]
    return found


# reruns for keys and values


@every_case
def test_a_rerun_for_keys_leaves_the_bits_of_a_full_one(name, options):
    case = make(name)
    assert differences(stream(case, True, options), stream(case, False, options)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_rerun_for_keys_stops_there(name, monkeypatch):
    """The last layer runs its norm's modulation and the projections of keys and values, and there is no head."""
    case, called, calls = make(name), set(), []
    module = hunyuan_video15_block if "hunyuan" in name else wan_block
    attention = module.attention
    monkeypatch.setattr(module, "attention", lambda *args: calls.append(1) or attention(*args))
    stack, last = ("transformer_blocks", 2) if "hunyuan" in name else ("blocks", len(case.model.blocks) - 1)
    with torch.no_grad():
        cache = case.model.new_cache(B, H, W)
        given = {**case.chunk(0, 2), "cache": cache}
        case.model(case.latents[:, :2], torch.full((B,), 500.0), **given)
        full, calls[:] = len(calls), []
        for path, part in case.model.named_modules():
            part.register_forward_hook(lambda *_, path=path: called.add(path))
        case.model(case.clean[:, :2], torch.zeros(B), **of_clean(given), keys_only=True)
    own = f"transformer.{stack}.{last}."
    inside = {path.removeprefix(own) for path in called if path.startswith(own)}
    if "hunyuan" in name:
        assert inside == {"norm1.linear", "attn.to_k", "attn.to_v"}
        assert len(calls) == last  # one a layer; the text has run before
        assert full == 2 * (last + 1)  # the first time also one a layer of the text
    else:
        assert inside == {"attn1.to_k", "attn1.to_v"}
        assert len(calls) == full * last // (last + 1)
    assert not {"transformer.proj_out", "transformer.norm_out.linear"} & called


@pytest.mark.parametrize("name", NAMES)
def test_known_frames_may_come_first(name):
    """Keys of clean chunks before any flow, as of a video that is continued; the text's keys stay where they are then."""
    case, flows = make(name), []
    for keys_only in (True, False):
        cache = case.model.new_cache(B, H, W, **WINDOW)
        with torch.no_grad():
            for first, last in ((0, 3), (3, 5)):
                given = of_clean(case.chunk(first, last)) | {"cache": cache, "start_frame": first, "keys_only": keys_only}
                case.model(case.clean[:, first:last], torch.zeros(B), **given)
            places = [t.data_ptr() for keys in cache.text for t in keys or ()]
            given = case.chunk(5, 7) | {"cache": cache, "start_frame": 5}
            flows.append(case.model(case.latents[:, 5:7], torch.full((B,), 500.0), **given))
            assert places == [t.data_ptr() for keys in cache.text for t in keys or ()]
            assert bool(places) != ("hunyuan" in name)
    assert torch.equal(*flows)


@pytest.mark.parametrize("name", ["wan", "wan TI2V", "hunyuan"])
def test_keys_alone_are_for_streaming_without_gradient(name):
    case = make(name)
    given = case.chunk(0, 2)
    call = lambda function, **more: function(case.latents[:, :2], torch.zeros(B), **given, **more, keys_only=True)
    with pytest.raises(ValueError, match="keys_only .* must be False in a call without cache, got True"), torch.no_grad():
        call(case.model)
    cache = case.model.new_cache(B, H, W)
    with pytest.raises(ValueError, match="keys_only .* must be False in a call with gradient, got True"):
        call(case.model, cache=cache)
    case.model.announce(cache, 0, 2, H, W)
    with pytest.raises(ValueError, match="keys_only .* must be False in a call with gradient, got True"):
        call(case.model.predict, cache=cache)
    assert cache.end_frame == 0 and cache._buffers == [None] * len(case.model.blocks)


# announce and predict


class Watch(TorchDispatchMode):
    """Names of the operators that run, and of those that read a tensor in host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.hosted: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]
        self.names.append(func.name())
        if any(t.device.type == "cpu" and t.dim() for t in tensors):
            self.hosted.append(func.name())
        return func(*args, **(kwargs or {}))


@every_case
def test_announced_chunks_are_those_of_forward(name, options):
    """In two halves, announced once for two runs; no run reads from the device once the text is known; tables stay in place."""
    case, first = make(name), 0
    expected, places = stream(case, True, options), {}
    cache = case.model.new_cache(B, H, W, **options)
    with torch.no_grad():
        for frames, (flow, kept) in zip(CHUNKS, expected, strict=True):
            last = first + frames
            with Watch() as watch:
                case.model.announce(cache, first, frames, H, W, **case.cameras(first, last))
                assert cache.end_frame == first
                given = {**case.chunk(first, last), "cache": cache}
                got = case.model.predict(case.latents[:, first:last], torch.full((B,), 500.0), **given)
                cache.commit()
                case.model.predict(case.clean[:, first:last], torch.zeros(B), **of_clean(given), keys_only=True)
                cache.commit()
            assert first == 0 or not READS & set(watch.names)
            assert torch.equal(got, flow) and same(contents(cache), kept) == []
            rope = cache.announced(frames)
            if "window_frames" in options:
                turning = [t for t in cache._turning or () if isinstance(t, torch.Tensor)]
                found = [t.data_ptr() for t in (*rope, *cache._tables.values(), *turning)]
                assert places.setdefault("tables", found) == found
            first = last


def test_a_chunk_must_be_run_as_it_was_announced():
    case = make("wan, camera")
    model, cache, given = case.model, case.model.new_cache(B, H, W), case.chunk(0, 2)
    run = lambda frames: model.predict(case.latents[:, :frames], torch.zeros(B), **case.chunk(0, frames), cache=cache)
    with pytest.raises(RuntimeError, match=r"begin\(\) with rope and size comes before a chunk is run"):
        run(2)
    cameras = {name: given[name] for name in ("viewmats", "Ks")}
    for changed, message in [
        ({}, "this model has a camera branch and needs viewmats and Ks, got none"),
        ({"viewmats": cameras["viewmats"]}, "viewmats and Ks come together"),
        (case.cameras(0, 3), r"viewmats must be \[B, F, 4, 4\] = \[2, 2, 4, 4\], got \[2, 3, 4, 4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.announce(cache, 0, 2, H, W, **changed)
    model.announce(cache, 0, 2, H, W, **cameras)
    with pytest.raises(ValueError, match="latents must have the 2 frames of the announced chunk, got 3"):
        run(3)
    with pytest.raises(ValueError, match="the chunk was announced with gradient and must be run so"), torch.no_grad():
        run(2)
    with torch.no_grad():
        model.announce(cache, 0, 2, H, W, **cameras)
    with pytest.raises(ValueError, match="the chunk was announced without gradient and must be run so"):
        run(2)
    with torch.no_grad():
        run(2)
    with pytest.raises(ValueError, match=r"latent height and width must be multiples of the patch 2×2, got 4×7"):
        model.announce(cache, 0, 2, H, 7, **cameras)


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "unrotated"])
def test_rows_of_a_chunk_with_gradient_are_its_own(rotated):
    """Autograd keeps them until backward, when later chunks have been announced."""
    case = make("wan, camera")
    cache = case.model.new_cache(B, H, W, **WINDOW, rotated=rotated)
    with torch.no_grad():
        case.model(case.clean[:, :2], torch.zeros(B), **case.chunk(0, 2), cache=cache)
        table, before = cache.announced(2)[0], {name: bits(t) for name, t in cache._tables.items()}
    case.model.announce(cache, 2, 2, H, W, **case.cameras(2, 4))
    rows = cache.announced(2)[0]
    kept = rows.clone()
    assert rows.data_ptr() != table.data_ptr()
    assert same({name: bits(t) for name, t in cache._tables.items()}, before) == []
    with torch.no_grad():
        case.model.announce(cache, 2, 1, H, W, **case.cameras(2, 3))
    assert torch.equal(rows, kept) and not torch.equal(table[:1], kept[1:])


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "unrotated"])
def test_announcing_is_work_of_the_device_alone(rotated):
    """On the meta device, which has no values: nothing can be read back, and nothing comes from host memory."""
    case = make("wan, camera")
    case.model.to("meta")
    cache, tables = case.model.new_cache(B, H, W, **WINDOW, rotated=rotated), set()
    viewmats, Ks = (case.frames[name][:, :3].to("meta") for name in ("viewmats", "Ks"))
    with torch.no_grad():
        for first in range(0, 60, 3):
            with Watch() as watch:
                case.model.announce(cache, first, 3, H, W, viewmats=viewmats, Ks=Ks)
            cache.commit()
            assert watch.names and (first == 0 or not watch.hosted)
            tables.add(tuple(id(t) for t in (*cache._tables.values(), *cache._plane)))
    assert len(tables) == 1


def test_a_longer_text_is_another_phase():
    case = make("hunyuan")
    cache, longer = case.model.new_cache(B, H, W, text_tokens=12), case.whole | {"image_embeds": torch.randn(B, 4, 8)}
    phases = []
    with torch.no_grad():
        for whole in (case.whole, longer, case.whole):
            given = case.chunk(0, 2) | whole | {"cache": cache}
            case.model(case.latents[:, :2], torch.zeros(B), **given)
            phases.append(cache.phase)
    assert phases[0] == phases[2] != phases[1]


# on several ranks


def on_a_rank(rank: int, ranks: int) -> dict[str, list[str]]:
    """What differs between the two kinds of rerun: on a rank's heads, and of a model whose blocks are shard units."""
    found = {}
    for name, options in CASES:
        if "window_frames" not in options or name not in ("wan, camera", *NAMES[-2:]):
            continue
        case = make(name)
        case.model.sequence_parallel = SequenceParallel(dist.group.WORLD)
        found[f"{name} {options}, sequence parallel"] = differences(stream(case, True, options), stream(case, False, options))
    for name in ("wan, camera", "hunyuan, camera, action"):
        case, alone = make(name), stream(make(name), False, WINDOW)
        for block in case.model.blocks:
            make_shard_unit(block)
            fully_shard(block)
        fully_shard(case.model)
        sharded = stream(case, True, WINDOW)
        found[f"{name}, shard units"] = differences(sharded, alone)
    return found


@pytest.mark.dist
def test_a_rerun_for_keys_on_two_ranks(run_ranks):
    for found in run_ranks(on_a_rank, 2):
        assert len(found) == 7 and {name: parts for name, parts in found.items() if parts} == {}
