"""The departures of easy-fpn.pytorch and jwyang's fpn.pytorch from the paper, each worked out."""

import fpn_ext
import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes
from fpn_ext.export.stages import Proposals
from fpn_ext.export.suppression import Suppression
from fpn_ext.modeling.fpn import FeaturePyramid
from fpn_ext.modeling.top_blocks import Subsample
from fpn_ext.registries.lookup import pyramids
from fpn_ext.variants.peers import (
    JwyangPyramid,
    PerLevelRPN,
    SmoothedRecursionPyramid,
    UnsmoothedTopPyramid,
)
from fpn_ext.variants.upsampling import BilinearPyramid
from test_pyramid_steps import maps_of, pyramid_of_ones, values
from torch import nn


def pyramid_of_twos(variant, **kwargs):
    """Lateral connections pass on, 3x3 convolutions double."""
    pyramid = pyramid_of_ones(variant, **kwargs)
    for output in pyramid.outputs:
        if not isinstance(output, nn.Identity):
            nn.init.dirac_(output.weight)
            output.weight.data *= 2
    return pyramid


# The pyramids


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        # Merged: 1111, 1110, 1100, 1000; each is doubled on its way out.
        (FeaturePyramid, [2222, 2220, 2200, 2000]),
        (BilinearPyramid, [2222, 2220, 2200, 2000]),
        # P5 is not.
        (UnsmoothedTopPyramid, [2222, 2220, 2200, 1000]),
        # 2 * 1000; 2 (100 + 2000); 2 (10 + 4200); 2 (1 + 8420).
        (SmoothedRecursionPyramid, [16842, 8420, 4200, 2000]),
        # 1000; 2 (100 + 1000); 2 (10 + 2200); 2 (1 + 4420).
        (JwyangPyramid, [8842, 4420, 2200, 1000]),
    ],
)
def test_convolutions_that_double(variant, expected):
    """C2 = 1, C3 = 10, C4 = 100, C5 = 1000."""
    pyramid = pyramid_of_twos(variant, top_block=Subsample("p5"))
    levels = pyramid.levels_on_maps(maps_of(1, 10, 100, 1000))
    assert values(levels) == expected
    assert values(pyramid.with_top_block(levels)) == [*expected, expected[-1]], "P6 is P5's"


@pytest.mark.parametrize("variant", [JwyangPyramid, BilinearPyramid])
def test_upsampling_is_bilinear(variant):
    """C5 = 0 | 4 in two columns becomes 0, 1, 3, 4 in C4's four."""
    pyramid = pyramid_of_ones(variant)
    maps = [torch.zeros(1, 1, side, side) for side in (16, 8, 4, 2)]
    maps[-1][..., 1] = 4
    assert pyramid.levels_on_maps(maps)[2][0, 0].tolist() == [[0, 1, 3, 4]] * 4


@pytest.mark.parametrize("variant", [UnsmoothedTopPyramid, JwyangPyramid])
def test_one_convolution_less(variant, small_cfg):
    small_cfg.MODEL.BACKBONE.NAME = "FeaturePyramid"
    whole = set(build_backbone(small_cfg).state_dict())
    small_cfg.MODEL.BACKBONE.NAME = variant.__name__
    pyramid = build_backbone(small_cfg)
    assert whole - set(pyramid.state_dict()) == {"fpn_output5.weight", "fpn_output5.bias"}
    assert variant.__name__ in pyramids() and getattr(fpn_ext, variant.__name__) is variant


def test_weights_of_the_paper_go_into_the_smoothed_recursion(small_cfg):
    small_cfg.MODEL.BACKBONE.NAME = "FeaturePyramid"
    plain = build_backbone(small_cfg).eval()
    small_cfg.MODEL.BACKBONE.NAME = "SmoothedRecursionPyramid"
    recursive = build_backbone(small_cfg).eval()
    recursive.load_state_dict(plain.state_dict())
    with torch.no_grad():
        image = torch.rand(1, 3, 64, 96)
        expected, found = plain(image), recursive(image)
    assert torch.equal(found["p5"], expected["p5"]), "nothing is merged into it"
    assert not torch.allclose(found["p4"], expected["p4"])


# Limits on proposals for each level


@pytest.fixture
def generators(small_cfg):
    """PyramidRPN and PerLevelRPN, at most 3 proposals."""
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = small_cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 3
    small_cfg.MODEL.FPN_EXT.KEEP_LEVELS = True
    found = []
    for name in ("PyramidRPN", "PerLevelRPN"):
        small_cfg.MODEL.PROPOSAL_GENERATOR.NAME = name
        found.append(build_model(small_cfg).proposal_generator.eval())
    return found


