"""The HunyuanVideo 1.5 backbone against the reference system's recorded numbers and against diffusers; loading and saving."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_hunyuan_video15 import CONDITIONED, TINY, close, conditions, tiny, video

from dit_ops import use_backend
from dit_ops.backbones.hunyuan_video15 import HunyuanVideo15Backbone
from dit_ops.backbones.hunyuan_video15_original import to_original
from dit_ops.convert import to_minwm
from dit_ops.registry import load_backbone
from dit_ops.testing import assert_within_rounding

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="module")
def golden():
    """Original config and weights, and the cases; latents were recorded as [B, Cz, F, h, w], timesteps as [F]."""
    with safe_open(GOLDEN / "hy15_original_format.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = load_file(GOLDEN / "hy15_original_format.safetensors")
    for name, made in json.loads(metadata["generated"]).items():
        generator = torch.Generator().manual_seed(made["seed"])
        weights[name] = torch.randn(made["shape"], generator=generator) * made["scale"] + made["add_one"]
        assert abs(weights[name].double().abs().sum().item() / made["abs_sum"] - 1) < 1e-6, "another random generator"
    cases = load_file(GOLDEN / "hy15_cases.safetensors")
    cases = {name: value.transpose(1, 2) if value.dim() == 5 else value for name, value in cases.items()}
    cases = {name: value[None] if name.endswith(".timestep") else value for name, value in cases.items()}
    return json.loads(metadata["config"]), weights, cases


def golden_model(golden, **options):
    config, weights, _ = golden
    return HunyuanVideo15Backbone.from_original(weights, config, block_frames=4, **options)


def golden_inputs(c, case):
    given = {
        "encoder_hidden_states": c["text.llm"],
        "encoder_attention_mask": c["text.llm_mask"],
        "encoder_hidden_states_2": c["text.byt5"],
        "encoder_attention_mask_2": c["text.byt5_mask"],
        "image_embeds": c["text.vision"],
        "latents": c[f"{case}.latents"],
        "timestep": c[f"{case}.timestep"],
        "viewmats": c[f"{case}.viewmats"],
        "Ks": c[f"{case}.Ks"],
    }
    return given | ({"clean_latents": c["tf.clean"]} if case == "tf" else {})


# against the reference system


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", ["bi", "tf"])
def test_golden(golden, case, backend):
    c, model = golden[2], golden_model(golden)
    with torch.no_grad(), use_backend(backend):
        close(model(**golden_inputs(c, case)), c[f"{case}.flow"])


def test_golden_streaming_over_the_text_cache(golden):
    c, model = golden[2], golden_model(golden)
    cache = model.new_cache(1, *c["chunk0.latents"].shape[3:])
    with torch.no_grad():
        close(model(**golden_inputs(c, "chunk0"), cache=cache), c["chunk0.flow"])
    for name, stored in zip("kv", cache.prefix_of(1), strict=True):
        recorded = c[f"text_cache.block1.{name}"].transpose(1, 2)  # [B, T, N, D]
        close(stored, torch.cat([recorded, recorded], 2))  # for both paths


@pytest.mark.parametrize("case", ["bi", "tf"])
def test_fp32_is_as_close_to_fp64_as_the_recorded_numbers(golden, case):
    c, model = golden[2], golden_model(golden)
    given = golden_inputs(c, case)
    with torch.no_grad():
        got = model(**given)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        exact = model.double()(**wide)
    assert exact.dtype == torch.float64
    assert_within_rounding(case, got, exact, c[f"{case}.flow"])


# against diffusers


def stock_call(model, latents, t, given, condition=None):
    """The stock model's own forward; what we may leave out it needs as padding and zeros."""
    B = latents.shape[0]
    defaults = {
        "encoder_attention_mask": torch.ones(given["encoder_hidden_states"].shape[:2]),
        "encoder_hidden_states_2": torch.zeros(B, 1, 10),
        "encoder_attention_mask_2": torch.zeros(B, given.get("encoder_hidden_states_2", torch.zeros(B, 1)).shape[1]),
        "image_embeds": torch.zeros(B, 1, 8),
    }
    x = latents if condition is None else torch.cat([latents, condition], 2)
    return model.transformer(x.transpose(1, 2), t, **defaults | given, return_dict=False)[0].transpose(1, 2)


@pytest.mark.parametrize("byt5", [True, False])
@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("B", [1, 2])
def test_equals_diffusers(B, image, byt5):
    """Also with two samples whose texts differ in length."""
    model, (latents, _, _) = tiny(camera=False), video(B=B)
    given, t = conditions(B, byt5=byt5, image=image), torch.tensor([833.0, 250.0])[:B]
    with torch.no_grad():
        close(model(latents, t, **given), stock_call(model, latents, t, given), 2e-5)


