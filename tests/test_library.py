"""Backend choice: what is asked for is run or refused with a reason, and explain tells which and why."""

import os
import subprocess
import sys

import pytest
import torch

import dit_ops
from dit_ops import _library as lib

X = torch.randn(1, 2, 8)


def test_use_backend_holds_inside_the_block_only():
    with dit_ops.use_backend("reference"):
        assert dit_ops.explain("adaln", X).backend == "reference"
        with dit_ops.use_backend(None):
            assert dit_ops.explain("adaln", X).backend == dit_ops.explain("adaln", X, backend=None).backend
    assert lib._forced is None
    with pytest.raises(RuntimeError, match="inside"), dit_ops.use_backend("reference"):
        raise RuntimeError("inside")
    assert lib._forced is None


def test_an_argument_wins_over_the_block():
    with dit_ops.use_backend("cuda"):
        assert dit_ops.explain("adaln", X, backend="reference").backend == "reference"
        with pytest.raises(NotImplementedError, match="adaln: backend 'cuda' cannot run this call: "):
            dit_ops.adaln(X)


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match="adaln: backend must be one of dense, cuda, triton, cpu, reference, got 'cudnn'"):
        dit_ops.adaln(X, backend="cudnn")
    with pytest.raises(ValueError, match="use_backend: name must be one of .* got 'gpu'"), dit_ops.use_backend("gpu"):
        pass


def test_explain_gives_a_reason_for_every_other_backend():
    for op in ("adaln", dit_ops.adaln):
        explained = dit_ops.explain(op, X)
        assert set(explained.refused) == set(lib.BACKENDS) - {explained.backend}
        assert explained.op == "adaln" and f"runs on {explained.backend!r}" in str(explained)
    asked = dit_ops.explain("adaln", X.double(), backend="cpu")
    assert asked.backend is None and asked.refused["cpu"]
    with_reference = dit_ops.explain("gated_residual", X, X, X[:, 0], backend="reference")
    assert with_reference.backend == "reference" and set(with_reference.refused) == {"dense", "cuda", "triton", "cpu"}
    with pytest.raises(ValueError, match="x must be"):
        dit_ops.explain("adaln", X[0])
    assert torch.isfinite(dit_ops.adaln(X)).all()  # explain leaves no trace


def test_missing_library_is_a_reason(monkeypatch):
    monkeypatch.setitem(lib.MISSING, "cpu", "dit_ops/_C_cpu.abi3.so is not built")
    with pytest.raises(NotImplementedError, match="backend 'cpu' cannot run this call: dit_ops/_C_cpu.abi3.so is not built"):
        dit_ops.adaln(X, backend="cpu")
    assert dit_ops.adaln(X).shape == X.shape


def test_environment_sets_the_backend_and_the_log():
    code = "import torch, dit_ops; dit_ops.adaln(torch.ones(1, 2, 8))"
    env = os.environ | {"DIT_OPS_BACKEND": "reference", "DIT_OPS_LOG": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "dit_ops adaln reference torch.float32[1, 2, 8]" in done.stderr
