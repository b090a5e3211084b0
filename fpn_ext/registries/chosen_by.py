"""Which key of a config chooses which of Detectron2's components."""

from typing import Any, NamedTuple

from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
)


class Choice(NamedTuple):
    """What a key names.

    Attributes:
        registry: of the names.
        node: of ``MODEL``, which the architecture must read for the key to count; "" for none.
    """

    registry: Any
    node: str


CHOSEN_BY = {
    "MODEL.META_ARCHITECTURE": Choice(META_ARCH_REGISTRY, ""),
    "MODEL.BACKBONE.NAME": Choice(BACKBONE_REGISTRY, ""),
    "MODEL.ANCHOR_GENERATOR.NAME": Choice(ANCHOR_GENERATOR_REGISTRY, ""),
    "MODEL.PROPOSAL_GENERATOR.NAME": Choice(PROPOSAL_GENERATOR_REGISTRY, "RPN"),
    "MODEL.RPN.HEAD_NAME": Choice(RPN_HEAD_REGISTRY, "RPN"),
    "MODEL.ROI_HEADS.NAME": Choice(ROI_HEADS_REGISTRY, "ROI_HEADS"),
    "MODEL.ROI_BOX_HEAD.NAME": Choice(ROI_BOX_HEAD_REGISTRY, "ROI_HEADS"),
    "MODEL.ROI_MASK_HEAD.NAME": Choice(ROI_MASK_HEAD_REGISTRY, "ROI_HEADS"),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": Choice(ROI_KEYPOINT_HEAD_REGISTRY, "ROI_HEADS"),
}
