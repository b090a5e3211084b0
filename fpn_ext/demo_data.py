"""A small synthetic detection data set in COCO format, with objects of every COCO size.

Five shapes (disc, square, triangle, star, ring) in random colours lie on cluttered backgrounds.
Colour, texture and size are drawn without regard to the class, so that only the shape tells the
classes apart; with distractors, only the shape tells an object from what is none.  Sides range
from about 17 to 210 pixels, which spreads the boxes over all levels of a feature pyramid.  Only
NumPy, Pillow and the standard library are needed.

    python -m fpn_ext.demo_data --root datasets/demo_multiscale

writes ``train/``, ``val/``, ``annotations/instances_{train,val}.json`` and ``info.json``.

All coordinates are in pixels with the origin at the top left corner; boxes are XYWH.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from .json_files import write_json

CLASS_NAMES = ("disc", "square", "triangle", "star", "ring")
# Shapes that are no objects: never annotated, drawn in images with distractors only.
DISTRACTOR_NAMES = ("plus", "half-disc", "hourglass", "chevron", "arch")
SPLITS = ("train", "val")
# Part of the identity of a data set: raise it with every change that alters a pixel or a box.
GENERATOR_VERSION = 2
MIN_IMAGE_SIZE = 128

# "Size" below is the geometric mean of the box's side and the side of a square of the mask's
# area.  A star fills under half of its box; this mean keeps both of its areas in one COCO bin
# for most objects, and gives every class the same distribution.
_SIZE_RANGES = ((18.0, 28.0), (37.0, 90.0), (130.0, 168.0))
_SIZE_SHARES = (0.27, 0.31, 0.42)
_MAX_LARGE = 2
_OBJECTS = (3, 4, 5, 6, 7)
_OBJECTS_SHARES = (0.30, 0.25, 0.20, 0.15, 0.10)
# Fraction of a shape that others must leave visible, by bin.  A small one is hard to tell with
# half of it gone; large ones must keep an area that is large by COCO's measure.
_MIN_VISIBLE = (0.85, 0.55, 0.65)
_EMPTY_SHARE = 0.06
_CROWD_SHARE = 0.04
_CROWD_OWNER = 0
_SUPERSAMPLE = 4
_PLACEMENT_TRIES = 30
_JPEG_QUALITY = 92

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

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


@dataclass
class _Item:
    """One annotated region; its pixels are those of ``_Scene.owner`` that hold its index."""

    category: int  # index into CLASS_NAMES, continued by DISTRACTOR_NAMES
    full_pixels: int  # of the whole shape, hidden and outside parts included
    min_visible: float  # the fraction of full_pixels that later objects must leave
    visible_pixels: int
    crowd: bool = False

    @property
    def annotated(self) -> bool:
        return self.category < len(CLASS_NAMES)


@dataclass
class _Scene:
    """An image under construction: colours in 0..255, and the index of each pixel's item."""

    canvas: Floats
    owner: npt.NDArray[np.int64]
    items: list[_Item] = field(default_factory=list)


# ---------------------------------------------------------------------------------- shapes


def _corners(count: int, radii: float | Floats = 1.0) -> Floats:
    """Points around the origin at equal angles."""
    angles = 2 * math.pi * np.arange(count) / count
    points: Floats = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    return points


def _outlines(category: int, rng: np.random.Generator) -> list[Floats]:
    """The outer outline of a shape, then that of its hole if it has one; any scale."""
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
    # Upright, give or take 20 degrees, as most things are: triangles and stars point up.
    turn = -math.pi / 2 + rng.uniform(-0.35, 0.35)
    cos, sin = math.cos(turn), math.sin(turn)
    # Stretch along the shape's axes; squares have theirs through the corners, so turn them first.
    first = math.pi / 4 if name == "square" else 0.0
    before = np.array([[math.cos(first), math.sin(first)], [-math.sin(first), math.cos(first)]])
    after = np.array([[stretch * cos, stretch * sin], [-sin / stretch, cos / stretch]])
    return [loop @ before @ after for loop in loops]


