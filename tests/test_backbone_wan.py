"""The Wan backbone against the reference system's recorded numbers and against diffusers; its files, its errors."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_wan import I2V, TINY, close, inputs, tiny

from dit_ops import use_backend
from dit_ops.backbones.wan import WanBackbone
from dit_ops.backbones.wan_original import rename
from dit_ops.registry import load_backbone

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN / "cases.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    cases = load_file(GOLDEN / "cases.safetensors")
    for name, value in cases.items():  # recorded as [B, Cz, F, h, w]
        if name.split(".")[0] in ("bi", "tf", "cache", "window", "evict") and value.dim() == 5:
            cases[name] = value.transpose(1, 2)
        if name.endswith(".context"):  # the condition side pads the text to text_len
            cases[name] = torch.nn.functional.pad(value, (0, 0, 0, config["text_len"] - value.shape[1]))
    return config, cases


def golden_model(config, block_frames=2):
    return WanBackbone.from_original(GOLDEN / "wan_original_format.safetensors", config, block_frames=block_frames)


# against the reference system


def test_golden_bidirectional(golden):
    config, c = golden
    flow = golden_model(config)(c["bi.latents"], c["bi.timestep"], c["bi.context"], viewmats=c["bi.viewmats"], Ks=c["bi.Ks"])
    close(flow, c["bi.flow"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_teacher_forcing_and_every_gradient(golden, checkpointing):
    config, c = golden
    model = golden_model(config)
    model.gradient_checkpointing = checkpointing
    flow = model(
        c["tf.latents"],
        c["tf.timestep"],
        c["tf.context"],
        clean_latents=c["tf.clean"],
        viewmats=c["tf.viewmats"],
        Ks=c["tf.Ks"],
    )
    close(flow, c["tf.flow"])
    (flow * c["tf.cotangent"]).mean().backward()
    recorded = {rename(k.removeprefix("tf.grad.")): v for k, v in c.items() if k.startswith("tf.grad.")}
    own = {k: p.grad for k, p in model.transformer.named_parameters()}
    own |= {f"camera:blocks.{k}": p.grad for k, p in model.camera.named_parameters()}
    assert recorded and recorded.keys() <= own.keys()
    for name, expected in recorded.items():
        error = (own[name].reshape(expected.shape) - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "unrotated"])
@pytest.mark.parametrize(
    "case, block, frames, options",
    [
        ("cache", 2, 6, {}),
        ("window", 1, 4, dict(window_frames=4, sink_frames=1)),
        ("evict", 1, 7, dict(window_frames=4, sink_frames=1)),
    ],
)
def test_golden_streaming(golden, case, block, frames, options, rotated):
    config, c = golden
    model = golden_model(config, block)
    B, _, _, h, w = c[f"{case}.latents"].shape
    cache = model.new_cache(B, h, w, rotated=rotated, **options)
    for first in range(0, frames, block):
        part = slice(first, first + block)
        latents = c[f"{case}.latents"][:, part]
        for t in (750.0, 0.0):
            with torch.no_grad():
                flow = model(
                    latents,
                    torch.full((B, block), t),
                    c[f"{case}.context"],
                    viewmats=c[f"{case}.viewmats"][:, part],
                    Ks=c[f"{case}.Ks"][:, part],
                    cache=cache,
                    start_frame=first,
                )
            close(flow, c[f"{case}.flow_t{t:.0f}"][:, part])


def test_golden_through_the_reference_backend(golden):
    config, c = golden
    with use_backend("reference"):
        flow = golden_model(config)(
            c["bi.latents"], c["bi.timestep"], c["bi.context"], viewmats=c["bi.viewmats"], Ks=c["bi.Ks"]
        )
    close(flow, c["bi.flow"])


# against diffusers


@pytest.mark.parametrize("config", [{}, dict(cross_attn_norm=False), I2V], ids=["t2v", "no cross norm", "i2v"])
def test_equals_diffusers(config):
    model = tiny(camera=False, **config)
    T = 512 if config is I2V else 7  # diffusers takes the last 512 rows as text and the rest as image
    latents, _, text, _ = inputs(T=T)
    t, kwargs, stock = torch.tensor([833.0, 250.0]), {}, {}
    x = latents
    if config is I2V:
        kwargs = dict(encoder_hidden_states_image=torch.randn(2, 6, 10), condition_latents=torch.randn(2, 5, 5, 4, 6))
        stock = dict(encoder_hidden_states_image=kwargs["encoder_hidden_states_image"])
        x = torch.cat([latents, kwargs["condition_latents"]], 2)
    with torch.no_grad():
        expected = model.transformer(x.transpose(1, 2), t, text, return_dict=False, **stock)[0].transpose(1, 2)
        close(model(latents, t, text, **kwargs), expected, 2e-5)


def test_bf16_is_as_far_from_fp32_as_diffusers_is():
    model = tiny(camera=False, num_attention_heads=4)
    latents, _, text, _ = inputs()
    t = torch.tensor([833.0, 250.0])
    with torch.no_grad():
        exact = model(latents, t, text)
        half = WanBackbone.from_config(dict(model.config), block_frames=2)
        half.load_state_dict(model.state_dict())
        keep = model.transformer._keep_in_fp32_modules
        for name, p in half.transformer.named_parameters():
            p.data = p.data if any(k in name.split(".") for k in keep) else p.data.bfloat16()
        x, c = latents.bfloat16(), text.bfloat16()
        own = half(x, t, c)
        stock = half.transformer(x.transpose(1, 2), t, c, return_dict=False)[0].transpose(1, 2)
    assert own.dtype == torch.bfloat16
    assert (own.float() - exact).norm() <= 1.2 * (stock.float() - exact).norm()


def test_round_trip_with_diffusers_is_silent_and_bitwise(tmp_path, caplog):
    model = tiny()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock, info = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not caplog.records
    for name, value in stock.state_dict().items():
        assert torch.equal(value, model.transformer.state_dict()[name]), name
    again = load_backbone(tmp_path)
    assert isinstance(again, WanBackbone) and again.block_frames == 2
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    stock.save_pretrained(tmp_path / "stock")
    ours, theirs = (p.joinpath("diffusion_pytorch_model.safetensors").read_bytes() for p in (tmp_path, tmp_path / "stock"))
    assert ours == theirs
    assert json.loads((tmp_path / "config.json").read_text()).keys() >= json.loads(
        (tmp_path / "stock/config.json").read_text()
    ).keys() - {"_name_or_path"}


def test_a_stock_checkpoint_loads_without_camera_and_gains_one_that_changes_nothing(tmp_path):
    WanTransformer3DModel.from_config(TINY).save_pretrained(tmp_path)
    model = WanBackbone.from_pretrained(tmp_path)
    latents, _, text, cameras = inputs()
    with torch.no_grad():
        before = model(latents, torch.tensor([500.0, 1.0]), text)
        model.add_camera()
        assert torch.equal(before, model(latents, torch.tensor([500.0, 1.0]), text, **cameras))


# loading


def original_names(state, camera):
    """The inverse of the renaming, for models of our own making."""
    with safe_open(GOLDEN / "wan_original_format.safetensors", "pt") as file:
        names = list(file.keys())
    back = {rename(k): k for k in names}
    out = {back[k]: v for k, v in state.items()}
    return out | {back[f"camera:blocks.{k}"]: v for k, v in camera.items()}


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
def test_minwm_checkpoints(golden, tmp_path, prefix):
    config, c = golden
    model = golden_model(config)
    names = original_names(model.transformer.state_dict(), model.camera.state_dict())
    plain = {prefix + k: torch.zeros_like(v) for k, v in names.items()}
    averaged = {prefix + k: v for k, v in names.items()}
    torch.save({"generator": plain, "generator_ema": averaged}, tmp_path / "model.pt")
    args = (c["bi.latents"], c["bi.timestep"], c["bi.context"])
    cameras = dict(viewmats=c["bi.viewmats"], Ks=c["bi.Ks"])
    for ema, expected in [(None, c["bi.flow"]), (True, c["bi.flow"]), (False, torch.zeros_like(c["bi.flow"]))]:
        with torch.no_grad():
            close(WanBackbone.from_original(tmp_path / "model.pt", config, ema=ema)(*args, **cameras), expected)
    torch.save({"generator": plain}, tmp_path / "no_ema.pt")
    with pytest.raises(ValueError, match="no 'generator_ema'"):
        WanBackbone.from_original(tmp_path / "no_ema.pt", config, ema=True)


class Payload:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_original_files_are_strict_and_never_run_code(golden, tmp_path):
    config, _ = golden
    weights = load_file(GOLDEN / "wan_original_format.safetensors")
    del weights["blocks.1.ffn.0.bias"]
    weights["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing \['blocks.1.ffn.net.0.proj.bias'\], unexpected \['extra'\]"):
        WanBackbone.from_original(weights, config)
    torch.save({"generator": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a plain torch weight file"):
        WanBackbone.from_original(tmp_path / "evil.pt", config)
    with pytest.raises(ValueError, match="the original Wan config needs"):
        WanBackbone.from_original(weights, {"dim": 128})


def test_from_pretrained_is_strict(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights.pop("blocks.0.attn1.to_q.bias")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="blocks.0.attn1.to_q.bias"):
        WanBackbone.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    camera = load_file(tmp_path / "camera.safetensors")
    save_file({k: v for k, v in camera.items() if k != "1.bias"}, tmp_path / "camera.safetensors")
    with pytest.raises(ValueError, match=r"camera branch does not fit, at \['1.bias'\]"):
        WanBackbone.from_pretrained(tmp_path)
    (tmp_path / "camera.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="announces a camera branch"):
        WanBackbone.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model at"):
        load_backbone(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"_class_name": "OtherModel"}')
    with pytest.raises(ValueError, match="no backbone for 'OtherModel'; known are WanTransformer3DModel"):
        load_backbone(tmp_path)


def test_published_shapes_have_the_published_sizes():
    """1.3B, 14B and I2V 14B on the meta device: 1.419 B and 14.29 B parameters, 825 tensors for 1.3B."""
    small = dict(num_attention_heads=12, num_layers=30, ffn_dim=8960)
    large = dict(num_attention_heads=40, num_layers=40, ffn_dim=13824)
    image = large | dict(in_channels=36, out_channels=16, image_dim=1280, added_kv_proj_dim=5120)
    for config, billions in [(small, 1.419), (large, 14.29), (image, 16.395)]:
        with torch.device("meta"):
            model = WanBackbone.from_config(config | dict(attention_head_dim=128))
        count = sum(p.numel() for p in model.parameters())
        assert abs(count / 1e9 - billions) < 0.005, count
        if config is small:
            assert len(model.state_dict()) == 825


# errors


def test_bad_input_is_named():
    model = tiny()
    latents, clean, text, cameras = inputs()
    t = torch.zeros(2)
    for args, kwargs, message in [
        ((latents[0], t, text), {}, r"latents must be \[B, F, Cz, h, w\], got \[5, 4, 4, 6\]"),
        ((latents, t, text[:, :, :5]), cameras, r"encoder_hidden_states must be .*\[2, T, 12\], got \[2, 7, 5\]"),
        ((latents, t, text), {}, "has a camera branch and needs viewmats and Ks"),
        ((latents, t, text), {"Ks": cameras["Ks"]}, "viewmats and Ks come together"),
        (
            (latents, t, text),
            cameras | {"viewmats": cameras["viewmats"][:, :3]},
            r"viewmats must be .*\[2, 5, 4, 4\], got \[2, 3, 4, 4\]",
        ),
        ((latents[..., :5], t, text), cameras, "multiples of the patch 2×2, got 4×5"),
        ((latents, t, text), cameras | {"clean_latents": clean[:, :4]}, "clean_latents must be"),
        ((latents, t, text), cameras | {"clean_latents": clean, "cache": model.new_cache(2, 4, 6)}, "exclude each other"),
        ((latents[:, :, :3], t, text), cameras, "must have 4 channels, got 3"),
        ((latents, torch.zeros(2, 3), text), cameras | {"clean_latents": clean}, r"F = 5, got \[2, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*args, **kwargs)
    with pytest.raises(ValueError, match="no camera branch"):
        tiny(camera=False)(latents, t, text, **cameras)
    with pytest.raises(ValueError, match=r"unknown keys \['num_layer'\]"):
        WanBackbone.from_config({"num_layer": 2})
