"""One key for the levels: derived keys, contradictions, and the table."""

import re

import fpn_ext
import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fpn_ext.__main__ import VERBS
from fpn_ext.config.level_keys import resolve_levels
from fpn_ext.config.level_table import level_table, level_table_in_errors
from fpn_ext.engine.train import setup
from fpn_ext.levels import LevelError

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
LEVELS = "MODEL.FPN_EXT.LEVELS"
SMALL = ["MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.DEVICE", "cpu"]
BOTTOM_UP = ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/mobilenet_v3_small"]


def load(levels, *opts):
    return fpn_ext.load_config(DEMO, [LEVELS, str(levels), *SMALL, *opts])


def from_text(tmp_path, text, *opts):
    file = tmp_path / "mine.yaml"
    file.write_text(f'_BASE_: "{fpn_ext.__path__[0]}/../{DEMO}"\n{text}')
    return fpn_ext.load_config(str(file), opts)


def keys(cfg):
    return {
        "pyramid": list(cfg.MODEL.FPN.IN_FEATURES),
        "RPN": list(cfg.MODEL.RPN.IN_FEATURES),
        "RoI heads": list(cfg.MODEL.ROI_HEADS.IN_FEATURES),
        "sizes": cfg.MODEL.ANCHOR_GENERATOR.SIZES,
    }


def test_without_the_key_nothing_changes(tmp_path):
    plain = fpn_ext.load_config(DEMO)
    before = plain.clone()
    resolve_levels(plain)
    assert plain == before
    assert plain.MODEL.ANCHOR_GENERATOR.SIZES == [[16], [32], [64], [128], [256]]
    assert from_text(tmp_path, "MODEL: {FPN_EXT: {LEVELS: []}}") == before


def test_one_line_gives_the_papers_levels():
    cfg = load(["p2", "p3", "p4", "p5", "p6"])
    assert keys(cfg) == {
        "pyramid": ["res2", "res3", "res4", "res5"],
        "RPN": ["p2", "p3", "p4", "p5", "p6"],
        "RoI heads": ["p2", "p3", "p4", "p5"],
        "sizes": [[32], [64], [128], [256], [512]],
    }


def test_one_line_moves_the_pyramid_a_level_down():
    """And another uses a network that has a map of stride 2."""
    cfg = load(["p1", "p2", "p3", "p4", "p5"], *BOTTOM_UP)
    assert keys(cfg) == {
        "pyramid": ["c1", "c2", "c3", "c4", "c5"],
        "RPN": ["p1", "p2", "p3", "p4", "p5"],
        "RoI heads": ["p1", "p2", "p3", "p4", "p5"],
        "sizes": [[16], [32], [64], [128], [256]],
    }


@pytest.mark.parametrize(
    ("levels", "maps", "pooled"),
    [
        (["p3", "p4", "p5", "p6", "p7"], ["res3", "res4", "res5"], ["p3", "p4", "p5"]),
        (["p2", "p4", "p5", "p7"], ["res2", "res4", "res5"], ["p2", "p4", "p5"]),
        (["p4"], ["res4"], ["p4"]),
        (["p2", "p3", "p4"], ["res2", "res3", "res4"], ["p2", "p3", "p4"]),
    ],
)
def test_a_model_of_these_levels(levels, maps, pooled):
    """Trains and infers on an image with indivisible sides; every parameter has a gradient."""
    cfg = load(levels)
    assert (maps, maps) == (cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.RESNETS.OUT_FEATURES)
    assert pooled == cfg.MODEL.ROI_HEADS.IN_FEATURES
    assert run(cfg) == levels


def run(cfg):
    """Build, train one step, infer; the names of the levels that the anchors are on."""
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    fpn_ext.check_config(cfg)
    fpn_ext.resolve_bottom_up(cfg)
    model = build_model(cfg)
    image = torch.randint(0, 255, (3, 131, 97), dtype=torch.uint8)
    boxes = torch.tensor([[5.0, 5, 25, 30], [10, 20, 90, 120]])
    truth = Instances((131, 97), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 1]))
    with EventStorage():
        losses = model([{"image": image, "instances": truth}])
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    model.eval()
    with torch.no_grad():
        (detections,) = model.inference([{"image": image}])
        assert torch.isfinite(detections["instances"].pred_boxes.tensor).all()
    shapes = model.backbone.output_shape()
    names = {shape.stride: name for name, shape in shapes.items()}
    return [names[stride] for stride in model.proposal_generator.anchor_generator.strides]


def test_p1_on_a_network_that_has_it():
    cfg = load(["p1", "p2", "p3", "p4", "p5"], *BOTTOM_UP)
    assert run(cfg) == ["p1", "p2", "p3", "p4", "p5"]


