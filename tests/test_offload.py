"""Blocks whose weights visit the device: the same bits as in place, no race between copies and computation, nothing lost."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given as examples
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from toy_backbones import tiny_batch, tiny_wan
from toy_hunyuan_video15 import tiny, video
from toy_rooms import random_rooms

from dit_ops import offload
from dit_ops.backbones.wan import WanBackbone
from dit_ops.float8 import to_float8
from dit_ops.offload import ALIGNMENT, DoubleBuffer, allocations, block_modules, offload_blocks, power_of_two, tensors_of
from dit_ops.pipelines import loading

WAN = dict(patch_size=[1, 2, 2], num_attention_heads=2, attention_head_dim=12, in_channels=2, out_channels=2)
WAN |= dict(text_dim=8, freq_dim=16, ffn_dim=32)


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    return model.eval().requires_grad_(False)


def wan(layers: int = 3) -> WanBackbone:
    model = WanBackbone.from_config(WAN | {"num_layers": layers}, camera=True, block_frames=2)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    return frozen(model)


def hunyuan(layers: int = 3) -> torch.nn.Module:
    return frozen(tiny(config={"num_layers": layers}))


def inputs(model: torch.nn.Module) -> dict:
    """A video of four frames, its cameras and text."""
    if isinstance(model, WanBackbone):
        batch = tiny_batch(1, 4)
        return {key: batch[key] for key in ("latents", "viewmats", "Ks")} | batch["condition"]
    latents, _, cameras = video(1, 4)
    return {"latents": latents, "encoder_hidden_states": torch.randn(1, 7, 12)} | cameras


@torch.inference_mode()
def stream(model: torch.nn.Module, given: dict) -> list[torch.Tensor]:
    """Two chunks, each with a noisy step and a clean rerun that stores keys alone."""
    flows, frames = [], {name: given[name] for name in ("latents", "viewmats", "Ks")}
    cache = model.new_cache(1, *given["latents"].shape[3:], window_frames=3)
    for first in (0, 2):
        chunk = {name: value[:, first : first + 2] for name, value in frames.items()}
        where = {"encoder_hidden_states": given["encoder_hidden_states"], "cache": cache, "start_frame": first}
        flows.append(model(timestep=torch.full((1,), 500.0), **chunk, **where))
        model(timestep=torch.zeros(1), keys_only=True, **chunk, **where)
    return flows


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("make", [wan, hunyuan], ids=["wan", "hunyuan"])
def test_offloaded_blocks_compute_the_same_bits(make, layers):
    model = make(layers)
    given = inputs(model)
    plain = stream(model, given)
    offload_blocks(model, "cpu")
    assert model.offloaded
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(stream(model, given), plain, strict=True))


@pytest.mark.parametrize("make", [wan, hunyuan], ids=["wan", "hunyuan"])
@pytest.mark.parametrize("change", ["float8", "bf16"])
def test_weights_of_several_dtypes_share_a_buffer(make, change):
    model = make().bfloat16()
    for block in model.blocks:
        if hasattr(block, "scale_shift_table"):  # of Wan, which diffusers keeps in fp32
            block.scale_shift_table.data = block.scale_shift_table.data.float()
    if change == "float8":
        to_float8(model, activations=False)
    given = {name: value.bfloat16() if name == "latents" else value for name, value in inputs(model).items()}
    given["encoder_hidden_states"] = given["encoder_hidden_states"].bfloat16()
    plain = stream(model, given)
    offload_blocks(model, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(stream(model, given), plain, strict=True))


def test_a_block_finds_its_weights_in_a_device_buffer_and_leaves_them_in_host_memory():
    model = wan(3)
    units = [tensors_of(modules) for modules in block_modules(model)]
    assert all(any(t is layer.weight for t in unit) for layer, unit in zip(model.camera, units, strict=True))
    offload_blocks(model, "cpu")
    rest = {id(t): t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    places: list[list[set[int]]] = []

    def look(i: int) -> None:
        places[-1].append({t.untyped_storage().data_ptr() for t in units[i]})
        assert all(t.data_ptr() % 64 == 0 == t.storage_offset() * t.itemsize % ALIGNMENT for t in units[i])
        moved = [i for i, unit in enumerate(units) if any(t.data_ptr() != rest[id(t)] for t in unit)]
        assert moved == [i]

    for i, block in enumerate(model.blocks):
        block.attn1.to_q.register_forward_pre_hook(lambda *_, i=i: look(i))
    with torch.no_grad():
        for _ in range(2):
            places.append([])
            model(**inputs(model), timestep=torch.full((1,), 500.0))
    order = [place for step in places for place in step]
    assert all(len(place) == 1 for place in order)
    slots = [place.pop() for place in order]
    assert len(set(slots)) == 2 and all(a != b for a, b in zip(slots, slots[1:], strict=False))
    assert {id(t): t.data_ptr() for t in (*model.parameters(), *model.buffers())} == rest


# streams that run when they want: a vector clock per stream says what is ordered, and a mode logs who touches the buffers


class Stream:
    def __init__(self, device: object = None):
        self.clock: dict[Stream, int] = {self: 0}

    def tick(self) -> dict["Stream", int]:
        self.clock[self] += 1
        return dict(self.clock)

    def wait_event(self, event: "Event") -> None:
        for stream, time in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)


class Event:
    def __init__(self) -> None:
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream) -> None:
        self.clock = stream.tick()


class Device:
    """The module of a device with streams; copies and kernels of different streams are ordered by events alone."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.current = Stream()

    def current_stream(self, device: object) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class Accesses(TorchDispatchMode):
    """Every touch of two buffers as (buffer, written, stream, time, clock), and the pairs that nothing orders."""

    def __init__(self, device: Device, buffers: list[torch.Tensor]):
        super().__init__()
        self.device, self.buffers = device, {b.untyped_storage()._cdata: i for i, b in enumerate(buffers)}
        self.log: list[tuple] = []
        self.races: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        stream = self.device.current
        for position, arg in enumerate(args):
            for tensor in tree_iter(arg):
                buffer = self.buffers.get(tensor.untyped_storage()._cdata) if isinstance(tensor, torch.Tensor) else None
                if buffer is None or func.is_view:
                    continue
                info = func._schema.arguments[position].alias_info
                written, clock = info is not None and info.is_write, stream.tick()
                for other, wrote, by, time, _ in self.log:
                    if other == buffer and (wrote or written) and clock.get(by, 0) < time:
                        self.races.append((buffer, func.name()))
                self.log.append((buffer, written, stream, clock[stream], clock))
        return out


