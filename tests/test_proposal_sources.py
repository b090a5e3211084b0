import logging
import sys
import types

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.structures import Boxes, BoxMode, Instances
from fpn_ext.proposals.file import ProposalFile
from fpn_ext.proposals.sources import (
    GROUND_TRUTH_SCORE,
    generate_proposals,
    ground_truth_proposals,
    selective_search_proposals,
)
from pictures import box, registered
from PIL import Image
from torch import nn

NAME = "test_proposal_sources"
IMAGES = {
    7: ((100, 80), [box(10, 10, 50, 50)]),
    "b": ((60, 90), []),  # no annotations: it is in the file all the same
    3: ((64, 64), [box(0, 0, 9, 9)]),
}


@pytest.fixture(autouse=True)
def records(tmp_path):
    with registered(NAME, tmp_path / "images", IMAGES) as found:
        yield found


@pytest.fixture
def file(tmp_path):
    return tmp_path / "new" / "some.safetensors"


@pytest.fixture
def cfg(small_cfg):
    small_cfg.INPUT.MIN_SIZE_TEST = 64
    small_cfg.DATALOADER.NUM_WORKERS = 0
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 40
    return small_cfg


# RPN


class FixedBoxes(nn.Module):
    """An RPN that returns fixed boxes, relative to the resized image."""

    def __init__(self, *shares):
        super().__init__()
        self.shares = torch.tensor(shares)

    def forward(self, images, features, targets):
        found = []
        for height, width in images.image_sizes:
            one = Instances((height, width))
            size = torch.tensor([width, height, width, height])
            one.proposal_boxes = Boxes(self.shares * size)
            one.objectness_logits = -torch.arange(float(len(self.shares)))
            found.append(one)
        return found, {}


class Backbone(nn.Module):
    size_divisibility = 0
    padding_constraints: dict = {}  # noqa: RUF012  # what Detectron2's main branch asks for

    def forward(self, images):
        return {}


class Model(nn.Module):
    def __init__(self, proposal_generator):
        super().__init__()
        self.backbone, self.proposal_generator = Backbone(), proposal_generator
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, torch.ones(3, 1, 1), persistent=False)


def test_boxes_are_mapped_to_the_original_image_and_clipped(cfg, file):
    """Of four boxes, one crosses the border and one is outside a 100 x 80 image."""
    model = Model(FixedBoxes((0, 0, 1, 1), (0.25, 0.5, 0.5, 0.75), (2, 0, 3, 1), (0.5, 0.5, 2, 2)))
    generate_proposals(cfg, model, NAME, file)
    boxes, scores = ProposalFile(file)[7]
    expected = [[0, 0, 100, 80], [25, 40, 50, 60], [50, 40, 100, 80]]
    np.testing.assert_allclose(boxes, expected, rtol=1e-6)
    assert boxes.max(axis=0).tolist() == [50, 40, 100, 80], "clipped, not beyond by rounding"
    assert scores.tolist() == [0, -1, -3]
    assert ProposalFile(file)["b"][0][0].tolist() == [0, 0, 60, 90]


@pytest.mark.parametrize("architecture", ["ProposalNetwork", "GeneralizedRCNN"])
def test_the_proposals_are_those_of_detectron2s_own_network(cfg, file, architecture):
    """Also from the RPN inside a detector; for every image; in any mode."""
    cfg.MODEL.META_ARCHITECTURE = architecture
    model = build_model(cfg).train()
    weights = model.state_dict()
    generate_proposals(cfg, model, NAME, file, top_k=30)
    assert model.training and model.backbone.training, "left as it was"

    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    network = build_model(cfg).eval()
    network.load_state_dict(weights, strict=False)
    proposals = ProposalFile(file)
    assert proposals.image_ids == [7, "b", 3] and proposals.dataset == NAME
    for (image,) in build_detection_test_loader(cfg, NAME):
        with torch.no_grad():
            expected = network([image])[0]["proposals"][:30]
        boxes, scores = proposals[image["image_id"]]
        assert len(boxes) == 30
        assert boxes.tobytes() == expected.proposal_boxes.tensor.numpy().tobytes()
        assert scores.tobytes() == expected.objectness_logits.numpy().tobytes()


def test_the_bound_of_the_config_is_said(cfg, file, caplog):
    model = Model(FixedBoxes((0.0, 0.0, 1.0, 1.0)))
    with caplog.at_level(logging.WARNING, logger="fpn_ext"):
        generate_proposals(cfg, model, NAME, file, top_k=40)
        assert not caplog.records
        generate_proposals(cfg, model, NAME, file)
    (record,) = caplog.records
    assert "top_k is 2000, but the RPN gives no more than MODEL.RPN.POST_NMS_TOPK_TEST 40" in (
        record.getMessage()
    )


def test_the_file_says_what_made_it(cfg, file):
    cfg.MODEL.WEIGHTS = "output/rpn/model_final.pth"
    generate_proposals(cfg, Model(FixedBoxes((0.0, 0.0, 1.0, 1.0))), NAME, file, top_k=9)
    source = ProposalFile(file).source
    for part in ("output/rpn/model_final.pth", "MIN_SIZE_TEST 64", "POST_NMS_TOPK_TEST 40",
                 "NMS_THRESH 0.7", "PyramidRPN", "top_k 9"):  # fmt: skip
        assert part in source


def test_a_model_without_an_rpn(cfg, file):
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    with pytest.raises(TypeError, match=r"this GeneralizedRCNN has no RPN; .*PrecomputedProposals"):
        generate_proposals(cfg, build_model(cfg), NAME, file)


