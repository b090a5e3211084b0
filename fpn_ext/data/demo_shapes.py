"""The shapes of the demo dataset: their outlines and per-pixel coverage.

Points are (x, y), y pointing down.
"""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

CLASS_NAMES = ("disc", "square", "triangle", "star", "ring")
# Distractors are never annotated.
DISTRACTOR_NAMES = ("plus", "half-disc", "hourglass", "chevron", "arch")

Floats = npt.NDArray[np.float64]

_SUPERSAMPLE = 4


def _corners(count: int, radii: float | Floats = 1.0) -> Floats:
    """Points around the origin at equal angles."""
    angles = 2 * math.pi * np.arange(count) / count
    points: Floats = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    return points


def outlines(category: int, rng: np.random.Generator) -> list[Floats]:
    """The outer outline of a shape, then that of its hole, if any; arbitrary scale."""
    name = (CLASS_NAMES + DISTRACTOR_NAMES)[category]
    if name in DISTRACTOR_NAMES:
        loops = [_distractor(name, rng)]
    elif name == "star":
        loops = [_corners(10, np.tile([1.0, rng.uniform(0.43, 0.49)], 5))]
    elif name == "ring":
        loops = [_corners(72), _corners(72, rng.uniform(0.47, 0.57))]
    else:
        loops = [_corners({"disc": 72, "square": 4, "triangle": 3}[name])]
    stretch = math.exp(rng.uniform(-0.12, 0.12))
    # Upright within 20 degrees: triangles and stars point up.
    turn = -math.pi / 2 + rng.uniform(-0.35, 0.35)
    cos, sin = math.cos(turn), math.sin(turn)
    # Stretch along the shape's axes; a square's run through its corners, so rotate it first.
    first = math.pi / 4 if name == "square" else 0.0
    before = np.array([[math.cos(first), math.sin(first)], [-math.sin(first), math.cos(first)]])
    after = np.array([[stretch * cos, stretch * sin], [-sin / stretch, cos / stretch]])
    return [loop @ before @ after for loop in loops]


def _distractor(name: str, rng: np.random.Generator) -> Floats:
    """The outline of a distractor, upright."""
    width = rng.uniform(0.3, 0.42)  # of its bars
    if name == "plus":
        corner = [(width, width), (width, 1.0), (-width, 1.0)]
        points = np.array(corner)
        turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        loop: Floats = np.concatenate([points @ turn.T for turn in turns])
    elif name == "half-disc":
        loop = _corners(72)
        loop = loop[loop[:, 0] >= -1e-9]
    elif name == "hourglass":
        waist = rng.uniform(0.1, 0.2)
        loop = np.array([(-1, -0.8), (0, -waist), (1, -0.8), (1, 0.8), (0, waist), (-1, 0.8)])
    elif name == "chevron":
        loop = np.array(
            [(1, 0), (0, 1), (-width * 2, 1), (1 - 2 * width, 0), (-width * 2, -1), (0, -1)]
        )
    else:  # an arch: a ring with a gap
        angles = np.linspace(0.65, 2 * math.pi - 0.65, 60)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        loop = np.concatenate([circle, circle[::-1] * rng.uniform(0.47, 0.57)])
    return loop


def _polygon_area(loop: Floats) -> float:
    x, y = loop[:, 0], loop[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def render(loops: list[Floats], size: float, max_side: float) -> Floats:
    """Coverage (0..1) of a shape of a given size, in a tightly fitting array."""
    box = np.ptp(loops[0], axis=0)
    area = _polygon_area(loops[0]) - sum(_polygon_area(loop) for loop in loops[1:])
    scale = size / (area * float(box[0] * box[1])) ** 0.25
    scale = min(scale, max_side / float(box.max()))
    width, height = (math.ceil(side * scale) + 1 for side in box)
    image = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    draw = ImageDraw.Draw(image)
    origin = loops[0].min(axis=0)
    for loop, value in zip(loops, (255, 0), strict=False):
        points = ((loop - origin) * scale + 0.5) * _SUPERSAMPLE
        draw.polygon([(float(x), float(y)) for x, y in points], fill=value)
    return np.asarray(image.reduce(_SUPERSAMPLE), dtype=np.float64) / 255
