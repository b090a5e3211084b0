"""Region proposals from the pyramid: Detectron2's RPN, decoding only what it keeps.

On each level the RPN scores up to some 200 000 anchors and keeps 1000. Detectron2 decodes all boxes
and sorts all scores first, then runs NMS on the candidates of all levels, though only 1000 in total
are kept. Here the top scores are selected first, only their boxes are decoded, and NMS runs on the
best of them, on all only if too few survive. The proposals are bit-identical; the order of equal
scores is undefined in both. Detectron2 drops the level a proposal came from; here it can be kept.
In training, anchors are matched to ground truth in bounded memory, however many objects there are.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, batched_nms
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from ..exporting import records_a_graph
from ..kernels.box_matching import match_boxes
from ..keys import declare, own_keys
from ..levels import nearest_level

declare(
    "MODEL.FPN_EXT.KEEP_LEVELS",
    False,
    "Give every proposal a field proposal_level, the level k that proposed it, and every "
    "detection that of its proposal and pooled_level, the level k that its features were "
    "pooled from.",
    "PyramidRPN",
    "PyramidROIHeads",
)

# NMS runs on this multiple of the proposals wanted, and on at least this many boxes (below 1000,
# torchvision's batched_nms on CPU uses another code path, with other rounding).
PREFIX_FACTOR = 2
SMALLEST_PREFIX = 2000

# The proposal_level of boxes that no level proposed: ground truth among training proposals.
NO_LEVEL = -1


@PROPOSAL_GENERATOR_REGISTRY.register()
class PyramidRPN(RPN):
    """Detectron2's RPN with a faster path from scores and deltas to proposals.

    Head, sampling, losses and parameter names are Detectron2's; anchors are matched to ground truth
    by :func:`~fpn_ext.kernels.box_matching.match_boxes`, with Detectron2's result. Proposals are
    bit-equal to Detectron2's except for the order of equal scores: v0.6 sorts where this, like
    main, calls ``topk``, and torch leaves the order of equal numbers undefined in both.

    With ``levels``, proposals have a field ``proposal_level``, (R,) int64: the level k of the
    feature map that proposed them. Ground truth that RoI heads add to training proposals has
    ``NO_LEVEL``. TorchScript and tracing do not support the field.

    Args:
        levels: level k of each of ``in_features``; empty for proposals without the field.
        **kwargs: of Detectron2's RPN.

    Raises:
        ValueError: ``levels`` and ``in_features`` differ in length.
    """

    @configurable
    def __init__(self, *, levels: Sequence[int] = (), **kwargs: Any):
        super().__init__(**kwargs)
        if levels and len(levels) != len(self.in_features):
            raise ValueError(
                f"levels must be one for each of the {len(self.in_features)} maps of in_features "
                f"(MODEL.RPN.IN_FEATURES), got {list(levels)}"
            )
        self.levels = list(levels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        arguments = super().from_config(cfg, input_shape)
        if own_keys(cfg).KEEP_LEVELS:
            strides = [input_shape[name].stride for name in cfg.MODEL.RPN.IN_FEATURES]
            arguments["levels"] = [nearest_level(stride) for stride in strides]
        for module in arguments["head"].modules():
            # Nothing but its activation reads a convolution's output.
            if isinstance(module, Conv2d) and isinstance(module.activation, nn.ReLU):
                module.activation.inplace = True
        return arguments

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """As the parent's; with ``levels``, ground truth also gets ``proposal_level``."""
        if self.levels and gt_instances is not None:
            # RoI heads append ground truth to the proposals, which needs the same fields.
            for targets in gt_instances:
                device = targets.gt_boxes.device
                targets.proposal_level = torch.full((len(targets),), NO_LEVEL, device=device)
        return super().forward(images, features, gt_instances)

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The anchors that are trained on, and the ground truth each is matched to.

        Args:
            anchors: per level, (A_i,) boxes, XYXY in pixels of the network input.
            gt_instances: per image, ``gt_boxes`` (M_n,) in the same coordinates.

        Returns:
            Per image, (A,) int8 labels of the anchors of all levels (1 object, 0 background, -1 not
            sampled), and (A, 4) boxes, undefined where the label is not 1.
        """
        all_anchors = Boxes.cat(anchors)
        labels, boxes = [], []
        for objects in gt_instances:
            matches, label = match_boxes(objects.gt_boxes, all_anchors, self.anchor_matcher)
            if self.anchor_boundary_thresh >= 0:
                inside = all_anchors.inside_box(objects.image_size, self.anchor_boundary_thresh)
                label[~inside] = -1
            labels.append(self._subsample_labels(label))
            none = torch.zeros_like(all_anchors.tensor)
            boxes.append(objects.gt_boxes.tensor[matches] if len(objects) else none)
        return labels, boxes

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """The best proposals of each image, highest score first.

        Args:
            anchors: per level (L of them), (A_i,) boxes, XYXY in pixels of the network input.
            pred_objectness_logits: per level, (N, A_i).
            pred_anchor_deltas: per level, (N, A_i, 4), to be decoded by ``box2box_transform``.
            image_sizes: (height, width) of each of the N images before padding.

        Returns:
            One Instances per image with ``proposal_boxes`` and ``objectness_logits``, and
            ``proposal_level`` if levels are kept and all maps are given.

        Raises:
            FloatingPointError: in training, a score or box that is NaN or infinite.
        """
        if records_a_graph():
            return super().predict_proposals(
                anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
            )
        # Proposals are constants to the RoI heads: no gradient flows through their boxes.
        with torch.no_grad():
            boxes, scores = [], []
            for level_anchors, logits, deltas in zip(
                anchors, pred_objectness_logits, pred_anchor_deltas, strict=True
            ):
                count = min(self.pre_nms_topk[self.training], logits.shape[1])
                best, index = logits.topk(count, dim=1)
                boxes.append(self._decode(level_anchors, deltas, index))
                scores.append(best)
            if scores[0].device.type != "cpu":
                return self._without_overlaps(boxes, scores, image_sizes)
            proposals = []
            for n, image_size in enumerate(image_sizes):
                one = slice(n, n + 1)
                proposals += self._first_without_overlaps(
                    [b[one] for b in boxes], [s[one] for s in scores], image_size
                )
            return proposals

    def _decode(self, anchors: Boxes, deltas: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """(N, A, 4) deltas and (N, k) indices into them -> (N, k, 4) boxes."""
        chosen = torch.gather(deltas, 1, index[:, :, None].expand(-1, -1, 4))
        boxes = self.box2box_transform.apply_deltas(
            chosen.reshape(-1, 4), anchors.tensor[index.flatten()]
        )
        return boxes.view(*index.shape, 4)

    def _first_without_overlaps(
        self, boxes: list[torch.Tensor], scores: list[torch.Tensor], image_size: tuple[int, int]
    ) -> list[Instances]:
        """:meth:`_without_overlaps` for one image, on a prefix if that suffices.

        NMS proceeds from the highest score down, and later boxes never affect earlier ones: if
        enough of the best m boxes survive, they are the result.
        """
        wanted = self.post_nms_topk[self.training]
        total = sum(s.shape[1] for s in scores)
        prefix = max(PREFIX_FACTOR * wanted, SMALLEST_PREFIX)
        # Non-finite values anywhere are handled as in Detectron2: dropped, or an error.
        if prefix < total and all(b.isfinite().all() for b in boxes):
            lowest = torch.cat(scores, dim=1).topk(prefix, sorted=False).values.min()
            # Includes ties at the lowest score. If a score is NaN, counts are 0.
            counts = [int((s >= lowest).sum()) for s in scores]
            found = self._without_overlaps(
                [b[:, :count] for b, count in zip(boxes, counts, strict=True)],
                [s[:, :count] for s, count in zip(scores, counts, strict=True)],
                [image_size],
            )
            if len(found[0]) == wanted:
                return found
        return self._without_overlaps(boxes, scores, [image_size])

    def _without_overlaps(
        self,
        boxes: list[torch.Tensor],
        scores: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """(N, k_i, 4) boxes and (N, k_i) scores per level -> the proposals of N images."""
        map_index = torch.cat(
            [torch.full((b.shape[1],), i, device=b.device) for i, b in enumerate(boxes)]
        )
        all_boxes, all_scores = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
        # Called with only some of the maps, it cannot tell which.
        levels = self.levels if len(self.levels) == len(boxes) else []
        return [
            self._suppress(all_boxes[n], all_scores[n], map_index, image_size, levels)
            for n, image_size in enumerate(image_sizes)
        ]

    def _suppress(
        self,
        candidates: torch.Tensor,
        scores: torch.Tensor,
        map_index: torch.Tensor,
        image_size: tuple[int, int],
        levels: list[int],
    ) -> Instances:
        """The second half of Detectron2's ``find_top_rpn_proposals``, for one image.

        Clips boxes, drops empty ones, runs NMS within each map and keeps the best.
        """
        finite = candidates.isfinite().all(dim=1) & scores.isfinite()
        if not finite.all():
            if self.training:
                raise FloatingPointError(
                    "Predicted boxes or scores contain Inf/NaN. Training has diverged."
                )
            candidates, scores, map_index = candidates[finite], scores[finite], map_index[finite]
        boxes = Boxes(candidates)
        boxes.clip(image_size)
        sized = boxes.nonempty(threshold=self.min_box_size)
        if not sized.all():
            boxes, scores, map_index = boxes[sized], scores[sized], map_index[sized]
        keep = batched_nms(boxes.tensor, scores, map_index, self.nms_thresh)
        keep = keep[: self.post_nms_topk[self.training]]
        found = Instances(image_size, proposal_boxes=boxes[keep], objectness_logits=scores[keep])
        if levels:
            of_map = torch.tensor(levels, device=map_index.device)
            found.proposal_level = of_map[map_index[keep]]
        return found

    def __prepare_scriptable__(self) -> nn.Module:
        # TorchScript does not support super(); the parent's proposals are the same.
        scriptable = copy.copy(self)
        scriptable.__class__ = RPN
        return scriptable