def test_a_saved_config_is_read_as_it_was(tmp_path):
    cfg = load(["p3", "p4", "p5", "p6"], "MODEL.RPN.IN_FEATURES", "['p3', 'p6']")
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    again = fpn_ext.load_config(str(file))
    assert (keys(again), again.MODEL.FPN_EXT) == (keys(cfg), cfg.MODEL.FPN_EXT)


def test_the_outputs_of_the_pyramid_are_the_levels():
    backbone = build_backbone(load(["p3", "p4", "p5", "p6", "p7"]))
    assert list(backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    image = torch.rand(1, 3, 101, 133)
    for name, features in backbone(image).items():
        stride = 2 ** int(name[1])
        assert features.shape[2:] == (-(-101 // stride), -(-133 // stride))


# What is set by hand


def test_a_key_of_the_base_is_replaced_and_one_beside_the_levels_stays(tmp_path):
    """The demo's IN_FEATURES and SIZES are set in its base file."""
    text = """
MODEL:
  FPN_EXT: {LEVELS: ["p2", "p3", "p4", "p5"]}
  RPN: {IN_FEATURES: ["p2", "p3"]}
  ANCHOR_GENERATOR: {SIZES: [[8], [80]]}
"""
    assert keys(from_text(tmp_path, text)) == {
        "pyramid": ["res2", "res3", "res4", "res5"],
        "RPN": ["p2", "p3"],
        "RoI heads": ["p2", "p3", "p4", "p5"],
        "sizes": [[8], [80]],
    }


def test_what_comes_after_the_levels_is_by_hand_too(tmp_path):
    text = 'MODEL: {FPN_EXT: {LEVELS: ["p2", "p3", "p4", "p5", "p6"]}}\n'
    cfg = from_text(tmp_path, text, "MODEL.ROI_HEADS.IN_FEATURES", "['p3', 'p6']")
    assert keys(cfg)["RoI heads"] == ["p3", "p6"]
    cfg = from_text(tmp_path, text, "MODEL.FPN.IN_FEATURES", "['res2', 'res3', 'res4']")
    assert keys(cfg)["pyramid"] == ["res2", "res3", "res4"]
    assert list(build_backbone(cfg).output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    assert build_backbone(cfg).top_block.num_levels == 2


def test_sizes_follow_the_maps_that_the_rpn_reads():
    cfg = load(["p2", "p3", "p4"], "MODEL.RPN.IN_FEATURES", "['p3', 'p4']")
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[64], [128]]


def test_in_python_keys_are_named(small_cfg):
    small_cfg.MODEL.FPN_EXT.LEVELS = ["p3", "p4", "p5"]
    with pytest.raises(ValueError, match=r"(?s)call fpn_ext\.resolve_levels.*level +made from"):
        fpn_ext.check_config(small_cfg)
    small_cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[9], [99], [999]]
    resolve_levels(small_cfg, explicitly_set=["MODEL.ANCHOR_GENERATOR.SIZES"])
    fpn_ext.check_config(small_cfg)
    assert keys(small_cfg)["sizes"] == [[9], [99], [999]]
    resolve_levels(small_cfg)
    assert keys(small_cfg)["sizes"] == [[64], [128], [256]]


def test_a_pyramid_whose_levels_are_not_resolved_is_not_built(small_cfg):
    small_cfg.MODEL.FPN_EXT.LEVELS = ["p3", "p4", "p5"]
    with pytest.raises(LevelError, match=r"LEVELS .* does not fit MODEL\.FPN\.IN_F") as error:
        build_backbone(small_cfg)
    assert "made from" not in str(error.value), "a component says its own, and no more"


@pytest.mark.parametrize(
    ("levels", "wrong"),
    [
        (["p2", "p3", "x6"], r"\['x6'\]"),
        (["p2", "c3"], r"\['c3'\]"),
        (["p2", "p3", 4], r"\[4\]"),
        ([["p2", "p3"]], r"\[\['p2', 'p3'\]\]"),
        (["p2", "p9"], r"\['p9'\]"),
    ],
)
def test_levels_that_are_none_name_their_key(small_cfg, levels, wrong):
    """Wherever they are set: a config built in Python is not checked."""
    small_cfg.MODEL.FPN_EXT.LEVELS = levels
    message = rf"MODEL\.FPN_EXT\.LEVELS .*: {wrong} are no levels\. A level is p1 to p7"
    for refuse in (build_backbone, resolve_levels, fpn_ext.check_config):
        with pytest.raises(ValueError, match=message):
            refuse(small_cfg)


def test_levels_out_of_order_name_their_key(small_cfg):
    small_cfg.MODEL.FPN_EXT.LEVELS = ["p3", "p2"]
    with pytest.raises(ValueError, match=r"FPN_EXT\.LEVELS \['p3', 'p2'\]: .*fine to coarse"):
        build_backbone(small_cfg)


def test_the_finest_level_alone_is_that_of_a_whole_pyramid():
    cfg = load(["p3"], "MODEL.BACKBONE.NAME", "FinestLevelPyramid")
    assert keys(cfg)["pyramid"] == ["res3", "res4", "res5"]
    assert run(cfg) == ["p3"]


def test_a_bottom_up_with_names_of_its_own(small_cfg):
    """Its maps are found by their strides."""
    small_cfg.MODEL.FPN_EXT.BOTTOM_UP = "build_resnet_fpn_backbone"
    small_cfg.MODEL.FPN_EXT.IN_FEATURES = ["p2"]
    small_cfg.MODEL.FPN_EXT.LEVELS = ["p3", "p5", "p6"]
    resolve_levels(small_cfg)
    assert small_cfg.MODEL.FPN_EXT.IN_FEATURES == ["c3", "c5"]
    backbone = build_backbone(small_cfg)
    assert backbone.in_features == ("p3", "p5")
    assert list(backbone.output_shape()) == ["p3", "p5", "p6"]


# Mistakes, each with the table


TABLE = r"(?s){}.*level +made from +stride +map, e\.g\. at 160x267 +anchor sizes"


@pytest.mark.parametrize(
    ("levels", "opts", "message"),
    [
        (["p2", "p3"], ["MODEL.RPN.IN_FEATURES", "['p2', 'p4']"],
         TABLE.format(r"RPN\.IN_FEATURES \['p2', 'p4'\] has \['p4'\], which .*LEVELS \['p2'")),
        (["p2", "p3"], ["MODEL.ROI_HEADS.IN_FEATURES", "['p9']"],
         TABLE.format(r"ROI_HEADS\.IN_FEATURES \['p9'\] has \['p9'\], which")),
        (["p2", "p3"], ["MODEL.FPN.IN_FEATURES", "['res3', 'res4']"],
         TABLE.format(r"LEVELS \['p2', 'p3'\] does not fit .* on which stand \['p3', 'p4'\]")),
        (["p1", "p2"], [],
         TABLE.format(r"stand on \['res1'\], which build_resnet_backbone does not give: its "
                      r"strides are \[4, 8, 16, 32\].*torchvision/resnet18")),
        (["p2", "ps48"], [], TABLE.format(r"\['ps48'\] cannot be put on p2")),
        (["p6", "p7"], [], r"no level of a stride up to 32.*FPN\.IN_FEATURES must say"),
        (["p2", "p8"], [], r"\['p8'\] are no levels\. A level is p1 to p7"),
        (["p2", "res3"], [], r"\['res3'\] are no levels"),
        (["p2", "ps8"], [], r"\['ps8'\] are no levels"),
        (["p3", "p2"], [], r"LEVELS \['p3', 'p2'\]: .*from fine to coarse"),
        (["p2", "p2"], [], r"from fine to coarse"),
        (["p2"], ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"],
         r"LEVELS serves MODEL\.BACKBONE\.NAME FeaturePyramid, .*got build_resnet_fpn_backbone"),
    ],
)  # fmt: skip
def test_contradictions(levels, opts, message):
    with pytest.raises(ValueError, match=message):
        load(levels, *opts)


def test_check_config_adds_the_table_to_what_does_not_fit():
    with pytest.raises(ValueError, match=TABLE.format(r"SIZES has 2 lists .* 3 maps")):
        fpn_ext.check_config(load(["p2", "p3", "p4"], "MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [9]]"))
    cfg = load(["ps6", "ps12"], *BOTTOM_UP)
    with pytest.raises(ValueError, match=TABLE.format(r"power of two.*LEVEL_RULE StrideRule")):
        fpn_ext.check_config(cfg)


def test_a_map_that_the_network_does_not_give_shows_both_tables():
    cfg = load(["ps6", "ps12"], *BOTTOM_UP)
    fpn_ext.resolve_bottom_up(cfg)
    message = TABLE.format(r"asks for \['s6', 's12'\].*gives \['c1'")
    with pytest.raises(LevelError, match=message) as error, level_table_in_errors(cfg):
        build_backbone(cfg)
    assert str(error.value).count("level  made from  stride") == 1


# Anchor sizes by level


def test_anchor_sizes_by_level_and_other_numbers_of_them(tmp_path):
    text = """
MODEL:
  RPN: {HEAD_NAME: "VariedAnchorsRPNHead"}
  FPN_EXT:
    LEVELS: ["p2", "p3", "p4"]
    ANCHOR_SIZES: {p2: [8, 12], p3: [20], p4: [40, 60, 80]}
"""
    cfg = from_text(tmp_path, text, *SMALL)
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[8, 12], [20], [40, 60, 80]]
    assert run(cfg) == ["p2", "p3", "p4"]
    model = build_model(cfg)
    assert model.proposal_generator.anchor_generator.num_anchors == [6, 3, 9]
    table = level_table(cfg)
    assert [re.split(r" {2,}", line)[5:8] for line in table.splitlines()[1:4]] == [
        ["8, 12", "6", "16,320"],
        ["20", "3", "2,040"],
        ["40, 60, 80", "9", "1,530"],
    ]


def test_anchor_sizes_without_levels(tmp_path):
    text = "MODEL: {FPN_EXT: {ANCHOR_SIZES: {p2: [1], p3: [2], p4: [3], p5: [4], p6: [5]}}}"
    cfg = from_text(tmp_path, text, "MODEL.FPN_EXT.ANCHOR_SIZES.p3", "[7]")
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[1], [7], [3], [4], [5]]


