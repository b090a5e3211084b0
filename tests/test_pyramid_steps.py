"""The three steps of a pyramid's forward, the second and third on feature maps only."""

import weakref

import pytest
import torch
from detectron2.modeling import Backbone
from fpn_ext.modeling.fpn import FeaturePyramid
from fpn_ext.modeling.top_blocks import ConvolutionsOnC, Subsample
from fpn_ext.variants.ablations import (
    BottomUpPyramid,
    FinestLevelPyramid,
    TopDownPyramid,
    UnsmoothedPyramid,
)
from fpn_ext.variants.bifpn import BiFPN
from fpn_ext.variants.lateral_norms import NormalizedLateralPyramid
from fpn_ext.variants.path_aggregation import PathAggregationPyramid
from fpn_ext.variants.peers import (
    JwyangPyramid,
    SmoothedRecursionPyramid,
    UnsmoothedTopPyramid,
)
from fpn_ext.variants.upsampling import BilinearPyramid, LearnedUpsamplingPyramid
from torch import nn

NAMES = ["c2", "c3", "c4", "c5"]


class Shapes(Backbone):
    """What a pyramid is built by; it has no maps to give."""

    def __init__(self, names=NAMES):
        super().__init__()
        self._out_features = list(names)
        self._out_feature_strides = {name: 4 * 2**i for i, name in enumerate(names)}
        self._out_feature_channels = dict.fromkeys(names, 1)

    def forward(self, image):
        raise AssertionError("the bottom-up was run")


class Maps(Shapes):
    """The maps of ``maps_of``, and weak references to those of the last image."""

    def forward(self, image):
        maps = maps_of(*(10.0**i for i in range(len(self._out_features))))
        self.given = [weakref.ref(c_k) for c_k in maps]
        return dict(zip(self._out_features, maps, strict=True))


def maps_of(*values):
    """Maps of one channel, each half the size of the one before, each of one value."""
    sides = [2 ** (len(values) - i) for i in range(len(values))]
    return [torch.full((1, 1, s, s), float(v)) for v, s in zip(values, sides, strict=True)]


def pyramid_of_ones(variant=FeaturePyramid, bottom_up=None, **kwargs):
    """Every convolution is the identity."""
    bottom_up = bottom_up or Shapes()
    pyramid = variant(
        bottom_up=bottom_up, in_features=bottom_up._out_features, out_channels=1, **kwargs
    )
    for convolution in pyramid.modules():
        if isinstance(convolution, nn.Conv2d):
            nn.init.dirac_(convolution.weight)
    return pyramid.eval()


def values(levels):
    return [level.unique().item() for level in levels]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (FeaturePyramid, [1111, 1110, 1100, 1000]),
        (BilinearPyramid, [1111, 1110, 1100, 1000]),
        (LearnedUpsamplingPyramid, [1111, 1110, 1100, 1000]),
        (PathAggregationPyramid, [1111, 1110, 1100, 1000]),
        (UnsmoothedPyramid, [1111, 1110, 1100, 1000]),
        (UnsmoothedTopPyramid, [1111, 1110, 1100, 1000]),
        (SmoothedRecursionPyramid, [1111, 1110, 1100, 1000]),
        (JwyangPyramid, [1111, 1110, 1100, 1000]),
        (BottomUpPyramid, [1, 10, 100, 1000]),
        (BiFPN, [1, 10, 100, 1000]),
        (TopDownPyramid, [1000, 1000, 1000, 1000]),
        (FinestLevelPyramid, [1111]),
    ],
)
def test_levels_on_maps_alone(variant, expected):
    """C2 = 1, C3 = 10, C4 = 100, C5 = 1000."""
    maps = maps_of(1, 10, 100, 1000)
    shapes = [c_k.shape for c_k in maps][: len(expected)]
    levels = pyramid_of_ones(variant).levels_on_maps(maps)
    assert values(levels) == expected
    assert [level.shape for level in levels] == shapes


def test_levels_on_maps_cell_by_cell():
    """Each cell of the coarser map goes to the four cells under it."""
    c2 = torch.arange(16.0).reshape(1, 1, 4, 4)
    c3 = torch.tensor([[100.0, 200], [300, 400]]).reshape(1, 1, 2, 2)
    p2, p3 = pyramid_of_ones(bottom_up=Shapes(["c2", "c3"])).levels_on_maps([c2, c3])
    assert p3.squeeze().tolist() == [[100, 200], [300, 400]]
    assert p2.squeeze().tolist() == [
        [100, 101, 202, 203],
        [104, 105, 206, 207],
        [308, 309, 410, 411],
        [312, 313, 414, 415],
    ]


