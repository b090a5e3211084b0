"""`fpn-ext explain`: the worked example of the FPN, and of other pyramids."""

import json

import fpn_ext
import pytest
import torch
from detectron2.modeling import build_anchor_generator, build_model
from fpn_ext.__main__ import main
from fpn_ext.inspection.explain import explain

R_50 = "configs/detectron2/faster_rcnn_R_50_FPN_1x.yaml"
RETINANET = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.FPN_EXT.TOP_BLOCK", "ConvolutionsOnC"),
    *("MODEL.FPN_EXT.LEVELS", '["p3", "p4", "p5", "p6", "p7"]'),
    *("MODEL.RETINANET.IN_FEATURES", '["p3", "p4", "p5", "p6", "p7"]'),
    *("MODEL.RETINANET.NUM_CLASSES", "5"),
]


@pytest.fixture(scope="module")
def r_50():
    """Faster R-CNN on ResNet-50 at 512 x 512, as the blog posts have it."""
    return explain(fpn_ext.load_config(R_50), (512, 512))


def of(cfg, size=(512, 512), *boxes):
    return explain(cfg, size, boxes or (32, 224))


def sizes(maps):
    return {m.name: (m.height, m.width) for m in maps}


def as_printed(table):
    """Rows of a table by their first cell."""
    return {row[0]: row[1:] for row in table.rows}


# The numbers of the posts, on paper.


def test_c2_to_c5_of_resnet_50(r_50):
    rows = [(m.name, m.made_from, m.height, m.stride, m.channels) for m in r_50.bottom_up]
    assert rows == [
        ("c2", "res2", 128, 4, 256),
        ("c3", "res3", 64, 8, 512),
        ("c4", "res4", 32, 16, 1024),
        ("c5", "res5", 16, 32, 2048),
    ]
    assert r_50.size == r_50.padded == (512, 512)


def test_m5_to_m2_each_a_lateral_connection_and_the_map_above(r_50):
    assert [(m.name, m.height, m.width, m.channels) for m in r_50.merged] == [
        *[("m5", 16, 16, 256), ("m4", 32, 32, 256), ("m3", 64, 64, 256), ("m2", 128, 128, 256)]
    ]
    assert [m.made_from for m in r_50.merged] == [
        "1x1 on c5, 2048 to 256 channels",
        "1x1 on c4, 1024 to 256 channels + m5 from 16 x 16 to 32 x 32",
        "1x1 on c3, 512 to 256 channels + m4 from 32 x 32 to 64 x 64",
        "1x1 on c2, 256 to 256 channels + m3 from 64 x 64 to 128 x 128",
    ]


def test_p2_to_p6_of_256_channels(r_50):
    rows = [(m.name, m.made_from, m.height, m.stride, m.channels) for m in r_50.levels]
    assert rows == [
        ("p2", "3x3 on m2", 128, 4, 256),
        ("p3", "3x3 on m3", 64, 8, 256),
        ("p4", "3x3 on m4", 32, 16, 256),
        ("p5", "3x3 on m5", 16, 32, 256),
        ("p6", "Subsample on p5", 8, 64, 256),
    ]


def test_one_scale_of_three_ratios_on_each_level(r_50):
    assert [(a.level, a.sizes, a.per_location) for a in r_50.anchors] == [
        *[("p2", [32], 3), ("p3", [64], 3), ("p4", [128], 3), ("p5", [256], 3), ("p6", [512], 3)]
    ]
    assert {tuple(a.aspect_ratios) for a in r_50.anchors} == {(0.5, 1, 2)}
    assert [a.anchors for a in r_50.anchors] == [3 * side**2 for side in (128, 64, 32, 16, 8)]
    printed = as_printed(r_50.tables()["anchors"])
    assert printed["all"][-2] == "65,472"


def test_multiply_adds_of_the_head_on_a_cell(r_50):
    """A 3x3 convolution of 256 to 256 channels, then 1x1 to 3 scores and 12 deltas."""
    of_a_cell = 9 * 256 * 256 + 256 * (3 + 12)
    assert [a.multiply_adds for a in r_50.anchors] == [
        a.height * a.width * of_a_cell for a in r_50.anchors
    ]


def test_the_anchors_of_table_1():
    """200k on {P_k} and 750k on P2, of an image of 1000 x 800; padded to 1024, a little more."""
    c = explain(fpn_ext.load_config("configs/paper/table1/c.yaml"), (800, 1000))
    cells = 200 * 256 + 100 * 128 + 50 * 64 + 25 * 32 + 13 * 16
    assert sum(a.anchors for a in c.anchors) == 3 * cells
    f = explain(fpn_ext.load_config("configs/paper/table1/f.yaml"), (800, 1000))
    assert [(a.level, a.per_location, a.anchors) for a in f.anchors] == [("p2", 15, 15 * 51_200)]


