"""Posed rooms: every pixel against its own pinhole geometry, and what training asks of prompts and trajectories."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_ops import rooms
from dit_ops.camera import intrinsics_matrix, mirror_trajectory, parse_segments, parse_trajectory
from dit_ops.conditions.linear import LinearCondition
from dit_ops.draws import Draws

POSE = "d*2,j*3,w*2,i*2"
CAMERA = parse_trajectory(POSE)[-1:]  # moved, turned and tilted
CAMERA_LEVEL = parse_trajectory("d*2,j*3,w*2")[-1:]  # upright lines stay upright
K = intrinsics_matrix(0.6, 0.8, 0.45, 0.55)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def project(points: Tensor, viewmat: Tensor, k: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """World points [n, 3] -> pixel coordinates x, y (centre of the first pixel = 0) and depth."""
    camera = points @ viewmat[:3, :3].T + viewmat[:3, 3]
    u, v, depth = (camera @ k.T).unbind(1)
    return u / depth * width - 0.5, v / depth * height - 0.5, depth


def sample(picture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear samples [n, 3] of a picture [3, H, W] at pixel coordinates."""
    height, width = picture.shape[1:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(picture[None], grid[None, None], align_corners=False)[0, :, 0].T


def silhouette(thing: str, camera: Tensor, height: int, width: int) -> Tensor:
    """Pixels that change when an object is put into the room, one ray per pixel."""
    with_it = rooms.render(f"a red room with a {thing}", camera, K, (height, width), supersample=1)
    without = rooms.render("a red room", camera, K, (height, width), supersample=1)
    return (with_it != without).any(1)[0]


def test_wall_points_are_seen_where_they_project():
    low, high = torch.tensor(rooms.ROOM_LOW), torch.tensor(rooms.ROOM_HIGH)
    points = low + (high - low) * torch.rand(3000, 3)
    wall = torch.arange(3000) % 6
    points[torch.arange(3000), wall // 2] = torch.where(wall % 2 == 0, low[wall // 2], high[wall // 2])
    picture = rooms.render("a teal room", CAMERA, K, (192, 256), supersample=1)[0]
    x, y, depth = project(points, CAMERA[0], K, 192, 256)
    seen = (depth > 0.1) & (x > 1) & (x < 254) & (y > 1) & (y < 190)
    expected = rooms.wall_colour(rooms.parse_prompt("a teal room"), points[seen].T[:, None])[:, 0].T * 2 - 1
    assert len(set(wall[seen].tolist())) == 4, "ahead, left, floor and ceiling are in view"
    torch.testing.assert_close(sample(picture, x[seen], y[seen]), expected, atol=0.02, rtol=0)


def test_ball_covers_exactly_the_rays_that_pass_within_its_radius():
    covered = silhouette("blue ball", CAMERA, 90, 120)
    centre = torch.tensor([rooms.PLACES[0][0], rooms.ROOM_HIGH[1] - rooms.RADIUS, rooms.PLACES[0][1]])
    camera = CAMERA[0, :3, :3] @ centre + CAMERA[0, :3, 3]
    y, x = torch.meshgrid((torch.arange(90) + 0.5) / 90, (torch.arange(120) + 0.5) / 120, indexing="ij")
    ray = F.normalize(torch.stack([(x - 0.45) / 0.6, (y - 0.55) / 0.8, torch.ones_like(x)], -1), dim=-1)
    distance = torch.linalg.cross(camera.expand_as(ray), ray, dim=-1).norm(dim=-1)
    sure = (distance - rooms.RADIUS).abs() > 1e-4
    assert torch.equal(covered[sure], (distance < rooms.RADIUS)[sure])
    assert covered.sum() > 200


@pytest.mark.parametrize("kind", ["box", "pillar"])
def test_objects_span_their_projected_corners(kind):
    camera = CAMERA if kind == "box" else CAMERA_LEVEL
    covered = silhouette(f"blue {kind}", camera, 180, 240)
    x0, z0 = rooms.PLACES[0]
    floor, ceiling = rooms.ROOM_HIGH[1], rooms.ROOM_LOW[1]
    if kind == "box":
        half, heights = rooms.RADIUS, (floor, floor - 2 * rooms.RADIUS)
        ring = [(-half, -half), (half, -half), (-half, half), (half, half)]
    else:
        heights = (floor, ceiling)
        angle = torch.arange(720) / 720 * 2 * torch.pi
        ring = (rooms.PILLAR_RADIUS * torch.stack([angle.cos(), angle.sin()], 1)).tolist()
    corners = torch.tensor([(x0 + dx, y, z0 + dz) for dx, dz in ring for y in heights])
    x, y, _ = project(corners, camera[0], K, 180, 240)
    rows, columns = covered.nonzero().unbind(1)
    for found, low, high, limit in ((columns, x.min(), x.max(), 239), (rows, y.min(), y.max(), 179)):
        assert abs(found.min() - low.clamp(min=0)) <= 1 and abs(found.max() - high.clamp(max=limit)) <= 1


def test_a_step_aside_shifts_the_wall_ahead_by_its_disparity():
    # fx W * 0.08 / z = 0.5 * 70 * 0.08 / 1.4 = 2 pixels per step
    video = rooms.render("a pink room", parse_trajectory("d*3"), None, 70)
    for n in range(1, 4):
        torch.testing.assert_close(video[n, :, 25:45, 20:40], video[0, :, 25:45, 20 + 2 * n : 40 + 2 * n], atol=1e-5, rtol=0)


def test_a_pure_turn_is_a_homography():
    size, camera = 256, parse_trajectory("l*4,k*2")
    first, *_, last = rooms.render("a blue striped room", camera, None, size)
    y, x = torch.meshgrid(torch.arange(60, 180), torch.arange(60, 180), indexing="ij")
    k = intrinsics_matrix(*rooms.INTRINSICS)
    pixel = torch.stack([(x + 0.5) / size, (y + 0.5) / size, torch.ones(120, 120)], -1).reshape(-1, 3)
    u, v, w = (pixel @ (k @ camera[-1, :3, :3].T @ k.inverse()).T).unbind(1)
    expected = sample(first, u / w * size - 0.5, v / w * size - 0.5)
    torch.testing.assert_close(last[:, 60:180, 60:180].reshape(3, -1).T, expected, atol=0.02, rtol=0)
    assert psnr(last[:, 60:180, 60:180], first[:, 60:180, 60:180]) < 20, "and not the identity"


def test_nearer_things_hide_farther_ones():
    near, far = rooms.Thing("ball", (1.0, 0.0, 0.0), 0.0, 0.5), rooms.Thing("box", (0.0, 0.0, 1.0), 0.0, 1.1)
    rays = rooms.pixel_rays(torch.eye(4)[None], intrinsics_matrix(*rooms.INTRINSICS)[None], 32, 32)
    pictures = [
        rooms.trace(rooms.Scene((0.1, 0.7, 0.2), "plain", things), *rays) for things in ((near, far), (far, near), (near,))
    ]
    assert torch.equal(pictures[0], pictures[1])
    ball = (pictures[2][0] > 0.3) & (pictures[2][1:].amax(0) == 0)
    box = (pictures[0][2] > 0.3) & (pictures[0][:2].amax(0) == 0)
    assert ball.sum() > 50 and box.sum() > 5, "both are in view"
    assert torch.equal(pictures[0][:, ball], pictures[2][:, ball]), "the box is hidden where the ball is"


def test_the_near_side_of_a_ball_is_seen():
    towards = torch.tensor([0.0, rooms.ROOM_HIGH[1] - rooms.RADIUS, 0.5])
    scene = rooms.Scene((0.1, 0.7, 0.2), "plain", (rooms.Thing("ball", (1.0, 1.0, 1.0), 0.0, 0.5),))
    colour = rooms.trace(scene, torch.zeros(3, 1, 1), towards.view(3, 1, 1))
    facing = -F.normalize(towards, dim=0) @ torch.tensor(rooms.LIGHT)
    torch.testing.assert_close(colour.flatten(), (0.72 + 0.28 * facing).expand(3))


def test_a_pixel_is_the_mean_of_its_rays():
    fine = rooms.render(rooms.PROMPTS[0], CAMERA, K, 64, supersample=1)
    torch.testing.assert_close(rooms.render(rooms.PROMPTS[0], CAMERA, K, 32), F.avg_pool2d(fine, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 7, (24, 40), 128])
def test_any_size_and_number_of_frames(size):
    height, width = (size, size) if isinstance(size, int) else size
    cameras = parse_trajectory("a*1,w*1")
    video = rooms.render(rooms.PROMPTS[3], cameras, K.expand(3, 3, 3), size)
    assert video.shape == (3, 3, height, width) and video.dtype == torch.float32
    assert video.min() >= -1 and video.max() <= 1
    assert torch.equal(video[2:], rooms.render(rooms.PROMPTS[3], cameras[2:], K, size)), "frames are independent"


def test_prompt_and_pose_determine_the_video():
    assert len(rooms.PROMPTS) >= 8
    videos = [rooms.film(prompt, "w*1", 16) for prompt in rooms.PROMPTS]
    for i, video in enumerate(videos):
        assert torch.equal(video, rooms.film(rooms.PROMPTS[i], "w*1", 16))
        assert all(psnr(video, other) < 25 for other in videos[:i])


def test_outside_the_room_there_is_grey():
    cameras = parse_trajectory("w*30")
    assert torch.equal(rooms.render("a red room", cameras[-1:], None, 8), torch.zeros(1, 3, 8, 8))
    back = rooms.render("a red room", parse_trajectory("s*60")[-1:], None, 32)
    assert back[0, :, 16, 16].abs().max() > 0.1 and not back[0, :, 0, 0].any(), "from behind, through the near wall"
    far = parse_trajectory("s*60")[-1:]
    pillar, bare = (rooms.render(prompt, far, None, 200)[0] for prompt in ("a red room with a white pillar", "a red room"))
    rows = (pillar != bare).any(0).any(1).nonzero()
    top, bottom = (100 + 100 * y / (4.8 + 0.87) for y in (rooms.ROOM_LOW[1], rooms.ROOM_HIGH[1]))
    assert abs(rows.min() - top) < 2 and abs(rows.max() - bottom) < 2, "a pillar ends at the floor and the ceiling"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a crimson room", "expected a room colour but got 'crimson'; known: red, orange"),
        ("a white room", "expected a room colour but got 'white'"),
        ("a red house", "expected a pattern or 'room' but got 'house'; known: checkered, striped, plain, room"),
        ("a red room with a blue cat", "expected a kind of object but got 'cat'; known: ball, box, pillar"),
        ("a red room with a ball", "expected an object colour but got 'ball'"),
        ("a red room and a blue ball", "expected 'with' but got 'and'"),
        ("a red room with", "expected an article but got 'the end'"),
        ("", "expected an article but got 'the end'"),
        ("a red room with a blue ball, a red box, a red ball and a red box", "at most 3 objects"),
    ],
)
def test_a_bad_prompt_names_the_word_and_the_known_ones(prompt, message):
    with pytest.raises(ValueError, match=message):
        rooms.render(prompt, CAMERA, K, 8)


