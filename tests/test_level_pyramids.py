"""Pyramids with various levels: extra levels on top, gaps, other strides, P1 and P7; export."""

import importlib.util

import fpn_ext
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone, build_model
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fpn_ext.modeling.fpn import FeaturePyramid
from fpn_ext.modeling.top_blocks import (
    TOP_BLOCK_REGISTRY,
    Convolutions,
    ConvolutionsOnC,
    ConvolutionsOnP,
    Subsample,
    Top,
)
from fpn_ext.variants.varied_anchors import VariedAnchorsRPNHead
from torch import nn

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
SMALL = ["MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.DEVICE", "cpu"]
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)


class Strided(Backbone):
    """Maps of any strides, each one convolution on the image: 4 channels, sides rounded up."""

    def __init__(self, strides):
        super().__init__()
        names = [f"map{i}" for i in range(len(strides))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(3, 4, 3, stride=stride, padding=1) for stride in strides
        )
        self._out_features = names
        self._out_feature_strides = dict(zip(names, strides, strict=True))
        self._out_feature_channels = dict.fromkeys(names, 4)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        maps: dict[str, torch.Tensor] = {}
        for i, convolution in enumerate(self.convolutions):
            maps[self._out_features[i]] = convolution(image)
        return maps


def pyramid(strides, **kwargs):
    bottom_up = Strided(strides)
    return FeaturePyramid(
        bottom_up=bottom_up, in_features=bottom_up._out_features, out_channels=4, **kwargs
    )


# Levels on top


def test_subsampling_twice_by_hand():
    p6, p7 = Subsample("p5", num_levels=2)(torch.arange(25.0).reshape(1, 1, 5, 5))
    assert p6.squeeze().tolist() == [[0, 2, 4], [10, 12, 14], [20, 22, 24]]
    assert p7.squeeze().tolist() == [[0, 4], [20, 24]]


def test_convolutions_by_hand():
    """With centre weight 1: every second cell; negative values do not reach P7."""
    block = Convolutions("p5", 1, 1, ["p6", "p7"])
    for parameter in block.parameters():
        parameter.data.zero_()
    block.p6.weight.data[..., 1, 1] = 1
    block.p7.weight.data[..., 1, 1] = 1
    p6, p7 = block(torch.arange(-12.0, 13.0).reshape(1, 1, 5, 5))
    assert p6.squeeze().tolist() == [[-12, -10, -8], [-2, 0, 2], [8, 10, 12]]
    assert p7.squeeze().tolist() == [[0, 0], [8, 12]]
    assert [name for name, _ in block.named_parameters()][::2] == ["p6.weight", "p7.weight"]


def test_what_they_read():
    top = Top(p="p5", c="res5", c_channels=64, out_channels=8, names=["p6", "p7"])
    on_p, on_c, below = ConvolutionsOnP.on(top), ConvolutionsOnC.on(top), Subsample.on(top)
    assert (on_p.in_feature, on_p.p6.in_channels, on_p.p7.in_channels) == ("p5", 8, 8)
    assert (on_c.in_feature, on_c.p6.in_channels, on_c.p7.in_channels) == ("res5", 64, 8)
    assert (below.in_feature, below.num_levels) == ("p5", 2)