def test_p1_alone_costs_three_times_the_other_levels():
    """256^2 = 65 536 cells beside 128^2 + 64^2 + 32^2 + 16^2 + 8^2 = 21 824."""
    levels = '["p1", "p2", "p3", "p4", "p5", "p6"]'
    opts = ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/resnet50", "MODEL.FPN_EXT.LEVELS", levels]
    found = explain(fpn_ext.load_config(R_50, opts), (512, 512))
    c1, m1, p1 = found.bottom_up[0], found.merged[-1], found.levels[0]
    assert (c1.name, c1.height, c1.channels) == ("c1", 256, 64)
    assert [(m.height, m.width, m.stride, m.channels) for m in (m1, p1)] == [(256, 256, 2, 256)] * 2
    anchors, *others = [a.anchors for a in found.anchors]
    cost, *costs = [a.multiply_adds for a in found.anchors]
    assert anchors / sum(others) == cost / sum(costs) == 65_536 / 21_824


def test_equation_1(r_50):
    """k = floor(4 + log2(sqrt(w h) / 224)); 16 and 32 px are below P2, and clamped to it."""
    rows = [(b.height, b.k, b.level, b.stride, b.cells) for b in r_50.boxes]
    assert rows == [
        (16, 0, "p2", 4, "4 x 4"),
        (32, 1, "p2", 4, "8 x 8"),
        (64, 2, "p2", 4, "16 x 16"),
        (112, 3, "p3", 8, "14 x 14"),
        (224, 4, "p4", 16, "14 x 14"),
        (448, 5, "p5", 32, "14 x 14"),
    ]
    assert r_50.rule.startswith("k = floor(4 + log2(sqrt(w h) / 224)), clamped to p2..p5")


