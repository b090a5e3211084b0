"""The anchor report, and that the suggested anchors fit better."""

import dataclasses
import json

import fpn_ext
import numpy as np
import pytest
import yaml
from fpn_ext.__main__ import main
from fpn_ext.data.training_boxes import ResizedBoxes, read_boxes
from fpn_ext.inspection.anchor_fit import fit_anchors
from fpn_ext.inspection.anchor_report import report_anchors
from fpn_ext.inspection.best_anchors import AnchorGrid, AnchorLevel
from pictures import box, registered
from PIL import Image

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"


def demo(*opts):
    opts = ["INPUT.MIN_SIZE_TRAIN", "(128,)", *opts]
    return fpn_ext.load_config(DEMO, opts)


def one_shape(count=12, width=60, height=20):
    """Boxes of one shape all over 128 x 128 images."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 128 - np.array([width, height]), (count, 2)).tolist()
    return {
        number: ((128, 128), [box(x, y, x + width, y + height)])
        for number, (x, y) in enumerate(corners)
    }


def test_shares_by_hand(tmp_path):
    """Anchors of 16 px squares on P2, of 64 px on P4, all centred on multiples of 16."""
    images = {
        "first": ((128, 128), [box(8, 8, 24, 24), box(0, 0, 64, 64)]),  # 1; 1
        "second": ((128, 128), [box(8, 8, 24, 18), box(8, 8, 24, 12), box(0, 0, 128, 1)]),
    }  # 10/16; 4/16; the thin one 1/79 of P4's anchor at most, and 16/(256+128-16) of P2's
    cfg = demo(
        "MODEL.RPN.IN_FEATURES", "['p2', 'p4']",
        "MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [64]]",
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0]]",
    )  # fmt: skip
    with registered("by_hand", tmp_path, images):
        report = report_anchors(cfg, read_boxes(["by_hand"]))
    assert report.best.iou.tolist()[:4] == pytest.approx([1, 1, 10 / 16, 4 / 16])
    assert report.best.level.tolist()[:4] == [0, 1, 0, 0]
    everything = report.shares(report.best, dict(report.groups())["all"])
    assert everything == pytest.approx(
        {"boxes": 5, "0.3": 0.6, "0.5": 0.6, "0.7": 0.4, "mean": report.best.iou.mean()}
    )
    assert report.shares(report.best, dict(report.groups())["medium"])["0.7"] == 1
    assert report.unmatched(report.best) == [{"image_id": "second", "boxes": 2}]
    assert "2 boxes have no anchor of IoU 0.3: second (2)" in str(report)


def test_a_box_is_matched_if_it_is_at_any_side(tmp_path):
    """12 px: at 128 too small for the anchors of 64 px, at 512 it has 48 px."""
    opts = ["MODEL.RPN.IN_FEATURES", "['p4']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[64]]"]
    with registered("sides", tmp_path, {1: ((128, 128), [box(40, 40, 52, 52)])}):
        found = read_boxes(["sides"])
        small = report_anchors(demo(*opts), found)
        both = report_anchors(demo(*opts, "INPUT.MIN_SIZE_TRAIN", "(128, 512)"), found)
    assert small.unmatched(small.best) == [{"image_id": 1, "boxes": 1}]
    assert both.unmatched(both.best) == []
    assert both.shares(both.best, dict(both.groups())["all"])["0.3"] == 0.5


def test_the_suggestion_fits_boxes_of_one_shape(tmp_path):
    """60 x 20: as configured, aspect ratio 1/2 at best; suggested, nearly 1/3."""
    with registered("one_shape", tmp_path, one_shape()):
        report = report_anchors(demo(), read_boxes(["one_shape"]))
    everything = dict(report.groups())["all"]
    before = report.shares(report.best, everything)
    after = report.shares(report.suggested, everything)
    assert before["0.7"] < 0.5 and after["0.7"] == 1
    assert min(abs(ratio - 1 / 3) for ratio in report.fit.aspect_ratios) < 0.1
    assert [len(sizes) for sizes in report.fit.sizes] == [1] * 5  # one scale a level, as before
    assert report.fit.sizes == sorted(report.fit.sizes)


def test_what_is_suggested_is_a_config(tmp_path):
    """In a config, the suggestion yields the reported fractions, and is not improved further."""
    with registered("written", tmp_path, one_shape()):
        found = read_boxes(["written"])
        report = report_anchors(demo(), found)
        content = yaml.safe_load(report.yaml())
        (tmp_path / "suggested.yaml").write_text(
            yaml.safe_dump({"_BASE_": str(fpn_ext.__path__[0] + f"/../{DEMO}"), **content})
        )
        cfg = fpn_ext.load_config(
            str(tmp_path / "suggested.yaml"), ["INPUT.MIN_SIZE_TRAIN", "(128,)"]
        )
        again = report_anchors(cfg, found)
    np.testing.assert_allclose(again.best.iou, report.suggested.iou, atol=1e-6)


def test_sizes_given_by_level_are_suggested_so(tmp_path):
    by_level = "MODEL.FPN_EXT.ANCHOR_SIZES"
    opts = [
        f"{by_level}.p2",
        "[16]",
        f"{by_level}.p3",
        "[32]",
        "MODEL.RPN.IN_FEATURES",
        "['p2', 'p3']",
    ]
    with registered("by_level", tmp_path, one_shape()):
        report = report_anchors(demo(*opts), read_boxes(["by_level"]))
    assert set(yaml.safe_load(report.yaml())["MODEL"]["FPN_EXT"]["ANCHOR_SIZES"]) == {"p2", "p3"}


def squares(sides, counts):
    boxes = np.repeat([[0.0, 0, side, side] for side in sides], counts, axis=0)
    boxes += 256 - boxes[:, 2:].max(axis=1, keepdims=True) / 2  # all around (256, 256)
    n = len(boxes)
    return ResizedBoxes(boxes, np.arange(n), np.full((n, 2), 512), np.ones(n))


def two_levels(*sizes):
    levels = [
        AnchorLevel(f"p{i}", 16, 0.0, np.array([[-s / 2, -s / 2, s / 2, s / 2]]))
        for i, s in enumerate(sizes)
    ]
    return AnchorGrid(levels, lambda height, width: [(32, 32)] * 2)


def test_good_anchors_are_left_as_they_are():
    assert fit_anchors(two_levels(50, 200), squares([50, 200], [5, 5])) is None


def test_many_boxes_of_one_size_do_not_draw_all_levels_to_it():
    """Squares of 100 and 110 px, hundreds of them, and a few of 400: these keep a level."""
    fit = fit_anchors(two_levels(100, 200), squares([100, 110, 400], [300, 300, 3]))
    assert fit is not None
    (first,), (second,) = fit.sizes
    assert 92 <= first <= 119 and 335 <= second <= 478  # IoU 0.7 with 100 and 110; with 400


def test_the_command_writes_what_it_says(tmp_path, capsys):
    with registered("command", tmp_path, one_shape()):
        files = ["--json", str(tmp_path / "new" / "report.json"), "--output", str(tmp_path / "out")]
        words = ["anchors", "--config-file", DEMO, "--dataset", "command", *files]
        assert main([*words, "INPUT.MIN_SIZE_TRAIN", "(128,)"]) == 0
    printed = capsys.readouterr().out
    assert "12 images, 12 boxes; shorter side 128 px" in printed and "SIZES: [[" in printed
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["boxes"] == 12
    assert content["suggested"]["boxes"]["all"]["0.7"] == 1
    assert content["configured"]["boxes"]["small"]["0.7"] is None  # there is no such box
    assert content["configured"]["levels"][0]["sizes"] == [16]
    with Image.open(tmp_path / "out" / "anchors.png") as picture:
        assert picture.size == (720, 432)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", "nowhere"], "'nowhere' is not a registered dataset"),
        (["MODEL.RPN.IN_FEATURE", "['p2']"], "no config key 'MODEL.RPN.IN_FEATURE'"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "MODEL.META_ARCHITECTURE"),
    ],
)
def test_mistakes_end_in_a_message(tmp_path, capsys, words, said):
    with registered("mistakes", tmp_path, one_shape(1)):
        default = ["--dataset", "mistakes"] if words[0] != "--dataset" else []
        assert main(["anchors", "--config-file", DEMO, *default, *words]) == 2
    assert said in capsys.readouterr().err


def test_levels_of_nearly_the_same_suggested_sizes_are_said(tmp_path):
    images = {n: ((128, 128), [box(9, 9, 53 + n, 53 + n)]) for n in range(3)}
    opts = ["MODEL.RPN.IN_FEATURES", "['p2', 'p3']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [9]]"]
    with registered("alike", tmp_path, images):
        report = report_anchors(demo(*opts), read_boxes(["alike"]))
    said = "p2 and p3 have nearly the same sizes"
    for sizes, is_said in (([[44], [46]], True), ([[32], [64]], False)):
        fit = dataclasses.replace(report.fit, sizes=sizes)
        assert (said in str(dataclasses.replace(report, fit=fit))) == is_said