def _distractor(name: str, rng: np.random.Generator) -> Floats:
    """The outline of a shape that is no object, upright as the others are."""
    width = rng.uniform(0.3, 0.42)  # of what it is made of
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


def _render(loops: list[Floats], size: float, max_side: float) -> Floats:
    """Coverage (0..1) of a shape of a given size, in an array that fits it tightly."""
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


# --------------------------------------------------------------------- background, clutter


def _colour(rng: np.random.Generator) -> Floats:
    colour: Floats = rng.uniform(15, 240, size=3)
    return colour


def _ramp(height: int, width: int, rng: np.random.Generator) -> Floats:
    """A linear ramp from -1 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width]
    ramp: Floats = x * math.cos(angle) + y * math.sin(angle)
    low, high = float(ramp.min()), float(ramp.max())
    return (2 * ramp - low - high) / max(high - low, 1e-9)


def _waves(height: int, width: int, period: float, rng: np.random.Generator) -> Floats:
    """Parallel stripes in -1..1 with a period in pixels."""
    angle, phase = rng.uniform(0, 2 * math.pi, size=2)
    y, x = np.mgrid[0:height, 0:width]
    along: Floats = x * math.cos(angle) + y * math.sin(angle)
    waves: Floats = np.sin(along * (2 * math.pi / period) + phase)
    return waves


def _cloud(height: int, width: int, cell: float, rng: np.random.Generator) -> Floats:
    """Smooth noise, about -1..1, whose lumps have a size of ``cell`` pixels."""
    rows, columns = (max(2, round(side / cell) + 1) for side in (height, width))
    grid = Image.fromarray(rng.uniform(-1, 1, size=(rows, columns)).astype(np.float32))
    smooth = grid.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float64)


def _background(height: int, width: int, rng: np.random.Generator) -> Floats:
    base = _colour(rng)
    canvas: Floats = np.broadcast_to(base, (height, width, 3)).copy()
    canvas += _ramp(height, width, rng)[..., None] * rng.uniform(-45, 45, size=3)
    for cell in (48, 12, 3):
        strength = rng.uniform(-16, 16, size=3)
        canvas += _cloud(height, width, cell, rng)[..., None] * strength
    if rng.random() < 0.25:
        stripes = _waves(height, width, rng.uniform(8, 40), rng)
        canvas += stripes[..., None] * rng.uniform(-12, 12, size=3)
    np.clip(canvas, 0, 255, out=canvas)
    return canvas


def _blend(canvas: Floats, alpha: Floats, colour: Floats) -> None:
    canvas += alpha[..., None] * (colour - canvas)


def _add_blob(canvas: Floats, rng: np.random.Generator) -> None:
    """A soft stain: blurred so much that it has no outline to take for a disc's."""
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
    _blend(canvas, alpha, _colour(rng))


def _stroke_paths(extent: float, rng: np.random.Generator) -> tuple[list[Floats], float]:
    """The polylines of one thing drawn with a pen, around the origin, and the pen's width."""
    kind = rng.integers(3)
    if kind == 0:  # a straight line
        end = rng.uniform(-1, 1, size=2) * extent * 0.6
        return [np.stack([-end, end])], rng.uniform(1, 5)
    # Upright, give or take 20 degrees, as most things are: triangles and stars point up.
    turn = -math.pi / 2 + rng.uniform(-0.35, 0.35)
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = np.array([[cos, sin], [-sin, cos]])
    if kind == 1:  # a cubic Bezier curve; its points advance, as a closed loop would look a ring
        control = np.stack([np.linspace(-0.4, 0.4, 4), rng.uniform(-0.6, 0.6, size=4)], axis=1)
        control = control @ rotation * extent
        t = np.linspace(0, 1, 40)[:, None]
        weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3])
        return [weights @ control], rng.uniform(1, 5)
    size = math.exp(rng.uniform(math.log(12), math.log(70)))
    glyph = _GLYPHS[rng.integers(len(_GLYPHS))]
    paths = [size * (np.array(path) - 0.5) @ rotation for path in glyph]
    return paths, size * rng.uniform(0.08, 0.2)


