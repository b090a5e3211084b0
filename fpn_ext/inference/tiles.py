"""Detection on large pictures tile by tile, with sahi (Akyon et al. 2022, arXiv 2202.06934).

A picture that is resized to the model's size loses its small objects; its tiles do not. sahi cuts
the tiles and moves what is found back; :func:`merged` makes one of what is found twice.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .detections import Detections

if TYPE_CHECKING:
    from .detector import Detector

INSTALL = "pip install -e '.[tiles]' in this project's folder, or pip install sahi"
OVERLAP = 0.2
MOST_OVERLAP = 0.9
SMALLEST_TILE = 32
SMALLEST_SIDE = 5  # under it, sahi takes (H, W, 3) for (C, H, W)
SAHI_SUPPRESSES_UNDER = 0.1  # a confidence threshold under it: suppression, whatever is asked for
# Suppression that no two boxes reach.
LEAVE_ALL_IN = {
    "postprocess_type": "NMS",
    "postprocess_match_metric": "IOU",
    "postprocess_match_threshold": 2.0,
}


def check_tiles(tile: int, overlap: float = OVERLAP) -> None:
    """Check what is asked for before a model is loaded.

    Args:
        tile: side of a tile in pixels of the picture.
        overlap: of neighbouring tiles, as a part of their side.

    Raises:
        ImportError: sahi is not installed; with the line that installs it.
        ValueError: a tile under 32 px; an overlap under 0 or over 0.9.
    """
    if tile < SMALLEST_TILE:
        raise ValueError(f"a tile must be at least {SMALLEST_TILE} px wide, got {tile}")
    if not 0 <= overlap <= MOST_OVERLAP:
        raise ValueError(f"the overlap of tiles must be from 0 to {MOST_OVERLAP}, got {overlap}")
    _sahi()


def check_size(image: np.ndarray) -> None:
    """Raise ValueError if a picture, (H, W, C), is under 5 px high or wide."""
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"a picture of {width} x {height} px is too small for tiles")


def detect_in_tiles(
    detector: "Detector",
    rgb: np.ndarray,
    tile: int,
    overlap: float = OVERLAP,
    min_score: float = 0.5,
) -> Detections:
    """The detections on a picture, of all its tiles and of the whole.

    What is found in several tiles is merged (:func:`merged`): two boxes of one class of which the
    smaller lies in the other by more than half become the box around both, with the higher score.
    With ``min_score`` under 0.1 sahi leaves the lower out instead, where they overlap by more than
    half of their union.

    Args:
        detector: gets the tiles in batches of ``detector.batch_size``, each resized by
            ``INPUT.MIN_SIZE_TEST``.
        rgb: (H, W, 3) uint8 RGB.
        tile: side of a tile in pixels of the picture. Those at the lower and right border are moved
            inwards, so that all are of one size.
        overlap: of neighbouring tiles, as a part of their side.
        min_score: detections under it are left out, before merging.

    Returns:
        The detections in pixels of the picture, without levels, masks and keypoints.

    Raises:
        ImportError, ValueError: as :func:`check_tiles`; a picture under 5 px high or wide; a model
            of RGBA, whose transparency the tiles would lose.
    """
    check_tiles(tile, overlap)
    check_size(rgb)
    height, width = rgb.shape[:2]
    merge_here = min_score >= SAHI_SUPPRESSES_UNDER
    with _pillows_limit_kept():
        result = _sahi().predict.get_sliced_prediction(
            rgb,
            sahi_model(detector, min_score),
            slice_height=tile,
            slice_width=tile,
            overlap_height_ratio=overlap,
            overlap_width_ratio=overlap,
            batch_size=detector.batch_size,
            verbose=0,
            **(LEAVE_ALL_IN if merge_here else {}),
        )
    found = sorted(result.object_prediction_list, key=lambda one: -one.score.value)
    boxes = np.array([one.bbox.to_xyxy() for one in found], dtype=np.float32).reshape(-1, 4)
    scores = np.array([one.score.value for one in found], dtype=np.float32)
    class_ids = np.array([one.category.id for one in found], dtype=np.int64)
    if merge_here:
        boxes, scores, class_ids = merged(boxes, scores, class_ids)
    return Detections(
        height=height,
        width=width,
        boxes=boxes,
        scores=scores,
        class_ids=class_ids,
        categories=detector.categories,
        read_rgb=functools.partial(np.asarray, rgb),
    )


def merged(
    boxes: np.ndarray, scores: np.ndarray, class_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of one object, of which each tile may show another part, made one.

    From the highest score down, each box takes in those of its class of which the smaller of the
    two lies in the other by more than half, and becomes the box around them; its score stays. A box
    that no longer lies so once the first has grown is left for itself. sahi's greedy merging, whose
    rule this is, leaves such a box out: of two neighbouring objects with a third box over the gap
    between them it keeps one (0.12.8, ``findings/sahi_merging_loses_an_object.sh``).

    Args:
        boxes: (R, 4) XYXY.
        scores: (R,).
        class_ids: (R,).

    Returns:
        What is left of each, highest score first.

    >>> cars = np.array([[0.0, 0, 100, 60], [80, 0, 180, 60], [78, 0, 102, 60]])
    >>> boxes, scores, _ = merged(cars, np.array([0.8, 0.7, 0.9]), np.zeros(3, dtype=np.int64))
    >>> boxes.tolist(), scores.tolist()
    ([[0.0, 0.0, 102.0, 60.0], [80.0, 0.0, 180.0, 60.0]], [0.9, 0.7])
    """
    left = np.argsort(-scores, kind="stable")
    kept, around = [], []
    while len(left):
        best, left = left[0], left[1:]
        box = boxes[best]
        same = (class_ids[left] == class_ids[best]) & (part_inside(box, boxes[left]) > 0.5)
        taken = np.zeros(len(left), dtype=bool)
        for place in np.flatnonzero(same):
            other = boxes[left[place]]
            if part_inside(box, other[None])[0] > 0.5:
                box = np.concatenate(
                    [np.minimum(box[:2], other[:2]), np.maximum(box[2:], other[2:])]
                )
                taken[place] = True
        left = left[~taken]
        kept.append(best)
        around.append(box)
    new = np.array(around, dtype=boxes.dtype).reshape(-1, 4)
    return new, scores[kept], class_ids[kept]


