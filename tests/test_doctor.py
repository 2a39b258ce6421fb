import pytest
import torch

import dit_ops
from dit_ops import _library as lib
from dit_ops.doctor import doctor, public_ops, sample_arguments

CPU = torch.device("cpu")


def test_every_public_op_has_a_line_that_names_a_backend():
    lines = {line.split()[0]: line.split()[1] for line in doctor().splitlines() if line}
    assert set(public_ops()) <= set(lines)
    assert {lines[name] for name in public_ops()} <= set(lib.BACKENDS)


def test_public_ops_are_the_functions_that_dit_ops_exports():
    assert {"adaln", "attention", "qk_norm_rope_prope", "renoise", "ema_update_"} <= set(public_ops())
    assert not {"BACKENDS", "explain", "use_backend"} & set(public_ops())


@pytest.mark.parametrize("name", public_ops())
def test_sample_call_runs(name):
    op = public_ops()[name]
    with dit_ops.use_backend("reference"):
        op(**sample_arguments(op, CPU))


def test_doctor_says_what_is_missing_and_why(monkeypatch):
    monkeypatch.setitem(lib.MISSING, "cpu", "dit_ops/_C_cpu.abi3.so does not load: undefined symbol: f")
    monkeypatch.setitem(lib.MISSING, "triton", "triton is not installed")
    text = doctor()
    assert "_C_cpu       dit_ops/_C_cpu.abi3.so does not load: undefined symbol: f" in text
    assert "triton       triton is not installed" in text
    (adaln,) = (line for line in text.splitlines() if line.startswith("adaln "))
    assert "undefined symbol: f" in adaln


def test_doctor_survives_a_forced_backend_that_does_not_exist(monkeypatch):
    monkeypatch.setattr(lib, "_forced", "cud")
    assert "backend must be one of dense, cuda, triton, cpu, reference, got 'cud'" in doctor()