def test_anchor_sizes_on_the_command_line_alone():
    sizes = {f"MODEL.FPN_EXT.ANCHOR_SIZES.p{k}": f"[{k}]" for k in (2, 3)}
    cfg = load(["p2", "p3"], *(word for pair in sizes.items() for word in pair))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[2], [3]]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("{p2: [1], p3: [2]}", r"ANCHOR_SIZES needs .* \['p2', 'p3', 'p4'\].*none for \['p4'\]"),
        ("{p2: [1], p3: [2], p4: [3], q5: [4]}", r"\['q5'\], no levels"),
    ],
)
def test_wrong_anchor_sizes(tmp_path, mapping, message):
    text = f'MODEL: {{FPN_EXT: {{LEVELS: ["p2", "p3", "p4"], ANCHOR_SIZES: {mapping}}}}}'
    with pytest.raises(ValueError, match=message):
        from_text(tmp_path, text)


def test_two_keys_for_one_thing(tmp_path):
    text = """
MODEL:
  ANCHOR_GENERATOR: {SIZES: [[9], [9]]}
  FPN_EXT: {LEVELS: ["p2", "p3"], ANCHOR_SIZES: {p2: [8], p3: [9]}}
"""
    with pytest.raises(ValueError, match=r"SIZES \[\[9\], \[9\]\] contradicts .*one of the two"):
        from_text(tmp_path, text)