def test_at_least_one_proposal(cfg, file):
    model = Model(FixedBoxes((0.0, 0.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match=r"--top-k\) must be at least 1, got 0"):
        generate_proposals(cfg, model, NAME, file, top_k=0)
    with pytest.raises(ValueError, match=r"must be at least 1, got -1"):
        selective_search_proposals(NAME, file, top_k=-1)


# Ground truth


def test_ground_truth_by_hand(tmp_path, file, caplog):
    annotations = [
        box(10, 10, 50, 50),
        box(5, 5, 9, 9, iscrowd=1),
        {"bbox": [90, 70, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},  # sticks out
        box(-4, -5, 6, 7),  # on the other side
        box(100, 0, 120, 10),  # outside
    ]
    images = {1: ((100, 80), annotations), 2: ((20, 20), [])}
    with (
        registered("test_ground_truth", tmp_path / "own", images),
        caplog.at_level(logging.WARNING, logger="fpn_ext"),
    ):
        ground_truth_proposals("test_ground_truth", file)
    proposals = ProposalFile(file)
    expected = [[10, 10, 50, 50], [90, 70, 100, 80], [0, 0, 6, 7]]
    assert proposals[1][0].tolist() == expected
    assert proposals[1][1].tolist() == [np.float32(GROUND_TRUTH_SCORE)] * 3
    assert proposals[2][0].shape == (0, 4)
    assert "image id 1: 1 ground truth boxes have no area" in caplog.text


def test_the_score_of_ground_truth_is_detectron2s():
    target = Instances((9, 9))
    target.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, 5.0, 5.0]]))
    proposal = Instances((9, 9))
    proposal.proposal_boxes = Boxes(torch.zeros(0, 4))
    proposal.objectness_logits = torch.zeros(0)
    try:
        (added,) = add_ground_truth_to_proposals([target], [proposal])  # main
    except (AttributeError, TypeError):
        (added,) = add_ground_truth_to_proposals([target.gt_boxes], [proposal])  # v0.6
    assert added.objectness_logits.item() == pytest.approx(GROUND_TRUTH_SCORE, rel=1e-6)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "'test_unlabelled' has no annotations"),
        ({"annotations": []}, "image id 1: the dataset does not tell its width and height"),
    ],
)
def test_a_dataset_that_tells_too_little(file, record, message):
    record = {"image_id": 1, "file_name": "x.png", **record}
    DatasetCatalog.register("test_unlabelled", lambda: [record])
    try:
        with pytest.raises(ValueError, match=message):
            ground_truth_proposals("test_unlabelled", file)
    finally:
        DatasetCatalog.remove("test_unlabelled")


# Selective search


@pytest.fixture
def stub(monkeypatch):
    """Stand-in for cv2: records calls of OpenCV's class, returns two boxes, XYWH."""
    calls = []

    class Search:
        def setBaseImage(self, image):
            calls.append(image)

        def switchToSelectiveSearchFast(self):
            calls.append("fast")

        def switchToSelectiveSearchQuality(self):
            calls.append("quality")

        def process(self):
            return np.array([[1, 2, 30, 40], [5, 6, 7, 8]], dtype=np.int32)

    cv2 = types.ModuleType("cv2")
    cv2.ximgproc = types.SimpleNamespace(
        segmentation=types.SimpleNamespace(createSelectiveSearchSegmentation=Search)
    )
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    return calls


def test_selective_search_by_hand(stub, file, records):
    selective_search_proposals(NAME, file)
    proposals = ProposalFile(file)
    assert proposals.image_ids == [7, "b", 3]
    assert proposals[7][0].tolist() == [[1, 2, 31, 42], [5, 6, 12, 14]], "XYXY"
    assert proposals[7][1].tolist() == [0, -1], "the order is all there is"
    assert proposals.source == "selective search, fast mode, top_k 2000"
    rgb = np.asarray(Image.open(records[0]["file_name"]))
    assert np.array_equal(stub[0], rgb[:, :, ::-1]), "OpenCV takes BGR"
    assert stub[1::2] == ["fast"] * 3


def test_options_of_selective_search(stub, file):
    selective_search_proposals(NAME, file, top_k=1, quality=True)
    assert ProposalFile(file)[7][0].tolist() == [[1, 2, 31, 42]]
    assert stub[1::2] == ["quality"] * 3
    assert "quality mode" in ProposalFile(file).source


@pytest.mark.parametrize("installed", [None, types.ModuleType("cv2")])
def test_without_opencv_or_its_contributed_modules(monkeypatch, file, installed):
    monkeypatch.setitem(sys.modules, "cv2", installed)
    monkeypatch.setitem(sys.modules, "cv2.ximgproc", None)  # where the real one is loaded
    with pytest.raises(ImportError, match=r"cv2\.ximgproc.*pip install .*\[selective-search\]"):
        selective_search_proposals(NAME, file)


def test_the_real_one(tmp_path, file):
    """If installed: boxes inside the image, and the same ones on the second call."""
    pytest.importorskip("cv2.ximgproc", reason="the extra selective-search is not installed")
    images = {i: ((60, 40), []) for i in range(3)}
    with registered("test_real", tmp_path / "own", images) as records:
        for record in records:
            smooth = Image.open(record["file_name"]).resize((6, 4)).resize((60, 40))
            smooth.save(record["file_name"])
        selective_search_proposals("test_real", file)
        first = dict(ProposalFile(file))
        selective_search_proposals("test_real", file)
    for image_id, (boxes, scores) in ProposalFile(file).items():
        assert np.array_equal(boxes, first[image_id][0])
        assert len(boxes) > 1 and scores.tolist() == [-i for i in range(len(boxes))]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0 and (boxes <= [60, 40, 60, 40]).all()
