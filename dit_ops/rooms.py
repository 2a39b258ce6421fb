"""Posed rooms: textured boxes with a few objects, described by a short prompt and filmed along any camera trajectory.

World axes are those of the first camera (OpenCV: x right, y down, z forward), units those of a pose string. Surfaces are lit by
their normal only, so a point has one colour from everywhere, and prompt and trajectory determine every pixel.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_ops.camera import intrinsics_matrix, invert_rigid, join_segments, parse_segments, parse_trajectory
from dit_ops.draws import Draws

INTRINSICS = (0.5, 0.5, 0.5, 0.5)  # fx, fy, cx, cy over image width and height: 90 degrees each way
ROOM_LOW = (-0.95, -0.7, -1.0)  # left wall, ceiling, wall behind
ROOM_HIGH = (0.95, 0.6, 1.4)  # right wall, floor, wall ahead
SAFE_LOW = (-0.65, -0.4, -0.7)  # where random trajectories may stand: no wall or object comes nearer than 0.1
SAFE_HIGH = (0.65, 0.4, 0.64)
PLACES = ((-0.42, 1.0), (0.48, 1.05), (0.04, 1.15))  # (x, z) of the first, second and third object
RADIUS = 0.22  # of a ball, half the side of a box
PILLAR_RADIUS = 0.13
LIGHT = (0.55, -0.7, -0.45)  # unit vector towards the light
OUTSIDE = 0.5  # grey of what is beyond the walls

ROOM_COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, 0.15, 0.1),
    "orange": (0.95, 0.5, 0.05),
    "yellow": (0.9, 0.85, 0.1),
    "green": (0.1, 0.7, 0.2),
    "teal": (0.05, 0.65, 0.7),
    "blue": (0.1, 0.25, 0.9),
    "purple": (0.5, 0.15, 0.8),
    "pink": (0.95, 0.35, 0.65),
}
OBJECT_COLOURS = ROOM_COLOURS | {"white": (0.95, 0.95, 0.95), "black": (0.05, 0.05, 0.05)}
PATTERNS = ("checkered", "striped", "plain")
KINDS = ("ball", "box", "pillar")
KEYS = ("w", "s", "a", "d", "j", "l", "i", "k")

PROMPTS = (
    "a red room with a blue ball and a white box",
    "a blue room with a yellow box and a red pillar",
    "a green room with a purple pillar and an orange ball",
    "a purple striped room with a green ball",
    "a teal room with a pink box and a black ball",
    "an orange room with a blue pillar and a white ball",
    "a yellow striped room with a purple box and a teal ball",
    "a pink room with a green box",
)


@dataclass(frozen=True)
class Thing:
    """One object of a room, standing on the floor at (x, z); a pillar reaches the ceiling."""

    kind: str
    colour: tuple[float, float, float]
    x: float
    z: float


@dataclass(frozen=True)
class Scene:
    """What a prompt means: wall colours come from `colour`, their texture from `pattern`."""

    colour: tuple[float, float, float]
    pattern: str
    things: tuple[Thing, ...]


def _expect(prompt: str, words: list[str], what: str, known: Iterable[str]) -> str:
    """Take the next word of a prompt, which must be one of `known`. Raises ValueError naming the word and the known ones."""
    word = words.pop(0) if words else "the end"
    if word not in known:
        raise ValueError(f"prompt {prompt!r}: expected {what} but got {word!r}; known: {', '.join(known)}")
    return word


def parse_prompt(prompt: str) -> Scene:
    """Read "a <colour> [pattern] room [with a <colour> <kind>{, a <colour> <kind>} [and a <colour> <kind>]]".

    ValueError names a word that does not fit and the words known there.
    """
    words = re.findall(r"[a-z]+|[^a-z\s]", prompt.lower())
    _expect(prompt, words, "an article", ("a", "an"))
    colour = ROOM_COLOURS[_expect(prompt, words, "a room colour", ROOM_COLOURS)]
    word = _expect(prompt, words, "a pattern or 'room'", (*PATTERNS, "room"))
    pattern = PATTERNS[0] if word == "room" else word
    if word != "room":
        _expect(prompt, words, "'room'", ("room",))
    things: list[Thing] = []
    while words:
        joint = _expect(prompt, words, "'with'" if not things else "',' or 'and'", ("with",) if not things else (",", "and"))
        if joint == "," and words[:1] == ["and"]:
            words.pop(0)
        if len(things) == len(PLACES):
            raise ValueError(f"prompt {prompt!r}: a room holds at most {len(PLACES)} objects")
        _expect(prompt, words, "an article", ("a", "an"))
        shade = OBJECT_COLOURS[_expect(prompt, words, "an object colour", OBJECT_COLOURS)]
        things.append(Thing(_expect(prompt, words, "a kind of object", KINDS), shade, *PLACES[len(things)]))
    return Scene(colour, pattern, tuple(things))


def wall_colours(colour: tuple[float, float, float]) -> Tensor:
    """Two colours in [0, 1] for each of left, right, ceiling, floor, behind, ahead -> [6, 2, 3].

    Neighbours differ in hue and opposite walls in brightness, so that every direction of motion changes the picture.
    """
    c = torch.tensor(colour)
    left, right = c.roll(1), c.roll(-1)
    walls = (
        (0.45 * left, 0.15 * left),
        (0.6 + 0.4 * right, 0.25 + 0.75 * right),
        (0.8 + 0.2 * c, 0.5 + 0.5 * left),
        (0.2 * right, 0.1 + 0.35 * c),
        (1 - c, 0.5 * (1 - c)),
        (c, 0.45 + 0.4 * c.flip(0)),
    )
    return torch.stack([torch.stack(pair) for pair in walls])


# one texture coordinate c_i in [-1, 1] per world axis: a soft square wave with these half periods and phases
TILE = ((1.1, 0.95, 1.3), (0.35, 0.25, 0.5))
SOFT = 1.4  # height of the sine before clipping: 1 = no flat part
CORNER = 0.35  # share of a half side over which neighbouring walls blend into each other


def _axes(values: Sequence[float], like: Tensor) -> Tensor:
    """Three numbers, one per world axis, as [3, 1, 1] beside rays [3, F, R]."""
    return torch.tensor(values, device=like.device)[:, None, None]


def wall_colour(scene: Scene, points: Tensor) -> Tensor:
    """Colours [3, F, R] of `points` [3, F, R] on the walls.

    A wall across axis i mixes its two colours by a texture of the other two coordinates: a soft checker (their product),
    stripes (the horizontal one) or a gradient; near a corner walls blend, so that the picture has few hard edges.
    """
    low, high = _axes(ROOM_LOW, points), _axes(ROOM_HIGH, points)
    q = (2 * points - low - high) / (high - low)  # [-1, 1] between opposite walls
    if scene.pattern == "plain":
        mix = (0.3 * (points[0] + points[1] + points[2])).expand_as(points)
    else:
        tile, phase = (_axes(v, points) for v in TILE)
        wave = (SOFT * torch.sin(torch.pi * (points / tile + phase))).clamp(-1, 1)
        mix = wave[[2, 0, 0]] if scene.pattern == "striped" else wave[[1, 2, 0]] * wave[[2, 0, 1]]
    share = 0.5 + 0.5 * mix.clamp(-1, 1)
    # colour = sum_walls weight * (first + share * (second - first)) / sum_walls weight: one product, the divisor a fourth row
    weight = torch.stack([-q, q], 1).sub_(1 - CORNER).clamp_(min=0)  # [3 axes, 2 sides, F, R]
    first, second = wall_colours(scene.colour).to(points.device).unbind(1)
    matrix = torch.cat([F.pad(first, (0, 1), value=1.0), F.pad(second - first, (0, 1))])  # [12, 4]
    total = torch.tensordot(matrix, torch.cat([weight, weight * share[:, None]]).flatten(0, 1), dims=([0], [0]))
    return total[:3] / total[3]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the first axis of a * b."""
    out = a[0] * b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        out = torch.addcmul(out, x, y)
    return out


