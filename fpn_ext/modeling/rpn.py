"""Region proposals from the pyramid: Detectron2's RPN, decoding only what it keeps.

On every level the RPN scores some 200 000 anchors and keeps 1000. Detectron2 decodes all boxes and
sorts all scores first, and looks for overlaps among all that it keeps of the levels, though 1000 in
all are asked for. Here the best scores are picked first, only their boxes are decoded, and overlaps
are looked for among the best until enough are found. The proposals are the same, bit for bit; where
scores are equal, neither says which comes first. Detectron2 forgets which level a proposal is of;
here it can be kept.
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

# Overlaps are looked for among this many times the proposals asked for, and at least so many boxes
# (below 1000, torchvision's batched_nms on CPU takes another route, with another rounding).
PREFIX_FACTOR = 2
SMALLEST_PREFIX = 2000

# The proposal_level of a box that no level proposed: ground truth among the proposals of training.
NO_LEVEL = -1


@PROPOSAL_GENERATOR_REGISTRY.register()
class PyramidRPN(RPN):
    """Detectron2's RPN with a quicker way from scores and deltas to proposals.

    Head, sampling and losses are Detectron2's, as are the names of the parameters. Proposals are
    bit-equal to Detectron2's, but for the order of those of one score: v0.6 sorts where this, as
    main, calls ``topk``, and torch defines the order of equal numbers for neither.

    With ``levels``, every proposal has a field ``proposal_level``, (R,) int64: the level k of the
    map that proposed it. The ground truth that RoI heads add to the proposals of training has
    ``NO_LEVEL`` there. TorchScript and tracing know no such field.

    Args:
        levels: level k of each of ``in_features``; empty for proposals without the field.
        **kwargs: of Detectron2's RPN.

    Raises:
        ValueError: another number of ``levels`` than of ``in_features``.
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
            # What a convolution hands to its own activation, nobody else ever reads.
            if isinstance(module, Conv2d) and isinstance(module.activation, nn.ReLU):
                module.activation.inplace = True
        return arguments

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """As the parent's; with ``levels``, ground truth gets the field ``proposal_level``, too."""
        if self.levels and gt_instances is not None:
            # RoI heads put the ground truth among the proposals, and want the same fields there.
            for targets in gt_instances:
                device = targets.gt_boxes.device
                targets.proposal_level = torch.full((len(targets),), NO_LEVEL, device=device)
        return super().forward(images, features, gt_instances)

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """The best proposals of each image, highest score first.

        Args:
            anchors: of each of the L levels, (A_i,) boxes, XYXY in pixels of the network input.
            pred_objectness_logits: of each level, (N, A_i).
            pred_anchor_deltas: of each level, (N, A_i, 4), as ``box2box_transform`` reads them.
            image_sizes: (height, width) of each of the N images before padding.

        Returns:
            One Instances per image with ``proposal_boxes`` and ``objectness_logits``, and
            ``proposal_level`` where levels are kept and all maps are given.

        Raises:
            FloatingPointError: in training, a score or box that is NaN or infinite.
        """
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return super().predict_proposals(
                anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
            )
        # Proposals are taken as fixed by what follows: no gradient goes through their boxes.
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
        """(N, A, 4) deltas and an (N, k) choice of them -> (N, k, 4) boxes."""
        chosen = torch.gather(deltas, 1, index[:, :, None].expand(-1, -1, 4))
        boxes = self.box2box_transform.apply_deltas(
            chosen.reshape(-1, 4), anchors.tensor[index.flatten()]
        )
        return boxes.view(*index.shape, 4)

    def _first_without_overlaps(
        self, boxes: list[torch.Tensor], scores: list[torch.Tensor], image_size: tuple[int, int]
    ) -> list[Instances]:
        """:meth:`_without_overlaps` of one image, looking only as far down as it must.

        Non-maximum suppression goes from the highest score down, and what comes later never
        changes what came first: if the best m boxes leave as many as are asked for, these are it.
        """
        wanted = self.post_nms_topk[self.training]
        total = sum(s.shape[1] for s in scores)
        prefix = max(PREFIX_FACTOR * wanted, SMALLEST_PREFIX)
        # What is not finite, wherever it stands, is Detectron2's to answer: drop it, or raise.
        if prefix < total and all(b.isfinite().all() for b in boxes):
            lowest = torch.cat(scores, dim=1).topk(prefix, sorted=False).values.min()
            # All boxes of that score, too. With a NaN among the scores there is none.
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
        """(N, k_i, 4) boxes and (N, k_i) scores of each level -> the proposals of N images."""
        map_index = torch.cat(
            [torch.full((b.shape[1],), i, device=b.device) for i, b in enumerate(boxes)]
        )
        all_boxes, all_scores = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
        # Asked for some of its maps alone, nobody knows for which.
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
        """The second half of Detectron2's ``find_top_rpn_proposals``, of one image.

        Boxes are clipped, empty ones dropped, those that overlap a better one of the same map
        suppressed, and the best kept.
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
        # TorchScript cannot follow super(); the parent gives the same proposals.
        scriptable = copy.copy(self)
        scriptable.__class__ = RPN
        return scriptable