# The table


def test_the_table_of_the_papers_configuration():
    """Side ranges are Eq. 1 by hand; maps of an 800 x 1333 image are padded to 800 x 1344."""
    cfg = fpn_ext.load_config("configs/Base-FPN.yaml")
    rows = [line.split() for line in level_table(cfg).splitlines()]
    assert rows[0][:7] == ["level", "made", "from", "stride", "map,", "e.g.", "at"]
    assert rows[1:] == [
        ["p2", "res2", "4", "200x336", "32", "3", "201,600", "0", "to", "112"],
        ["p3", "res3", "8", "100x168", "64", "3", "50,400", "112", "to", "224"],
        ["p4", "res4", "16", "50x84", "128", "3", "12,600", "224", "to", "448"],
        ["p5", "res5", "32", "25x42", "256", "3", "3,150", "448", "and", "more"],
        ["p6", "Subsample", "64", "13x21", "512", "3", "819", "-"],
        ["all", "268,569"],
    ]


@pytest.mark.parametrize(
    ("opts", "row"),
    [
        (["MODEL.ROI_HEADS.NAME", "AllLevelsROIHeads"], r"p3 .* all\n"),
        (["MODEL.ROI_HEADS.NAME", "StandardROIHeads"], r"p3 .* 112 to 224\n"),
        (["MODEL.FPN_EXT.LEVEL_RULE", "RoundedRule"], r"p3 .* 39\.6 to 79\.2\n"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], r"p3 .* 2,160 +-\n"),
        (["MODEL.FPN_EXT.TOP_BLOCK", "ConvolutionsOnC"], r"p6 +ConvolutionsOnC "),
    ],
)
def test_the_table_says_which_boxes_are_pooled(opts, row):
    table = level_table(fpn_ext.load_config(DEMO, opts))
    assert re.search(row, table), table


def test_models_without_known_levels_have_no_table(small_cfg):
    small_cfg.MODEL.RPN.IN_FEATURES = ["some", "maps"]
    assert level_table(small_cfg) == ""


def test_a_training_prints_it(demo_images, tmp_path, capsys):
    words = ["--config-file", DEMO, "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    setup(VERBS["train"].parser().parse_args(words))
    assert capsys.readouterr().out.count("level  made from  stride") == 1
