"""The control of DeepPCB: Detectron2's pyramid over a network of a library."""

import importlib.util

import fpn_ext
import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone.fpn import FPN

CONFIG = "configs/deeppcb/faster_rcnn_efficientnet_lite0_FPN.yaml"
PARTS = {
    "BACKBONE": "Detectron2Pyramid",
    "ANCHOR_GENERATOR": "DefaultAnchorGenerator",
    "PROPOSAL_GENERATOR": "RPN",
    "ROI_HEADS": "StandardROIHeads",
}


RANDOM = ("MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS", "", "MODEL.FPN_EXT.KEEP_PIXELS", True)


def config(file, *opts):
    cfg = fpn_ext.load_config(file, [*RANDOM, *opts])
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_the_control_differs_in_its_components_alone():
    ours, control = config(CONFIG), config(CONFIG.replace(".yaml", "_builtin.yaml"))
    for part, name in PARTS.items():
        assert control.MODEL[part].NAME == name != ours.MODEL[part].NAME
        control.MODEL[part].NAME = ours.MODEL[part].NAME
    control.OUTPUT_DIR = ours.OUTPUT_DIR
    assert control == ours


needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)


@pytest.mark.parametrize(
    "bottom_up",
    [pytest.param("timm/tf_efficientnet_lite0", marks=needs_timm), "torchvision/resnet18"],
)
def test_the_same_seed_gives_the_same_model(bottom_up):
    states, features = [], []
    for name in ("", "_builtin"):
        file = CONFIG.replace(".yaml", f"{name}.yaml")
        cfg = config(file, "MODEL.FPN_EXT.BOTTOM_UP", bottom_up, "MODEL.FPN_EXT.NUMERICS", "exact")
        torch.manual_seed(1)
        model = build_model(cfg).eval()
        states.append(model.state_dict())
        torch.manual_seed(2)
        with torch.no_grad():
            features.append(model.backbone(torch.randn(1, 3, 64, 96)))
    assert isinstance(model.backbone, FPN)
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert list(features[0]) == ["p2", "p3", "p4", "p5", "p6"]
    for level, value in features[0].items():
        assert torch.equal(value, features[1][level]), level


@needs_timm
def test_an_unknown_network():
    cfg = config(CONFIG, "MODEL.BACKBONE.NAME", "Detectron2Pyramid")
    cfg.MODEL.FPN_EXT.BOTTOM_UP = "timm/tf_efficientnet_light0"
    with pytest.raises(ValueError, match="tf_efficientnet_lite0"):
        build_backbone(cfg)
