"""Dense rectangles on a GPU: every dense kernel there, determinism, capture of a streaming step, and the peers' results."""

import pytest
import torch
from attention_cases import MASKS, causal, dense_attention, gradients, qkv, teacher

import dit_ops
from dit_ops.cache import KVCache
from dit_ops.ops import _attention_dense as dense
from dit_ops.ops import _dense_kernels as kernels
from dit_ops.testing import assert_within_rounding

pytestmark = pytest.mark.gpu
NAMES = [kernel.name for kernel in kernels.KERNELS[1:]]


def only(name: str, dtype: torch.dtype, D: int, monkeypatch) -> None:
    """Leaves one dense kernel, or skips with its reason."""
    (kernel,) = (kernel for kernel in kernels.KERNELS if kernel.name == name)
    reason = kernel.refuses(torch.device("cuda"), dtype, D, False)
    if reason:
        pytest.skip(f"{name}: {reason}")
    monkeypatch.setattr(kernels, "KERNELS", (kernel, kernels.KERNELS[-1]))  # FA2 for head sizes that it does not take


@pytest.mark.parametrize("B, N, D", [(1, 24, 128), (2, 4, 64), (1, 2, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_dense_kernel_is_within_rounding_of_fp64(name, dtype, B, N, D, monkeypatch):
    only(name, dtype, D, monkeypatch)
    for mask in (teacher(7, 3, prefix=9, size=61), causal(9, 2, prefix=5, window=4, sink=1, size=33), MASKS["no keys"]):
        leaves = qkv(mask, dtype, B=B, N=N, D=D, device="cuda")
        wide = [t.detach().double().requires_grad_() for t in leaves]
        do, dlse = torch.randn_like(leaves[0]), torch.randn(B, N, mask.queries, device="cuda")
        for outs in (1, 2):  # o alone, and with lse
            results = []
            for x in (wide, leaves, leaves):
                if len(results) < 2:
                    y = dense_attention(*x, mask, D**-0.5)
                else:
                    y = dit_ops.attention(*x, mask, return_lse=True, backend="dense")
                cotangents = [c.to(t.dtype) for c, t in zip((do, dlse), y, strict=True)]
                results.append((y[0], *gradients(y[:outs], x, cotangents[:outs])))
            for what, exact, plain, got in zip(("o", "dq", "dk", "dv"), *results, strict=True):
                assert_within_rounding(f"{name} {what}", got, exact, plain)


@pytest.mark.parametrize("backend", ["dense", "triton"])
def test_deterministic_gradients_have_the_same_bits(backend):
    mask = teacher(6, 2, size=200)
    leaves = qkv(mask, torch.bfloat16, B=1, N=8, D=128, device="cuda")
    do = torch.randn_like(leaves[0])
    first = None
    for _ in range(100):
        o = dit_ops.attention(*leaves, mask, deterministic=True, backend=backend)
        grads = gradients([o], leaves, [do])
        first = first or grads
        assert all(torch.equal(a, b) for a, b in zip(grads, first, strict=True))


@pytest.mark.parametrize("backend", ["dense", "triton"])
def test_streaming_step_in_a_cuda_graph(backend):
    """A chunk over a ring cache that is full: a replay reads what the slots hold then."""
    cache = KVCache(1, window_frames=4, sink_frames=1)
    T, N, D = 96, 4, 128
    chunks = torch.randn(6, 3, 1, T, N, D, device="cuda", dtype=torch.bfloat16)
    for frame, (_, k, v) in enumerate(chunks):
        cache.begin(frame, 1, T)
        cache.write(0, k, v)
        cache.commit()
    k, v = cache.visible(0)
    q = torch.empty_like(chunks[0, 0])
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            dit_ops.attention(q, k, v, backend=backend)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = dit_ops.attention(q, k, v, backend=backend)
        for new in chunks[:3]:
            q.copy_(new[0])
            k.copy_(k.roll(1, 1))
            graph.replay()
            torch.testing.assert_close(o, dit_ops.attention(q, k, v, backend=backend), atol=0, rtol=0)


def test_keys_of_a_ring_are_read_in_place():
    q = torch.randn(1, 256, 4, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 4096, 4, 128, device="cuda", dtype=torch.bfloat16)[:, :, 512:]
    rows = [0, 256, 1, 0, k.shape[1]]
    dense.attention_fwd(q, k, v, rows, 0.1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, lse = dense.attention_fwd(q, k, v, rows, 0.1)
    assert torch.cuda.max_memory_allocated() - before < k.nbytes


def test_compiled_backbone_sized_call():
    mask = teacher(4, 2, size=64)
    leaves = qkv(mask, torch.bfloat16, B=1, N=4, D=128, device="cuda")
    compiled = torch.compile(lambda *t: dit_ops.attention(*t, mask), fullgraph=True)
    want, got = dit_ops.attention(*leaves, mask), compiled(*leaves)
    torch.testing.assert_close(got, want)
    do = torch.randn_like(want)
    torch.testing.assert_close(gradients([got], leaves, [do]), gradients([want], leaves, [do]), atol=0.02, rtol=0.02)
