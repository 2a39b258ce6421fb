"""Weights as 8-bit floats: bounds of their rounding, products against fp64, which layers, and what it does to a flow."""

import copy

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given as examples
from hypothesis import strategies as st
from toy_backbones import tiny_batch, tiny_wan
from toy_hunyuan_video15 import tiny
from toy_rooms import random_rooms

from dit_ops import float8
from dit_ops.backbones.wan import WanBackbone
from dit_ops.float8 import Float8Linear, quantise, to_float8
from dit_ops.offload import offload_blocks
from dit_ops.testing import assert_within_rounding


def frozen(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    return model.eval().requires_grad_(False).to(dtype)


def wan() -> WanBackbone:
    """Its sizes are multiples of 16, as the product of 8-bit matrices wants them."""
    sizes = dict(num_attention_heads=2, attention_head_dim=16, text_dim=8, freq_dim=16, ffn_dim=48, num_layers=2)
    model = WanBackbone.from_config(sizes | {"in_channels": 2, "out_channels": 2}, camera=True, block_frames=2)
    for p in model.parameters():
        p.data = torch.randn(p.shape) * (0.25 if p.dim() > 1 else 0.5)
    return frozen(model)


def run(model: torch.nn.Module, **changed) -> torch.Tensor:
    batch = tiny_batch(1, 4)
    given = {key: batch[key] for key in ("viewmats", "Ks")} | {"latents": batch["latents"].to(model.dtype)}
    states = batch["condition"]["encoder_hidden_states"].to(model.dtype)
    with torch.inference_mode():
        return model(**given | changed, encoder_hidden_states=states, timestep=torch.full((1,), 500.0))


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def bound(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Of an element: half a step of three mantissa bits, and of the smallest numbers half of their spacing 2⁻⁹, in fp32."""
    return torch.maximum(rows.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)


@examples(st.integers(-30, 30), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_an_element_is_off_by_half_a_step_at_most(exponent, seed, dtype):
    rows = torch.randn(5, 37, generator=torch.Generator().manual_seed(seed)).pow(5) * 2.0**exponent
    rows = rows.to(dtype)
    q, scale = quantise(rows)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (5, 1)
    error = (q.double() * scale.double() - rows.double()).abs()
    assert (error <= bound(rows.double(), scale.double())).all()
    assert (q.float().abs().amax(1) == 448).all()


def test_rows_of_zeros_and_of_the_smallest_numbers_stay_what_they_are():
    rows = torch.zeros(3, 16)
    rows[1, 3], rows[2, 5] = 1e-44, 3e38
    q, scale = quantise(rows)
    assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(q.float()).all()
    assert not q[0].float().any()
    torch.testing.assert_close(q[2].double() * scale[2].double(), rows[2].double())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_alone_are_rounded_where_there_are_no_tensor_cores_for_them(dtype, bias):
    linear = torch.nn.Linear(80, 48, bias=bias).requires_grad_(False)
    linear.weight.mul_(torch.logspace(-3, 3, 48)[:, None])  # channels of very different size
    layer, x = Float8Linear(linear.to(dtype)), torch.randn(2, 7, 80).to(dtype)
    W = layer.weight.double() * layer.scale.double()
    b = None if linear.bias is None else linear.bias.double()
    plain = nnf.linear(x, W.to(dtype), linear.bias)
    assert_within_rounding("weights only", layer(x), nnf.linear(x.double(), W, b), plain)
    off = nnf.linear(x.double(), W) - nnf.linear(x.double(), linear.weight.double())
    allowed = nnf.linear(x.double().abs(), bound(linear.weight.double(), layer.scale.double()))
    assert (off.abs() <= allowed).all() and off.abs().max() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_activations_are_rounded_too_where_there_are(bias, monkeypatch):
    """The call that the fp8 tensor cores get, on a CPU: torch computes it there as well."""
    calls, scaled_mm = [], torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: calls.append((args, kwargs)) or scaled_mm(*args, **kwargs))
    linear = frozen(torch.nn.Linear(80, 48, bias=bias))
    layer = Float8Linear(linear, activations=True)
    x = (torch.randn(2, 7, 80) * torch.logspace(-2, 2, 7)[:, None]).bfloat16()  # tokens of very different size
    got = layer(x)
    W, (q, scale) = layer.weight.double() * layer.scale.double(), quantise(x.flatten(0, 1))
    X = (q.double() * scale.double()).unflatten(0, (2, 7))
    b = None if linear.bias is None else linear.bias.double()
    plain = nnf.linear(X.bfloat16(), W.bfloat16(), linear.bias)
    assert_within_rounding("weights and activations", got, nnf.linear(X, W, b), plain)

    (((a, w), options),) = calls  # what torch's documentation asks of scales per row
    assert a.dtype == w.dtype == torch.float8_e4m3fn and a.is_contiguous() and w.t().is_contiguous()
    assert a.shape == (14, 80) and w.shape == (80, 48) and not any(n % 16 for n in w.shape)
    for name, shape in (("scale_a", (14, 1)), ("scale_b", (1, 48))):
        assert options[name].dtype == torch.float32 and options[name].shape == shape and options[name].is_contiguous()
    assert options["out_dtype"] == torch.bfloat16


def test_what_the_tensor_cores_do_not_take_is_computed_without_them(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: pytest.fail("called"))
    for size, dtype in (((80, 40), torch.bfloat16), ((72, 48), torch.bfloat16), ((80, 48), torch.float32)):
        linear = frozen(torch.nn.Linear(*size), dtype)
        Float8Linear(linear, activations=True)(torch.randn(3, size[0], dtype=dtype))
    linear = frozen(torch.nn.Linear(80, 48))
    Float8Linear(linear)(torch.randn(3, 80).bfloat16())  # a CPU
    Float8Linear(linear, activations=False)(torch.randn(3, 80).bfloat16())


WAN_LAYERS = {f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")}
HUNYUAN_LAYERS = {
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{name}.net.{layer}" for name in ("ff", "ff_context") for layer in ("0.proj", "2")),
}


@pytest.mark.parametrize(
    "make, blocks, layers",
    [
        (wan, "transformer.blocks", WAN_LAYERS | {"ffn.net.0.proj", "ffn.net.2"}),
        (lambda: frozen(tiny()), "transformer.transformer_blocks", HUNYUAN_LAYERS),
    ],
    ids=["wan", "hunyuan"],
)
def test_attention_mlp_and_camera_layers_are_rounded_and_nothing_else(make, blocks, layers):
    model = make()
    before = dict(copy.deepcopy(model).named_parameters())
    to_float8(model)
    expected = {f"{blocks}.{i}.{name}" for i in range(2) for name in layers} | {"camera.0", "camera.1"}
    assert {name for name, m in model.named_modules() if isinstance(m, Float8Linear)} == expected
    rest = dict(model.named_parameters())
    assert rest.keys() == {name for name in before if name.rpartition(".")[0] not in expected}
    assert all(torch.equal(value, before[name]) for name, value in rest.items())
    for name in expected:
        layer, weight = model.get_submodule(name), before[f"{name}.weight"]
        assert torch.equal(layer.bias, before[f"{name}.bias"]) and layer.weight.shape == weight.shape
        error = (layer.weight.double() * layer.scale.double() - weight.double()).abs()
        assert (error <= bound(weight.double(), layer.scale.double())).all()
        assert layer.weight.nbytes + layer.scale.nbytes == weight.nbytes // 2 + 4 * weight.shape[0]


def test_the_flow_of_a_rooms_model_moves_by_less_than_one_rounding_of_its_weights():
    """Roundings of single weights are independent: what is left of 2⁻⁴ in a sum over a row is less. Also more than bf16's."""
    fp32 = random_rooms().backbone
    for p in fp32.camera.parameters():
        p.data = torch.randn_like(p) * 0.1
    batch = tiny_batch(1, 4)
    given = {key: batch[key] for key in ("viewmats", "Ks")} | {"timestep": torch.full((1,), 500.0)}
    latents, states = torch.randn(1, 4, 16, 8, 8), torch.randn(1, 5, 64)

    @torch.inference_mode()
    def flow(model: torch.nn.Module) -> torch.Tensor:
        return model(latents.to(model.dtype), encoder_hidden_states=states.to(model.dtype), **given)

    bf16 = frozen(copy.deepcopy(fp32))
    weights, both = copy.deepcopy(bf16), copy.deepcopy(bf16)
    to_float8(weights, activations=False)
    to_float8(both, activations=True)
    plain = flow(bf16)
    assert relative_error(plain, flow(fp32)) < relative_error(flow(weights), plain) < relative_error(flow(both), plain) < 2**-4


def test_adapters_stay_as_they_are_on_rounded_layers():
    peft = pytest.importorskip("peft")
    model = wan()
    model.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "net.2"], init_lora_weights=False))
    frozen(model)
    plain = run(model)
    to_float8(model)
    q = model.blocks[0].attn1.to_q
    assert isinstance(q.base_layer, Float8Linear) and q.lora_A["default"].weight.dtype == torch.bfloat16
    with_adapters = run(model)
    assert 0 < relative_error(with_adapters, plain) < 0.1
    model.transformer.disable_adapters()
    assert relative_error(run(model), plain) > relative_error(with_adapters, plain)


