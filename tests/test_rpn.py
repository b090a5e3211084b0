"""PyramidRPN returns Detectron2's proposals, bit for bit, with less work."""

import pytest
import torch
from fpn_ext import PyramidRPN
from detectron2.modeling import build_proposal_generator
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes

SIZES = [(60, 80), (30, 40), (15, 20), (8, 10)]  # 18 900 anchors on an image of 240 x 320


@pytest.fixture
def generators(small_cfg, request):
    """Ours and Detectron2's, asked for 300 proposals of at most 1000 per level."""
    from detectron2.layers import ShapeSpec

    small_cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    small_cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256]]
    small_cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = small_cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 1000
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 300
    shapes = {f"p{k}": ShapeSpec(channels=32, stride=2**k) for k in (2, 3, 4, 5)}
    small_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PyramidRPN"
    ours = build_proposal_generator(small_cfg, shapes)
    small_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    theirs = build_proposal_generator(small_cfg, shapes)
    assert type(ours) is PyramidRPN and type(theirs) is RPN
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


@pytest.fixture
def predictions(generators):
    """Anchors, logits, deltas and image sizes of a batch of two, as the RPN's forward has them."""
    anchors = generators[0].anchor_generator([torch.zeros(2, 32, *size) for size in SIZES])
    logits = [torch.randn(2, len(a)) for a in anchors]
    deltas = [0.3 * torch.randn(2, len(a), 4) for a in anchors]
    return anchors, logits, deltas, [(240, 320), (200, 300)]


def assert_same(generators, predictions):
    ours, theirs = (g.predict_proposals(*predictions) for g in generators)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)
        assert a.image_size == b.image_size
    return ours


@pytest.fixture
def suppressions(monkeypatch):
    """The number of boxes in each NMS call."""
    counts = []
    original = PyramidRPN._without_overlaps

    def counting(self, boxes, *arguments):
        counts.append(sum(b.shape[1] for b in boxes))
        return original(self, boxes, *arguments)

    monkeypatch.setattr(PyramidRPN, "_without_overlaps", counting)
    return counts


def test_the_best_are_enough(generators, predictions, suppressions):
    found = assert_same(generators, predictions)
    assert [len(f) for f in found] == [300, 300]
    assert suppressions == [2000, 2000], "of 3140 candidates an image"


def test_the_best_overlap_and_all_are_needed(generators, predictions, suppressions):
    _, logits, deltas, _ = predictions
    # The 1000 best of P2 and of P3 are blown up to the whole image: one of each level is left.
    for level in (0, 1):
        logits[level] += 100
        deltas[level][..., 2:] = 6.0
    found = assert_same(generators, predictions)
    assert suppressions == [2000, 3140, 2000, 3140]
    assert all(10 < len(f) <= 300 for f in found)


def test_fewer_anchors_than_are_asked_for(generators, predictions):
    anchors, logits, deltas, sizes = predictions
    few = [Boxes(a.tensor[:40]) for a in anchors]
    found = assert_same(generators, (few, [x[:, :40] for x in logits],
                                     [x[:, :40] for x in deltas], sizes))  # fmt: skip
    assert all(0 < len(f) <= 160 for f in found)


@pytest.mark.parametrize("where", ["logits", "deltas"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite(generators, predictions, where, value):
    """Dropped in inference; in training it indicates a diverged loss."""
    _, logits, deltas, _ = predictions
    broken = logits[0] if where == "logits" else deltas[0][..., 0]
    broken[0, 5:5000:7] = value
    assert_same(generators, predictions)
    if where == "deltas" or value != float("-inf"):
        for generator in generators:
            generator.train()
            with pytest.raises(FloatingPointError):
                generator.predict_proposals(*predictions)


def test_a_faulty_box_that_the_best_do_not_need(generators, predictions):
    _, logits, deltas, _ = predictions
    # All 240 anchors of P5 are candidates; its worst is not among the best 2000 of the image.
    deltas[3][0, logits[3][0].argmin()] = float("nan")
    assert_same(generators, predictions)
    for generator in generators:
        with pytest.raises(FloatingPointError):
            generator.train().predict_proposals(*predictions)


def test_batched_equals_single(generators, predictions):
    anchors, logits, deltas, sizes = predictions
    ours = generators[0]
    both = ours.predict_proposals(*predictions)
    for n in range(2):
        (alone,) = ours.predict_proposals(
            anchors,
            [x[n : n + 1] for x in logits],
            [x[n : n + 1] for x in deltas],
            sizes[n : n + 1],
        )
        assert torch.equal(alone.proposal_boxes.tensor, both[n].proposal_boxes.tensor)


def test_no_gradient_goes_through_proposals(generators, predictions):
    anchors, logits, deltas, sizes = predictions
    deltas = [d.requires_grad_() for d in deltas]
    (first, _) = generators[0].predict_proposals(anchors, logits, deltas, sizes)
    assert not first.proposal_boxes.tensor.requires_grad


def test_the_heads_relu_is_in_place(generators):
    ours, theirs = generators
    assert ours.rpn_head.conv.activation.inplace
    maps = [torch.randn(1, 32, 9, 11, requires_grad=True)]
    for a, b in zip(ours.rpn_head(maps), theirs.rpn_head(maps), strict=True):
        assert torch.equal(a[0], b[0])
    (ours_gradient,) = torch.autograd.grad(ours.rpn_head(maps)[0][0].sum(), maps)
    (their_gradient,) = torch.autograd.grad(theirs.rpn_head(maps)[0][0].sum(), maps)
    assert torch.equal(ours_gradient, their_gradient)
