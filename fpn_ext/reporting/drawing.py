"""Boxes drawn on images, coloured by class or by pyramid level.

Uses Pillow: Detectron2's Visualizer needs OpenCV.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from detectron2.structures import Instances
from PIL import Image, ImageDraw, ImageFont

from ..levels import LEVEL_FIELDS, name_of

Color = tuple[int, int, int]
ColorBy = Literal["class", "level"]

# Okabe and Ito's colour-blind-safe palette.
LEVEL_COLORS: dict[int, Color] = {
    1: (90, 90, 90),
    2: (213, 94, 0),
    3: (0, 158, 115),
    4: (0, 114, 178),
    5: (204, 121, 167),
    6: (230, 159, 0),
    7: (86, 180, 233),
}
NO_LEVEL_COLOR: Color = (200, 30, 30)  # ground truth, or a model that does not keep the level
CLASS_COLORS = tuple(LEVEL_COLORS[level] for level in (4, 2, 3, 5, 6, 7, 1))  # then again


def draw_detections(
    image: np.ndarray,
    detections: Instances,
    class_names: Sequence[str],
    scale: float = 1.0,
    label_levels: bool = False,
    color_by: ColorBy = "class",
) -> Image.Image:
    """Boxes with class and score, coloured by class (:data:`CLASS_COLORS`) or by level.

    Masks are tinted in the colour of their box; keypoints are dots in it.

    Args:
        image: (H, W, 3) uint8 RGB.
        detections: on CPU, with ``pred_boxes`` in pixels of ``image``, ``pred_classes``, ``scores``
            and, if the model has them, ``pred_masks``, ``pred_keypoints``, ``proposal_level`` and
            ``pooled_level``.
        class_names: by class index.
        scale: size of the drawing relative to ``image``.
        label_levels: put both levels on every box (:func:`level_labels`).
        color_by: ``"level"`` is that of :func:`coloring_field`.
    """
    labels = [
        f"{class_names[c]} {score:.2f}"
        for c, score in zip(detections.pred_classes.tolist(), detections.scores, strict=True)
    ]
    if label_levels:
        own = level_labels(detections)
        labels = [f"{label} {levels}".rstrip() for label, levels in zip(labels, own, strict=True)]
    if color_by == "class":
        numbers = detections.pred_classes.tolist()
        colors = [CLASS_COLORS[number % len(CLASS_COLORS)] for number in numbers]
    else:
        field = coloring_field(detections)
        levels = detections.get(field).tolist() if field else [None] * len(detections)
        colors = list(map(color_of, levels))
    if detections.has("pred_masks"):
        image = _tinted(image, detections.pred_masks.numpy(), colors)
    boxes = detections.pred_boxes.tensor.numpy()
    picture = _draw(image, boxes, labels, colors, scale)
    if detections.has("pred_keypoints"):
        pen, radius = ImageDraw.Draw(picture), max(1, picture.height // 120)
        points = detections.pred_keypoints.numpy()[:, :, :2] * scale
        for of_one, color in zip(points, colors, strict=True):
            for x, y in of_one.tolist():
                corners = (x - radius, y - radius, x + radius, y + radius)
                pen.ellipse(corners, fill=color, outline="white")
    return picture


def color_of(level: int | None) -> Color:
    return NO_LEVEL_COLOR if level is None else LEVEL_COLORS.get(level, NO_LEVEL_COLOR)


def _tinted(image: np.ndarray, masks: np.ndarray, colors: Sequence[Color]) -> np.ndarray:
    """An image, half of it in the colour of an object where its mask is."""
    tinted = image.astype(np.float32)
    for mask, color in zip(masks.astype(bool), colors, strict=True):
        tinted[mask] = (tinted[mask] + color) / 2
    return tinted.astype(np.uint8)


def coloring_field(detections: Instances) -> str | None:
    """The field that colours boxes: ``pooled_level``, else ``proposal_level``, else None.

    Proposals are not pooled yet, and AllLevelsROIHeads pool from all levels.
    """
    return next((field for field in reversed(LEVEL_FIELDS) if detections.has(field)), None)


def level_labels(detections: Instances) -> list[str]:
    """``"p3>p4"`` for each box: proposed by P3, pooled from P4; unknown levels are omitted.

    >>> import torch
    >>> found = Instances((60, 80), proposal_level=torch.tensor([3, -1]))
    >>> level_labels(found)
    ['p3', '']
    >>> found.pooled_level = torch.tensor([4, 2])
    >>> level_labels(found)
    ['p3>p4', '>p2']
    """
    labels = [""] * len(detections)
    for field, mark in zip(LEVEL_FIELDS, ("", ">"), strict=True):
        if detections.has(field):
            for i, level in enumerate(detections.get(field).tolist()):
                if level >= 0:  # -1: none
                    labels[i] += mark + name_of(level)
    return labels


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    levels: Sequence[int | None],
    scale: float = 1.0,
) -> Image.Image:
    """Draw (R, 4) XYXY boxes in pixels of an (H, W, 3) uint8 RGB image, in their levels' colours.

    The label ``""`` draws none.
    """
    return _draw(image, boxes, labels, list(map(color_of, levels)), scale)


def _draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    colors: Sequence[Color],
    scale: float,
) -> Image.Image:
    """:func:`draw_boxes` in any colours: all boxes first, so that none crosses out a label."""
    picture = Image.fromarray(image)
    if scale != 1:
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(10, picture.height // 40))
    line_width = max(1, picture.height // 160)
    scaled = [[float(value) for value in box] for box in boxes * scale]
    for (x0, y0, x1, y1), color in zip(scaled, colors, strict=True):
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=color, width=line_width)
    for (x0, y0, _, _), label, color in zip(scaled, labels, colors, strict=True):
        if not label:
            continue
        _, _, text_width, text_height = pen.textbbox((0, 0), label, font=font)
        text_y = max(0.0, y0 - text_height - 2)
        pen.rectangle((x0, text_y, x0 + text_width + 3, text_y + text_height + 2), fill=color)
        pen.text((x0 + 2, text_y), label, fill="white", font=font)
    return picture


def draw_legend(pen: ImageDraw.ImageDraw, x: int, y: int, names: Mapping[int, str]) -> None:
    """Draw a legend from (x, y) to the right: each level's colour and feature-map name."""
    for level, name in names.items():
        pen.rectangle((x, y, x + 12, y + 12), fill=LEVEL_COLORS.get(level, NO_LEVEL_COLOR))
        pen.text((x + 18, y), name, fill="black")
        x += max(56, 30 + round(pen.textlength(name)))