def test_equation_1_with_other_boxes_and_keys():
    opts = ["MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "112", "MODEL.FPN_EXT.CANONICAL_LEVEL", "3"]
    cfg = fpn_ext.load_config(R_50, opts)
    found = of(cfg, (512, 512), 111.5, 112, (50, 900), 4000)
    assert [(b.k, b.level) for b in found.boxes] == [(2, "p2"), (3, "p3"), (3, "p3"), (8, "p5")]
    assert "k = floor(3 + log2(sqrt(w h) / 112))" in found.rule
    assert found.boxes[2].cells == "6.25 x 112.5"


def test_what_is_shared(r_50):
    assert [(w.part, w.layers, w.levels) for w in r_50.weights] == [
        (
            "RPN head",
            ["conv", "objectness_logits", "anchor_deltas"],
            ["p2", "p3", "p4", "p5", "p6"],
        ),
        ("RoI heads", ["box_head", "box_predictor"], ["p2", "p3", "p4", "p5"]),
    ]


def test_parameters_on_paper(r_50):
    assert r_50.parameters["lateral connections"] == 256 * (256 + 512 + 1024 + 2048) + 4 * 256
    assert r_50.parameters["output convolutions"] == 4 * (9 * 256 * 256 + 256)
    assert r_50.parameters["box head"] == 256 * 49 * 1024 + 1024 + 1024 * 1024 + 1024
    assert r_50.parameters["box predictor"] == 1025 * (81 + 4 * 80)


# Any config: against the model itself, built and run with data.


def check_against_the_model(cfg, found):
    """Sizes, channels, anchors and parameters."""
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    model = build_model(cfg).eval()
    assert sum(found.parameters.values()) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        levels = model.backbone(torch.zeros(1, 3, *found.padded))
        below = model.backbone.bottom_up(torch.zeros(1, 3, *found.padded))
    assert {m.name: (1, m.channels, m.height, m.width) for m in found.levels} == {
        name: tuple(level.shape) for name, level in levels.items()
    }
    for m in found.bottom_up:
        assert below[m.made_from].shape == (1, m.channels, m.height, m.width)
    names = [a.level for a in found.anchors]
    shapes = model.backbone.output_shape()
    generator = build_anchor_generator(cfg, [shapes[name] for name in names])
    anchors = generator([levels[name] for name in names])
    assert [a.anchors for a in found.anchors] == [len(boxes) for boxes in anchors]


@pytest.mark.parametrize(
    "network", ["timm/mobilenetv3_small_050", "torchvision/mobilenet_v3_small"]
)
def test_a_network_of_a_library_and_a_size_that_is_padded(network, small_cfg):
    pytest.importorskip(network.partition("/")[0])
    small_cfg.MODEL.FPN_EXT.BOTTOM_UP, small_cfg.MODEL.FPN_EXT.KEEP_PIXELS = network, True
    small_cfg.MODEL.FPN_EXT.LEVELS = ["p2", "p3", "p4", "p5", "p6"]
    fpn_ext.resolve_levels(small_cfg)
    found = of(small_cfg, (100, 170))
    assert (found.padded, found.divisibility) == ((128, 192), 32)
    said = "padded to 128 x 192 for FeaturePyramid, whose size_divisibility is 32."
    assert f"An image of 100 x 170 px (height x width) is {said}" in str(found)
    assert sizes(found.levels)["p5"] == (4, 6)
    check_against_the_model(small_cfg, found)


def test_retinanet(small_cfg):
    cfg = fpn_ext.load_config("configs/Base-FPN.yaml", RETINANET)
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    found = of(cfg, (256, 256))
    assert sizes(found.levels) == {f"p{k}": (256 >> k, 256 >> k) for k in range(3, 8)}
    assert [m.made_from for m in found.levels[3:]] == [
        "ConvolutionsOnC on c5, 1 of 2",
        "ConvolutionsOnC on c5, 2 of 2",
    ]
    assert (found.head, found.boxes) == ("RetinaNet head", [])
    assert found.weights[0].levels == ["p3", "p4", "p5", "p6", "p7"]
    assert "RetinaNet head" in found.parameters and "top block" in found.parameters
    check_against_the_model(cfg, found)


def test_unshared_heads_are_told_from_shared_ones(small_cfg):
    small_cfg.MODEL.RPN.HEAD_NAME = "UnsharedRPNHead"
    small_cfg.MODEL.ROI_HEADS.NAME = "UnsharedROIHeads"
    found = of(small_cfg, (64, 64))
    rpn = [(w.layers, w.levels) for w in found.weights if w.part == "RPN head"]
    assert rpn == [([f"heads.{i}"], [f"p{i + 2}"]) for i in range(5)]
    roi = [(w.layers, w.levels) for w in found.weights if w.part == "RoI heads"]
    assert roi == [([f"box_head.{i}", f"box_predictor.{i}"], [f"p{i + 2}"]) for i in range(4)]
    check_against_the_model(small_cfg, found)


def test_a_head_shared_as_far_as_the_numbers_of_anchors_allow(small_cfg):
    small_cfg.MODEL.RPN.HEAD_NAME = "VariedAnchorsRPNHead"
    small_cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 24], [32], [64], [128], [256]]
    weights = {name: w.levels for w in of(small_cfg, (64, 64)).weights for name in w.layers}
    assert weights["conv"] == ["p2", "p3", "p4", "p5", "p6"]
    assert weights["objectness_logits.6"] == ["p2"]
    assert weights["objectness_logits.3"] == ["p3", "p4", "p5", "p6"]


MERGED = "1x1 on c4, 256 to 32 channels + m5 from 4 x 4 to 8 x 8"


@pytest.mark.parametrize(
    ("pyramid", "m4", "p4"),
    [
        ("FeaturePyramid", MERGED, "3x3 on m4"),
        ("BilinearPyramid", MERGED, "3x3 on m4"),
        ("UnsmoothedPyramid", MERGED, "m4 itself"),
        ("BottomUpPyramid", "1x1 on c4, 256 to 32 channels", "3x3 on m4"),
        ("TopDownPyramid", "m5 from 4 x 4 to 8 x 8", "3x3 on m4"),
        ("BiFPN", "1x1 on c4, 256 to 32 channels", "BiFPN"),
        ("PathAggregationPyramid", MERGED, "PathAggregationPyramid"),
        ("UnsmoothedTopPyramid", MERGED, "3x3 on m4"),
        ("SmoothedRecursionPyramid", MERGED.replace("m5", "p5"), "3x3 on m4"),
    ],
)
def test_what_a_variant_is_made_from(pyramid, m4, p4, small_cfg):
    small_cfg.MODEL.BACKBONE.NAME = pyramid
    found = of(small_cfg, (128, 128))
    assert {m.name: m.made_from for m in found.merged}["m4"] == m4
    assert {m.name: m.made_from for m in found.levels}["p4"] == p4
    check_against_the_model(small_cfg, found)


