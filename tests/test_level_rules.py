"""Rules that assign boxes to levels, and the poolers that use them."""

import math
import sys
from pathlib import Path

import fpn_ext
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from fpn_ext.modeling.level_rules import (
    LEVEL_RULE_REGISTRY,
    LongerSideRule,
    PaperRule,
    RoundedRule,
    StrideRule,
    assign_levels,
)
from fpn_ext.modeling.pooler import LevelMappedROIPooler
from fpn_ext.variants.all_levels import AllLevelsROIPooler
from fpn_ext.variants.peers import NaturalLogRule, RoundedNaturalLogRule
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import level_rules

BINARY = ["PaperRule", "RoundedRule", "LongerSideRule", "StrideRule"]  # a level is a factor of two
RULES = [*BINARY, "NaturalLogRule", "RoundedNaturalLogRule"]
FPN = [4, 8, 16, 32]
NAN = float("nan")


def boxes(*sizes):
    """One at (0, 0) for each (width, height), or for each side of a square."""
    pairs = [size if isinstance(size, tuple) else (size, size) for size in sizes]
    return torch.tensor([[0.0, 0.0, w, h] for w, h in pairs]).reshape(-1, 4)


def random_boxes(count=500):
    side = 4 * 300 ** torch.rand(count, 2)
    corner = 500 * torch.rand(count, 2)
    return torch.cat([corner, corner + side], dim=1)


# By hand, on P2..P5 with 224 px at P4 unless it says otherwise.


def test_the_papers_rule_is_eq_1():
    rule = PaperRule(FPN, 224, 4)
    found = random_boxes()
    assert torch.equal(rule(found), assign_levels(found, 2, 5) - 2)
    assert rule.bounds() == [112, 224, 448]


def test_rounded():
    """Half a level sooner: 224 / sqrt(2) = 158.39 is the first of P4."""
    sizes = boxes(79.1, 79.3, 158.3, 158.5, 224.0, 316.7, 316.9)
    assert RoundedRule(FPN, 224, 4)(sizes).tolist() == [0, 1, 1, 2, 2, 2, 3]


def test_longer_side():
    sizes = boxes((10.0, 111.0), (10.0, 112.0), (223.0, 223.0), (224.0, 5.0), (3.0, 448.0))
    assert LongerSideRule(FPN, 224, 4)(sizes).tolist() == [0, 1, 1, 2, 3]


def test_natural_logarithm():
    """A level is a factor of e: 224 / e = 82.4, 224, 224 e = 608.9."""
    sizes = boxes(5.0, 82.3, 82.5, 223.9, 224.0, 608.8, 609.0)
    assert NaturalLogRule(FPN, 224, 4)(sizes).tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_natural_logarithm_rounded():
    """Half a level sooner: 224 e^-1.5 = 49.98, 224 e^-0.5 = 135.86, 224 e^0.5 = 369.31."""
    sides = (49.9, 50.0, 135.8, 135.9, 224.0, 369.3, 369.4)
    expected = [2, 3, 3, 4, 4, 4, 5]
    assert [round(4 + math.log(side / 224)) for side in sides] == expected
    found = RoundedNaturalLogRule(FPN, 224, 4)(boxes(*sides))
    assert [2 + index for index in found.tolist()] == expected


def test_by_stride():
    """14 cells of a map: 84 px on stride 6, 168 on 12, 336 on 24."""
    rule = StrideRule([6, 12, 24], 224, 4)
    assert rule(boxes(1.0, 84.0, 167.9, 168.0, 335.9, 336.0, 9e3)).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert rule.bounds() == [168, 336]


def test_by_stride_is_eq_1_where_strides_are_powers_of_two():
    found = torch.cat([random_boxes(), boxes(*(224.0 * 2.0**k for k in range(-6, 4)))])
    for strides in (FPN, [2, 4, 8], [16, 32, 64, 128]):
        assert torch.equal(StrideRule(strides, 224, 4)(found), PaperRule(strides, 224, 4)(found))


