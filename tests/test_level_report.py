"""How many boxes are pooled from each level."""

import json

import fpn_ext
import pytest
from fpn_ext.__main__ import main
from fpn_ext.data.training_boxes import read_boxes
from fpn_ext.inspection.level_report import report_levels
from pictures import box, registered
from PIL import Image

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"  # canonical size 112: P3 from 56 px, P4 from 112
SIDE = ["INPUT.MIN_SIZE_TRAIN", "(200,)"]
IMAGES = {
    1: ((200, 200), [box(0, 0, 20, 20), box(0, 0, 55, 55), box(0, 0, 56, 56)]),
    2: ((200, 200), [box(0, 0, 112, 112), box(0, 0, 200, 200), box(0, 0, 20, 200)]),
}


def counts(tmp_path, *opts):
    cfg = fpn_ext.load_config(DEMO, [*SIDE, *opts])
    with registered("levels", tmp_path, IMAGES):
        return report_levels(cfg, read_boxes(["levels"]))


def test_by_hand(tmp_path):
    """Sides 20, 55 | 56, 63 (20 x 200) | 112, 200; with 224 px at P4, 20, 55, 56, 63 | 112, 200."""
    report = counts(tmp_path)
    assert report.levels == ["p2", "p3", "p4", "p5"]
    assert report.counts["all"] == report.counts["class thing"] == [2, 2, 2, 0]
    assert report.counts["small"] == [1, 0, 0, 0]
    moved = counts(tmp_path, "MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "224")
    assert moved.counts["all"] == [4, 2, 0, 0]
    assert moved.bounds == [112, 224, 448]


def test_by_the_rule_of_the_config(tmp_path):
    """By the longer side the box of 20 x 200 is on P4."""
    report = counts(tmp_path, "MODEL.FPN_EXT.LEVEL_RULE", "LongerSideRule")
    assert report.counts["all"] == [2, 1, 3, 0]
    assert "LongerSideRule, by the longer side of a box: p3 from 56 px" in str(report)


def test_after_the_resize_and_with_several_sides(tmp_path):
    """At 100 px only the sides 112 and 200 reach P3; half of the weight is that of 200 px."""
    report = counts(tmp_path, "INPUT.MIN_SIZE_TRAIN", "(100, 200)")
    at_100 = counts(tmp_path, "INPUT.MIN_SIZE_TRAIN", "(100,)").counts["all"]
    at_200 = counts(tmp_path, "INPUT.MIN_SIZE_TRAIN", "(200,)").counts["all"]
    assert at_100 == [4, 2, 0, 0] and at_200 == [2, 2, 2, 0]
    assert report.counts["all"] == [3, 2, 1, 0]


def test_the_command_writes_what_it_says(tmp_path, capsys):
    with registered("levels", tmp_path, IMAGES):
        files = ["--json", str(tmp_path / "levels.json"), "--output", str(tmp_path / "out")]
        words = ["--config-file", DEMO, "--dataset", "levels", *files, *SIDE]
        assert main(["levels", *words]) == 0
    assert "all          6      2 (33%)" in capsys.readouterr().out
    content = json.loads((tmp_path / "levels.json").read_text())
    assert content["counts"]["all"] == [2, 2, 2, 0]
    assert content["rule"] == "PaperRule" and content["boxes"] == 6
    with Image.open(tmp_path / "out" / "levels.png") as picture:
        assert picture.size == (720, 432)


def test_heads_without_levels_are_refused(tmp_path, capsys):
    with registered("levels", tmp_path, IMAGES):
        words = ["levels", "--config-file", DEMO, "--dataset", "levels"]
        assert main([*words, "MODEL.ROI_HEADS.NAME", "AllLevelsROIHeads"]) == 2
    assert "MODEL.ROI_HEADS.NAME AllLevelsROIHeads" in capsys.readouterr().err
