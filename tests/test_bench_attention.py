"""The benchmark of attention: its shapes, its useful FLOPs, and peers that compute the same."""

import json
import sys
from argparse import Namespace

import pytest
import torch
from attention_cases import dense_attention, teacher

from dit_ops.bench import attention_peers, bench_attention, measure
from dit_ops.masks import Full


def arguments(**changes) -> Namespace:
    given = {"device": "cpu", "tokens": 126, "shapes": None, "dtype": "float32", "repeats": 2, "output": "-", "backends": []}
    return Namespace(**given | changes)


def test_shapes_are_those_of_the_models():
    found = {(s.name, s.deterministic): s for s in bench_attention.shapes(arguments(tokens=None))}
    assert len(found) == 18
    chunk = found["wan2.1-1.3b, one chunk of 3 of 21 latent frames", False]
    assert (chunk.mask.queries, chunk.mask.keys, chunk.heads) == (4680, 32760, 12)
    assert 4 * chunk.mask.pairs() * chunk.heads * 128 == pytest.approx(0.942e12, rel=1e-3)
    forcing = found["wan2.1-14b, teacher forcing", True]
    assert forcing.mask.queries == 65520 and 4 * forcing.mask.pairs() * 40 * 128 == pytest.approx(25.1e12, rel=2e-3)
    quarter = found["hunyuanvideo-1.5, one chunk of 3 of 21 latent frames, a quarter of the heads", False]
    assert quarter.heads == 4
    behind, apart = (next(s for name, s in found.items() if text in name[0]) for text in ("behind unused", "apart"))
    assert behind.mask.pairs() == apart.mask.pairs() == chunk.mask.pairs()  # only where the keys lie differs
    assert len(apart.mask.intervals()[0][2]) == 2


def test_every_record_has_its_rates(monkeypatch, capsys):
    """Both passes of ours and of the reference, reasons of what cannot run here, and the memory of both cache modes."""
    monkeypatch.setattr(measure, "copy_rate", lambda device: 10.0)
    monkeypatch.setattr(measure, "matmul_rate", lambda device: 2.0)
    options = {"--device": "cpu", "--tokens": "126", "--repeats": "2", "--shapes": "5", "--dtype": "float32", "--output": "-"}
    monkeypatch.setattr(sys, "argv", ["bench_attention", *(word for option in options.items() for word in option)])
    bench_attention.main()
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = {(r["shape"], r["pass"], r["backend"]): r for r in records if r["op"] == "attention"}
    name = "wan2.1-1.3b, teacher forcing, frames of 3 tokens"
    forward, backward = (rows[name, pass_, "dense"] for pass_ in ("forward", "backward"))
    assert forward["flops"] == 4 * teacher(21, 3).pairs() * 12 * 128 and backward["flops"] == 2.5 * forward["flops"]
    assert forward["TFLOP/s"] == pytest.approx(forward["flops"] / forward["us"] / 1e6, abs=0.01)
    assert forward["of_matmul"] == pytest.approx(forward["TFLOP/s"] / 2.0, abs=0.01)
    assert rows[name, "backward", "reference"]["us"] > 0 and rows[name, "forward", "SDPA, boolean mask"]["us"] > 0
    assert rows[name, "forward", "cuDNN SDPA"]["refused"] == "it needs a CUDA device"
    assert "tensors are on cpu" in rows[name, "forward", "triton"]["refused"]
    cache = {(r["shape"].split(",")[0], r["backend"]): r["bytes"] for r in records if r["op"] == "cache"}
    assert len(cache) == 6
    rotated, plain = (
        next(b for (m, mode), b in cache.items() if m == "wan2.1-14b" and text in mode) for text in ("reads", "before")
    )
    assert 0.5 < plain / rotated < 0.53  # half, and what one layer turns


def test_peers_compute_the_same(device):
    mask = teacher(4, 2, prefix=3, size=16)
    q, k, v = (torch.randn(1, mask.queries, 2, 64, device=device).to(torch.bfloat16) for _ in range(3))
    want = dense_attention(*(t.double() for t in (q, k, v)), mask, 64**-0.5)[0]
    peers = attention_peers.attention_peers(mask, device, False)
    ran = [name for name, peer in peers.items() if peer.fn is not None]
    assert "SDPA, boolean mask" in ran
    for name in ran:
        torch.testing.assert_close(peers[name].fn(q, k, v).double(), want, atol=0.03, rtol=0.03, msg=name)
    assert all(peer.missing for name, peer in peers.items() if name not in ran)


def test_peers_rules_are_the_mask():
    """What flex_attention and the packing are told, without running either."""
    mask = teacher(5, 2, prefix=3)
    q, k = torch.arange(mask.queries)[:, None], torch.arange(mask.keys)[None]
    assert torch.equal(attention_peers._teacher_forcing(mask)(0, 0, q, k), mask.dense())
    assert torch.equal(attention_peers._intervals(mask, "cpu")(0, 0, q, k), mask.dense())
    at, (cu_q, cu_k), longest = attention_peers._packing(mask, "cpu")
    assert cu_k[-1] == sum(b - a for a, b in at) and cu_q[-1] == mask.queries
    assert longest == (6, 3 + 5 * 3)
    assert ((cu_q[1:] - cu_q[:-1]) * (cu_k[1:] - cu_k[:-1])).sum() == mask.pairs()


def test_peers_of_one_rectangle_need_no_mask():
    peers = attention_peers.attention_peers(Full(4, 6), "cpu", False)
    assert peers["SDPA, boolean mask"].missing == "there is nothing to mask"
    assert attention_peers.attention_peers(Full(4, 6), "cpu", True) == {}