def test_a_hierarchy_is_the_bottom_ups_maps():
    cfg = fpn_ext.load_config("configs/paper/figure1/c.yaml")
    found = of(cfg, (128, 128))
    assert found.merged == []
    made = {level.name: level.made_from for level in found.levels}
    assert (made["p3"], made["p5"]) == ("c3 itself", "c5 itself")
    assert made["p6"] == "ConvolutionsOnC on c5, 1 of 2"
    assert [level.channels for level in found.levels] == [512, 1024, 2048, 256, 256]


@pytest.mark.parametrize(
    ("heads", "rule", "level", "said"),
    [
        ("StandardROIHeads", "PaperRule", "p3", "k = floor(4"),
        ("PyramidROIHeads", "LongerSideRule", "p4", "LongerSideRule, by the longer side of a box"),
        ("AllLevelsROIHeads", "PaperRule", "", "AllLevelsROIHeads pool from p2, p3, p4, p5"),
    ],
)
def test_other_rules_and_heads(heads, rule, level, said, small_cfg):
    small_cfg.MODEL.ROI_HEADS.NAME, small_cfg.MODEL.FPN_EXT.LEVEL_RULE = heads, rule
    found = of(small_cfg, (128, 128), (60, 300))
    assert [b.level for b in found.boxes] == [level]
    assert said in str(found)


def test_no_file_is_looked_for(tmp_path):
    """Neither weights nor proposals: Fast R-CNN of the paper, whose proposals are not made yet."""
    opts = ["MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS", str(tmp_path / "none.pth")]
    found = explain(fpn_ext.load_config("configs/paper/table2/c.yaml", opts), (64, 64))
    assert found.head == "" and found.anchors == [] and found.boxes
    assert "anchors" not in found.tables()


# The command.


def test_the_command_prints_and_writes(tmp_path, capsys):
    words = ["--size", "128x192", "--boxes", "32", "8x9", "--json", str(tmp_path / "out.json")]
    assert main(["explain", "MODEL.RESNETS.DEPTH", "101", *words]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["padded"] == [128, 192]
    assert content["levels"][0] == {
        **{"name": "p2", "made_from": "3x3 on m2", "height": 32, "width": 48},
        **{"stride": 4, "channels": 256},
    }
    assert [(b["height"], b["width"]) for b in content["boxes"]] == [(32, 32), (8, 9)]
    for title in ("Bottom-up network, build_resnet_backbone: C_k", "Shared weights", "Parameters"):
        assert title in printed
    total = sum(content["parameters"].values())
    assert f"{total:,}" in printed and total > 55e6  # ResNet-101


def test_the_command_takes_the_config_of_a_run(tmp_path, capsys):
    cfg = fpn_ext.load_config(R_50, ["MODEL.FPN.OUT_CHANNELS", "16", "DATASETS.TEST", "('gone',)"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert main(["explain", "--run", str(tmp_path), "--size", "64"]) == 0
    assert "1x1 on c5, 2048 to 16 channels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "0"], "'0' is no size in whole pixels: 512 (a square) or 800x1333"),
        (["--size", "512x"], "'512x' is no size"),
        (["--boxes", "16", "-3"], "expected at least one argument|-3"),
        (["--boxes", "16", "nan"], "'nan' is no size of a box"),
        (["--boxes", "16", "SEED", "1"], "KEY VALUE overrides come before --boxes"),
        (["--run", "no/folder"], "no/folder"),
        (["MODEL.BACKBONE.NAME", "FeaturePyramide"], "nearest valid: 'FeaturePyramid'"),
        (["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"], "must be FeaturePyramid or one of"),
        (["MODEL.RPN.IN_FEATURES", "['p2', 'p9']"], "MODEL.RPN.IN_FEATURES asks for ['p9']"),
    ],
)
def test_mistakes(words, said, capsys):
    assert main(["explain", *words]) == 2
    printed = capsys.readouterr()
    assert any(text in printed.err for text in said.split("|")) and not printed.out


@pytest.mark.parametrize(
    ("size", "boxes", "said"),
    [
        ((0, 512), (32,), "a height and a width of at least 1 px, got (0, 512)"),
        ((512, 512), (32, (5, -1)), "above 0 px, got [32, (5, -1)]"),
        ((512, 512), (float("nan"),), "above 0 px"),
    ],
)
def test_mistakes_in_python(size, boxes, said, small_cfg):
    with pytest.raises(ValueError) as error:
        explain(small_cfg, size, boxes)
    assert said in str(error.value)


def test_the_config_is_left_as_it_is(small_cfg):
    before = small_cfg.dump()
    of(small_cfg, (64, 64))
    assert small_cfg.dump() == before