def part_inside(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(R,): the intersection of a (4,) box with (R, 4) others, as a part of the smaller of the two.

    >>> part_inside(np.array([0.0, 0, 4, 4]), np.array([[2.0, 0, 4, 8], [0, 0, 40, 40]])).tolist()
    [0.5, 1.0]
    """
    corner = np.maximum(box[:2], others[:, :2])
    sides = np.clip(np.minimum(box[2:], others[:, 2:]) - corner, 0, None)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    smaller = np.minimum(areas, np.prod(box[2:] - box[:2]))
    return np.prod(sides, axis=1) / np.maximum(smaller, np.finfo(np.float32).tiny)


def sahi_model(detector: "Detector", min_score: float = 0.3) -> Any:
    """A ``sahi.models.base.DetectionModel``, for any of sahi's functions.

        sahi.predict.get_sliced_prediction("large.png", sahi_model(detector), 640, 640)

    sahi gives it RGB. Its category ids are the numbers of the classes, from 0. Mind that sahi's
    functions set Pillow's ``Image.MAX_IMAGE_PIXELS``, the limit on what is decoded, to None for the
    whole process; :meth:`fpn_ext.Detector.tiled` puts it back.

    Args:
        min_score: sahi's ``confidence_threshold``; detections under it are left out.

    Raises:
        ImportError: sahi is not installed; with the line that installs it.
        ValueError: a model of RGBA.
    """
    if detector.model.pixel_format == "RGBA":
        raise ValueError("INPUT.FORMAT RGBA: tiles are RGB, and would lose the transparency")
    _sahi()
    from sahi.models.base import DetectionModel
    from sahi.prediction import ObjectPrediction

    class Model(DetectionModel):
        def set_model(self, model: "Detector", **kwargs: Any) -> None:
            self.model = model
            names = model.categories.values()
            self.category_mapping = {str(number): name for number, name in enumerate(names)}

        def perform_inference(self, image: np.ndarray) -> None:
            self.perform_batch_inference([image])

        def perform_batch_inference(self, images: list[np.ndarray]) -> None:
            self._original_predictions = self.model(images, min_score=self.confidence_threshold)

        def _create_object_prediction_list_from_original_predictions(
            self,
            shift_amount_list: Sequence[Any] | None = ((0, 0),),
            full_shape_list: Sequence[Any] | None = None,
        ) -> None:
            found: list[Detections] = self._original_predictions
            shifts = _for_each(shift_amount_list or [0, 0], len(found))
            shapes = _for_each(full_shape_list, len(found))
            self._object_prediction_list_per_image = [
                [
                    ObjectPrediction(
                        bbox=box,
                        category_id=number,
                        category_name=detections.class_names[row],
                        score=score,
                        shift_amount=list(shift),
                        full_shape=shape,
                    )
                    for row, (box, number, score) in enumerate(
                        zip(
                            detections.boxes.tolist(),
                            detections.class_ids.tolist(),
                            detections.scores.tolist(),
                            strict=True,
                        )
                    )
                ]
                for detections, shift, shape in zip(found, shifts, shapes, strict=True)
            ]

    return Model(model=detector, confidence_threshold=min_score, device="cpu")


def _for_each(values: Any, count: int) -> list[Any]:
    """What sahi gives for one picture, ``[x, y]``, or for each, ``[[x, y], ...]``."""
    if values is None:
        return [None] * count
    return list(values) if isinstance(values[0], Sequence) else [values] * count


@contextlib.contextmanager
def _pillows_limit_kept() -> Iterator[None]:
    """sahi takes away, for the whole process, what keeps Pillow from decoding endless pictures."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _sahi() -> Any:
    try:
        import sahi.predict
    except ImportError as error:
        raise ImportError(
            f"detection in tiles needs sahi, which cannot be imported ({error}): {INSTALL}"
        ) from error
    return sahi