def test_equals_diffusers_with_condition_latents_patches_and_no_masks():
    model, (latents, _, _) = tiny(camera=False, config=CONDITIONED | dict(patch_size=2)), video(h=4, w=6)
    given = {k: v for k, v in conditions().items() if "mask" not in k}
    masks = {f"encoder_attention_mask{n}": torch.ones(given[f"encoder_hidden_states{n}"].shape[:2]) for n in ("", "_2")}
    t, condition = torch.tensor([833.0, 250.0]), torch.randn(2, 5, 5, 4, 6)
    with torch.no_grad():
        expected = stock_call(model, latents, t, given | masks, condition)
        close(model(latents, t, **given, condition_latents=condition), expected, 2e-5)
        expected = stock_call(model, latents, t, given | masks, torch.zeros_like(condition))
        close(model(latents, t, **given), expected, 2e-5)


def test_every_gradient_is_that_of_diffusers():
    model, (latents, _, _) = tiny(camera=False), video()
    given, t = conditions(), torch.tensor([833.0, 250.0])
    weight = torch.randn_like(latents)
    (stock_call(model, latents, t, given) * weight).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (model(latents, t, **given) * weight).mean().backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert own and own.keys() <= expected.keys()
    for name, gradient in expected.items():  # what the last block does to the text has no effect: no gradient, or zeros
        error = (own.get(name, torch.zeros(())) - gradient).norm()
        assert error < 1e-4 * gradient.norm().clamp_min(1e-3), f"{name}: error {error:.1e}"


def test_bf16_is_as_far_from_fp32_as_diffusers_is():
    model, (latents, _, _) = tiny(camera=False).bfloat16(), video(F=8)
    given, t = conditions(), torch.tensor([832.0, 250.0])
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        own = model(latents.bfloat16(), t, **half)
        plain = stock_call(model, latents.bfloat16(), t.bfloat16(), half)
        exact = model.float()(latents.bfloat16().float(), t, **{k: v.float() for k, v in half.items()})
    assert own.dtype == torch.bfloat16
    assert (own - exact).norm() <= 1.2 * (plain - exact).norm()


# loading and saving


def test_round_trip_with_diffusers_is_silent_and_bitwise(tmp_path, caplog):
    model = tiny(action=True, text_timestep=0.0, prope_cache="shared")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock, info = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not caplog.records
    again = load_backbone(tmp_path)
    assert isinstance(again, HunyuanVideo15Backbone)
    assert (again.block_frames, again.text_timestep, again.prope_cache) == (2, 0.0, "shared")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    again.save_pretrained(tmp_path / "again")
    names = {"config.json", "dit_ops.json", "camera.safetensors", "action.safetensors", "diffusion_pytorch_model.safetensors"}
    assert {file.name for file in (tmp_path / "again").iterdir()} == names
    stock.save_pretrained(tmp_path / "stock")
    read = lambda folder, name: (tmp_path / folder / name).read_bytes()
    for name in names:
        assert name == "config.json" or read("again", name) == read(".", name), name
    weights = "diffusion_pytorch_model.safetensors"
    assert read("stock", weights) == read(".", weights) and read("stock", "config.json") == read("again", "config.json")


def test_branches_that_are_added_change_nothing(tmp_path):
    HunyuanVideo15Transformer3DModel.from_config(TINY).save_pretrained(tmp_path)
    model = HunyuanVideo15Backbone.from_pretrained(tmp_path, device="cpu")
    (latents, _, cameras), given, t = video(), conditions(), torch.tensor([500.0, 1.0])
    with torch.no_grad():
        before = model(latents, t, **given)
        model.add_camera()
        assert torch.equal(before, model(latents, t, **given, **cameras))
        model.add_action()
        close(model(latents, t, **given, **cameras, action=torch.arange(10).view(2, 5)), before, 1e-6)