def test_prompts_read_as_they_are_written():
    scene = rooms.parse_prompt("An orange striped room with a blue ball, a green box, and a white pillar")
    assert scene.pattern == "striped" and [thing.kind for thing in scene.things] == ["ball", "box", "pillar"]
    assert scene.things[2].colour == rooms.OBJECT_COLOURS["white"]
    assert rooms.parse_prompt("a red room") == rooms.parse_prompt("a red checkered room")


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"viewmats must have shape \[F, 4, 4\] but got \[4, 4\]"):
        rooms.render("a red room", torch.eye(4))
    with pytest.raises(ValueError, match=r"K must have shape \[3, 3\] or \[1, 3, 3\] but got \[2, 3, 3\]"):
        rooms.render("a red room", CAMERA, K.expand(2, 3, 3))


@pytest.mark.parametrize("frames", [2, 8, 20])
def test_random_trajectories_stay_in_view(frames):
    poses = [rooms.random_trajectory(Draws(5, (i,)), frames) for i in range(200)]
    assert poses == [rooms.random_trajectory(Draws(5, (i,)), frames) for i in range(200)]
    assert len(set(poses)) > (7 if frames == 2 else 60)
    used = set()
    for pose in poses:
        segments = parse_segments(pose)
        used |= {key for key, _ in segments}
        assert sum(count for _, count in segments) == frames - 1 and pose == rooms.canonical_pose(pose)
        c2w = torch.linalg.inv(parse_trajectory(pose))
        assert (c2w[:, :3, 3].abs() < 0.7).all(), "inside the room, away from walls and objects"
        assert (c2w[:, 2, 2] > 0.43).all(), "and facing it"
    assert used == set("wsadjlik")
    single = sum("," not in pose for pose in poses)
    assert single == 200 if frames == 2 else single > (40 if frames == 8 else 5)


