"""Region proposals from the pyramid: Detectron2's RPN, decoding only what it keeps.

On every level the RPN scores some 200 000 anchors and keeps 1000. Detectron2 decodes all boxes and
sorts all scores first, and looks for overlaps among all that it keeps of the levels, though 1000 in
all are asked for. Here the best scores are picked first, only their boxes are decoded, and overlaps
are looked for among the best until enough are found. The proposals are the same, bit for bit; where
scores are equal, neither says which comes first.
"""

import copy

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, Instances
from torch import nn

# Overlaps are looked for among this many times the proposals asked for, and at least so many boxes
# (below 1000, torchvision's batched_nms on CPU takes another route, with another rounding).
PREFIX_FACTOR = 2
SMALLEST_PREFIX = 2000


@PROPOSAL_GENERATOR_REGISTRY.register()
class PyramidRPN(RPN):
    """Detectron2's RPN with a quicker way from scores and deltas to proposals.

    Constructor, head, sampling and losses are Detectron2's, as are the names of the parameters.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        arguments = super().from_config(cfg, input_shape)
        for module in arguments["head"].modules():
            # What a convolution hands to its own activation, nobody else ever reads.
            if isinstance(module, Conv2d) and isinstance(module.activation, nn.ReLU):
                module.activation.inplace = True
        return arguments

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
            One Instances per image with ``proposal_boxes`` and ``objectness_logits``.

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
        """Detectron2's clipping, dropping of empty boxes, suppression per level, and cut."""
        return find_top_rpn_proposals(
            boxes,
            scores,
            image_sizes,
            self.nms_thresh,
            self.pre_nms_topk[self.training],
            self.post_nms_topk[self.training],
            self.min_box_size,
            self.training,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        # TorchScript cannot follow super(); the parent gives the same proposals.
        scriptable = copy.copy(self)
        scriptable.__class__ = RPN
        return scriptable