def test_from_pretrained_is_strict(tmp_path):
    model = tiny(action=True)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights.pop("transformer_blocks.0.attn.to_q.bias")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit .*transformer_blocks.0.attn.to_q.bias"):
        HunyuanVideo15Backbone.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    for name, missing in (("camera", "1.bias"), ("action", "linear_2.bias")):
        whole = load_file(tmp_path / f"{name}.safetensors")
        save_file({k: v for k, v in whole.items() if k != missing}, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=rf"{name} branch does not fit, at \['{missing}'\]"):
            HunyuanVideo15Backbone.from_pretrained(tmp_path)
        save_file(whole, tmp_path / f"{name}.safetensors")
    (tmp_path / "action.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"announces an action branch, but action\.safetensors is missing"):
        HunyuanVideo15Backbone.from_pretrained(tmp_path)
    for name, error, message in [
        ("camera.safetensors", ValueError, "camera.safetensors: not a complete safetensors file"),
        ("diffusion_pytorch_model.safetensors", OSError, "Unable to load weights from checkpoint file"),
    ]:
        model.save_pretrained(tmp_path)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(error, match=message):
            HunyuanVideo15Backbone.from_pretrained(tmp_path)
    (tmp_path / "dit_ops.json").write_text('{"camera": tr')
    model.transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dit_ops.json: not a complete JSON file"):
        HunyuanVideo15Backbone.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no diffusers transformer at"):
        HunyuanVideo15Backbone.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
def test_training_checkpoints(golden, tmp_path, prefix):
    config, weights, c = golden
    averaged = {prefix + k: v for k, v in weights.items()}
    plain = {prefix + k: torch.zeros_like(v) for k, v in weights.items()}
    torch.save({"generator": plain, "generator_ema": averaged}, tmp_path / "model.pt")
    for ema, expected in [(None, c["bi.flow"]), (False, torch.zeros_like(c["bi.flow"]))]:
        model = HunyuanVideo15Backbone.from_original(tmp_path / "model.pt", config, ema=ema)
        with torch.no_grad():
            close(model(**golden_inputs(c, "bi")), expected)
    with pytest.raises(ValueError, match="no 'generator_ema'"):
        HunyuanVideo15Backbone.from_original({"generator": plain}, config, ema=True)


def test_tencents_files_have_no_camera_branch_and_minwms_may_have_an_action_branch(golden):
    config, weights, _ = golden
    plain = {k: v for k, v in weights.items() if "prope" not in k}
    model = HunyuanVideo15Backbone.from_original(plain, config)
    assert model.camera is None and model.action is None
    layers = {0: torch.randn(128, 256), 2: torch.randn(128, 128)}
    action = {f"action_in.mlp.{i}.weight": w for i, w in layers.items()} | {
        f"action_in.mlp.{i}.bias": torch.randn(128) for i in layers
    }
    weights = weights | action
    model = HunyuanVideo15Backbone.from_original(weights, config, text_timestep=0.0)
    assert torch.equal(model.action.linear_2.weight, layers[2]) and model.camera is not None and model.text_timestep == 0
    branches = {"camera": model.camera.state_dict(), "action": model.action.state_dict()}
    back = to_original(model.transformer.state_dict(), branches)
    assert back.keys() == weights.keys() and all(torch.equal(back[k], v) for k, v in weights.items())


def test_model_pt_and_back(golden, tmp_path):
    """`dit-ops convert` to minWM's file and back: the same bits, our branches too."""
    model = golden_model(golden)
    model.add_action()
    to_minwm(model, tmp_path / "model.pt")
    again = HunyuanVideo15Backbone.from_original(tmp_path / "model.pt", golden[0], block_frames=4)
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert model.camera is not None and again.action is not None


def test_original_files_are_strict(golden):
    config, weights, _ = golden
    wrong = {k: v for k, v in weights.items() if k != "double_blocks.1.txt_mlp.fc1.bias"} | {"extra": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"missing \['transformer_blocks.1.ff_context.net.0.proj.bias'\], unexpected \['extra'\]"
    ):
        HunyuanVideo15Backbone.from_original(wrong, config)
    with pytest.raises(ValueError, match=r"differ for {'proj_out.bias': \(\[3\], \[8\]\)}"):
        HunyuanVideo15Backbone.from_original(weights | {"final_layer.linear.bias": torch.zeros(3)}, config)
    with pytest.raises(ValueError, match=r"camera branch does not fit, at \['1.bias'\]"):
        HunyuanVideo15Backbone.from_original(weights | {"double_blocks.1.img_attn_prope_proj.bias": torch.zeros(3)}, config)
    with pytest.raises(ValueError, match=r"config needs .*missing \['heads_num'\]"):
        HunyuanVideo15Backbone.from_original(weights, {k: v for k, v in config.items() if k != "heads_num"})
    with pytest.raises(ValueError, match="must have .*got {'mm_single_blocks_depth': 4}"):
        HunyuanVideo15Backbone.from_original(weights, config | {"mm_single_blocks_depth": 4})


def test_the_published_shape_has_the_published_size():
    """8.33 billion parameters; 54 ProPE projections of 4.2 million."""
    with torch.device("meta"):
        model = HunyuanVideo15Backbone.from_config({}, camera=True, action=True)
    count = sum(p.numel() for p in model.transformer.parameters())
    assert abs(count / 1e9 - 8.326) < 0.001, count
    assert sum(p.numel() for p in model.camera.parameters()) == 54 * (2048 * 2048 + 2048)
    assert sum(p.numel() for p in model.action.parameters()) == 2048 * (256 + 1) + 2048 * (2048 + 1)
    with torch.device("meta"):
        stock = HunyuanVideo15Transformer3DModel()
    assert model.transformer.state_dict().keys() == stock.state_dict().keys()
    assert model.rope.splits == (16, 56, 56) and model.rope.theta == 256


# errors


def test_bad_input_is_named():
    model, (latents, clean, cameras), given = tiny(), video(), conditions()
    t = torch.zeros(2)
    for args, changed, message in [
        ((latents[0], t), {}, r"latents must be \[B, F, Cz, h, w\], got \[5, 4, 3, 4\]"),
        (
            (latents, t),
            {"encoder_hidden_states": torch.zeros(2, 7, 5)},
            r"encoder_hidden_states must be .*\[2, T, 12\], got \[2, 7, 5\]",
        ),
        ((latents, t), {"encoder_hidden_states_2": torch.zeros(1, 3, 10)}, r"encoder_hidden_states_2 must be .*\[2, T, 10\]"),
        ((latents, t), {"image_embeds": torch.zeros(2, 8)}, r"image_embeds must be .*\[2, T, 8\], got \[2, 8\]"),
        (
            (latents, t),
            {"encoder_attention_mask": torch.ones(2, 6)},
            r"encoder_attention_mask must be .*\[2, 7\], got \[2, 6\]",
        ),
        ((latents, t), {"encoder_hidden_states_2": None}, "encoder_attention_mask_2 must be left out without its states"),
        ((latents, t), {"encoder_attention_mask": torch.zeros(2, 7)}, r"at least one token of every sample, got \[0, 0\]"),
        ((latents, t), {"viewmats": None}, "viewmats and Ks come together"),
        ((latents, t), {"viewmats": None, "Ks": None}, "has a camera branch and needs viewmats and Ks"),
        ((latents, t), {"viewmats": cameras["viewmats"][:, :3]}, r"viewmats must be .*\[2, 5, 4, 4\], got \[2, 3, 4, 4\]"),
        ((latents, t), {"clean_latents": clean[:, :4]}, "clean_latents must be"),
        ((latents, t), {"clean_latents": clean, "cache": model.new_cache(2, 3, 4)}, "exclude each other"),
        ((latents[:, :, :3], t), {}, "must have 4 channels, got 3"),
        ((latents, torch.zeros(2, 3)), {"clean_latents": clean}, r"F = 5, got \[2, 3\]"),
        ((latents, torch.zeros(2, 1)), {}, r"F = 5, got \[2, 1\]"),
        ((latents, t), {"action": torch.zeros(2, 5)}, "no action branch"),
        ((latents, t), {"condition_latents": torch.zeros(2, 5, 5, 3, 4)}, r"condition_latents must be \[2, 5, 0, 3, 4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*args, **given | cameras | changed)
    with pytest.raises(ValueError, match="no camera branch"):
        tiny(camera=False)(latents, t, **given, **cameras)
    acting = tiny(camera=False, action=True)
    with pytest.raises(ValueError, match="has an action branch and needs action"):
        acting(latents, t, **given)
    with pytest.raises(ValueError, match=r"action must be \[B, F\] = \[2, 5\], got \[5\]"):
        acting(latents, t, **given, action=torch.zeros(5))
    for config, options, message in [
        ({"num_layer": 2}, {}, r"unknown keys \['num_layer'\]"),
        (TINY | {"use_meanflow": True}, {}, "use_meanflow must be false"),
        (TINY | {"patch_size": 2, "rope_axes_dim": (4, 4, 4)}, {}, "must be three even sizes that sum to head_dim = 16"),
        (TINY | {"patch_size_t": 2}, {}, "patch_size_t must be 1, got 2"),
        (TINY, {"prope_cache": "both"}, "prope_cache must be one of .*got 'both'"),
    ]:
        with pytest.raises(ValueError, match=message):
            HunyuanVideo15Backbone.from_config(config, **options)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        model.new_cache(0, 3, 4)
    with pytest.raises(ValueError, match="multiples of the patch 2×2, got 3×4"):
        tiny(config={"patch_size": 2}).new_cache(1, 3, 4)