def test_excluded_trajectories_never_come():
    everything = {rooms.random_trajectory(Draws(0, (i,)), 3) for i in range(500)}
    held_out = ["w*1,w*1", "left*1, right*1"]
    assert {"w*2", "j*1,l*1"} <= everything
    rest = {rooms.random_trajectory(Draws(0, (i,)), 3, exclude=held_out) for i in range(500)}
    assert rest == everything - {"w*2", "j*1,l*1"}
    with pytest.raises(ValueError, match="is excluded"):
        rooms.random_trajectory(Draws(0), 2, exclude=[f"{key}*1" for key in rooms.KEYS])
    with pytest.raises(ValueError, match="frames must be at least 2 but got 1"):
        rooms.random_trajectory(Draws(0), 1)


def test_the_picture_depends_on_the_camera_and_suits_the_codec():
    """What a small model needs to learn: mirrored motion looks different, and 16 PCA channels hold the picture."""
    videos = []
    for prompt in rooms.PROMPTS:
        for key in "wajk":
            pose = f"{key}*7"
            videos += [rooms.film(prompt, pose, 32), rooms.film(prompt, mirror_trajectory(pose), 32)]
    pairs = torch.stack(videos).view(len(rooms.PROMPTS), 4, 2, 8, 3, 32, 32)
    assert max(psnr(a, b) for a, b in pairs.flatten(0, 1)) < 17
    large = torch.stack([rooms.film(prompt, "l*3,w*4", 64) for prompt in rooms.PROMPTS])
    condition = LinearCondition.fit(large)
    assert psnr(condition.decode_to_pixel(condition.encode_to_latent(large)), large) > 28
