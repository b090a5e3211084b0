"""The images of the demo dataset: objects on a background, none occluded too much."""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from .demo_backgrounds import (
    add_blob,
    add_strokes,
    background,
    blend,
    cloud,
    ramp,
    random_colour,
    waves,
)
from .demo_shapes import CLASS_NAMES, DISTRACTOR_NAMES, Floats, outlines, render

# "Size" below is the geometric mean of the box's side and the side of a square of the mask's
# area. A star fills less than half of its box; with this mean, box and mask area fall into the
# same COCO bin for most objects, and every class has the same distribution.
_SIZE_RANGES = ((18.0, 28.0), (37.0, 90.0), (130.0, 168.0))
_SIZE_SHARES = (0.27, 0.31, 0.42)
_MAX_LARGE = 2
_OBJECTS = (3, 4, 5, 6, 7)
_OBJECTS_SHARES = (0.30, 0.25, 0.20, 0.15, 0.10)
# Fraction of a shape that must stay visible, by bin. A small shape is hard to recognize with half
# of it occluded; the visible area of a large one must still be large by COCO's definition.
_MIN_VISIBLE = (0.85, 0.55, 0.65)
_EMPTY_SHARE = 0.06
_CROWD_SHARE = 0.04
_CROWD_OWNER = 0
_PLACEMENT_TRIES = 30
# Of families, in pixels of an image of 320. Made half as high for the network, whose C2 sees 17
# pixels beyond its cell, that is 34 of these, fewer than companions are apart from shapes.
_PARENT_SIZES = (140.0, 190.0)
_CHILD_SIZES = (50.0, 90.0)
_COMPANION_SIZES = (22.0, 30.0)
_COMPANION_SHAPE = CLASS_NAMES.index("disc")
_COMPANION_DISTANCE = 40


@dataclass
class Item:
    """One annotated region; its pixels are those where ``Scene.owner`` holds its index."""

    category: int  # index into CLASS_NAMES, continued by DISTRACTOR_NAMES
    full_pixels: int  # of the whole shape, including occluded and outside parts
    min_visible: float  # fraction of full_pixels that later objects must not occlude
    visible_pixels: int
    crowd: bool = False
    companion: bool = False  # a disc, whatever the category

    @property
    def annotated(self) -> bool:
        return self.category < len(CLASS_NAMES)


@dataclass
class Scene:
    """An image under construction: colours in 0..255 and each pixel's item index."""

    canvas: Floats
    owner: npt.NDArray[np.int64]
    items: list[Item] = field(default_factory=list)


