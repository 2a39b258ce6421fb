"""The Triton backend of attention at full size: against cuDNN on slices, the same bits, and in a CUDA graph. Needs a GPU."""

import pytest
import torch
import torch.nn.functional as tf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_ops
from dit_ops.layout import VideoLayout
from dit_ops.masks import BlockCausal, Full, TeacherForcing
from dit_ops.testing import assert_within_rounding

pytestmark = pytest.mark.gpu
T = 1560  # tokens of a latent frame at 480p
N, D = 2, 128
CASES = {
    "chunk over the cache": Full(3 * T, 21 * T),
    "block causal": BlockCausal(VideoLayout(6, 30, 52, block_frames=3)),
    "window, sink and text": BlockCausal(VideoLayout(9, 30, 52, block_frames=3, prefix=512), window_frames=6, sink_frames=3),
    "teacher forcing": TeacherForcing(VideoLayout(9, 30, 52, block_frames=3, halves=2)),
}


def case(mask, dtype: torch.dtype = torch.bfloat16, heads: int = N, D: int = D) -> list[Tensor]:
    """q inside packed QKV, k, v and the gradient of o."""
    q = torch.randn(1, mask.queries, 3, heads, D, device="cuda", dtype=dtype)[:, :, 0]
    k, v = torch.randn(2, 1, mask.keys, heads, D, device="cuda", dtype=dtype)
    return [q, k, v, torch.randn(1, mask.queries, heads, D, device="cuda", dtype=dtype)]


def run(q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = dit_ops.attention(*leaves, mask, backend="triton")
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do), strict=True))}


def slices(q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask, kernel: SDPBackend) -> dict[str, Tensor]:
    """Every row of the mask by a dense kernel on a copy of its keys; gradients add up in fp32."""
    o, dq = torch.empty_like(do), torch.empty_like(do)
    dk, dv = (torch.zeros(t.shape, device="cuda", dtype=torch.promote_types(t.dtype, torch.float32)) for t in (k, v))
    for q0, q1, pairs in mask.intervals():
        keys, values = (torch.cat([t[:, a:b] for a, b in pairs], 1) for t in (k, v))
        leaves = [t.transpose(1, 2).detach().requires_grad_() for t in (q[:, q0:q1], keys, values)]
        with sdpa_kernel(kernel):
            y = tf.scaled_dot_product_attention(*leaves)
        grads = torch.autograd.grad(y, leaves, do[:, q0:q1].transpose(1, 2))
        o[:, q0:q1], dq[:, q0:q1] = y.detach().transpose(1, 2), grads[0].transpose(1, 2)
        at = 0
        for a, b in pairs:
            dk[:, a:b] += grads[1].transpose(1, 2)[:, at : at + b - a]
            dv[:, a:b] += grads[2].transpose(1, 2)[:, at : at + b - a]
            at += b - a
    return {"o": o, "dq": dq, "dk": dk.to(k.dtype), "dv": dv.to(v.dtype)}


@pytest.mark.parametrize("name", CASES)
def test_within_rounding_of_fp64_where_cudnn_is(name):
    mask = CASES[name]
    args = case(mask, heads=1)
    got, plain = run(*args, mask), slices(*args, mask, SDPBackend.CUDNN_ATTENTION)
    exact = slices(*(t.double() for t in args), mask, SDPBackend.MATH)
    for key in got:
        assert_within_rounding(key, got[key], exact[key], plain[key])


@pytest.mark.parametrize(
    "dtype, D", [(torch.float16, 64), (torch.bfloat16, 96), (torch.float32, 128), (torch.bfloat16, 40)], ids=str
)
def test_other_dtypes_and_head_sizes(dtype, D):
    mask = TeacherForcing(VideoLayout(4, 13, 17, block_frames=2, halves=2, prefix=33))
    args = case(mask, dtype, 3, D)
    got, plain = run(*args, mask), slices(*args, mask, SDPBackend.MATH)
    exact = slices(*(t.double() for t in args), mask, SDPBackend.MATH)
    for key in got:
        assert_within_rounding(key, got[key], exact[key], plain[key], 3.0 if dtype == torch.float32 else 2.0)


def test_the_same_bits_in_a_hundred_runs():
    mask = TeacherForcing(VideoLayout(6, 30, 52, block_frames=3, halves=2))
    args = case(mask)
    first = run(*args, mask)
    for _ in range(100):
        again = run(*args, mask)
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_split_tiles_agree_with_whole_ones():
    from dit_ops.kernels.attention import attention_fwd

    q, k, v, _ = case(CASES["chunk over the cache"])
    rows, exact = [0, q.shape[1], 1, 0, k.shape[1]], None
    for splits in ((0, 1), None, (37, 3), (5, 8)):
        o, lse = attention_fwd(q, k, v, rows, D**-0.5, splits=splits)
        exact = exact or (o.double(), lse.double())
        torch.testing.assert_close(o.double(), exact[0], rtol=2**-8, atol=2**-14)
        torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-6)


def test_offsets_beyond_32_bits():
    """The last head of a tensor of more than 2^31 values."""
    L, heads = 2048, 8200
    k = torch.zeros(1, L, heads, D, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    k[:, :, -1:] = torch.randn(1, L, 1, D, device="cuda", dtype=torch.bfloat16)
    part = k[:, :, -1:]
    want = dit_ops.attention(part.clone(), part.clone(), part.clone(), backend="triton")
    assert torch.equal(dit_ops.attention(part, part, part, backend="triton"), want)


def test_graph_replay_gives_the_same_bits():
    """After one call outside, capture only launches: no table is copied again."""
    mask = BlockCausal(VideoLayout(6, 30, 52, block_frames=3, prefix=512))
    args = case(mask)
    static = [t.clone() for t in args]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(*static, mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*static, mask)
    for _ in range(2):
        args = case(mask)
        for into, new in zip(static, args, strict=True):
            into.copy_(new)
        graph.replay()
        eager = run(*static, mask)
        assert all(torch.equal(captured[key], eager[key]) for key in eager)