@pytest.mark.parametrize(
    ("strides", "firsts"),
    [
        ([4, 16, 32], [4, 5]),  # P3 is as near to P2 as to P4: to the finer
        ([4, 32], [4]),  # P3 to P2, P4 to P5
        ([4, 64], [5]),  # P3, P4 to P2; P5 to P6
        ([2, 4, 32, 128], [2, 4, 7]),  # P6 to P5
    ],
)
def test_a_missing_level_goes_to_the_nearest_the_finer_of_two(strides, firsts):
    rule = PaperRule(strides, 224, 4)
    sides = [224.0 * 2.0 ** (k - 4) for k in range(0, 9)]
    by_hand = [sum(k >= first for first in firsts) for k in range(0, 9)]
    assert rule(boxes(*sides)).tolist() == by_hand
    assert rule(boxes(*(side * 1.99 for side in sides))).tolist() == by_hand


def test_by_stride_a_missing_level_goes_to_the_finer():
    sides = [56.0, 112.0, 224.0, 447.0, 448.0]
    assert StrideRule([4, 32], 224, 4)(boxes(*sides)).tolist() == [0, 0, 0, 0, 1]


# Of every rule


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("strides", [FPN, [4, 16, 32], [2, 8, 128], [16]])
def test_bounds_are_where_the_map_changes(name, strides):
    rule = LEVEL_RULE_REGISTRY.get(name)(strides, 224, 4)
    assert len(rule.bounds()) == len(strides) - 1
    for i, bound in enumerate(rule.bounds()):
        assert rule(boxes(bound * 0.9999, bound * 1.0001)).tolist() == [i, i + 1]