def _ball(o: Tensor, d: Tensor, centre: Tensor, radius: float, axes: list[int]) -> tuple[Tensor, Tensor]:
    """First hit of rays o + t d with |p - centre| = radius over `axes` (all three: a ball; x and z: an upright pillar)
    -> t [F, R] (inf = none), normal [3, F, R]."""
    oc, da = (o - centre)[axes], d[axes]
    a, b, c = _dot(da, da), _dot(oc, da), _dot(oc, oc) - radius**2
    disc = b * b - a * c
    t = (-b - disc.clamp(min=0).sqrt()) / a
    normal = torch.zeros_like(d)
    normal[axes] = (oc + t * da) / radius
    return torch.where((disc > 0) & (t > 0), t, torch.inf), normal


def _box(o: Tensor, d: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """First hit of rays o + t d with an axis-aligned box -> t [F, R] (inf = none), normal [3, F, R]."""
    t1, t2 = (low - o) / d, (high - o) / d
    enter, axis = torch.minimum(t1, t2).max(0, keepdim=True)
    leave = torch.maximum(t1, t2).amin(0)
    normal = torch.zeros_like(d).scatter_(0, axis, -d.sign().gather(0, axis))
    return torch.where((enter[0] > 0) & (enter[0] < leave), enter[0], torch.inf), normal


def _hit(thing: Thing, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """First hit of rays with one object -> t [F, R] (inf = none), normal [3, F, R]."""
    centre = _axes((thing.x, ROOM_HIGH[1] - RADIUS, thing.z), d)
    if thing.kind == "box":
        return _box(o, d, centre - RADIUS, centre + RADIUS)
    if thing.kind == "ball":
        return _ball(o, d, centre, RADIUS, [0, 1, 2])
    t, normal = _ball(o, d, centre, PILLAR_RADIUS, [0, 2])
    y = o[1] + t * d[1]
    return torch.where((y > ROOM_LOW[1]) & (y < ROOM_HIGH[1]), t, torch.inf), normal


def trace(scene: Scene, o: Tensor, d: Tensor) -> Tensor:
    """Colours in [0, 1] [3, F, R] of rays from o [3, F, 1] along d [3, F, R].

    From outside one looks through the nearer walls, and sees grey where there is no room.
    """
    d = torch.where(d.abs() < 1e-9, 1e-9, d)
    low, high = _axes(ROOM_LOW, d), _axes(ROOM_HIGH, d)
    t = ((torch.where(d > 0, high, low) - o) / d).amin(0)
    colour = wall_colour(scene, o + t * d)
    if not bool(((o > low) & (o < high)).all()):
        missed = t <= ((torch.where(d > 0, low, high) - o) / d).amax(0).clamp(min=0)
        colour = torch.where(missed, OUTSIDE, colour)
        t = torch.where(missed, torch.inf, t)
    for thing in scene.things:
        hit, normal = _hit(thing, o, d)
        shade = 0.72 + 0.28 * _dot(normal, _axes(LIGHT, d))
        closer = hit < t
        t = torch.where(closer, hit, t)
        colour = torch.where(closer, _axes(thing.colour, d) * shade, colour)
    return colour


def pixel_rays(viewmats: Tensor, Ks: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rays of w2c [F, 4, 4], normalised Ks [F, 3, 3] through the pixel centres: origins [3, F, 1], directions [3, F, H * W]."""
    u, v = ((torch.arange(n, device=Ks.device) + 0.5) / n for n in (width, height))
    x = ((u - Ks[:, 0, 2, None]) / Ks[:, 0, 0, None]).repeat(1, height)
    y = ((v - Ks[:, 1, 2, None]) / Ks[:, 1, 1, None]).repeat_interleave(width, 1)
    c2w = invert_rigid(viewmats)
    d = c2w[:, :3, :3] @ torch.stack([x, y, torch.ones_like(x)], 1)
    return c2w[:, :3, 3].T[..., None], d.transpose(0, 1)


@torch.no_grad()
def render(
    prompt: str,
    viewmats: Tensor,
    K: Tensor | None = None,
    size: int | tuple[int, int] = 64,
    *,
    supersample: int = 2,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The room of `prompt` from w2c cameras viewmats [F, 4, 4] -> [F, 3, H, W] in [-1, 1].

    K: normalised intrinsics [3, 3] or [F, 3, 3], None: INTRINSICS; size: pixels, one number or (H, W); a pixel is the mean of
    supersample^2 rays. ValueError: a prompt outside the grammar (the word is named), bad shapes.
    """
    scene = parse_prompt(prompt)
    if viewmats.dim() != 3 or viewmats.shape[1:] != (4, 4):
        raise ValueError(f"render: viewmats must have shape [F, 4, 4] but got {list(viewmats.shape)}")
    K = intrinsics_matrix(*INTRINSICS) if K is None else K
    if K.shape not in ((3, 3), (len(viewmats), 3, 3)):
        raise ValueError(f"render: K must have shape [3, 3] or [{len(viewmats)}, 3, 3] but got {list(K.shape)}")
    height, width = (size, size) if isinstance(size, int) else size
    viewmats, Ks = viewmats.to(device, torch.float32), K.to(device, torch.float32).expand(len(viewmats), 3, 3)
    # one frame at a time stays in a CPU's cache; a GPU wants them all
    chunk = 1 if viewmats.device.type == "cpu" else len(viewmats)
    frames = []
    for part, k in zip(viewmats.split(chunk), Ks.split(chunk), strict=True):
        colour = trace(scene, *pixel_rays(part, k, height * supersample, width * supersample))
        picture = colour.view(3, len(part), height * supersample, width * supersample)
        frames.append(F.avg_pool2d(picture, supersample).transpose(0, 1))
    return torch.cat(frames) * 2 - 1


def film(prompt: str, pose: str, size: int | tuple[int, int] = 64) -> Tensor:
    """The true video of a prompt along a pose string with the rooms' own intrinsics -> [F, 3, H, W] in [-1, 1]."""
    return render(prompt, parse_trajectory(pose), None, size)


def canonical_pose(pose: str) -> str:
    """One spelling per motion: neighbouring segments of one key are joined and empty ones dropped ("w*1,w*2,a*0" -> "w*3")."""
    return join_segments(parse_segments(pose))


def stays_in_view(pose: str) -> bool:
    """True if every camera stands in the free part of the room and turns at most 60 degrees sideways and 30 up or down."""
    c2w = invert_rigid(parse_trajectory(pose))
    centre, forward = c2w[:, :3, 3], c2w[:, :3, 2]
    free = (centre > torch.tensor(SAFE_LOW)) & (centre < torch.tensor(SAFE_HIGH))
    return bool(free.all() and (forward[:, 2] > 0.43).all() and (forward[:, 1].abs() < 0.501).all())


def random_trajectory(draws: Draws, frames: int, *, exclude: Sequence[str] = ()) -> str:
    """A pose string of frames - 1 steps that stays in view and is none of `exclude`.

    Every third is one key all the way, the others have segments of random length. A pure function of `draws`.
    ValueError: frames < 2, or nothing but excluded strings found in 1000 tries.
    """
    if frames < 2:
        raise ValueError(f"random_trajectory: frames must be at least 2 but got {frames}")
    taken = {canonical_pose(pose) for pose in exclude}
    generator = draws.generator("trajectory")

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    for _ in range(1000):
        long, pose, left = pick(3) == 0, "", frames - 1
        while left:
            number = left if long else 1 + pick(left)
            key = KEYS[pick(len(KEYS))]
            while number and not stays_in_view(f"{pose}{key}*{number}"):
                number -= 1
            if number:
                pose, left = f"{pose}{key}*{number},", left - number
        pose = canonical_pose(pose[:-1])
        if pose not in taken:
            return pose
    raise ValueError(f"random_trajectory: every pose string of {frames} frames found in 1000 tries is excluded")