def test_weights_are_rounded_on_the_device_and_come_back(monkeypatch):
    """The meta device stands for a GPU: what is computed there is seen to be asked back."""
    seen = []
    monkeypatch.setattr(float8, "quantise", lambda rows: seen.append(rows.device.type) or quantise(rows))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        Float8Linear(torch.nn.Linear(16, 32).requires_grad_(False), "meta")
    assert seen == ["meta"]


def test_mistakes_are_named(tmp_path):
    model = wan()
    trained = wan().requires_grad_(True)
    with pytest.raises(ValueError, match="must be frozen, float8 is for inference only; .* requires grad"):
        to_float8(trained)
    away = wan()
    offload_blocks(away, "cpu")
    with pytest.raises(ValueError, match="they are offloaded: call to_float8 before"):
        to_float8(away)
    state = model.state_dict()
    to_float8(model)
    with pytest.raises(ValueError, match=r"must hold Linear layers, got none \(they may be float8 already\)"):
        to_float8(model)
    with pytest.raises(ValueError, match="not saved: save the model before to_float8"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not saved: save the model before to_float8"):
        model.state_dict()
    with pytest.raises(ValueError, match="not loaded: load the weights before to_float8"):
        model.load_state_dict(state)
    batch = tiny_batch(1, 4)
    x = batch["latents"].bfloat16().requires_grad_()
    with pytest.raises(ValueError, match="inference only: call the model under torch.no_grad"):
        model(
            x,
            torch.full((1,), 500.0),
            batch["condition"]["encoder_hidden_states"].bfloat16(),
            Ks=batch["Ks"],
            viewmats=batch["viewmats"],
        )
    before = run(model)
    model.to("cpu")
    assert torch.equal(run(model), before)
    with pytest.raises(ValueError, match="must keep their dtype: cast the model before to_float8"):
        model.float()


def test_sizes_that_are_no_multiples_of_16_work_too():
    model = frozen(tiny_wan(2))
    plain = run(model)
    to_float8(model, activations=True)
    assert 0 < relative_error(run(model), plain) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("M, K, N", [(1, 32, 48), (100, 1536, 1536), (6240, 1536, 8960)])
def test_tensor_cores_give_the_product_of_the_rounded_matrices(M, K, N):
    if not float8.has_float8_cores(torch.device("cuda")):
        pytest.skip("this GPU multiplies no 8-bit floats")
    linear = frozen(torch.nn.Linear(K, N)).cuda()
    layer, x = Float8Linear(linear), torch.randn(M, K, device="cuda").bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = layer(x)
    assert any(event.key == "aten::_scaled_mm" for event in profile.key_averages())
    q, scale = quantise(x)
    X, W = q.double() * scale.double(), layer.weight.double() * layer.scale.double()
    exact = nnf.linear(X, W, linear.bias.double())
    assert_within_rounding("fp8 tensor cores", got, exact, nnf.linear(X.bfloat16(), W.bfloat16(), linear.bias))


@pytest.mark.gpu
def test_on_a_gpu_offloaded_float8_weights_give_the_same_bits():
    model = wan()
    to_float8(model, "cuda")
    resident = copy.deepcopy(model).cuda()
    offload_blocks(model, "cuda")
    batch = {key: value.cuda() for key, value in tiny_batch(1, 4).items() if key != "condition"}
    batch["latents"] = batch["latents"].bfloat16()
    states = tiny_batch(1, 4)["condition"]["encoder_hidden_states"].cuda().bfloat16()
    with torch.inference_mode():
        a, b = (m(**batch, encoder_hidden_states=states, timestep=torch.full((1,), 500.0).cuda()) for m in (model, resident))
    assert torch.equal(a, b)
