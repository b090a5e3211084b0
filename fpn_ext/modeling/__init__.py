"""The paper's pyramid, anchors, proposals, Eq. 1 and pooling, RoI heads."""

from .. import components as components