def test_a_norm_after_the_laterals_counts_once():
    """BN that doubles: of C2 = 1 and C3 = 10, P3 = 20 and P2 = 2 + 20."""
    pyramid = pyramid_of_ones(NormalizedLateralPyramid, Shapes(["c2", "c3"]), norm="BN")
    for lateral in pyramid.laterals:
        lateral.norm.weight.data.fill_(2)
    levels = pyramid.levels_on_maps(maps_of(1, 10))
    assert values(levels) == pytest.approx([22, 20], rel=1e-4)


def test_the_top_block_on_levels_alone():
    p2, p3 = maps_of(1, 10)
    p3 = torch.tensor([[1.0, 2], [3, 4]]).reshape(1, 1, 2, 2)
    pyramid = pyramid_of_ones(bottom_up=Shapes(["c2", "c3"]), top_block=Subsample("p3"))
    levels = pyramid.with_top_block([p2, p3])
    assert levels[0] is p2 and levels[1] is p3
    assert levels[2].item() == 1  # of every 2 x 2 cells the first
    assert len(pyramid_of_ones().with_top_block(maps_of(1, 2, 3, 4))) == 4, "none without one"


def test_a_top_block_on_a_c_k():
    """P6 of C5 = 7, whatever P5 is."""
    pyramid = pyramid_of_ones(top_block=ConvolutionsOnC("c5", 1, 1, ["p6"]))
    levels = maps_of(1, 2, 3, 4)
    assert values(pyramid.with_top_block(levels, torch.full((1, 1, 2, 2), 7.0))) == [1, 2, 3, 4, 7]
    with pytest.raises(ValueError, match="top_map is missing: the top block reads c5"):
        pyramid.with_top_block(levels)


def test_a_name_that_both_have_is_the_pyramids_to_the_top_block():
    """A pyramid on a pyramid: P4 is of the outer P3, whose 3x3 doubles."""
    bottom_up = Maps(["p2", "p3"])
    pyramid = pyramid_of_ones(bottom_up=bottom_up, top_block=Subsample("p3"))
    pyramid.fpn_output3.weight.data.mul_(2)
    assert values(pyramid(torch.zeros(1)).values()) == [11, 20, 20]


def test_path_aggregation_is_its_third_step():
    """N2 = P2, N3 = N2 + P3, N4 = N3 + P4, N5 = N4 + P5, and P6 is of N5."""
    pyramid = pyramid_of_ones(PathAggregationPyramid, top_block=Subsample("p5"))
    assert values(pyramid.with_top_block(maps_of(1, 20, 300, 4000))) == [1, 21, 321, 4321, 4321]


def test_bifpn_fuses_what_the_top_block_has_made():
    """The layers get all five levels, including P6 from P5."""
    pyramid = pyramid_of_ones(BiFPN, top_block=Subsample("p5"), repeats=2)
    given = []
    for layer in pyramid.bifpn:
        layer.register_forward_hook(lambda _, maps, made: given.append((maps[0], made)))
    made = pyramid.with_top_block(maps_of(1, 2, 3, 4))
    assert values(given[0][0]) == [1, 2, 3, 4, 4]
    assert given[1][0] is given[0][1] and made is given[1][1]


@pytest.mark.parametrize("variant", [FeaturePyramid, BottomUpPyramid, BiFPN, TopDownPyramid])
def test_a_c_k_lives_until_its_lateral_connection_has_read_it(variant):
    """Without gradients, each lateral connection runs after the coarser C_k is freed."""
    bottom_up = Maps()
    pyramid = pyramid_of_ones(variant, bottom_up)
    alive = []
    for lateral in pyramid.laterals:
        lateral.register_forward_pre_hook(
            lambda *_: alive.append(sum(c_k() is not None for c_k in bottom_up.given))
        )
    with torch.no_grad():
        pyramid(torch.zeros(1))
    assert alive == ([1] if variant is TopDownPyramid else [4, 3, 2, 1])


def test_the_steps_are_those_of_forward():
    pyramid = pyramid_of_ones(bottom_up=Maps(), top_block=Subsample("p5"))
    maps = pyramid(torch.zeros(1))
    assert list(maps) == ["p2", "p3", "p4", "p5", "p6"]
    levels = pyramid.with_top_block(pyramid.levels_on_maps(maps_of(1, 10, 100, 1000)))
    assert values(maps.values()) == values(levels) == [1111, 1110, 1100, 1000, 1000]


def test_steps_that_make_another_number_of_levels():
    class OneTooFew(FeaturePyramid):
        def levels_on_maps(self, maps):
            return super().levels_on_maps(maps)[1:]

    with pytest.raises(ValueError, match=r"made 3 levels of \['p2', 'p3', 'p4', 'p5'\]"):
        pyramid_of_ones(OneTooFew, Maps())(torch.zeros(1))
