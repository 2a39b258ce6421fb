import math

import pytest
import torch

from dit_ops.rope import Rope3D


def test_axes_of_wan():
    assert Rope3D(128).splits == (44, 42, 42)
    t, h, w = Rope3D(128).tables(3, 4, 5)
    assert t.shape[1:] == (22, 2) and h.shape[1:] == w.shape[1:] == (21, 2)
    torch.testing.assert_close(t[1, :2, 0], torch.tensor([0.540302, 0.791258]), atol=1e-6, rtol=0)
    torch.testing.assert_close(t[1, :2, 1], torch.tensor([0.841471, 0.611483]), atol=1e-6, rtol=0)


def test_tables_are_built_once_and_grow_with_the_stream():
    rope = Rope3D(64)
    assert rope.tables(3, 4, 5)[0] is rope.tables(9, 4, 5)[0]
    longer = rope.tables(1500, 4, 5)[0]
    assert longer.shape[0] >= 1500 and torch.equal(longer[:1024], rope.tables(3, 4, 5)[0])


def test_tables_made_while_sampling_serve_training():
    rope = Rope3D(32, theta=777.0)
    with torch.inference_mode():
        rope.tables(2, 2, 2)
    x = torch.ones(6, 2, requires_grad=True)
    (x * rope.tables(2, 2, 2)[0][1]).sum().backward()  # autograd saves the table
    assert x.grad is not None


def test_bad_splits():
    with pytest.raises(ValueError, match="sum to head_dim = 64, got"):
        Rope3D(64, splits=(16, 24, 22))


@pytest.mark.parametrize("first, last", [(0, 3), (1022, 1025), (7, 7), (99_990, 100_000)])
def test_rows_are_those_of_the_table(first, last):
    rope = Rope3D(16, splits=(8, 4, 4))
    assert torch.equal(rope.rows(first, last), rope.tables(last, 1, 1)[0][first:last])


def test_rows_of_late_frames():
    """After a year of 4 latent frames per second an angle is still exact to fp32."""
    frame, splits = 126_000_000, (44, 42, 42)
    (row,) = Rope3D(128, splits=splits).rows(frame, frame + 1)
    angles = [frame * 10000.0 ** (-2 * i / splits[0]) for i in range(22)]
    assert torch.equal(row, torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float32))
