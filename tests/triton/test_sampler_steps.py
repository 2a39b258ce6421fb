"""The Triton kernels of the sampler steps in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import pytest
import torch
from torch.library import opcheck

import dit_ops
from dit_ops import _library as lib
from dit_ops.testing import check_backend

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

STEPS = {
    "add_noise": (dit_ops.add_noise, ("x0", "noise"), ("sigma",), {}),
    "flow_to_x0": (dit_ops.flow_to_x0, ("x", "flow"), ("sigma",), {}),
    "renoise": (dit_ops.renoise, ("x", "flow", "noise"), ("sigma", "sigma_next"), {}),
    "guided": (dit_ops.cfg_euler_step, ("x", "cond", "uncond"), ("sigma", "sigma_next"), {"guidance": 3.0}),
    "unguided": (dit_ops.cfg_euler_step, ("x", "cond"), ("sigma", "sigma_next"), {"guidance": 3.0, "uncond": None}),
}
SIGMAS = {"numbers": (0.75, 0.5), "samples": ((2,), (2,)), "frames": ((2, 3), (2, 3)), "mixed": ((2,), (2, 3))}


def sigmas(names: tuple[str, ...], kind: str) -> dict:
    return {n: spec if isinstance(spec, float) else torch.rand(spec) for n, spec in zip(names, SIGMAS[kind], strict=False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SIGMAS)
@pytest.mark.parametrize("step", STEPS)
def test_kernels_are_within_rounding(step, kind, dtype):
    """Outputs and gradients, those of the noise levels included; 70 values a row: no multiple of a block."""
    fn, names, levels, options = STEPS[step]
    tensors = {name: torch.randn(2, 3, 7, 10).to(dtype) for name in names}
    given = sigmas(levels, kind)
    tables = {name: s for name, s in given.items() if isinstance(s, torch.Tensor)}
    numbers = {name: s for name, s in given.items() if name not in tables}
    factor = 4 if dtype == torch.bfloat16 else 2  # the interpreter truncates to bf16, a GPU rounds
    cotangent = torch.randn(2, 3, 7, 10).to(dtype)
    check_backend(fn, {**tensors, **tables}, [cotangent], "triton", factor=factor, **numbers, **options)


@pytest.mark.parametrize("step", STEPS)
def test_rows_of_several_blocks_and_mixed_dtypes(step):
    fn, names, levels, options = STEPS[step]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tensors = {name: torch.randn(2, 1500).to(dtype) for name, dtype in zip(names, dtypes, strict=False)}
    given = sigmas(levels, "samples")
    check_backend(fn, tensors | given, [torch.randn(2, 1500)], "triton", factor=4, **options)


def test_strided_arguments_zero_sizes_and_ends():
    x, y = torch.randn(2, 4, 2, 3).transpose(1, 2)
    assert torch.equal(dit_ops.add_noise(x, y, torch.ones(2), backend="triton"), y)
    assert torch.equal(dit_ops.add_noise(x, y, 0.0, backend="triton"), x)
    empty = torch.randn(2, 0, 3, requires_grad=True)
    out = dit_ops.flow_to_x0(empty, empty, torch.rand(2, 0), backend="triton")
    assert out.shape == empty.shape and torch.autograd.grad(out.sum(), empty)[0].shape == empty.shape


def test_a_number_as_a_tensor_and_rows_of_one_value():
    x, y = torch.randn(2, 300)
    for s in (torch.tensor(0.3), torch.rand(300)):
        want = dit_ops.flow_to_x0(x, y, s, backend="reference")
        torch.testing.assert_close(dit_ops.flow_to_x0(x, y, s, backend="triton"), want)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)], ids=str)
def test_gradient_of_a_table_as_large_as_x(shape):
    x = torch.randn(shape or (5,))
    s = torch.rand(shape)
    check_backend(dit_ops.flow_to_x0, {"x": x, "flow": x, "sigma": s}, [torch.randn_like(x)], "triton")


def test_small_steps_of_numbers_are_not_rounded_away():
    x, v = torch.zeros(8), torch.ones(8)
    out = dit_ops.cfg_euler_step(x, v, None, 1.0, 0.9, 0.9 - 1e-7, backend="triton")
    torch.testing.assert_close(out, torch.full((8,), -1e-7), rtol=1e-5, atol=0)


def test_op_is_well_registered():
    x, y, z = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(3))
    op, s = torch.ops.dit_ops.sampler_step.default, torch.rand(2, 3, requires_grad=True)
    opcheck(op, ("renoise", x, y, z, s, None, 0.0, 0.25, 1.0, "triton"))
    opcheck(op, ("cfg_euler_step", x, y, None, None, s, 0.5, 0.0, 3.0, "triton"))


def test_fp64_is_refused_and_triton_comes_first_here():
    x = torch.randn(1, 8)
    assert dit_ops.explain("add_noise", x, x.bfloat16(), 0.5).backend == "triton"
    with pytest.raises(NotImplementedError, match=r"flow_to_x0: backend 'triton' .* dtype is torch.float64"):
        dit_ops.flow_to_x0(x, x.double(), 0.5, backend="triton")