@pytest.fixture
def race(monkeypatch):
    """race(model, steps): the log of an offloaded model on streams that only events order."""
    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)

    def run(model: torch.nn.Module, steps: int) -> Accesses:
        given, made = inputs(model), []
        monkeypatch.setattr(offload, "DoubleBuffer", lambda *args: made.append(DoubleBuffer(*args)) or made[-1])
        offload_blocks(model, "cpu")
        with Accesses(device, made[0].slots) as accesses:
            for _ in range(steps):
                stream(model, given)
        return accesses

    return run


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("make", [wan, hunyuan], ids=["wan", "hunyuan"])
def test_events_order_every_copy_and_every_use_of_a_buffer(race, make, layers):
    accesses = race(make(layers), 2)
    copies = [entry for entry in accesses.log if entry[1]]
    assert {entry[0] for entry in copies} == {0, 1} and not accesses.races


def test_the_next_block_is_copied_while_this_one_computes(race):
    """No copy waits for the block that is launched beside it, and each block is copied once per pass."""
    layers = 4
    accesses = race(wan(layers), 1)
    log = accesses.log
    assert sum(entry[1] for entry in log) == 4 * layers + 1  # four passes, and the first block of a fifth
    copies = [at for at, entry in enumerate(log) if entry[1]]
    for at in copies[1:]:
        clock = log[at][4]
        beside = [entry for entry in log[at + 1 :] if not entry[1]][:1]  # the first use after the copy was launched
        for buffer, _, compute, time, _ in beside:
            assert buffer != log[at][0] and clock.get(compute, 0) < time


def test_state_dict_and_saved_files_hold_the_weights(tmp_path):
    model = wan()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain")
    offload_blocks(model, "cpu")
    stream(model, inputs(model))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path / "offloaded")
    for file in ("diffusion_pytorch_model.safetensors", "camera.safetensors"):
        plain, offloaded = (load_file(tmp_path / kind / file) for kind in ("plain", "offloaded"))
        assert plain.keys() == offloaded.keys() and all(torch.equal(plain[name], offloaded[name]) for name in plain)


@pytest.mark.parametrize("camera_alone", [False, True])
def test_loaded_weights_are_used_by_the_next_step(camera_alone):
    """Also those of the block that was copied ahead."""
    model, other = wan(2), frozen(tiny_wan(2))
    given = inputs(model)
    offload_blocks(model, "cpu")
    stream(model, given)
    if camera_alone:
        model.camera.load_state_dict(other.camera.state_dict())
        expected = wan(2)
        expected.camera.load_state_dict(other.camera.state_dict())
    else:
        model.load_state_dict(other.state_dict())
        expected = other
    assert all(torch.equal(a, b) for a, b in zip(stream(model, given), stream(expected, given), strict=True))


def test_adapters_are_offloaded_with_their_layers():
    peft = pytest.importorskip("peft")
    model = wan()
    model.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    frozen(model)
    given = inputs(model)
    plain = stream(model, given)
    offload_blocks(model, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(stream(model, given), plain, strict=True))


def test_an_error_inside_a_block_leaves_the_model_whole():
    model = wan(3)
    given = inputs(model)
    plain, before = stream(model, given), copy.deepcopy(model.state_dict())
    offload_blocks(model, "cpu")
    failing = model.blocks[1].ffn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream(model, given)
    failing.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(stream(model, given), plain, strict=True))


