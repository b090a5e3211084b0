"""An exported detector beside the one in PyTorch: the same pictures, and what each finds."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork
from detectron2.structures import Boxes, Instances

from ..reporting.measuring import markdown_table
from .formats import Run

# The largest difference of a detection that counts as the same: pixels, probabilities, and logits
# relative to the largest.
BOXES = 0.1
SCORES = 1e-3
MASKS = 1e-2
HEATMAPS = 1e-3
# Detections that only one side has, because two scores or an overlap and its threshold differ by
# less than rounding: at most this share. Those at the lowest scores that were kept are not counted.
MOST_UNPAIRED = 0.01

Found = dict[str, np.ndarray]


class Row(NamedTuple):
    """The comparison of one batch.

    Attributes:
        what: of the pictures.
        size: height and width.
        batch: number of pictures.
        expected: detections of the model in PyTorch.
        found: detections of the file.
        unpaired: detections that only one of them has.
        boxes: largest difference of a coordinate in pixels.
        scores: of a probability (an RPN's objectness logits: relative to the largest).
        masks: of a mask's probability, or of keypoint heatmaps relative to the largest; None
            without.
    """

    what: str
    size: tuple[int, int]
    batch: int
    expected: int
    found: int
    unpaired: int
    boxes: float
    scores: float
    masks: float | None

    @property
    def is_equal(self) -> bool:
        most = int(MOST_UNPAIRED * max(self.expected, self.found))
        return (
            self.unpaired <= most
            and self.boxes <= BOXES
            and self.scores <= SCORES
            and (self.masks or 0.0) <= MASKS
        )


def table(rows: Sequence[Row]) -> str:
    """The comparison as Markdown."""
    header = ["pictures", "size", "PyTorch", "file", "unpaired", "boxes, px", "scores", "masks"]
    lines = [
        [
            f"{row.batch} x {row.what}",
            "x".join(map(str, row.size)),
            str(row.expected),
            str(row.found),
            str(row.unpaired),
            *("-" if x is None else f"{x:.1e}" for x in (row.boxes, row.scores, row.masks)),
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def compared(
    what: str, model: Any, run: Run, outputs: Sequence[str], arrays: Sequence[np.ndarray]
) -> Row:
    """Run a batch through both, and pair what they find.

    Args:
        model: in PyTorch, in eval mode on the CPU.
        run: the file.
        outputs: names of what it gives.
        arrays: its inputs: images (N, C, H, W), and for Fast R-CNN proposals (N, P, 4).
    """
    expected = in_pytorch(model, arrays)
    found = dict(zip(outputs, run(*arrays), strict=True))
    assert expected.keys() == found.keys(), (expected.keys(), found.keys())
    pairs, unpaired = _paired(expected, found)
    score = "scores" if "scores" in found else "objectness_logits"
    differences = {name: _difference(expected, found, name, pairs) for name in found}
    if score == "objectness_logits":
        differences[score] /= max(1.0, np.abs(expected[score]).max(initial=0))
    masks: float | None = None
    for name, relative_to in (("masks", 1.0), ("keypoint_heatmaps", None)):
        if name in found:
            largest = relative_to or max(1.0, np.abs(expected[name]).max(initial=0))
            scale = 1.0 if name == "masks" else MASKS / HEATMAPS
            masks = max(masks or 0.0, differences[name] / largest * scale)
    size = arrays[0].shape[2:]
    return Row(
        what,
        (size[0], size[1]),
        len(arrays[0]),
        len(expected["boxes"]),
        len(found["boxes"]),
        unpaired,
        differences["boxes"],
        differences[score],
        masks,
    )


def in_pytorch(model: Any, arrays: Sequence[np.ndarray]) -> Found:
    """What a model finds on a batch of one size, as an exported graph gives it.

    Detectron2's own inference, picture by picture.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for number, pixels in enumerate(arrays[0]):
        height, width = pixels.shape[1:]
        entry: dict[str, Any] = {
            "image": torch.from_numpy(pixels),
            "height": height,
            "width": width,
        }
        if len(arrays) > 1:
            boxes = Boxes(torch.from_numpy(arrays[1][number]))
            boxes = boxes[boxes.nonempty()]
            logits = torch.ones(len(boxes))
            entry["proposals"] = Instances(
                (height, width), proposal_boxes=boxes, objectness_logits=logits
            )
        with torch.no_grad():
            result = _inferred(model, entry)
        fields = result.get_fields()
        if isinstance(model, ProposalNetwork):
            one = {
                "boxes": fields["proposal_boxes"].tensor,
                "objectness_logits": fields["objectness_logits"],
            }
        else:
            one = {
                "boxes": fields["pred_boxes"].tensor,
                "scores": fields["scores"],
                "classes": fields["pred_classes"],
            }
        one["image"] = torch.full((len(result),), number)
        if "pred_masks" in fields:
            one["masks"] = fields["pred_masks"][:, 0]
        if "pred_keypoint_heatmaps" in fields:
            one["keypoint_heatmaps"] = fields["pred_keypoint_heatmaps"]
        for name, value in one.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def _inferred(model: Any, entry: dict[str, Any]) -> Instances:
    if isinstance(model, GeneralizedRCNN):  # masks and heatmaps before they are pasted
        result = model.inference([entry], do_postprocess=False)[0]
        return result[result.pred_boxes.nonempty()]
    (output,) = model([entry])
    return output["proposals"] if isinstance(model, ProposalNetwork) else output["instances"]


def _paired(expected: Found, found: Found) -> tuple[np.ndarray, int]:
    """(K, 2) rows of the same detection, and how many have no other."""
    score = "scores" if "scores" in found else "objectness_logits"
    pairs: list[np.ndarray] = []
    unpaired = 0
    for image in np.union1d(expected["image"], found["image"]):
        a, b = (np.flatnonzero(side["image"] == image) for side in (expected, found))
        apart = np.full((len(a), len(b)), np.inf)
        if len(a) and len(b):
            apart = np.abs(expected["boxes"][a][:, None] - found["boxes"][b][None]).max(axis=2)
            if "classes" in found:
                apart[expected["classes"][a][:, None] != found["classes"][b][None]] = np.inf
        # Several may have one box, where boxes are clipped: the score tells which is which.
        scores = np.abs(expected[score][a][:, None] - found[score][b][None])
        unlike = np.where(apart <= BOXES, apart / BOXES + scores / SCORES, np.inf)
        left_a, left_b = np.ones(len(a), bool), np.ones(len(b), bool)
        for i in range(len(a)):
            j = int(np.argmin(np.where(left_b, unlike[i], np.inf))) if len(b) else 0
            if len(b) and left_b[j] and np.isfinite(unlike[i, j]):
                pairs.append(np.array([a[i], b[j]]))
                left_a[i] = left_b[j] = False
        # What is at the lowest score of a list that is full depends on the last digit.
        for side, rows, left in ((expected, a, left_a), (found, b, left_b)):
            lowest = side[score][rows].min(initial=np.inf)
            unpaired += int((side[score][rows[left]] > lowest + SCORES).sum())
        if min(len(a), len(b)) == 0:
            unpaired = max(unpaired, len(a) + len(b))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2), unpaired


