"""Backgrounds of the demo dataset, and fill patterns for its objects.

Canvases are (height, width, 3) RGB in 0..255; the ``add_*`` functions paint on them in place.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .demo_shapes import Floats

# Open strokes in the unit square: letters and crosses that resemble none of the classes.
_GLYPHS: tuple[tuple[tuple[tuple[float, float], ...], ...], ...] = (
    (((0.1, 0), (0.1, 1), (0.9, 1)),),  # L
    (((0, 0), (1, 0)), ((0.5, 0), (0.5, 1))),  # T
    (((0, 0), (1, 1)), ((0, 1), (1, 0))),  # X
    (((0, 0), (1, 0), (0, 1), (1, 1)),),  # Z
    (((0, 0), (0, 1)), ((0.8, 0), (0, 0.5), (0.8, 1))),  # K
    (((0, 0), (0, 1)), ((1, 0), (1, 1)), ((0, 0.5), (1, 0.5))),  # H
    (((1, 0), (0, 0), (0, 1), (1, 1)), ((0, 0.5), (0.8, 0.5))),  # E
    (((0, 1), (0, 0), (1, 1), (1, 0)),),  # N
    (((0.5, 0), (0.5, 1)), ((0, 0.5), (1, 0.5))),  # +
)


def random_colour(rng: np.random.Generator) -> Floats:
    colour: Floats = rng.uniform(15, 240, size=3)
    return colour


def ramp(height: int, width: int, rng: np.random.Generator) -> Floats:
    """A linear ramp from -1 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width]
    along: Floats = x * math.cos(angle) + y * math.sin(angle)
    low, high = float(along.min()), float(along.max())
    return (2 * along - low - high) / max(high - low, 1e-9)


def waves(height: int, width: int, period: float, rng: np.random.Generator) -> Floats:
    """Parallel stripes in -1..1, ``period`` in pixels."""
    angle, phase = rng.uniform(0, 2 * math.pi, size=2)
    y, x = np.mgrid[0:height, 0:width]
    along: Floats = x * math.cos(angle) + y * math.sin(angle)
    stripes: Floats = np.sin(along * (2 * math.pi / period) + phase)
    return stripes


def cloud(height: int, width: int, cell: float, rng: np.random.Generator) -> Floats:
    """Smooth noise, roughly in -1..1, with features of about ``cell`` pixels."""
    rows, columns = (max(2, round(side / cell) + 1) for side in (height, width))
    grid = Image.fromarray(rng.uniform(-1, 1, size=(rows, columns)).astype(np.float32))
    smooth = grid.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float64)


def background(height: int, width: int, rng: np.random.Generator) -> Floats:
    base = random_colour(rng)
    canvas: Floats = np.broadcast_to(base, (height, width, 3)).copy()
    canvas += ramp(height, width, rng)[..., None] * rng.uniform(-45, 45, size=3)
    for cell in (48, 12, 3):
        strength = rng.uniform(-16, 16, size=3)
        canvas += cloud(height, width, cell, rng)[..., None] * strength
    if rng.random() < 0.25:
        stripes = waves(height, width, rng.uniform(8, 40), rng)
        canvas += stripes[..., None] * rng.uniform(-12, 12, size=3)
    np.clip(canvas, 0, 255, out=canvas)
    return canvas


def blend(canvas: Floats, alpha: Floats, colour: Floats) -> None:
    canvas += alpha[..., None] * (colour - canvas)


def add_blob(canvas: Floats, rng: np.random.Generator) -> None:
    """A soft stain, too blurred to be mistaken for a disc."""
    height, width = canvas.shape[:2]
    radius = rng.uniform(10, 40)
    angles = np.linspace(0, 2 * math.pi, 14, endpoint=False)
    radii = radius * rng.uniform(0.35, 1.3, size=14)
    centre = rng.uniform(0, 1, size=2) * (width, height)
    points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    stain = Image.new("L", (width, height))
    ImageDraw.Draw(stain).polygon([(float(x), float(y)) for x, y in points], fill=255)
    stain = stain.filter(ImageFilter.GaussianBlur(radius / 4))
    alpha = np.asarray(stain, dtype=np.float64) / 255 * rng.uniform(0.15, 0.4)
    blend(canvas, alpha, random_colour(rng))


def _stroke_paths(extent: float, rng: np.random.Generator) -> tuple[list[Floats], float]:
    """The polylines of one pen drawing, centred on the origin, and the pen's width."""
    kind = rng.integers(3)
    if kind == 0:  # a straight line
        end = rng.uniform(-1, 1, size=2) * extent * 0.6
        return [np.stack([-end, end])], rng.uniform(1, 5)
    # Upright within 20 degrees, like the triangles and stars.
    turn = -math.pi / 2 + rng.uniform(-0.35, 0.35)
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = np.array([[cos, sin], [-sin, cos]])
    if kind == 1:  # a cubic Bezier curve; advancing, as a loop would look like a ring
        control = np.stack([np.linspace(-0.4, 0.4, 4), rng.uniform(-0.6, 0.6, size=4)], axis=1)
        control = control @ rotation * extent
        t = np.linspace(0, 1, 40)[:, None]
        weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3])
        return [weights @ control], rng.uniform(1, 5)
    size = math.exp(rng.uniform(math.log(12), math.log(70)))
    glyph = _GLYPHS[rng.integers(len(_GLYPHS))]
    paths = [size * (np.array(path) - 0.5) @ rotation for path in glyph]
    return paths, size * rng.uniform(0.08, 0.2)


def add_strokes(canvas: Floats, count: int, rng: np.random.Generator) -> None:
    height, width = canvas.shape[:2]
    zoom = 2
    image = Image.new("RGBA", (width * zoom, height * zoom))
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        paths, pen = _stroke_paths(max(height, width), rng)
        centre = rng.uniform(0, 1, size=2) * (width, height)
        red, green, blue = (int(channel) for channel in random_colour(rng))
        for path in paths:
            points = [(float(x), float(y)) for x, y in (path + centre) * zoom]
            width_drawn = max(1, round(pen * zoom))
            draw.line(points, fill=(red, green, blue, 255), width=width_drawn, joint="curve")
    layer = np.asarray(image.reduce(zoom), dtype=np.float64)
    blend(canvas, layer[..., 3] / 255, layer[..., :3])