def _windows(
    position: tuple[int, int], size: tuple[int, int], image: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Slices of a patch at ``position`` (row, column) clipped to the image: in image, in patch."""
    inside, in_patch = [], []
    for start, length, limit in zip(position, size, image, strict=True):
        low, high = max(start, 0), min(start + length, limit)
        inside.append(slice(low, high))
        in_patch.append(slice(low - start, high - start))
    return (inside[0], inside[1]), (in_patch[0], in_patch[1])


def _distinct_colour(surroundings: Floats, rng: np.random.Generator) -> Floats:
    """A random colour that stands out from nearly all of the pixels around an object."""
    pixels = surroundings.reshape(-1, 3)
    best, best_distance = random_colour(rng), -1.0
    for _ in range(12):
        colour = random_colour(rng)
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
        pattern = ramp(height, width, rng)
    elif kind == 2:
        pattern = waves(height, width, rng.uniform(4, 24), rng)
    else:
        pattern = cloud(height, width, rng.uniform(2, 8), rng)
    return colour + pattern[..., None] * rng.uniform(-28, 28, size=3)


def _paint(
    scene: Scene, alpha: Floats, position: tuple[int, int], owner: int, rng: np.random.Generator
) -> None:
    inside, in_patch = _windows(position, alpha.shape, scene.owner.shape)
    margin = 3
    near = tuple(slice(max(part.start - margin, 0), part.stop + margin) for part in inside)
    colour = _distinct_colour(scene.canvas[near], rng)
    fill = _fill(alpha.shape[0], alpha.shape[1], colour, rng)
    blend(scene.canvas[inside], alpha[in_patch], np.clip(fill, 0, 255)[in_patch])
    scene.owner[inside][alpha[in_patch] >= 0.5] = owner


def _hides_too_much(scene: Scene, hidden: npt.NDArray[np.int64]) -> bool:
    return any(
        item.visible_pixels - taken < item.min_visible * item.full_pixels
        for item, taken in zip(scene.items, hidden, strict=True)
    )


def _random_position(
    alpha: Floats, image: tuple[int, int], small: bool, rng: np.random.Generator
) -> tuple[int, int]:
    """A position for a patch; one in four of the larger ones may extend beyond the image."""
    overhang = 0.15 if not small and rng.random() < 0.25 else 0.0
    starts = []
    for length, limit in zip(alpha.shape, image, strict=True):
        low = -math.floor(overhang * length)
        high = max(limit - length + math.floor(overhang * length), low)
        starts.append(int(rng.integers(low, high + 1)))
    return starts[0], starts[1]


def _place(scene: Scene, category: int, size: float, rng: np.random.Generator) -> None:
    """Add an object on top of the scene, unless every position tried occludes too much."""
    small = size <= _SIZE_RANGES[0][1]
    bin_index = sum(size > high for _, high in _SIZE_RANGES[:-1])
    min_visible = _MIN_VISIBLE[bin_index]
    alpha = render(outlines(category, rng), size, 0.95 * min(scene.owner.shape))
    covered = alpha >= 0.5
    full = int(covered.sum())
    for _ in range(_PLACEMENT_TRIES):
        position = _random_position(alpha, scene.owner.shape, small, rng)
        inside, in_patch = _windows(position, alpha.shape, scene.owner.shape)
        below = scene.owner[inside][covered[in_patch]]
        hidden = np.bincount(below[below >= 0], minlength=len(scene.items))
        if below.size < min_visible * full or _hides_too_much(scene, hidden):
            continue
        for item, taken in zip(scene.items, hidden, strict=True):
            item.visible_pixels -= int(taken)
        _paint(scene, alpha, position, len(scene.items), rng)
        scene.items.append(Item(category, full, min_visible, below.size))
        return


def _place_crowd(scene: Scene, category: int, rng: np.random.Generator) -> None:
    """Many tiny shapes of one class in a dense patch, annotated as one region."""
    height, width = scene.owner.shape
    rows, columns = rng.integers(4, 8, size=2)
    pitch = 13
    top = int(rng.integers(0, height - rows * pitch))
    left = int(rng.integers(0, width - columns * pitch))
    for row in range(rows):
        for column in range(columns):
            alpha = render(outlines(category, rng), rng.uniform(9, 12), pitch + 2)
            shift = rng.integers(-2, 3, size=2)
            position = (top + row * pitch + int(shift[0]), left + column * pitch + int(shift[1]))
            _paint(scene, alpha, position, _CROWD_OWNER, rng)
    # The region includes the gaps between shapes, as in hand-drawn crowd regions.
    shapes = Image.fromarray(((scene.owner == _CROWD_OWNER) * 255).astype(np.uint8))
    scene.owner[np.asarray(shapes.filter(ImageFilter.MaxFilter(5))) > 0] = _CROWD_OWNER
    pixels = int((scene.owner == _CROWD_OWNER).sum())
    scene.items.append(Item(category, pixels, 0.95, pixels, crowd=True))


def _draw_sizes(count: int, rng: np.random.Generator) -> list[float]:
    """Sizes in pixels, log-uniform within each bin, roughly from large to small."""
    bins = rng.choice(len(_SIZE_RANGES), size=count, p=_SIZE_SHARES)
    surplus = np.flatnonzero(bins == 2)[_MAX_LARGE:]
    bins[surplus] = rng.integers(0, 2, size=surplus.size)
    sizes = [math.exp(rng.uniform(*np.log(_SIZE_RANGES[index]))) for index in bins]
    # Large objects go to the back so as not to occlude the others; noise allows exceptions.
    keys = np.log(sizes) + rng.normal(0, 0.35, size=count)
    return [sizes[index] for index in np.argsort(-keys, kind="stable")]


def _finish(canvas: Floats, rng: np.random.Generator) -> Image.Image:
    """Camera effects: a slight blur, then sensor noise."""
    sharp = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    blurred = sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7)))
    noise = rng.normal(0, rng.uniform(1, 6), size=canvas.shape)
    pixels = np.clip(np.rint(np.asarray(blurred, dtype=np.float64) + noise), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _place_companion(scene: Scene, category: int, rng: np.random.Generator) -> None:
    """Add a small disc of any class, unless every position tried is near other objects."""
    alpha = render(outlines(_COMPANION_SHAPE, rng), rng.uniform(*_COMPANION_SIZES), math.inf)
    covered = int((alpha >= 0.5).sum())
    discs = [number for number, item in enumerate(scene.items) if item.companion]
    for _ in range(_PLACEMENT_TRIES):
        position = _random_position(alpha, scene.owner.shape, small=True, rng=rng)
        ends = [start + length for start, length in zip(position, alpha.shape, strict=True)]
        near, below = (
            scene.owner[
                max(position[0] - margin, 0) : ends[0] + margin,
                max(position[1] - margin, 0) : ends[1] + margin,
            ]
            for margin in (_COMPANION_DISTANCE, 0)
        )
        if np.isin(near, [-1, *discs]).all() and (below == -1).all():
            _paint(scene, alpha, position, len(scene.items), rng)
            scene.items.append(Item(category, covered, 1.0, covered, companion=True))
            return


def _empty_scene(rng: np.random.Generator, image_size: int) -> Scene:
    """A background with blurred blobs and strokes."""
    sides = [image_size, image_size]
    if rng.random() < 0.5:
        sides[int(rng.integers(2))] = round(image_size * rng.uniform(0.75, 1.0))
    height, width = sides
    scene = Scene(background(height, width, rng), np.full((height, width), -1, dtype=np.int64))
    for _ in range(rng.integers(0, 4)):
        add_blob(scene.canvas, rng)
    add_strokes(scene.canvas, int(rng.integers(1, 8)), rng)
    return scene


def make_scene(
    rng: np.random.Generator, image_size: int, distractors: int = 0
) -> tuple[Image.Image, Scene]:
    """One image and its items; all randomness comes from ``rng``.

    Args:
        rng: used for this image only.
        image_size: its longer side in pixels, at least 128.
        distractors: max number of distractors.

    Returns:
        The RGB image, and the scene before blur and noise.
    """
    scene = _empty_scene(rng, image_size)
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


def make_family(
    rng: np.random.Generator, image_size: int, companions: int
) -> tuple[Image.Image, Scene]:
    """One image of objects that are all of one class, and its items.

    A large shape and one or two of medium size have the outline of the class. Its companions are
    small discs, whatever the class: only the shapes, of which none is near, tell it.

    Args:
        rng: used for this image only.
        image_size: its longer side in pixels; from 320 there is room.
        companions: max number of companions, at least 2.

    Returns:
        The RGB image, and the scene before blur and noise.
    """
    scene = _empty_scene(rng, image_size)
    if rng.random() >= _EMPTY_SHARE:
        category = int(rng.integers(len(CLASS_NAMES)))
        _place(scene, category, rng.uniform(*_PARENT_SIZES), rng)
        for _ in range(rng.integers(1, 3)):
            _place(scene, category, rng.uniform(*_CHILD_SIZES), rng)
        for _ in range(rng.integers(2, companions + 1)):
            _place_companion(scene, category, rng)
    return _finish(scene.canvas, rng), scene


def picture(rng: np.random.Generator, category: int, side: int) -> Image.Image:
    """A square image of one shape on a background, for image classification.

    Args:
        rng: the source of all randomness.
        category: index into ``CLASS_NAMES + DISTRACTOR_NAMES``.
        side: in pixels; the shape takes up 0.35 to 0.8 of it.
    """
    scene = Scene(background(side, side, rng), np.full((side, side), -1, dtype=np.int64))
    add_strokes(scene.canvas, int(rng.integers(0, 3)), rng)
    while not scene.items:
        _place(scene, category, side * rng.uniform(0.35, 0.7), rng)
    return _finish(scene.canvas, rng)
