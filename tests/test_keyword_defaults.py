"""Keywords match Detectron2's: names and defaults, by introspection."""

import inspect

import fpn_ext
import pytest
from detectron2.modeling import BACKBONE_REGISTRY, StandardROIHeads
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from fpn_ext.registries.lookup import pyramids

PAIRS = [
    (fpn_ext.FeaturePyramid, FPN),
    (fpn_ext.PyramidAnchorGenerator, DefaultAnchorGenerator),
    (fpn_ext.LevelMappedROIPooler, ROIPooler),
    (fpn_ext.PyramidRPN, RPN),
    (fpn_ext.PyramidROIHeads, StandardROIHeads),
]

# Each is in docs/paper/differences.md, with its reason.
ONLY_OURS_HAS_A_DEFAULT = {("FPN", "out_channels")}
ONLY_THEIRS = {("FPN", "square_pad")}


def keywords(component):
    """{name: default} of a class's explicit constructor, including those passed on to parents."""
    found = {}
    for ancestor in component.__mro__:
        if "__init__" not in vars(ancestor):
            continue
        parameters = inspect.signature(ancestor.__init__).parameters.values()
        for p in parameters:
            if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                found.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def differing(ours, theirs):
    """Names of Detectron2's keywords that ours lacks, or has with a different default."""
    given = keywords(ours)
    return {
        (theirs.__name__, name)
        for name, default in keywords(theirs).items()
        if name not in given or given[name] != default
    }


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda component: component.__name__)
def test_every_keyword_of_detectron2s_with_its_default(ours, theirs):
    assert len(keywords(theirs)) >= 4
    assert differing(ours, theirs) <= ONLY_OURS_HAS_A_DEFAULT | ONLY_THEIRS


def test_an_exception_is_a_default_where_detectron2_has_none():
    """So swapping theirs for ours requires no other change."""
    assert keywords(FPN)["out_channels"] is inspect.Parameter.empty
    assert keywords(fpn_ext.FeaturePyramid)["out_channels"] == 256


@pytest.mark.parametrize("name", [name for name in pyramids() if name != "FeaturePyramid"])
def test_a_variant_has_the_defaults_of_the_pyramid(name):
    """Except the norm, which NormalizedLateralPyramid requires."""
    variant = BACKBONE_REGISTRY.get(name)
    excepted = {"norm"} if name == "NormalizedLateralPyramid" else set()
    changed = {key for _, key in differing(variant, fpn_ext.FeaturePyramid)}
    assert changed == excepted


def test_the_comparison_sees_a_default_that_differs():
    class Shifted(fpn_ext.PyramidAnchorGenerator):
        def __init__(self, *, offset=0.0, **kwargs):
            super().__init__(offset=offset, **kwargs)

    assert differing(Shifted, DefaultAnchorGenerator) == {("DefaultAnchorGenerator", "offset")}