def of_two_levels(*scores):
    """Anchors in a row, 20 px apart, so that none suppresses another; deltas of 0."""
    boxes = [
        Boxes(torch.tensor([[20.0 * i, 9.0 * level, 20.0 * i + 5, 9.0 * level + 5]
                            for i in range(len(s))]))
        for level, s in enumerate(scores)
    ]  # fmt: skip
    logits = [torch.tensor([s]) for s in scores]
    return boxes, logits, [torch.zeros(1, len(s), 4) for s in scores], [(200, 200)]


def test_levels_need_not_compete(generators):
    """Of the scores 9 to 5 and 4 to 1, the best three are 9, 8, 7; of each level, 4, 3, 2, too."""
    joint, per_level = generators
    per_level.levels = joint.levels = [2, 3]
    given = of_two_levels([9.0, 8.0, 7.0, 6.0, 5.0], [1.0, 2.0, 3.0, 4.0])
    for training in (False, True):
        (best,) = joint.train(training).predict_proposals(*given)
        assert best.objectness_logits.tolist() == [9, 8, 7]
        (found,) = per_level.train(training).predict_proposals(*given)
        assert found.objectness_logits.tolist() == [9, 8, 7, 4, 3, 2], "highest first"
        assert found.proposal_level.tolist() == [2, 2, 2, 3, 3, 3]
        assert found.proposal_boxes.tensor[3].tolist() == [60, 9, 65, 14]


def test_within_the_limit_both_are_one(generators):
    joint, per_level = generators
    given = of_two_levels([9.0, 1.0], [5.0])
    per_level.levels = joint.levels = []
    (best,) = joint.predict_proposals(*given)
    (found,) = per_level.predict_proposals(*given)
    assert found.get_fields().keys() == best.get_fields().keys()
    assert torch.equal(found.proposal_boxes.tensor, best.proposal_boxes.tensor)
    assert found.objectness_logits.tolist() == best.objectness_logits.tolist() == [9, 5, 1]


def test_images_of_a_batch(generators):
    anchors, logits, deltas, sizes = of_two_levels([9.0, 8.0, 7.0, 6.0], [1.0, 2.0])
    logits = [torch.cat([x, -x]) for x in logits]
    deltas = [x.expand(2, -1, -1) for x in deltas]
    generators[1].levels = []
    both = generators[1].predict_proposals(anchors, logits, deltas, sizes * 2)
    scores = [found.objectness_logits.tolist() for found in both]
    assert scores == [[9, 8, 7, 2, 1], [-1, -2, -6, -7, -8]]


@pytest.mark.torchscript
def test_it_is_not_taken_for_the_one_with_a_joint_limit(generators):
    joint, per_level = generators
    Proposals(joint, Suppression())
    with pytest.raises(ValueError, match="cannot export the proposals of PerLevelRPN: choose"):
        Proposals(per_level, Suppression())
    with pytest.raises(ValueError, match="PerLevelRPN cannot be scripted; choose"):
        torch.jit.script(per_level)


# Whole models, as the peers have them


@pytest.mark.parametrize("name", ["easy_fpn", "jwyang_fpn"])
def test_the_voc_set_up_is_the_variant(name):
    variant = fpn_ext.load_config(f"configs/variants/{name}.yaml").MODEL
    of_voc = fpn_ext.load_config(f"configs/variants/voc/{name}_R_101.yaml")
    assert of_voc.MODEL.BACKBONE.NAME == variant.BACKBONE.NAME
    assert of_voc.MODEL.PROPOSAL_GENERATOR.NAME == variant.PROPOSAL_GENERATOR.NAME
    assert of_voc.MODEL.FPN_EXT.LEVEL_RULE == variant.FPN_EXT.LEVEL_RULE
    assert of_voc.MODEL.RESNETS.DEPTH == 101 and of_voc.MODEL.ROI_HEADS.NUM_CLASSES == 20
    assert of_voc.DATASETS.TRAIN == ("voc_2007_trainval",)
    assert of_voc.DATASETS.TEST == ("voc_2007_test",)


def test_detections_say_their_levels(small_cfg):
    small_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PerLevelRPN"
    small_cfg.MODEL.FPN_EXT.KEEP_LEVELS = True
    small_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 4
    model = build_model(small_cfg).eval()
    assert type(model.proposal_generator) is PerLevelRPN
    image = {"image": torch.randint(0, 255, (3, 128, 128), dtype=torch.uint8)}
    with torch.no_grad():
        found = model([image])[0]["instances"]
        quick = fpn_ext.optimize_for_inference(model)([image])[0]["instances"]
    assert found.proposal_level.unique().tolist() == [2, 3, 4, 5, 6]
    torch.testing.assert_close(quick.scores, found.scores, rtol=1e-3, atol=1e-4)
