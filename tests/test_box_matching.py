"""Boxes are matched to ground truth as by Detectron2, to the bit, in little memory."""

import subprocess
import sys

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator, build_roi_heads
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from fpn_ext.kernels import box_matching
from fpn_ext.kernels.box_matching import match_boxes
from fpn_ext.modeling.anchors import PyramidAnchorGenerator
from fpn_ext.reporting.measuring import peak_memory
from hypothesis import given, settings
from hypothesis import strategies as st

STRIDES = (4, 8, 16, 32, 64)
RPN_MATCHER = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
ROI_MATCHER = Matcher([0.5], [0, 1])


@pytest.fixture(params=[500, 1 << 16], ids="blocks of {} pairs".format)
def in_blocks(request, monkeypatch):
    """Block by block, however few the pairs."""
    monkeypatch.setattr(box_matching, "PAIRS_AT_ONCE", 0)
    monkeypatch.setattr(box_matching, "SMALLEST_BLOCK", min(request.param, 256))
    monkeypatch.setattr(
        box_matching, "PAIRS_PER_BLOCK", dict.fromkeys(("cpu", "other"), request.param)
    )


def assert_same(objects, boxes, matcher):
    ours = match_boxes(objects, boxes, matcher)
    theirs = matcher(pairwise_iou(objects, boxes))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)
    return ours


