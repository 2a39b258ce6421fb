"""Action labels from poses: every key, combinations, thresholds, and the recorded meaning of the classes."""

import pytest
import torch

from dit_ops.actions import CLASSES, action_labels
from dit_ops.camera import invert_rigid, parse_trajectory


def pose(key):
    """The labels of one step of a key."""
    return action_labels(parse_trajectory(f"{key}*2"))


@pytest.mark.parametrize(
    "key, label",
    [("w", 9), ("s", 18), ("d", 27), ("a", 36), ("l", 1), ("j", 2), ("i", 3), ("k", 4), ("u", 0), ("dn", 0)],
)
def test_every_key(key, label):
    """Right is class 3 of 9 and left class 4: labels 27 and 36."""
    assert pose(key).tolist() == [0, label, label]


def move(x=0.0, z=0.0, yaw=0.0, pitch=0.0):
    """Labels of a camera that moves by (x, 0, z) and turns by Ry(yaw)·Rx(pitch), in degrees, once."""
    y, p = torch.deg2rad(torch.tensor([yaw, pitch], dtype=torch.float64))
    one, zero = torch.ones(()).double(), torch.zeros(()).double()
    Ry = torch.stack([y.cos(), zero, y.sin(), zero, one, zero, -y.sin(), zero, y.cos()]).view(3, 3)
    Rx = torch.stack([one, zero, zero, zero, p.cos(), -p.sin(), zero, p.sin(), p.cos()]).view(3, 3)
    camera = torch.eye(4, dtype=torch.float64)
    camera[:3, :3], camera[:3, 3] = Ry @ Rx, torch.tensor([x, 0, z])
    return action_labels(torch.stack([torch.eye(4).double(), invert_rigid(camera)]))[1].item()


def test_two_directions_at_once():
    assert [move(1, 1), move(-1, 1), move(1, -1), move(-1, -1)] == [9 * 5, 9 * 6, 9 * 7, 9 * 8]
    assert [move(yaw=3, pitch=3), move(yaw=3, pitch=-3), move(yaw=-3, pitch=3), move(yaw=-3, pitch=-3)] == [5, 6, 7, 8]
    assert move(1, 1, 3, -3) == 9 * 5 + 6 and move(-1, -1, -3, -3) == CLASSES - 1


def test_thresholds():
    assert move(z=0.0101) == 9 and move(z=0.0099) == 0
    assert move(yaw=0.051) == 1 and move(yaw=0.049) == 0 and move(pitch=-0.051) == 4 and move(pitch=-0.049) == 0
    tan60 = 3**0.5
    assert move(tan60 * 0.99, 1) == 9 * 5 and move(tan60 * 1.01, 1) == 9 * 3 and move(0.57, 1) == 9 * 1


def test_labels_are_relative_and_batched():
    """A turned and shifted world, and a batch, give the same labels: they depend on consecutive cameras only."""
    views = parse_trajectory("w*2,l*3,a*1,k*2")
    expected = [0, 9, 9, 1, 1, 1, 36, 4, 4]
    assert action_labels(views).tolist() == expected
    moved = views @ parse_trajectory("d*9,l*20,i*4")[-1]
    both = action_labels(torch.stack([views, moved]))
    assert both.dtype == torch.int64 and both.tolist() == [expected] * 2


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"viewmats must be \[\.\.\., F, 4, 4\], got \[4, 4\]"):
        action_labels(torch.eye(4))