def _add_strokes(canvas: Floats, count: int, rng: np.random.Generator) -> None:
    height, width = canvas.shape[:2]
    zoom = 2
    image = Image.new("RGBA", (width * zoom, height * zoom))
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        paths, pen = _stroke_paths(max(height, width), rng)
        centre = rng.uniform(0, 1, size=2) * (width, height)
        red, green, blue = (int(channel) for channel in _colour(rng))
        for path in paths:
            points = [(float(x), float(y)) for x, y in (path + centre) * zoom]
            width_drawn = max(1, round(pen * zoom))
            draw.line(points, fill=(red, green, blue, 255), width=width_drawn, joint="curve")
    layer = np.asarray(image.reduce(zoom), dtype=np.float64)
    _blend(canvas, layer[..., 3] / 255, layer[..., :3])


# ----------------------------------------------------------------------------------- scene


def _windows(
    position: tuple[int, int], size: tuple[int, int], image: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of a patch at ``position`` (row, column) inside the image: there, in the patch."""
    inside, own = [], []
    for start, length, limit in zip(position, size, image, strict=True):
        low, high = max(start, 0), min(start + length, limit)
        inside.append(slice(low, high))
        own.append(slice(low - start, high - start))
    return (inside[0], inside[1]), (own[0], own[1])


def _distinct_colour(surroundings: Floats, rng: np.random.Generator) -> Floats:
    """A random colour that stands out from nearly all of the pixels around an object."""
    pixels = surroundings.reshape(-1, 3)
    best, best_distance = _colour(rng), -1.0
    for _ in range(12):
        colour = _colour(rng)
        distance = float(np.percentile(np.linalg.norm(pixels - colour, axis=1), 15))
        if distance > best_distance:
            best, best_distance = colour, distance
        if distance >= 85:
            break
    return best


def _fill(height: int, width: int, colour: Floats, rng: np.random.Generator) -> Floats:
    """A coloured patch: flat, a gradient, striped or mottled."""
    kind = rng.integers(4)
    if kind == 0:
        pattern = np.zeros((height, width))
    elif kind == 1:
        pattern = _ramp(height, width, rng)
    elif kind == 2:
        pattern = _waves(height, width, rng.uniform(4, 24), rng)
    else:
        pattern = _cloud(height, width, rng.uniform(2, 8), rng)
    return colour + pattern[..., None] * rng.uniform(-28, 28, size=3)


def _paint(
    scene: _Scene, alpha: Floats, position: tuple[int, int], owner: int, rng: np.random.Generator
) -> None:
    inside, own = _windows(position, alpha.shape, scene.owner.shape)
    margin = 3
    near = tuple(slice(max(part.start - margin, 0), part.stop + margin) for part in inside)
    colour = _distinct_colour(scene.canvas[near], rng)
    fill = _fill(alpha.shape[0], alpha.shape[1], colour, rng)
    _blend(scene.canvas[inside], alpha[own], np.clip(fill, 0, 255)[own])
    scene.owner[inside][alpha[own] >= 0.5] = owner


def _hides_too_much(scene: _Scene, hidden: npt.NDArray[np.int64]) -> bool:
    return any(
        item.visible_pixels - taken < item.min_visible * item.full_pixels
        for item, taken in zip(scene.items, hidden, strict=True)
    )


def _random_position(
    alpha: Floats, image: tuple[int, int], small: bool, rng: np.random.Generator
) -> tuple[int, int]:
    """A place for a patch; one in four of the larger ones may stick out of the image a bit."""
    overhang = 0.15 if not small and rng.random() < 0.25 else 0.0
    starts = []
    for length, limit in zip(alpha.shape, image, strict=True):
        low = -math.floor(overhang * length)
        high = max(limit - length + math.floor(overhang * length), low)
        starts.append(int(rng.integers(low, high + 1)))
    return starts[0], starts[1]


def _place(scene: _Scene, category: int, size: float, rng: np.random.Generator) -> None:
    """Add an object on top of the scene, unless too much would be hidden wherever it is tried."""
    small = size <= _SIZE_RANGES[0][1]
    bin_index = sum(size > high for _, high in _SIZE_RANGES[:-1])
    min_visible = _MIN_VISIBLE[bin_index]
    alpha = _render(_outlines(category, rng), size, 0.95 * min(scene.owner.shape))
    covered = alpha >= 0.5
    full = int(covered.sum())
    for _ in range(_PLACEMENT_TRIES):
        position = _random_position(alpha, scene.owner.shape, small, rng)
        inside, own = _windows(position, alpha.shape, scene.owner.shape)
        below = scene.owner[inside][covered[own]]
        hidden = np.bincount(below[below >= 0], minlength=len(scene.items))
        if below.size < min_visible * full or _hides_too_much(scene, hidden):
            continue
        for item, taken in zip(scene.items, hidden, strict=True):
            item.visible_pixels -= int(taken)
        _paint(scene, alpha, position, len(scene.items), rng)
        scene.items.append(_Item(category, full, min_visible, below.size))
        return


def _place_crowd(scene: _Scene, category: int, rng: np.random.Generator) -> None:
    """Many tiny shapes of one class in a dense patch, annotated as one region."""
    height, width = scene.owner.shape
    rows, columns = rng.integers(4, 8, size=2)
    pitch = 13
    top = int(rng.integers(0, height - rows * pitch))
    left = int(rng.integers(0, width - columns * pitch))
    for row in range(rows):
        for column in range(columns):
            alpha = _render(_outlines(category, rng), rng.uniform(9, 12), pitch + 2)
            shift = rng.integers(-2, 3, size=2)
            position = (top + row * pitch + int(shift[0]), left + column * pitch + int(shift[1]))
            _paint(scene, alpha, position, _CROWD_OWNER, rng)
    # The region includes the gaps between its shapes, as hand-drawn crowd regions do.
    shapes = Image.fromarray(((scene.owner == _CROWD_OWNER) * 255).astype(np.uint8))
    scene.owner[np.asarray(shapes.filter(ImageFilter.MaxFilter(5))) > 0] = _CROWD_OWNER
    pixels = int((scene.owner == _CROWD_OWNER).sum())
    scene.items.append(_Item(category, pixels, 0.95, pixels, crowd=True))


def _draw_sizes(count: int, rng: np.random.Generator) -> list[float]:
    """Sizes in pixels, log-uniform within each bin, roughly from large to small."""
    bins = rng.choice(len(_SIZE_RANGES), size=count, p=_SIZE_SHARES)
    surplus = np.flatnonzero(bins == 2)[_MAX_LARGE:]
    bins[surplus] = rng.integers(0, 2, size=surplus.size)
    sizes = [math.exp(rng.uniform(*np.log(_SIZE_RANGES[index]))) for index in bins]
    # Large ones go to the back, or they would hide the others; the noise lets exceptions happen.
    keys = np.log(sizes) + rng.normal(0, 0.35, size=count)
    return [sizes[index] for index in np.argsort(-keys, kind="stable")]


def _finish(canvas: Floats, rng: np.random.Generator) -> Image.Image:
    """Camera effects: a slight blur, then sensor noise."""
    sharp = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    blurred = sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7)))
    noise = rng.normal(0, rng.uniform(1, 6), size=canvas.shape)
    pixels = np.clip(np.rint(np.asarray(blurred, dtype=np.float64) + noise), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _make_scene(
    rng: np.random.Generator, image_size: int, distractors: int = 0
) -> tuple[Image.Image, _Scene]:
    """One image and its items; everything random about it comes from ``rng``."""
    sides = [image_size, image_size]
    if rng.random() < 0.5:
        sides[int(rng.integers(2))] = round(image_size * rng.uniform(0.75, 1.0))
    height, width = sides
    scene = _Scene(_background(height, width, rng), np.full((height, width), -1, dtype=np.int64))
    for _ in range(rng.integers(0, 4)):
        _add_blob(scene.canvas, rng)
    _add_strokes(scene.canvas, int(rng.integers(1, 8)), rng)
    kind = rng.random()
    if kind >= _EMPTY_SHARE:
        if kind < _EMPTY_SHARE + _CROWD_SHARE:
            _place_crowd(scene, int(rng.integers(len(CLASS_NAMES))), rng)
        objects = int(rng.choice(_OBJECTS, p=_OBJECTS_SHARES))
        categories = [None] * objects
        if distractors:
            others = rng.integers(distractors + 1)
            categories += list(len(CLASS_NAMES) + rng.integers(len(DISTRACTOR_NAMES), size=others))
            rng.shuffle(categories)
        for category, size in zip(categories, _draw_sizes(len(categories), rng), strict=True):
            if category is None:
                category = rng.integers(len(CLASS_NAMES))
            _place(scene, int(category), size, rng)
    return _finish(scene.canvas, rng), scene


def picture(rng: np.random.Generator, category: int, side: int) -> Image.Image:
    """A square picture of one shape on a background of its own, as an image classifier sees it.

    Args:
        rng: everything random comes from it.
        category: index into ``CLASS_NAMES + DISTRACTOR_NAMES``.
        side: pixels; the shape takes from 0.35 to 0.8 of them.
    """
    scene = _Scene(_background(side, side, rng), np.full((side, side), -1, dtype=np.int64))
    _add_strokes(scene.canvas, int(rng.integers(0, 3)), rng)
    while not scene.items:
        _place(scene, category, side * rng.uniform(0.35, 0.7), rng)
    return _finish(scene.canvas, rng)


# ----------------------------------------------------------------------------- annotations


def _boundary_loops(mask: Mask) -> Iterator[list[tuple[int, int]]]:
    """The closed outlines (x, y) of a mask along pixel edges; holes run the other way round."""
    padded = np.pad(mask, 1).astype(np.int8)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Walk with the mask on the right: top edges go right, bottom edges left, and so on.
    down, across = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]
    for edges, sign, start, end in (
        (down, 1, (0, 0), (1, 0)),
        (down, -1, (1, 0), (0, 0)),
        (across, 1, (0, 1), (0, 0)),
        (across, -1, (0, 0), (0, 1)),
    ):
        for y, x in np.argwhere(edges == sign).tolist():
            following.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))
    while following:
        point = first = next(iter(following))
        loop, heading = [], (0, 0)
        while True:
            choices = following[point]
            target = choices.pop()
            if not choices:
                del following[point]
            new_heading = (target[0] - point[0], target[1] - point[1])
            if new_heading != heading:  # keep the corners only
                loop.append(point)
            point, heading = target, new_heading
            if point == first:
                break
        yield loop


def _signed_area(loop: list[tuple[int, int]]) -> float:
    return (
        sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, loop[1:] + loop[:1], strict=True))
        / 2
    )


def _polygons(mask: Mask, left: int, top: int) -> list[list[float]]:
    """COCO polygons of a mask whose top left pixel is at (left, top) in the image.

    COCO joins the polygons of an object, so a hole cannot be one of them.  Where there is a hole,
    all outlines become a single polygon instead, joined by bridges that are walked both ways and
    so enclose nothing.
    """
    loops = list(_boundary_loops(mask))
    if any(_signed_area(loop) < 0 for loop in loops):
        joined = loops[0] + loops[0][:1]
        for loop in loops[1:]:
            joined += loop + loop[:1] + loops[0][:1]
        loops = [joined[:-1]]
    return [[float(c) for x, y in loop for c in (x + left, y + top)] for loop in loops]


def _rle_counts(mask: Mask) -> list[int]:
    """Uncompressed COCO run lengths: column by column, starting with a run of zeros."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    bounds = np.concatenate([[0], changes, [flat.size]])
    counts: list[int] = np.diff(bounds).tolist()
    return [0, *counts] if flat[0] else counts


def _annotation(scene: _Scene, index: int) -> dict[str, Any]:
    """The COCO annotation of one item, from its visible pixels; ids are left to the caller."""
    item, mask = scene.items[index], scene.owner == index
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    height, width = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
    segmentation: Any
    if item.crowd:
        segmentation = {"counts": _rle_counts(mask), "size": list(mask.shape)}
    else:
        segmentation = _polygons(mask[top : top + height, left : left + width], left, top)
    return {
        "category_id": item.category + 1,
        "bbox": [float(left), float(top), float(width), float(height)],
        "area": float(mask.sum()),
        "iscrowd": int(item.crowd),
        "segmentation": segmentation,
    }


def _area_bin(area: float) -> str:
    if area < 32**2:
        return "small"
    return "medium" if area <= 96**2 else "large"


def _summarize(dataset: dict[str, Any]) -> dict[str, Any]:
    """Counts of one split; boxes are those of single objects, without the crowd regions."""
    single = [ann for ann in dataset["annotations"] if not ann["iscrowd"]]
    occupied = {ann["image_id"] for ann in dataset["annotations"]}
    by_class = dict.fromkeys(CLASS_NAMES, 0)
    by_area = dict.fromkeys(("small", "medium", "large"), 0)
    by_box_area = dict(by_area)
    for ann in single:
        by_class[CLASS_NAMES[ann["category_id"] - 1]] += 1
        by_area[_area_bin(ann["area"])] += 1
        by_box_area[_area_bin(ann["bbox"][2] * ann["bbox"][3])] += 1
    return {
        "images": len(dataset["images"]),
        "empty_images": len(dataset["images"]) - len(occupied),
        "boxes": len(single),
        "crowd_regions": len(dataset["annotations"]) - len(single),
        "boxes_per_class": by_class,
        "boxes_per_area": by_area,
        "boxes_per_box_area": by_box_area,
    }


# ------------------------------------------------------------------------------- the files


def _write_split(root: Path, split: str, options: dict[str, int]) -> dict[str, Any]:
    """Write the images and annotations of one split, and return its summary."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / split).mkdir()
    for index in range(options[f"num_{split}"]):
        # A stream of its own makes each image independent of how many others there are.
        rng = np.random.default_rng([options["seed"], SPLITS.index(split), index])
        image, scene = _make_scene(rng, options["image_size"], options["distractors"])
        name, image_id = f"{index + 1:06d}.jpg", index + 1
        image.save(root / split / name, quality=_JPEG_QUALITY)
        images.append(
            {
                "id": image_id,
                "file_name": name,
                "width": image.width,
                "height": image.height,
                "license": 1,
            }
        )
        for number in (n for n, item in enumerate(scene.items) if item.annotated):
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append(ids | _annotation(scene, number))
    dataset = {
        "info": {
            "description": f"fpn_ext synthetic multi-scale shapes, {split}",
            "version": str(GENERATOR_VERSION),
        },
        "licenses": [{"id": 1, "name": "Apache License 2.0", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "shape"}
            for number, name in enumerate(CLASS_NAMES, start=1)
        ],
    }
    (root / "annotations").mkdir(exist_ok=True)
    write_json(root / "annotations" / f"instances_{split}.json", dataset, indent=None)
    return _summarize(dataset)


def _check_options(**options: Any) -> dict[str, int]:
    """The options as a dict; ValueError for a value that no data set can be made with."""
    least = {
        "seed": 0,
        "num_train": 1,
        "num_val": 1,
        "image_size": MIN_IMAGE_SIZE,
        "distractors": 0,
    }
    for name, minimum in least.items():
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name}: got {value!r}, needed an integer of at least {minimum}")
    return options


def _load_existing(root: Path, options: dict[str, int]) -> dict[str, Any] | None:
    """The summary of the data set in ``root``; None if there is nothing.

    Raises ValueError if ``root`` holds something else than what ``options`` ask for.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    advice = f"delete {root} or choose another root"
    try:
        info = json.loads((root / "info.json").read_text(encoding="utf-8"))
        # Sets made before there was such an option have no distractors.
        version = info["generator_version"]
        found = {"generator_version": version, "distractors": 0, **info["options"]}
        summary: dict[str, Any] = info["summary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root} exists but holds no data set of this kind; {advice}") from error
    wanted = {"generator_version": GENERATOR_VERSION, **options}
    differences = [
        f"{name} is {found.get(name)!r}, needed {value!r}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differences:
        raise ValueError(f"{root} holds another data set ({'; '.join(differences)}); {advice}")
    return summary


def _create(target: Path, options: dict[str, int]) -> dict[str, Any]:
    """Make a data set beside ``target`` and move it there once complete; returns its summary."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        staged = Path(temporary) / "data"  # a folder with the usual permissions, unlike its parent
        staged.mkdir()
        summary = {split: _write_split(staged, split, options) for split in SPLITS}
        info = {"generator_version": GENERATOR_VERSION, "options": options, "summary": summary}
        write_json(staged / "info.json", info, indent=None)
        try:
            os.replace(staged, target)
        except OSError:
            # Another process may have been faster; its result is as good if it is the same set.
            existing = _load_existing(target, options)
            if existing is None:
                raise
            return existing
    return summary


def generate(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_train: int = 800,
    num_val: int = 160,
    image_size: int = 224,
    distractors: int = 0,
) -> dict[str, Any]:
    """Make the data set in ``root``, which must not exist or be empty.

    Args:
        root: folder to create.  It appears only when complete.
        seed: non-negative; the same options give the same images and annotations.
        num_train, num_val: how many images, at least 1 each.
        image_size: the longer side of the images in pixels, at least 128.  Objects have the same
            size in pixels whatever this is, so under about 200 fewer large ones fit.
        distractors: at most so many other shapes (plus, half-disc, hourglass, chevron, arch) in an
            image, drawn as the objects are and not annotated: to find the objects one has to know
            their shapes, however small they are.

    Returns:
        The counts per split, as also stored in ``info.json``.
    """
    options = _check_options(
        seed=seed,
        num_train=num_train,
        num_val=num_val,
        image_size=image_size,
        distractors=distractors,
    )
    target = Path(root).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; delete it or use ensure()")
    return _create(target, options)


def ensure(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_train: int = 800,
    num_val: int = 160,
    image_size: int = 224,
    distractors: int = 0,
) -> dict[str, Any]:
    """Like ``generate``, but reuse a data set that was made in ``root`` with the same options.

    Raises ValueError if ``root`` holds anything else; nothing is ever overwritten.
    """
    options = _check_options(
        seed=seed,
        num_train=num_train,
        num_val=num_val,
        image_size=image_size,
        distractors=distractors,
    )
    target = Path(root).absolute()
    existing = _load_existing(target, options)
    return _create(target, options) if existing is None else existing


def default_root() -> str:
    """``demo_multiscale`` in the folder where Detectron2 looks for data sets."""
    return os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "demo_multiscale")


def _table(summary: dict[str, Any]) -> str:
    """The summary as text, one column per split."""
    rows: list[tuple[str, list[str]]] = [("", list(summary))]
    parts = list(summary.values())
    for key, value in parts[0].items():
        label = key.replace("_", " ")
        if not isinstance(value, dict):
            rows.append((label, [str(part[key]) for part in parts]))
            continue
        rows.append((label, []))
        for name in value:
            cells = [
                f"{part[key][name]} ({part[key][name] / max(part['boxes'], 1):4.0%})"
                for part in parts
            ]
            rows.append((f"  {name}", cells))
    return "\n".join(
        f"{label:<20}" + "".join(f"{cell:>14}" for cell in cells) for label, cells in rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry point: make the data set unless it is there, and print its counts."""
    parser = argparse.ArgumentParser(description="Make the synthetic multi-scale data set.")
    parser.add_argument("--root", default=default_root(), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=int, default=800, help="images")
    parser.add_argument("--num-val", type=int, default=160, help="images")
    parser.add_argument("--image-size", type=int, default=224, help="longer side in pixels")
    parser.add_argument(
        "--distractors", type=int, default=0, help="most shapes that are no objects"
    )
    options = vars(parser.parse_args(argv))
    root = options.pop("root")
    try:
        summary = ensure(root, **options)
    except ValueError as error:
        parser.error(str(error))
    print(f"{root}\n{_table(summary)}")


if __name__ == "__main__":
    main()
