"""Text and image encoders in host memory: on the device while they encode, and at no other time."""

import gc
import json
import threading
import time

import pytest
import torch
from test_conditions import wan_directory  # noqa: F401 - a fixture
from toy_hunyuan_directory import save
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from dit_ops.conditions import load

GPU = torch.device("cuda", 0)
ENCODERS = {"wan": ("text_encoder", "image_encoder"), "hunyuan_video15": ("text_encoder", "text_encoder_2", "image_encoder")}
PROMPTS = ['a red room saying "open"', 'a box saying "a ball"']


@pytest.fixture(scope="module")
def directories(wan_directory, tmp_path_factory):  # noqa: F811
    """Both model directories, with image encoders."""
    torch.manual_seed(0)
    wan = tmp_path_factory.mktemp("wan_image")
    for part in wan_directory.iterdir():
        if part.is_dir():
            (wan / part.name).symlink_to(part)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    size = {"height": 28, "width": 28}
    CLIPVisionModel(vision).save_pretrained(wan / "image_encoder")
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(wan / "image_processor")
    index = json.loads((wan_directory / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    (wan / "model_index.json").write_text(json.dumps(index))
    return {"wan": wan, "hunyuan_video15": save(tmp_path_factory.mktemp("hunyuan") / "model", image=True)}


class ToyDevice:
    """Stands for a GPU: what goes `.to` it is copied, and written down by its address in host memory."""

    def __init__(self, monkeypatch) -> None:
        self.came: list[int] = []
        self.refuse_after: int | None = None
        real = torch.Tensor.to

        def to(tensor, *args, **kwargs):
            device = kwargs.pop("device", None) or next((a for a in args if isinstance(a, str | torch.device)), None)
            if device is None or torch.device(device) != GPU:
                return real(tensor, *args, **kwargs) if device is None else real(tensor, device, *args[1:], **kwargs)
            if self.refuse_after is not None and len(self.came) >= self.refuse_after:
                raise torch.OutOfMemoryError("the toy device is full")
            self.came.append(tensor.data_ptr())
            dtypes = [a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)]
            return real(tensor.clone(), dtypes[0] if dtypes else tensor.dtype)

        monkeypatch.setattr(torch.Tensor, "to", to)


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def addresses(module: torch.nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in weights(module)]


def encode(condition) -> dict[str, torch.Tensor]:
    image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    return {**condition.encode_text(PROMPTS), **condition.encode_image(image, 2)}


@pytest.fixture(params=ENCODERS)
def name(request):
    return request.param


def offloaded(directory):
    """A condition side whose encoders are loaded, in host memory, and their addresses there."""
    condition = load(directory)
    condition.offload = True
    condition.to(GPU)
    return condition


def test_encoders_are_on_the_device_only_while_they_encode(name, directories, monkeypatch):
    expected = encode(load(directories[name]))
    condition, device = offloaded(directories[name]), ToyDevice(monkeypatch)
    encoders = {part: condition.component(part) for part in ENCODERS[name]}
    home = {part: addresses(encoder) for part, encoder in encoders.items()}
    assert not device.came, "loaded into host memory"
    during: dict[str, list[dict[str, bool]]] = {part: [] for part in encoders}

    def watch(part):
        def hook(module, *given):
            away = {p: [a != h for a, h in zip(addresses(e), home[p], strict=True)] for p, e in encoders.items()}
            during[part].append({p: all(moved) for p, moved in away.items() if any(moved)})

        return hook

    for part, encoder in encoders.items():
        encoder.register_forward_pre_hook(watch(part))
    got = encode(condition)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    for part, encoder in encoders.items():
        assert during[part] and all(there == {part: True} for there in during[part]), "all of it, and nothing else"
        assert addresses(encoder) == home[part], "the same host memory, not a copy"
        assert all(device.came.count(address) == 1 for address in home[part]), "copied once"
    condition.encode_text(PROMPTS)
    assert device.came.count(home["text_encoder"][0]) == 2
    before = len(device.came)
    condition.encode_to_latent(torch.zeros(1, 1, 3, 32, 32))
    assert len(device.came) == before + 1, "the VAE is there, only pixels came"


def test_encoders_go_home_when_an_error_is_raised(name, directories, monkeypatch):
    condition, device = offloaded(directories[name]), ToyDevice(monkeypatch)
    encoder = condition.component("text_encoder")
    home = addresses(encoder)
    handle = encoder.register_forward_pre_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        condition.encode_text(PROMPTS)
    assert addresses(encoder) == home and device.came.count(home[0]) == 1
    handle.remove()
    device.refuse_after = len(device.came) + 5
    with pytest.raises(torch.OutOfMemoryError, match="the toy device is full"):
        condition.encode_text(PROMPTS)
    assert addresses(encoder) == home, "half of it was there"
    device.refuse_after = None
    expected = load(directories[name]).encode_text(PROMPTS)
    assert torch.equal(condition.encode_text(PROMPTS)["encoder_hidden_states"], expected["encoder_hidden_states"])


def test_one_at_a_time(name, directories, monkeypatch):
    """Two threads that encode text: the second waits until the first has brought the weights home."""
    condition, device = offloaded(directories[name]), ToyDevice(monkeypatch)
    encoder = condition.component("text_encoder")
    home, inside, most = addresses(encoder), [], []

    def enter(*given) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.1)

    encoder.register_forward_pre_hook(enter)
    encoder.register_forward_hook(lambda *given: inside.pop() and None)
    threads = [threading.Thread(target=condition.encode_text, args=(PROMPTS,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1, 1] and addresses(encoder) == home and device.came.count(home[0]) == 2


def test_without_offload_threads_encode_together(name, directories):
    condition = load(directories[name])
    together, done = threading.Barrier(2, timeout=30), []

    def meet(*given) -> None:
        together.wait()

    condition.component("text_encoder").register_forward_pre_hook(meet)
    threads = [threading.Thread(target=lambda: done.append(condition.encode_text(PROMPTS))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 2


def test_on_a_cpu_nothing_is_copied(name, directories):
    condition = load(directories[name])
    expected = encode(condition)
    encoders = [condition.component(part) for part in ENCODERS[name]]
    home = [addresses(encoder) for encoder in encoders]
    during = []
    for encoder in encoders:
        encoder.register_forward_pre_hook(lambda module, *given: during.append(addresses(module)))
    condition.offload = True
    got = encode(condition)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert all(there in home for there in during) and len(during) >= len(encoders)
    assert [addresses(encoder) for encoder in encoders] == home


def test_the_switch_moves_what_is_loaded(name, directories, monkeypatch):
    """Encoders home with offload, to the device without; the VAE is always there; tokenizers have no place."""
    ToyDevice(monkeypatch)
    condition = load(directories[name])
    parts = {part: condition.component(part) for part in (*ENCODERS[name], "vae")}
    moves: list[tuple[str, str]] = []
    for part, module in parts.items():
        monkeypatch.setattr(module, "to", lambda device, part=part: moves.append((part, torch.device(device).type)))
    for offload, device in ((False, GPU), (True, GPU), (False, GPU), (True, "cpu")):
        moves.clear()
        condition.offload = offload
        moves.clear()
        condition.to(device)
        assert condition.offload is offload
        encoders = "cpu" if offload or device == "cpu" else "cuda"
        assert sorted(moves) == sorted(
            [*((part, encoders) for part in ENCODERS[name]), ("vae", "cpu" if device == "cpu" else "cuda")]
        )
    condition.to(GPU)
    moves.clear()
    condition.offload = False
    assert (ENCODERS[name][0], "cuda") in moves, "the switch itself moves them"


@pytest.mark.gpu
def test_on_a_gpu_the_encoders_leave_no_memory_behind(name, directories):
    expected = encode(load(directories[name]).to("cuda"))
    condition = load(directories[name])
    condition.offload = True
    condition.to("cuda").component("vae")
    got = encode(condition)
    for key, value in expected.items():
        assert got[key].is_cuda
        torch.testing.assert_close(got[key], value, rtol=0, atol=0)
    gc.collect()
    before = torch.cuda.memory_allocated()
    again = encode(condition)
    del again
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    for part in ENCODERS[name]:
        assert {tensor.device.type for tensor in weights(condition.component(part))} == {"cpu"}
