"""Whole detectors as modules of tensors, for exporters: images in, detections out.

Each stage is that of Detectron2's inference, in the same order and with the same numbers, written
without what a graph cannot hold: lists of Instances, branches on values, loops over images. Where
the number of boxes depends on the picture, rows that are not there have the score ``ABSENT``, and
are left out before boxes are pooled and at the end.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork, StandardROIHeads
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.roi_heads import (
    FastRCNNOutputLayers,
)
from torch import nn

from ..modeling.roi_heads import ChunkedROIHeads, LevelKeepingOutputLayers, PyramidROIHeads
from .pooling import LevelMappedRoIAlign
from .rows import (
    ABSENT,
    above,
    absent,
    by_anchor,
    clipped,
    decoded,
    larger_than,
    rois,
    rows_of,
    top,
)
from .stages import (
    Detections,
    KeypointBranch,
    MaskBranch,
    Proposals,
    checked_limit,
    checked_nms_threshold,
    checked_score_threshold,
)
from .suppression import Suppression, as_batched_nms_moves_them


class DetectorGraph(nn.Module):
    """Normalisation, padding and the backbone; subclasses add what is found on its maps.

    Called with ``images``, (N, C, H, W) float32 in the channels of ``INPUT.FORMAT`` and its range
    of values, any H and W, resized as for testing; all N have the size.

    Args:
        model: a Detectron2 model in eval mode; its modules are taken, and altered.
        suppression: how a runtime suppresses overlapping boxes.

    Attributes:
        inputs (tuple): names of the inputs.
        outputs (tuple): names of the outputs.
    """

    inputs: tuple[str, ...] = ("images",)
    outputs: tuple[str, ...] = ()
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, model: Any, suppression: Suppression):
        super().__init__()
        for module in model.modules():
            if type(module) is Conv2d:
                module.__class__ = _Conv2d
            elif _is_same_convolution(module):
                module.__class__ = _Conv2dSame
        self.backbone = model.backbone
        self.suppression = suppression
        self.register_buffer("pixel_mean", model.pixel_mean.detach().clone())
        self.register_buffer("pixel_std", model.pixel_std.detach().clone())
        self.divisor = max(int(model.backbone.size_divisibility), 1)
        constraints = getattr(model.backbone, "padding_constraints", {})
        if constraints.get("square_size"):
            raise ValueError(
                "cannot export a backbone that needs square inputs (padding_constraints "
                f"{dict(constraints)}): height and width of an exported file are free"
            )

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The backbone's maps of images that are padded at the right and at the bottom."""
        normalised = (images - self.pixel_mean) / self.pixel_std
        height, width = images.shape[-2:]
        # Sums, not remainders: torch.export then knows that the divisor divides the padded sides,
        # and every stride after it stays a simple expression.
        below, right = (_next_multiple(side, self.divisor) - side for side in (height, width))
        return self.backbone(F.pad(normalised, [0, right, 0, below]))


def _next_multiple(side: int, divisor: int) -> int:
    return (side + divisor - 1) // divisor * divisor


