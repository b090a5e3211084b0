"""The network under the pyramid: C2..C5, from Detectron2, torchvision or timm."""

from .. import components as components
