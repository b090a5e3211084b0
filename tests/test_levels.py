import pytest
from fpn_ext.levels import level_of, levels_of, name_of, stride_of


def test_level_stride_and_name_belong_together():
    assert [stride_of(k) for k in range(2, 7)] == [4, 8, 16, 32, 64]
    assert [level_of(s) for s in (4, 8, 16, 32, 64)] == [2, 3, 4, 5, 6]
    assert [name_of(k) for k in (2, 6)] == ["p2", "p6"]


def test_a_scale_rounded_in_float_still_names_its_level():
    assert level_of(1 / (1 / 32 + 1e-10)) == 5


@pytest.mark.parametrize("stride", [0, -4, 6, 0.5, float("nan"), float("inf")])
def test_a_stride_that_is_no_power_of_two_is_refused(stride):
    with pytest.raises(ValueError, match=r"got"):
        level_of(stride)


@pytest.mark.parametrize("strides", [[], [4, 16], [8, 4], [4, 4], [4, 8, 12]])
def test_gaps_and_wrong_orders_are_refused(strides):
    with pytest.raises(ValueError):
        levels_of(strides)


def test_any_gap_free_run_is_a_pyramid():
    assert levels_of([2.0, 4.0]) == [1, 2]
    assert levels_of([16]) == [4]
