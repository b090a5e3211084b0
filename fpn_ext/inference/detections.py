"""What a detector has found on one picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from ..reporting.coco_json import annotations_of
from ..reporting.drawing import ColorBy, draw_detections

INSTALL_SUPERVISION = (
    "pip install -e '.[supervision]' in this project's folder, or pip install supervision"
)


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The R detections on one picture, highest score first, in pixels of the picture as given.

    ``found[found.scores > 0.5]`` are those of them; an index array or a slice chooses, too. Boxes
    are in Detectron2's coordinates: the upper left corner of the picture is (0, 0), the lower right
    (``width``, ``height``).

    Attributes:
        height, width: of the picture, in pixels.
        boxes: (R, 4) float32, XYXY.
        scores: (R,) float32, 0 to 1.
        class_ids: (R,) int64, the number of each one's class, from 0.
        categories: COCO category id of every class of the model, in the order of their numbers,
            and its name.
        proposal_levels: (R,) int64, the level k that proposed each; -1 where none did. None if the
            model does not say.
        pooled_levels: (R,) int64, the level k that each one's features were pooled from. None if
            the model does not pool a box from one level.
        keypoints: (R, K, 3) float32: x, y, score, the middle of the first pixel being (0.5, 0.5).
            None without keypoints.
        mask_run_lengths: COCO's compressed run lengths of each mask; None without masks.
        read_rgb: gives the picture, (H, W, 3) uint8 RGB, to :meth:`draw`; None for none.
    """

    height: int
    width: int
    boxes: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    categories: Mapping[int, str]
    proposal_levels: np.ndarray | None = None
    pooled_levels: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    mask_run_lengths: Sequence[dict[str, Any]] | None = None
    read_rgb: Callable[[], np.ndarray] | None = None

    @classmethod
    def of(
        cls,
        found: Instances,
        categories: Mapping[int, str],
        read_rgb: Callable[[], np.ndarray] | None = None,
    ) -> "Detections":
        """Those of :func:`fpn_ext.inference.predictor.detections_of`.

        Args:
            found: on CPU, in pixels of the picture.
            categories: as the attribute.
            read_rgb: as the attribute.
        """

        def column(name: str) -> np.ndarray | None:
            return found.get(name).numpy() if found.has(name) else None

        height, width = found.image_size
        return cls(
            height=int(height),
            width=int(width),
            boxes=found.pred_boxes.tensor.numpy(),
            scores=found.scores.numpy(),
            class_ids=found.pred_classes.numpy(),
            categories=categories,
            proposal_levels=column("proposal_level"),
            pooled_levels=column("pooled_level"),
            keypoints=column("pred_keypoints"),
            mask_run_lengths=_run_lengths(found.pred_masks) if found.has("pred_masks") else None,
            read_rgb=read_rgb,
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        first = zip(self.class_names[:3], self.scores.tolist(), strict=False)
        names = [f"{name} {score:.2f}" for name, score in first]
        names += ["..."] if len(self) > len(names) else []
        found = f": {', '.join(names)}" if names else ""
        return f"<Detections: {len(self)} on {self.width} x {self.height}{found}>"

    def __getitem__(self, rows: Any) -> "Detections":
        if isinstance(rows, int | np.integer):
            rows = [int(rows)]
        chosen = np.arange(len(self))[rows]
        columns = ("boxes", "scores", "class_ids", "proposal_levels", "pooled_levels", "keypoints")
        parts: dict[str, Any] = {name: getattr(self, name) for name in columns}
        parts = {name: part if part is None else part[chosen] for name, part in parts.items()}
        if self.mask_run_lengths is not None:
            parts["mask_run_lengths"] = [self.mask_run_lengths[row] for row in chosen]
        return replace(self, **parts)

    @property
    def category_ids(self) -> np.ndarray:
        """(R,) int64: COCO's id of each one's class, as in the dataset it was trained on."""
        return np.array([*self.categories], dtype=np.int64)[self.class_ids]

    @property
    def class_names(self) -> list[str]:
        """The name of each one's class, R of them."""
        names = list(self.categories.values())
        return [names[number] for number in self.class_ids.tolist()]

    @property
    def masks(self) -> np.ndarray | None:
        """(R, height, width) bool, None without masks; made anew at each access."""
        if self.mask_run_lengths is None:
            return None
        if not self.mask_run_lengths:
            return np.zeros((0, self.height, self.width), dtype=bool)
        columns = mask_util.decode(list(self.mask_run_lengths))
        return np.ascontiguousarray(columns.transpose(2, 0, 1)).astype(bool)

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """COCO annotations with scores, which COCO's tools read as results.

        As in the file of ``fpn-ext predict``: ``bbox`` is XYWH, masks are compressed run lengths,
        ``keypoints`` are in COCO's pixel numbers, ``proposal_level`` and ``pooled_level`` are
        added where known.

        Args:
            image_id: of the picture in the dataset.
        """
        found = annotations_of(self.to_instances(), [*self.categories])
        return [{"image_id": image_id, **annotation} for annotation in found]

    def to_supervision(self) -> Any:
        """A ``supervision.Detections``, class names and levels in its ``data``.

        Raises:
            ImportError: supervision is not installed; with the line that installs it.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError(
                f"to_supervision() needs supervision, which is not there: {INSTALL_SUPERVISION}"
            ) from error
        levels = {"proposal_level": self.proposal_levels, "pooled_level": self.pooled_levels}
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            mask=self.masks,
            confidence=self.scores.copy(),
            class_id=self.class_ids.astype(int),
            data={
                "class_name": np.array(self.class_names, dtype=str),
                **{name: column for name, column in levels.items() if column is not None},
            },
        )

    def to_instances(self) -> Instances:
        """Detectron2's ``Instances``, on CPU, as its model gives them."""
        found = Instances((self.height, self.width))
        found.pred_boxes = Boxes(torch.from_numpy(self.boxes.copy()))
        found.scores = torch.from_numpy(self.scores.copy())
        found.pred_classes = torch.from_numpy(self.class_ids.copy())
        columns = {
            "proposal_level": self.proposal_levels,
            "pooled_level": self.pooled_levels,
            "pred_keypoints": self.keypoints,
            "pred_masks": self.masks,
        }
        for name, column in columns.items():
            if column is not None:
                found.set(name, torch.from_numpy(column.copy()))
        return found

    def draw(self, scale: float = 1.0, label_levels: bool = False) -> Image.Image:
        """The picture with boxes, coloured by class, and masks and keypoints where there are.

        A picture given as a path is read again; of one given as an array, what it holds now is
        drawn on, and it is left as it is.

        Args:
            scale: size of the drawing relative to the picture.
            label_levels: write ``p3>p4`` on each box, proposed by P3 and pooled from P4, and
                colour it by the second.

        Raises:
            OSError: the picture was a file, and cannot be read any more.
            ValueError: the detections came without a picture.
        """
        if self.read_rgb is None:
            raise ValueError("these detections came without a picture to draw on")
        names = list(self.categories.values())
        color_by: ColorBy = "level" if label_levels else "class"
        found = self.to_instances()
        return draw_detections(self.read_rgb(), found, names, scale, label_levels, color_by)


def _run_lengths(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Compressed run lengths of (R, H, W) masks: a byte where a full mask has a thousand."""
    return [mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
