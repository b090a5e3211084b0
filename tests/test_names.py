"""A component counts as ours by its class: ours, a user's subclass of it, or neither."""

import contextlib

import fpn_ext
import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, build_backbone, build_model
from fpn_ext.data.training_boxes import read_boxes
from fpn_ext.inspection.level_report import report_levels
from fpn_ext.keys import own_keys
from fpn_ext.registries.lookup import (
    has_pyramid_heads,
    inherits,
    is_finest_level_alone,
    is_pyramid,
    pools_from_all_levels,
    pyramids,
)
from pictures import box, registered

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"  # CANONICAL_BOX_SIZE 112
SMALL = ["MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.DEVICE", "cpu"]
SIDES = [20, 55, 56, 111, 112, 200]


@contextlib.contextmanager
def in_registry(registry, component):
    registry.register(component)
    try:
        yield component.__name__
    finally:
        registry._obj_map.pop(component.__name__)


class UsersPyramid(fpn_ext.FeaturePyramid):
    pass


class UsersFinestLevel(fpn_ext.FinestLevelPyramid):
    pass


class UsersHeads(fpn_ext.PyramidROIHeads):
    pass


class UsersAllLevels(fpn_ext.AllLevelsROIHeads):
    pass


def build_users_pyramid(cfg, input_shape):
    raise AssertionError


def pooled_column(cfg):
    """From the level table, for each pooled level."""
    rows = [line.split("  ") for line in fpn_ext.level_table(cfg).splitlines()[1:]]
    return [row[-1].strip() for row in rows if row[-1].strip() not in ("-", "") and "p" in row[1]]


def test_a_users_roi_heads_are_taken_for_what_they_are(tmp_path):
    """56, 112, 224 in table and report, as in the pooler; 112, 224, 448 would be Detectron2's."""
    boxes = [box(0, 0, side, side) for side in SIDES]
    with (
        in_registry(ROI_HEADS_REGISTRY, UsersHeads) as name,
        registered("users", tmp_path, {1: ((200, 200), boxes)}),
    ):
        opts = ["MODEL.ROI_HEADS.NAME", name, "INPUT.MIN_SIZE_TRAIN", "(200,)", *SMALL]
        cfg = fpn_ext.load_config(DEMO, opts)
        fpn_ext.check_config(cfg)
        assert pooled_column(cfg) == ["0 to 56", "56 to 112", "112 to 224", "224 and more"]
        report = report_levels(cfg, read_boxes(["users"]))
        assert report.bounds == [56, 112, 224]
        pooler = build_model(cfg).roi_heads.box_pooler
    corners = torch.tensor([[0.0, 0, side, side] for side in SIDES])
    assert pooler.assign(corners).tolist() == [2, 2, 3, 3, 4, 4]
    assert report.counts["all"] == [2, 2, 2, 0]


def test_the_checks_of_keys_are_those_of_their_class():
    with in_registry(ROI_HEADS_REGISTRY, UsersHeads) as name:
        opts = ["MODEL.ROI_HEADS.NAME", name, "MODEL.FPN_EXT.LEVEL_RULE", "PaperRul"]
        with pytest.raises(ValueError, match=r"LEVEL_RULE: .*nearest valid: 'PaperRule'"):
            fpn_ext.check_config(fpn_ext.load_config(DEMO, opts))


def test_a_users_heads_on_all_levels():
    with in_registry(ROI_HEADS_REGISTRY, UsersAllLevels) as name:
        cfg = fpn_ext.load_config(DEMO, ["MODEL.ROI_HEADS.NAME", name])
        assert pools_from_all_levels(cfg) and has_pyramid_heads(cfg)
        assert pooled_column(cfg) == ["all"] * 4


def test_a_users_pyramid_follows_the_levels():
    with in_registry(BACKBONE_REGISTRY, UsersPyramid) as name:
        levels = ["p3", "p4", "p5", "p6"]
        opts = ["MODEL.BACKBONE.NAME", name, "MODEL.FPN_EXT.LEVELS", str(levels), *SMALL]
        cfg = fpn_ext.load_config(DEMO, opts)
        assert is_pyramid(cfg) and name in pyramids() and not is_finest_level_alone(cfg)
        assert list(build_backbone(cfg).output_shape()) == levels
        assert "p3     res3" in fpn_ext.level_table(cfg)


def test_a_users_finest_level_alone():
    with in_registry(BACKBONE_REGISTRY, UsersFinestLevel) as name:
        opts = ["MODEL.BACKBONE.NAME", name, "MODEL.FPN_EXT.LEVELS", "['p3']", *SMALL]
        cfg = fpn_ext.load_config(DEMO, opts)
        assert is_finest_level_alone(cfg)
        assert list(cfg.MODEL.FPN.IN_FEATURES) == ["res3", "res4", "res5"]
        assert list(build_backbone(cfg).output_shape()) == ["p3"]


def test_a_function_that_builds_and_a_name_of_nobody_are_no_subclass():
    with in_registry(BACKBONE_REGISTRY, build_users_pyramid) as name:
        assert not inherits(BACKBONE_REGISTRY, name, "FeaturePyramid")
        assert name not in pyramids()
    assert not inherits(BACKBONE_REGISTRY, "nobody", "FeaturePyramid")
    assert not inherits(ROI_HEADS_REGISTRY, "StandardROIHeads", "PyramidROIHeads")


def test_defaults_where_a_config_has_none_of_our_keys(small_cfg):
    small_cfg.MODEL.FPN_EXT.CANONICAL_LEVEL = 3
    assert own_keys(small_cfg).CANONICAL_LEVEL == 3
    del small_cfg.MODEL["FPN_EXT"]
    assert own_keys(small_cfg) == fpn_ext.get_cfg().MODEL.FPN_EXT
    with pytest.raises(AttributeError, match="immutable"):
        own_keys(small_cfg).CANONICAL_LEVEL = 3