@pytest.mark.parametrize("name", RULES)
def test_boxes_without_a_size_go_to_the_finest(name):
    odd = torch.tensor([[9.0, 9, 9, 9], [9, 9, 5, 30], [NAN, 0, 9, 9]])
    found = LEVEL_RULE_REGISTRY.get(name)(FPN, 224, 4)(odd)
    assert found[0] == 0 and found[2] == 0
    assert found.dtype == torch.int64
    assert LEVEL_RULE_REGISTRY.get(name)(FPN, 224, 4)(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("name", RULES)
def test_larger_boxes_never_go_to_finer_maps(name):
    rule = LEVEL_RULE_REGISTRY.get(name)([4, 16, 32, 128], 100, 3)
    found = rule(boxes(*[1.05**i for i in range(200)]))
    assert (found.diff() >= 0).all() and found.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", BINARY)
def test_one_level_more_is_half_the_size(name):
    rule = LEVEL_RULE_REGISTRY.get(name)
    found = random_boxes()
    assert torch.equal(rule(FPN, 448, 5)(found), rule(FPN, 224, 4)(found))


@pytest.mark.parametrize("name", RULES)
def test_twice_the_canonical_size_is_for_boxes_twice_as_large(name):
    rule = LEVEL_RULE_REGISTRY.get(name)
    found = random_boxes()
    doubled = torch.cat([found[:, :2] * 2, found[:, 2:] * 2], dim=1)
    assert torch.equal(rule(FPN, 448, 4)(doubled), rule(FPN, 224, 4)(found))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.torchscript
def test_torchscript(name):
    for strides in (FPN, [4, 32]):
        rule = LEVEL_RULE_REGISTRY.get(name)(strides, 224, 4)
        found = random_boxes(50)
        assert torch.equal(torch.jit.script(rule)(found), rule(found))


@pytest.mark.parametrize("name", [name for name in RULES if name != "StrideRule"])
def test_eq_1_names_no_level_of_stride_6(name):
    with pytest.raises(ValueError, match=rf"power of two, got 6; {name} .*LEVEL_RULE StrideRule"):
        LEVEL_RULE_REGISTRY.get(name)([6, 12], 224, 4)
    assert LEVEL_RULE_REGISTRY.get(name)([6], 224, 4)(boxes(5.0)).tolist() == [0]


# The pooler with them


def pooler(strides, rule="PaperRule", implementation="per_level", **kwargs):
    return LevelMappedROIPooler(
        output_size=2,
        scales=[1 / t for t in strides],
        sampling_ratio=2,
        pooler_type="ROIAlignV2",
        level_rule=rule,
        implementation=implementation,
        **kwargs,
    )


def maps_of(strides, size=768, channels=1):
    """Maps that say which they are."""
    sides = [-(-size // t) for t in strides]
    return [torch.full((1, channels, s, s), float(t)) for s, t in zip(sides, strides, strict=True)]


@pytest.mark.parametrize("implementation", ["per_level", "weighted_rows"])
@pytest.mark.parametrize(
    ("strides", "rule", "sides", "expected", "levels"),
    [
        ([4, 16, 32], "PaperRule", (50.0, 120, 230, 500), (4, 4, 16, 32), (2, 2, 4, 5)),
        ([6, 12, 24], "StrideRule", (80.0, 170, 300, 340), (6, 12, 12, 24), (3, 4, 4, 5)),
        ([2, 128], "PaperRule", (100.0, 448, 700), (2, 128, 128), (1, 7, 7)),
        ([7, 21, 63], "StrideRule", (90.0, 300, 700), (7, 21, 21), (3, 4, 4)),
    ],
)
def test_levels_with_gaps_and_other_strides(implementation, strides, rule, sides, expected, levels):
    pool = pooler(strides, rule, implementation)
    found = boxes(*sides)
    pooled = pool(maps_of(strides), [Boxes(found)])
    for row, stride in zip(pooled, expected, strict=True):
        torch.testing.assert_close(row, torch.full_like(row, float(stride)))
    assert pool.assign(found).tolist() == list(levels)


def test_a_box_on_stride_6_is_where_it_is():
    """On a map whose value is its x in pixels: bins of 24 px have their centres at 72 and 96."""
    x = (torch.arange(40.0) + 0.5) * 6
    pool = pooler([6, 12], "StrideRule")
    maps = [x.expand(1, 1, 40, 40), torch.zeros(1, 1, 20, 20)]
    pooled = pool(maps, [Boxes(torch.tensor([[60.0, 60, 108, 108]]))])
    torch.testing.assert_close(pooled[0, 0], torch.tensor([[72.0, 96.0], [72.0, 96.0]]))


@pytest.mark.torchscript
def test_torchscript_of_a_pooler_with_gaps():
    pool = pooler([4, 32], "RoundedRule")
    scripted = torch.jit.script(pool)
    found = [Boxes(random_boxes(20) / 3)]
    maps = [torch.rand(1, 3, 80, 80), torch.rand(1, 3, 10, 10)]
    assert torch.equal(scripted(maps, found), pool(maps, found))


@pytest.mark.torchscript
def test_all_levels_by_hand():
    found = [Boxes(boxes(50.0, 300.0, 700.0))]
    for fusion, value in (("max", 32.0), ("sum", 4.0 + 8 + 16 + 32)):
        pool = AllLevelsROIPooler([pooler([t]) for t in FPN], fusion)
        pooled = pool(maps_of(FPN), found)
        assert pooled.shape == (3, 1, 2, 2) and pooled.unique().tolist() == [value]
        assert torch.equal(torch.jit.script(pool)(maps_of(FPN), found), pooled)


def test_all_levels_are_those_of_each_level():
    maps = [torch.rand(2, 3, 256 // t, 256 // t, requires_grad=True) for t in FPN]
    found = [Boxes(random_boxes(9) / 3), Boxes(boxes(5.0, NAN))]
    alone = torch.stack([pooler([t])([m], found) for t, m in zip(FPN, maps, strict=True)])
    every = [pooler([t]) for t in FPN]
    pool = AllLevelsROIPooler(every, "sum")
    torch.testing.assert_close(pool(maps, found), alone.sum(dim=0))
    assert pool.num_degenerate == 1
    pooled = AllLevelsROIPooler(every, "max")(maps, found)
    assert torch.equal(pooled, alone.amax(dim=0))
    pooled.sum().backward()
    assert all(m.grad is not None and m.grad.any() for m in maps)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"LEVEL_FUSION must be one of .*got 'mean'"):
        AllLevelsROIPooler([pooler([4])], "mean")
    with pytest.raises(ValueError, match=r"names no map"):
        AllLevelsROIPooler([])
    with pytest.raises(ValueError, match=r"2 levels, got 1 maps"):
        AllLevelsROIPooler([pooler([4]), pooler([8])])(maps_of([4]), [Boxes(boxes(3.0))])


# From YAML


DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
CPU = ["MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"]


@pytest.mark.parametrize(
    "opts",
    [
        *(["MODEL.FPN_EXT.LEVEL_RULE", rule] for rule in RULES[1:]),
        ["MODEL.ROI_HEADS.NAME", "AllLevelsROIHeads"],
        ["MODEL.ROI_HEADS.NAME", "AllLevelsROIHeads", "MODEL.FPN_EXT.LEVEL_FUSION", "sum"],
        ["MODEL.ROI_HEADS.NAME", "AllLevelsROIHeads", "MODEL.MASK_ON", "True"],
    ],
    ids=lambda opts: "-".join(opts[1::2]),
)
def test_a_model_of_every_rule(opts):
    cfg = fpn_ext.load_config(DEMO, [*opts, *CPU, "MODEL.RPN.POST_NMS_TOPK_TEST", "20"])
    fpn_ext.check_config(cfg)
    model = build_model(cfg).eval()
    pool = model.roi_heads.box_pooler
    if "MODEL.FPN_EXT.LEVEL_RULE" in opts:
        assert type(pool.rule).__name__ == opts[1]
    else:
        assert isinstance(pool, AllLevelsROIPooler)
        assert pool.takes_maximum == ("sum" not in opts)
    with torch.no_grad():
        image = {"image": torch.randint(0, 255, (3, 97, 131), dtype=torch.uint8)}
        plain = model([image])[0]["instances"]
        quick = fpn_ext.optimize_for_inference(model)([image])[0]["instances"]
    assert plain.has("pooled_level") == ("MODEL.FPN_EXT.LEVEL_RULE" in opts)
    torch.testing.assert_close(quick.scores, plain.scores, rtol=1e-3, atol=1e-4)


def test_a_rule_of_ones_own():
    @LEVEL_RULE_REGISTRY.register()
    class EverythingFinest(nn.Module):
        measure = "side"

        def __init__(self, strides, canonical_box_size, canonical_level):
            super().__init__()
            self.count = len(strides)

        def bounds(self):
            return [math.inf] * (self.count - 1)

        def forward(self, boxes):
            return torch.zeros(len(boxes), dtype=torch.int64)

    try:
        opts = ["MODEL.FPN_EXT.LEVEL_RULE", "EverythingFinest", *CPU]
        cfg = fpn_ext.load_config(DEMO, opts)
        fpn_ext.check_config(cfg)
        pool = build_model(cfg).roi_heads.box_pooler
        assert pool.assign(boxes(3.0, 900.0)).tolist() == [2, 2]
    finally:
        LEVEL_RULE_REGISTRY._obj_map.pop("EverythingFinest")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.FPN_EXT.LEVEL_RULE", "PaperRul"], r"LEVEL_RULE: 'PaperRul' .*valid: 'PaperRule'"),
        (["MODEL.FPN_EXT.LEVEL_FUSION", "mean"], r"LEVEL_FUSION must be one of .*got 'mean'"),
    ],
)
def test_mistakes(opts, message):
    with pytest.raises(ValueError, match=message):
        fpn_ext.check_config(fpn_ext.load_config(DEMO, opts))


# The benchmark's table


def test_the_table_of_the_benchmark():
    def run(rule, seed, *scores):
        scores = dict(zip(level_rules.METRICS, scores, strict=True))
        return {
            "rule": rule,
            "seed": seed,
            "scores": scores,
            "iterations": 1,
            "commit": "c",
            "hardware": "h",
        }

    runs = [
        run("PaperRule", 1, 10.0, 20.0, 1.0, 2.0, 3.0),
        run("PaperRule", 2, 14.0, 20.0, 1.0, 2.0, None),
        run("RoundedRule", 1, 11.0, 20.0, 1.0, 2.0, 3.0),
        run("RoundedRule", 2, 17.0, 20.0, 1.0, 2.0, 3.0),
        run("LongerSideRule", 3, 9.0, 20.0, 1.0, 2.0, 3.0),
    ]
    rows = {(row["rule"], row["metric"]): row for row in level_rules.summary(runs)}
    assert ("PaperRule", "APl") not in rows
    rounded = rows["RoundedRule", "AP"]
    assert (rounded["mean"], rounded["difference"], rounded["standard_error"]) == (14, 2, 1)
    text = level_rules.markdown(runs, "command")
    assert "| PaperRule | 2 | 12.0 ± 2.8 |" in text
    assert "| RoundedRule | +2.0 ± 1.0 | +0.0 ± 0.0 |" in text
    assert "| LongerSideRule | 1 | 9.0 |" in text and "| LongerSideRule |  |" in text