def anchors(size=128):
    generator = PyramidAnchorGenerator(
        sizes=[[8], [16], [32], [64], [128]],
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=STRIDES,
    )
    return Boxes.cat(generator([torch.zeros(1, 1, size // s, size // s) for s in STRIDES]))


def objects(count, side, size=128.0):
    corner = torch.rand(count, 2) * (size - side)
    return Boxes(torch.cat([corner, corner + side * (0.2 + 0.8 * torch.rand(count, 2))], dim=1))


@pytest.mark.parametrize("side", [2, 10, 100])
@pytest.mark.parametrize("matcher", [RPN_MATCHER, ROI_MATCHER], ids=["rpn", "roi heads"])
def test_anchors_of_a_pyramid(in_blocks, side, matcher):
    _, labels = assert_same(objects(20, side), anchors(), matcher)
    assert matcher is ROI_MATCHER or (labels == 1).any()


# Corners on a coarse grid, so that boxes coincide, touch, have no area and overlap equally.
corners = st.lists(st.tuples(*[st.integers(-1, 5)] * 4), max_size=12)


@settings(max_examples=200)
@given(corners, corners, st.booleans(), st.sampled_from([0.2, 0.25, 0.5, 1.0]))
def test_ties(few, many, low_quality, threshold):
    def boxes(tuples):
        tensor = torch.tensor(tuples, dtype=torch.float32).reshape(-1, 4)
        return Boxes(torch.cat([tensor[:, :2], tensor[:, :2] + tensor[:, 2:].clamp(min=0)], dim=1))

    matcher = Matcher([threshold, 1.0], [0, -1, 1], allow_low_quality_matches=low_quality)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(box_matching, "PAIRS_AT_ONCE", 0)
        patch.setattr(box_matching, "SMALLEST_BLOCK", 3)
        patch.setattr(box_matching, "PAIRS_PER_BLOCK", {"cpu": 6})
        assert_same(boxes(few), boxes(many), matcher)


def test_an_object_far_from_every_box_makes_all_positive_as_in_detectron2(in_blocks):
    far = Boxes(torch.tensor([[5000.0, 5000, 5010, 5010], [0, 0, 16, 16]]))
    _, labels = assert_same(far, anchors(), RPN_MATCHER)
    assert (labels == 1).all()


def test_boxes_without_area_or_with_swapped_corners(in_blocks):
    """With a box of the opposite area, the union is 0."""
    point, swapped = [60.0, 60, 60, 60], [68.0, 60, 60, 68]
    few = Boxes(torch.cat([objects(20, 20).tensor, torch.tensor([point, swapped])]))
    many = Boxes(torch.cat([anchors().tensor, torch.tensor([point, [60, 60, 68, 68]])]))
    assert (few.area()[-1] + many.area() == 0).any()
    matches, _ = assert_same(few, many, RPN_MATCHER)
    assert (matches > 0).any()


def test_no_objects_and_no_boxes(in_blocks):
    for few, many in ((0, 5), (5, 0), (0, 0)):
        assert_same(objects(few, 10), objects(many, 10), RPN_MATCHER)


def test_boxes_that_are_not_finite_are_detectron2s_affair(in_blocks):
    boxes = anchors()
    boxes.tensor[7, 2] = float("nan")
    boxes.tensor[8, 2] = float("inf")
    assert_same(objects(5, 20), boxes, RPN_MATCHER)


def test_a_matcher_of_another_class_gets_the_whole_matrix(in_blocks):
    class Everything(Matcher):
        def __call__(self, match_quality_matrix):
            return match_quality_matrix.shape

    assert match_boxes(objects(5, 20), anchors(), Everything([0.5], [0, 1])) == (5, 4092)


def test_ten_thousand_small_objects_take_little_memory():
    """The matrix alone would be 1600 MB."""
    boxes, crowd = anchors(400), objects(10_000, 4, 400.0)
    assert len(boxes) * len(crowd) > 390e6
    memory = peak_memory(lambda: match_boxes(crowd, boxes, RPN_MATCHER))
    if memory is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert memory["peak"] - memory["before"] < 250, "MiB"


def images_with(counts):
    for count in counts:
        image = Instances((128, 128), gt_boxes=objects(count, 20))
        image.gt_classes = torch.randint(5, (count,))
        yield image


@pytest.mark.parametrize("boundary", [-1, 0])
def test_the_rpn_samples_detectron2s_anchors(small_cfg, in_blocks, boundary):
    small_cfg.MODEL.RPN.BOUNDARY_THRESH = boundary
    shapes = {f"p{k}": ShapeSpec(channels=32, stride=2**k) for k in range(2, 7)}
    images = list(images_with([9, 0, 30]))
    grids = [Boxes(part) for part in anchors().tensor.split(1000)]
    found = []
    for name in ("PyramidRPN", "RPN"):
        small_cfg.MODEL.PROPOSAL_GENERATOR.NAME = name
        torch.manual_seed(1)
        generator = build_proposal_generator(small_cfg, shapes)
        found.append(generator.label_and_sample_anchors(grids, images))
    for ours, theirs in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (found[0][0][0] == 1).any() and (found[0][0][0] == 0).any()


@pytest.mark.parametrize("append", [True, False])
def test_roi_heads_sample_detectron2s_proposals(small_cfg, in_blocks, append):
    small_cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = append
    shapes = {f"p{k}": ShapeSpec(channels=32, stride=2**k) for k in range(2, 7)}
    targets = list(images_with([9, 0, 30]))
    for target in targets:
        target.gt_numbers = torch.arange(len(target))
    candidates = [Instances((128, 128), proposal_boxes=objects(900, 30)) for _ in targets]
    for image in candidates:
        image.objectness_logits = torch.randn(900)
    found, counts = [], []
    for name in ("PyramidROIHeads", "StandardROIHeads"):
        small_cfg.MODEL.ROI_HEADS.NAME = name
        heads = build_roi_heads(small_cfg, shapes)
        torch.manual_seed(1)
        with EventStorage() as storage:
            found.append(heads.label_and_sample_proposals(candidates, targets))
            counts.append(storage.latest())
    for ours, theirs in zip(*found, strict=True):
        fields, expected = ours.get_fields(), theirs.get_fields()
        assert fields.keys() == expected.keys()
        for name, values in fields.items():
            pair = [getattr(v, "tensor", v) for v in (values, expected[name])]
            assert torch.equal(*pair), name
    assert counts[0] == counts[1] and counts[0]["roi_head/num_fg_samples"][0] > 0


def test_it_can_be_imported_before_any_model():
    words = [sys.executable, "-c", "import fpn_ext.kernels.box_matching"]
    subprocess.run(words, check=True)