def test_another_thread_may_run_the_model():
    model = wan()
    given = inputs(model)
    plain, found = stream(model, given), []
    offload_blocks(model, "cpu")
    thread = threading.Thread(target=lambda: found.extend(stream(model, given)))
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_mistakes_are_named():
    model = wan()
    given = inputs(model)
    trained = wan().requires_grad_(True)
    with pytest.raises(ValueError, match=r"must be frozen, offloaded weights are for inference only; .* requires grad"):
        offload_blocks(trained, "cpu")
    assert not trained.offloaded
    offload_blocks(model, "cpu")
    with pytest.raises(ValueError, match="must have its blocks in place, but they are offloaded already"):
        offload_blocks(model, "cpu")
    with pytest.raises(ValueError, match="inference only: call the model under torch.no_grad"):
        model(**given, timestep=torch.full((1,), 500.0))
    model.to("cpu")
    stream(model, given)
    model.bfloat16()
    given = {name: value.bfloat16() if name in ("latents", "encoder_hidden_states") else value for name, value in given.items()}
    for _ in range(2):
        with pytest.raises(
            ValueError, match="block 0 must stay where offload_blocks put them, but were moved, cast or replaced"
        ):
            stream(model, given)


@examples(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(1, 2000))
def test_allocations_cover_all_units_in_order(sizes, largest):
    runs = allocations(sizes, largest)
    assert [i for first, last in runs for i in range(first, last)] == list(range(len(sizes)))
    for first, last in runs:
        assert last == first + 1 or sum(sizes[first:last]) <= largest


def test_blocks_of_published_sizes_waste_little_pinned_memory():
    """torch rounds an allocation up to a power of two: alone, a block of 755 MB would take 1074."""
    for size, layers in ((97_628_160, 30), (755_308_032, 40), (310_508_544, 54)):
        sizes = [size] * layers
        held = sum(power_of_two(sum(sizes[first:last])) for first, last in allocations(sizes))
        assert held < 1.12 * sum(sizes) < sum(map(power_of_two, sizes))
    assert [power_of_two(n) for n in (1, 2, 3, 1024, 1025)] == [1, 2, 4, 1024, 2048]


def test_a_pipeline_is_loaded_offloaded_and_streams_the_same_bits(tmp_path, monkeypatch):
    rooms, tiled = random_rooms(), []
    monkeypatch.setattr(type(rooms.condition), "enable_tiling", lambda condition: tiled.append(condition))
    loading.save(tmp_path / "model", "few_step", rooms.backbone, rooms.condition, rooms.settings)
    plain = loading.load(tmp_path / "model", "cpu")
    small = loading.load(tmp_path / "model", "cpu", offload=True, vae_tiling=True)
    assert small.backbone.offloaded and small.condition.offload and not plain.backbone.offloaded
    assert tiled == [small.condition]
    request = {"pose": "w*2,l*3", "seed": 3}
    assert torch.equal(small("a red room", **request), plain("a red room", **request))
    rounded = loading.load(tmp_path / "model", "cpu", float8=True)
    both = loading.load(tmp_path / "model", "cpu", float8=True, offload=True)
    pixels = rounded("a red room", **request)
    assert torch.equal(both("a red room", **request), pixels) and not torch.equal(pixels, plain("a red room", **request))


@pytest.mark.gpu
def test_on_a_gpu_the_bits_are_the_same_and_two_blocks_are_resident():
    """Blocks large enough that a copy takes longer than a kernel; a slow kernel in front of a use shows a missing wait."""
    sizes = {"num_attention_heads": 8, "attention_head_dim": 96, "ffn_dim": 3072, "num_layers": 6}
    model = frozen(WanBackbone.from_config(WAN | sizes, camera=True, block_frames=2)).bfloat16()
    for p in model.parameters():
        p.data = torch.randn(p.shape, dtype=p.dtype) * 0.05
    batch = tiny_batch(1, 4)
    given = {key: batch[key].cuda() for key in ("latents", "viewmats", "Ks")}
    given = {**given, "latents": given["latents"].bfloat16()}
    given["encoder_hidden_states"] = batch["condition"]["encoder_hidden_states"].cuda().bfloat16()
    plain = stream_on_gpu(copy.deepcopy(model).cuda(), given)
    whole = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    largest = max(sum(t.nbytes for t in tensors_of(modules)) for modules in block_modules(model))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    offload_blocks(model, "cuda")
    taken = torch.cuda.memory_allocated() - before
    assert taken < whole - 3 * largest
    assert all(t.is_pinned() for modules in block_modules(model) for t in tensors_of(modules))
    assert model.device.type == "cuda"
    for delayed in (False, True):
        hooks = []
        for block in model.blocks if delayed else ():
            hooks.append(block.attn1.to_q.register_forward_pre_hook(lambda *_: torch.cuda._sleep(20_000_000)))
        for a, b in zip(stream_on_gpu(model, given), plain, strict=True):
            assert torch.equal(a, b)
        for hook in hooks:
            hook.remove()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for a, b in zip(stream_on_gpu(model, given), plain, strict=True):
            assert torch.equal(a, b)


@torch.inference_mode()
def stream_on_gpu(model: torch.nn.Module, given: dict) -> list[torch.Tensor]:
    flows = []
    for t in (900.0, 500.0, 100.0):
        flows.append(model(timestep=torch.full((1,), t, device="cuda"), **given))
    torch.cuda.synchronize()
    return flows