def _difference(expected: Found, found: Found, name: str, pairs: np.ndarray) -> float:
    a = expected[name][pairs[:, 0]].astype(np.float64)
    b = found[name][pairs[:, 1]].astype(np.float64)
    if a.shape != b.shape:
        return float("inf")
    return float(np.abs(a - b).max(initial=0.0))


def with_many(model: Any) -> Any:
    """A copy of a model that gives up to a thousand detections per image, whatever their scores."""
    model = copy.deepcopy(model)
    if isinstance(model, GeneralizedRCNN):
        model.roi_heads.box_predictor.test_score_thresh = 0.0
        model.roi_heads.box_predictor.test_topk_per_image = 1000
    elif isinstance(model, ProposalNetwork):
        model.proposal_generator.post_nms_topk[False] = 1000
    else:
        model.test_score_thresh = 0.0
        model.max_detections_per_image = 1000
    return model


def with_none(model: Any) -> Any:
    """A copy of a model that finds nothing: no proposal is large enough, no score high enough."""
    model = copy.deepcopy(model)
    rpn = getattr(model, "proposal_generator", None)
    if rpn is not None:
        rpn.min_box_size = float("inf")
    elif isinstance(model, GeneralizedRCNN):
        model.roi_heads.box_predictor.test_score_thresh = 1.0
    else:
        model.test_score_thresh = 1.0
    return model