@pytest.mark.parametrize("name", ["Subsample", "ConvolutionsOnP", "ConvolutionsOnC"])
def test_top_blocks_from_yaml(name):
    levels = "['p3', 'p4', 'p5', 'p6', 'p7']"
    opts = ["MODEL.FPN_EXT.TOP_BLOCK", name, "MODEL.FPN_EXT.LEVELS", levels]
    backbone = build_backbone(fpn_ext.load_config(DEMO, opts + SMALL))
    assert type(backbone.top_block) is TOP_BLOCK_REGISTRY.get(name)
    assert list(backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    maps = backbone(torch.rand(2, 3, 193, 130))
    assert [tuple(m.shape[2:]) for m in maps.values()][-2:] == [(4, 3), (2, 2)]
    maps["p7"].sum().backward()
    gradients = {n for n, p in backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert ("fpn_output5.weight" in gradients) == (name != "ConvolutionsOnC")


def test_with_the_defaults_p6_is_what_it_was():
    backbone = build_backbone(fpn_ext.load_config(DEMO, SMALL))
    assert type(backbone.top_block) is Subsample and backbone.top_block.num_levels == 1
    assert not [n for n, _ in backbone.named_parameters() if n.startswith("top_block")]


def test_no_level_on_top():
    opts = ["MODEL.FPN_EXT.LEVELS", "['p2', 'p3', 'p4', 'p5']", *SMALL]
    assert build_backbone(fpn_ext.load_config(DEMO, opts)).top_block is None


def test_an_unknown_top_block():
    cfg = fpn_ext.load_config(DEMO, ["MODEL.FPN_EXT.TOP_BLOCK", "Subsampling"])
    with pytest.raises(ValueError, match=r"TOP_BLOCK: 'Subsampling' .*nearest valid: 'Subsample'"):
        fpn_ext.check_config(cfg)


# Gaps and other strides


@pytest.mark.parametrize(
    ("strides", "names", "divisor"),
    [
        ([4, 16, 32], ["p2", "p4", "p5", "p6"], 32),
        ([6, 12, 24], ["ps6", "ps12", "ps24", "ps48"], 24),
        ([2, 6, 18], ["p1", "ps6", "ps18", "ps36"], 18),
        ([4, 6], ["p2", "ps6", "ps12"], 12),
        ([7], ["ps7", "ps14"], 7),
        ([2, 4, 8, 16, 32, 64], ["p1", "p2", "p3", "p4", "p5", "p6", "p7"], 64),
    ],
)
@pytest.mark.parametrize("size", [(801, 1333), (95, 64)])
def test_pyramids_of_any_strides_on_images_of_any_size(strides, names, divisor, size):
    fpn = pyramid(strides, top_block=Subsample(names[len(strides) - 1]))
    assert list(fpn.output_shape()) == names
    assert fpn.size_divisibility == divisor
    with torch.no_grad():
        maps = fpn(torch.rand(1, 3, *size))
    for name, features in maps.items():
        stride = fpn.output_shape()[name].stride
        assert features.shape == (1, 4, -(-size[0] // stride), -(-size[1] // stride))


def test_a_gap_by_hand():
    """A cell of P4 is added to the 4 x 4 cells of P2 under it; one of stride 18 to 3 x 3 of 6."""
    for strides, ratio in (([4, 16], 4), ([6, 18], 3)):
        fpn = pyramid(strides)
        for convolution in fpn.laterals + fpn.outputs:
            nn.init.zeros_(convolution.weight)
        coarse, fine = fpn.laterals
        coarse.weight.data[:, :, 0, 0] = torch.eye(4)
        for output in fpn.outputs:
            output.weight.data[:, :, 1, 1] = torch.eye(4)
        fine.bias.data.fill_(100)
        maps = list(fpn(torch.rand(1, 3, 2 * strides[1], 3 * strides[1])).values())
        cells = maps[1].repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)
        torch.testing.assert_close(maps[0], cells + 100)


def test_recorded_and_unrecorded_sums_are_the_same():
    for strides in ([4, 16, 32], [6, 12, 24], [2, 6, 18]):
        fpn, image = pyramid(strides), torch.rand(1, 3, 144, 144)
        with torch.no_grad():
            plain = fpn(image)
        for name, recorded in fpn(image).items():
            assert torch.equal(plain[name], recorded)


def test_a_model_of_strides_6_12_24_48():
    """All of it, training and inference, on a bottom-up with custom map names."""
    if "build_sixes" not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY._do_register("build_sixes", lambda cfg, shape: Strided([6, 12, 24]))
    levels = ["ps6", "ps12", "ps24", "ps48"]
    opts = [
        *("MODEL.FPN_EXT.LEVELS", str(levels), "MODEL.FPN_EXT.BOTTOM_UP", "build_sixes"),
        *("MODEL.FPN_EXT.LEVEL_RULE", "StrideRule", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    ]
    cfg = fpn_ext.load_config(DEMO, opts + SMALL)
    fpn_ext.check_config(cfg)
    assert "ps12   s12        12" in fpn_ext.level_table(cfg)
    model = build_model(cfg)
    assert model.backbone.output_shape().keys() == set(levels)
    image = torch.randint(0, 255, (3, 131, 97), dtype=torch.uint8)
    truth = Instances(
        (131, 97),
        gt_boxes=Boxes(torch.tensor([[5.0, 5, 45, 60]])),
        gt_classes=torch.tensor([0]),
    )
    with EventStorage():
        sum(model([{"image": image, "instances": truth}]).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    maps = list(model.backbone(torch.zeros(1, 3, 144, 96)).values())
    anchors = model.proposal_generator.anchor_generator(maps)
    middles = [boxes.get_centers()[::3][:2].tolist() for boxes in anchors]
    assert middles == [[[0, 0], [t, 0]] for t in (6, 12, 24, 48)]
    model.eval()
    with torch.no_grad():
        found = model([{"image": image}])[0]["instances"]
    assert set(found.pooled_level.tolist()) <= {3, 4, 5}


# Different numbers of anchors


def test_an_rpn_head_for_different_numbers_of_anchors():
    head = VariedAnchorsRPNHead(in_channels=8, num_anchors=[3, 6, 3])
    maps = [torch.rand(2, 8, s, s) for s in (8, 4, 2)]
    logits, deltas = head(maps)
    assert [tuple(x.shape[1:]) for x in logits] == [(3, 8, 8), (6, 4, 4), (3, 2, 2)]
    assert [tuple(x.shape[1:]) for x in deltas] == [(12, 8, 8), (24, 4, 4), (12, 2, 2)]
    with torch.no_grad():
        head.objectness_logits["3"].bias.fill_(7)
    changed = [not torch.equal(a, b) for a, b in zip(head(maps)[0], logits, strict=True)]
    assert changed == [True, False, True]


def test_with_one_number_it_is_the_standard_head():
    ours = VariedAnchorsRPNHead(in_channels=8, num_anchors=[3, 3])
    theirs = StandardRPNHead(in_channels=8, num_anchors=3)
    weights = {name.replace(".3.", "."): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    maps = [torch.rand(1, 8, s, s) for s in (8, 4)]
    for mine, its in zip(ours(maps), theirs(maps), strict=True):
        assert all(map(torch.equal, mine, its))
    for name, value in theirs.state_dict().items():
        if name.endswith("weight"):
            assert 0.005 < value.std() < 0.02, "initialised as the standard head is"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("IN_FEATURES", [], r"IN_FEATURES needs|IN_FEATURES need"),
        ("CONV_DIMS", [-1, -1], r"CONV_DIMS must be \[-1\].*got \[-1, -1\]"),
    ],
)
def test_what_that_head_cannot(small_cfg, key, value, message):
    small_cfg.MODEL.RPN[key] = value
    shapes = [ShapeSpec(channels=8, stride=4)] if key == "CONV_DIMS" else []
    with pytest.raises(ValueError, match=message):
        VariedAnchorsRPNHead(small_cfg, shapes)


# Export, on three families


FAMILIES = [
    "build_resnet_backbone",
    "torchvision/mobilenet_v3_small",
    pytest.param("timm/test_resnet", marks=needs_timm),
]
SHAPES = {
    "a level down": ["p1", "p2", "p3", "p4", "p5"],
    "up to P7": ["p3", "p4", "p5", "p6", "p7"],
    "a gap": ["p2", "p4", "p5", "p6"],
    "a single level": ["p4"],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.torchscript
def test_export_and_torchscript(name, shape):
    levels = SHAPES[shape]
    if name == "build_resnet_backbone" and "p1" in levels:
        pytest.skip("its stem has stride 4")
    opts = [
        *("MODEL.FPN_EXT.BOTTOM_UP", name, "MODEL.FPN_EXT.LEVELS", str(levels)),
        *("MODEL.FPN_EXT.TOP_BLOCK", "ConvolutionsOnC" if "p7" in levels else "Subsample"),
        *("MODEL.FPN_EXT.KEEP_PIXELS", "True", *SMALL),
    ]
    backbone = build_backbone(fpn_ext.load_config(DEMO, opts)).eval()
    image = torch.rand(1, 3, 97, 131)
    with torch.no_grad():
        expected = backbone(image)
        scripted = torch.jit.script(backbone)(image)
        exported = torch.export.export(backbone, (image,)).module()(image)
    assert list(expected) == levels == list(scripted) == list(exported)
    for level, features in expected.items():
        assert features.shape[2:] == tuple(-(-side // 2 ** int(level[1])) for side in (97, 131))
        torch.testing.assert_close(scripted[level], features, rtol=0, atol=0)
        torch.testing.assert_close(exported[level], features)