class _Conv2d(Conv2d):
    """Detectron2's, which asks whether its input is empty: torch.export cannot tell."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.Conv2d.forward(self, x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class _Conv2dSame(nn.Conv2d):
    """timm's, of TensorFlow's SAME padding, by whole numbers.

    timm divides and rounds up, which torch.export would carry on into every shape after it, growing
    with each stride: a detector on EfficientNet was not exported within ten minutes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = []
        axes = zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        for side, kernel, stride, dilation in reversed(list(axes)):
            missing = _next_multiple(side, stride) - stride + _extent(kernel, dilation) - side
            padding += [missing // 2, missing - missing // 2]
        return self._conv_forward(F.pad(x, padding), self.weight, self.bias)


def _is_same_convolution(module: nn.Module) -> bool:
    """Whether it is timm's, and as wide as its stride: then its padding is never negative."""
    named = type(module).__name__ == "Conv2dSame" and type(module).__module__.startswith("timm.")
    if not (named and isinstance(module, nn.Conv2d)):
        return False
    axes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    return all(_extent(kernel, dilation) >= stride for kernel, stride, dilation in axes)


def _extent(kernel: int, dilation: int) -> int:
    return (kernel - 1) * dilation + 1


class ProposalGraph(DetectorGraph):
    """An RPN alone: the proposals of N images, one after the other, the best of each first.

    Outputs, of R proposals: ``boxes`` (R, 4) float32 XYXY in pixels of ``images``,
    ``objectness_logits`` (R,) float32, ``image`` (R,) int64, the image of each.
    """

    outputs = ("boxes", "objectness_logits", "image")

    def __init__(self, model: Any, suppression: Suppression):
        super().__init__(model, suppression)
        self.proposals = Proposals(model.proposal_generator, suppression)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        boxes, logits, present = self.proposals(self.maps(images), images.shape[-2:])
        image, rows = torch.nonzero(present, as_tuple=True)
        return boxes[image, rows], logits[image, rows], image


class RCNNGraph(DetectorGraph):
    """Faster, Mask and Keypoint R-CNN, and Fast R-CNN, whose boxes are an input.

    Fast R-CNN's ``proposals`` are (N, P, 4) float32 XYXY in pixels of ``images``; rows without area
    fill an image that has fewer. P may be 0.

    Outputs, of D detections of all images, one image after the other, the best of each first:
    ``boxes`` (D, 4) float32 XYXY in pixels of ``images``, ``scores`` (D,) float32, ``classes``
    (D,) int64, ``image`` (D,) int64, the image of each; ``masks`` (D, S, S) float32, probabilities
    in cells of the box; ``keypoint_heatmaps`` (D, K, S, S) float32 logits, likewise.
    """

    outputs = ("boxes", "scores", "classes", "image")

    def __init__(self, model: Any, suppression: Suppression):
        super().__init__(model, suppression)
        heads = _checked_heads(model.roi_heads)
        self.proposals = None
        if model.proposal_generator is None:
            self.inputs = ("images", "proposals")
        else:
            self.proposals = Proposals(model.proposal_generator, suppression)
        self.in_features = list(heads.box_in_features)
        self.box_pooler = LevelMappedRoIAlign(heads.box_pooler)
        self.box_head = heads.box_head
        self.box_predictor = heads.box_predictor
        self.detections = Detections(heads.box_predictor, heads.num_classes, suppression)
        self.branches = nn.ModuleDict()
        if heads.mask_on:
            self.branches["masks"] = MaskBranch(heads)
        if heads.keypoint_on:
            self.branches["keypoint_heatmaps"] = KeypointBranch(heads)
        self.outputs = (*RCNNGraph.outputs, *self.branches)

    def forward(
        self, images: torch.Tensor, proposals: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        maps, size = self.maps(images), images.shape[-2:]
        if self.proposals is not None:
            boxes, _, present = self.proposals(maps, size)
        else:
            assert proposals is not None
            boxes = F.pad(proposals, [0, 0, 0, 1])  # a row at least, for operators that need one
            present = (boxes[:, :, 2] > boxes[:, :, 0]) & (boxes[:, :, 3] > boxes[:, :, 1])

        image, rows = torch.nonzero(present, as_tuple=True)
        regions = rois(image, boxes[image, rows])
        pooled = self.box_pooler([maps[f] for f in self.in_features], regions)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        found, scores, classes, image = self.detections(logits, deltas, boxes, image, rows, size)
        regions = rois(image, found)
        extras = [branch(maps, regions, classes) for branch in self.branches.values()]
        return (found, scores, classes, image, *extras)


class RetinaNetGraph(DetectorGraph):
    """RetinaNet; outputs as :class:`RCNNGraph`'s."""

    outputs = ("boxes", "scores", "classes", "image")

    def __init__(self, model: RetinaNet, suppression: Suppression):
        super().__init__(model, suppression)
        self.in_features = list(model.head_in_features)
        self.head = model.head
        self.anchor_generator = model.anchor_generator
        self.transform = model.box2box_transform
        self.num_classes = model.num_classes
        self.threshold = checked_score_threshold(model.test_score_thresh, "MODEL.RETINANET.")
        self.nms_threshold = checked_nms_threshold(
            model.test_nms_thresh, "MODEL.RETINANET.NMS_THRESH_TEST"
        )
        self.candidates = checked_limit(
            model.test_topk_candidates, "MODEL.RETINANET.TOPK_CANDIDATES_TEST"
        )
        self.limit = checked_limit(model.max_detections_per_image, "TEST.DETECTIONS_PER_IMAGE")

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps, size = self.maps(images), images.shape[-2:]
        levels = [maps[f] for f in self.in_features]
        logits, deltas = self.head(levels)
        anchors = self.anchor_generator(levels)
        boxes, scores, classes = [], [], []
        for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
            probabilities = by_anchor(level_logits, self.num_classes).sigmoid().flatten(1)
            best, index = top(above(probabilities, self.threshold), self.candidates, ABSENT)
            row = torch.div(index, self.num_classes, rounding_mode="floor")
            boxes.append(
                decoded(self.transform, level_anchors.tensor, by_anchor(level_deltas, 4), row)
            )
            scores.append(best)
            classes.append(index % self.num_classes)
        all_boxes, all_scores = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
        all_classes = torch.cat(classes, dim=1)
        present = all_scores > ABSENT
        of_class = all_classes[:, None, :] == torch.arange(self.num_classes)[:, None]
        kept = self.suppression(
            as_batched_nms_moves_them(all_boxes, all_classes, present),
            torch.where(
                of_class, all_scores[:, None], torch.full_like(all_scores[:, None], ABSENT)
            ),
            self.nms_threshold,
        )
        kept_scores = torch.where(kept.any(dim=1), all_scores, absent(all_scores))
        best, index = top(kept_scores, self.limit, ABSENT)
        found = clipped(rows_of(all_boxes, index), size)
        image, rows = torch.nonzero((best > ABSENT) & larger_than(found, 0), as_tuple=True)
        classes_found = all_classes.gather(1, index)
        return found[image, rows], best[image, rows], classes_found[image, rows], image


def detector_graph(model: Any, suppression: Suppression) -> DetectorGraph:
    """The graph of a detector.

    Args:
        model: a GeneralizedRCNN, ProposalNetwork or RetinaNet on the CPU in eval mode, not from
            ``optimize_for_inference``. Not modified.
        suppression: how the runtime of the file suppresses overlapping boxes.

    Raises:
        ValueError: a part of it that cannot be exported.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    if isinstance(model, ProposalNetwork):
        return ProposalGraph(model, suppression)
    if isinstance(model, RetinaNet):
        return RetinaNetGraph(model, suppression)
    if type(model) is GeneralizedRCNN:
        return RCNNGraph(model, suppression)
    raise ValueError(
        f"cannot export a {type(model).__name__}: MODEL.META_ARCHITECTURE must be GeneralizedRCNN, "
        "ProposalNetwork or RetinaNet"
    )


def _checked_heads(heads: Any) -> StandardROIHeads:
    if type(heads) not in (PyramidROIHeads, ChunkedROIHeads):
        raise ValueError(
            f"cannot export {type(heads).__name__}: choose MODEL.ROI_HEADS.NAME PyramidROIHeads, "
            "which has the parameters of StandardROIHeads"
        )
    if type(heads.box_predictor) not in (FastRCNNOutputLayers, LevelKeepingOutputLayers):
        raise ValueError(
            f"cannot export the box predictor {type(heads.box_predictor).__name__}: its inference "
            "may differ from that of FastRCNNOutputLayers"
        )
    return heads
