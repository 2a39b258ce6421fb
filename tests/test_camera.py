"""Pose strings, camera files and ProPE's matrices; golden numbers were recorded from the reference system."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dit_ops import camera

GOLDEN = Path(__file__).with_name("golden") / "cases.safetensors"


def random_viewmats(*shape):
    rotation = torch.linalg.qr(torch.randn(*shape, 3, 3, dtype=torch.float64))[0]
    rotation = rotation * torch.linalg.det(rotation)[..., None, None]
    viewmats = torch.eye(4, dtype=torch.float64).repeat(*shape, 1, 1)
    viewmats[..., :3, :3], viewmats[..., :3, 3] = rotation, torch.randn(*shape, 3, dtype=torch.float64)
    return viewmats


def test_pose_strings_match_golden():
    cases = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    for i in range(6):
        torch.testing.assert_close(camera.parse_trajectory(meta[f"traj.{i}"]), cases[f"traj.{i}"], atol=1e-6, rtol=0)


def test_signs_of_every_key():
    """OpenCV axes: where the camera ends up, and where it looks."""
    expected = {"w": (0, 0, 1), "s": (0, 0, -1), "d": (1, 0, 0), "a": (-1, 0, 0), "u": (0, -1, 0), "dn": (0, 1, 0)}
    for key, direction in expected.items():
        position = camera.invert_rigid(camera.parse_trajectory(f"{key}*5"))[-1, :3, 3]
        torch.testing.assert_close(position, 5 * 0.08 * torch.tensor(direction, dtype=torch.float32), atol=1e-6, rtol=0)
    for key, direction in {"l": (1, 0, 0), "j": (-1, 0, 0), "i": (0, -1, 0), "k": (0, 1, 0)}.items():
        forward = camera.invert_rigid(camera.parse_trajectory(f"{key}*30"))[-1, :3, 2]  # 30 steps of 3 degrees
        torch.testing.assert_close(forward, torch.tensor(direction, dtype=torch.float32), atol=1e-6, rtol=0)


def test_known_last_poses():
    last = camera.parse_trajectory("l*1,i*1,d*1")[-1]
    expected = [[0.99863, 0, -0.052336, -0.08], [0.002739, 0.99863, 0.052264, 0], [0.052264, -0.052336, 0.997261, 0]]
    torch.testing.assert_close(last[:3], torch.tensor(expected), atol=1e-6, rtol=0)


def test_aliases_zero_counts_and_spaces():
    assert torch.equal(camera.parse_trajectory("left*2, up*1"), camera.parse_trajectory("j*2,i*1"))
    assert torch.equal(camera.parse_trajectory("w*0"), torch.eye(4)[None])
    assert camera.trajectory_frames("a*4,w*8,s*7") == 20


def test_keys_can_be_joined_and_the_camera_can_stay():
    both = camera.invert_rigid(camera.parse_trajectory("w+l*1"))[-1]
    turned = camera.invert_rigid(camera.parse_trajectory("l*1,w*1"))[-1]  # turn, then go where the camera looks now
    torch.testing.assert_close(both, turned, atol=1e-6, rtol=0)
    assert torch.equal(camera.parse_trajectory("w+s*3"), torch.eye(4).expand(4, 4, 4))
    stayed = camera.parse_trajectory("w*2,stay*3,w*1")
    assert torch.equal(stayed[2].expand(4, 4, 4), stayed[2:6]) and not torch.equal(stayed[6], stayed[5])
    assert camera.mirror_trajectory("w+right*2,stay*1") == "s+j*2,stay*1"


@pytest.mark.parametrize("cut", [["w*2,l+up*3", "stay*1,w*4"], ["w*1", "w*1,l+i*1", "l+i*2,stay*1,w*1", "w*3"]])
def test_a_trajectory_does_not_depend_on_how_it_is_cut(cut):
    trajectory = camera.Trajectory()
    steps = torch.cat([trajectory.extend(text) for text in cut])
    assert torch.equal(steps, camera.parse_trajectory("w*2,l+i*3,stay*1,w*4")[1:])
    assert camera.join_segments([s for text in cut for s in camera.parse_segments(text)]) == "w*2,l+i*3,stay*1,w*4"
    assert camera.Trajectory().extend("w*0").shape == (0, 4, 4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("w+*2", r"segment 1 .* got 'w\+\*2'"),
        ("a*4,q*2", r"segment 2 must be key\*count with a key of w, s, d, a, u, dn, j, l, i, k, stay, .*got 'q\*2'"),
        ("a*4,", "segment 2 .* got ''"),
        ("A*4", "segment 1 .* got 'A"),
        ("a 4", "segment 1 .* got 'a 4'"),
        ("", "segment 1 .* got ''"),
    ],
)
def test_bad_pose_string_names_the_segment_and_the_keys(text, message):
    with pytest.raises(ValueError, match=message):
        camera.parse_trajectory(text)


def test_mirror_is_the_opposite_motion():
    assert camera.mirror_trajectory("a*4,w*8,i*1,u*2") == "d*4,s*8,k*1,dn*2"
    there, back = camera.parse_trajectory("j*7")[-1], camera.parse_trajectory(camera.mirror_trajectory("j*7"))[-1]
    torch.testing.assert_close(there @ back, torch.eye(4))


def test_projective_cameras_are_inverse_and_match_known_numbers():
    viewmats = random_viewmats(2, 3)
    Ks = camera.intrinsics_matrix(0.7, 1.3).double().expand(2, 3, 3, 3)
    P, P_inv = camera.projective_cameras(viewmats, Ks)
    torch.testing.assert_close(P @ P_inv, torch.eye(4, dtype=torch.float64).expand_as(P), atol=1e-12, rtol=0)
    V = camera.parse_trajectory("l*10,w*5")[-1:][None]
    P, P_inv = camera.projective_cameras(V, camera.intrinsics_matrix(*camera.DEFAULT_INTRINSICS)[None, None])
    x = torch.arange(1.0, 5.0)
    torch.testing.assert_close(P[0, 0].T @ x, torch.tensor([1.937387, 1.795735, 2.345551, 2.8]), atol=2e-6, rtol=0)
    torch.testing.assert_close(P_inv[0, 0] @ x, torch.tensor([4.014730, 2.2275, 2.993717, 4]), atol=2e-6, rtol=0)


def test_projective_cameras_never_compute_in_half_precision():
    viewmats = random_viewmats(1, 2).bfloat16()
    P, _ = camera.projective_cameras(viewmats, torch.eye(3).expand(1, 2, 3, 3).bfloat16())
    assert P.dtype == torch.float32
    with pytest.raises(ValueError, match=r"Ks must be \[B, F, 3, 3\] = \[1, 2, 3, 3\], got \[1, 3, 3\]"):
        camera.projective_cameras(viewmats, torch.eye(3).expand(1, 3, 3))


def test_alignment_makes_the_first_pose_the_identity_and_keeps_relative_poses():
    V = random_viewmats(4)
    aligned = camera.align_to_first(V)
    torch.testing.assert_close(aligned[0], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(aligned[3] @ camera.invert_rigid(aligned[1]), V[3] @ camera.invert_rigid(V[1]))


def test_quaternions():
    half = math.radians(15)  # half of a 30 degree yaw
    pose = torch.tensor([1.0, 2, 3, 0, math.sin(half), 0, math.cos(half)], dtype=torch.float64)
    V = camera.quaternion_poses_to_viewmats(pose)
    yaw = camera.invert_rigid(camera.parse_trajectory("l*10"))[-1].double()
    torch.testing.assert_close(V[:3, :3], yaw[:3, :3], atol=1e-6, rtol=0)
    assert V[:, 3].tolist() == [1, 2, 3, 1]


def test_pose_json(tmp_path):
    V = camera.parse_trajectory("w*1,l*1").double()
    world = random_viewmats(1)[0]
    frames = {
        str(i): {"extrinsic": camera.invert_rigid(v @ world).tolist(), "K": [[900, 0, 960], [0, 950, 540], [0, 0, 1]]}
        for i, v in enumerate(V)
    }
    path = tmp_path / "pose.json"
    path.write_text(json.dumps(frames))
    viewmats, Ks = camera.trajectory_from_json(path)
    torch.testing.assert_close(viewmats, V.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(Ks[0], camera.intrinsics_matrix(900 / 1920, 950 / 1080))
    frames["1"].pop("K")
    path.write_text(json.dumps(frames))
    with pytest.raises(ValueError, match="frame 1 needs 'K' as a 3×3 matrix"):
        camera.trajectory_from_json(path)
