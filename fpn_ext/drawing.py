"""Boxes on pictures, coloured by pyramid level."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

# Colours of the levels, distinct for colour-blind readers too (Okabe and Ito); RGB in [0, 1].
LEVEL_COLORS = {
    1: (0.0, 0.0, 0.0),
    2: (0.84, 0.37, 0.0),
    3: (0.0, 0.62, 0.45),
    4: (0.0, 0.45, 0.70),
    5: (0.80, 0.47, 0.65),
    6: (0.94, 0.89, 0.26),
    7: (0.34, 0.71, 0.91),
}
OTHER_COLOR = (0.9, 0.1, 0.1)  # no level known, e.g. ground truth or Detectron2's own RoI heads


def draw_detections(
    image: np.ndarray, detections: Instances, class_names: Sequence[str], scale: float = 1.0
) -> Image.Image:
    """Boxes with class and score, coloured by the level each was pooled from if it is known.

    Args:
        image: (H, W, 3) uint8 RGB.
        detections: on CPU, with ``pred_boxes`` in pixels of ``image``, ``pred_classes``, ``scores``
            and, if the model keeps it, ``pooled_level``.
        class_names: name of each class number.
        scale: size of the picture relative to ``image``.
    """
    labels = [
        f"{class_names[c]} {score:.2f}"
        for c, score in zip(detections.pred_classes.tolist(), detections.scores, strict=True)
    ]
    levels = (
        detections.pooled_level.tolist()
        if detections.has("pooled_level")
        else [None] * len(detections)
    )
    return draw_boxes(image, detections.pred_boxes.tensor.numpy(), labels, levels, scale)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    levels: Sequence[int | None],
    scale: float = 1.0,
) -> Image.Image:
    """(R, 4) XYXY boxes in pixels of an (H, W, 3) RGB image, each in the colour of its level."""
    visualizer = Visualizer(image, scale=scale)
    colors = [LEVEL_COLORS.get(level, OTHER_COLOR) if level else OTHER_COLOR for level in levels]
    drawn = visualizer.overlay_instances(boxes=boxes, labels=labels, assigned_colors=colors)
    picture = Image.fromarray(drawn.get_image())
    plt.close(visualizer.output.fig)
    return picture
