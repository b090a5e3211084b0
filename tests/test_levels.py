import pytest
from fpn_ext.levels import (
    check_fine_to_coarse,
    level_of,
    map_name,
    name_of,
    names_above,
    nearest_level,
    stride_named,
    stride_of,
)


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


@pytest.mark.parametrize("strides", [[], [8, 4], [4, 4], [0, 4], [4, float("nan")]])
def test_wrong_orders_are_refused(strides):
    with pytest.raises(ValueError, match=r"at least one level|from fine to coarse"):
        check_fine_to_coarse(strides)


@pytest.mark.parametrize("strides", [[2.0, 4.0], [16], [4, 16, 32], [6, 12, 24], [3, 9]])
def test_gaps_and_other_strides_are_levels(strides):
    check_fine_to_coarse(strides)


def test_a_name_says_its_stride_and_back():
    for stride in (1, 2, 6, 7, 32, 48, 128):
        assert stride_named(map_name(stride)) == stride
        assert stride_named(map_name(stride, "c")) == stride
    assert [map_name(t) for t in (128, 12.0)] == ["p7", "ps12"]


@pytest.mark.parametrize("name", ["", "p", "stem", "ps8", "s4", "ps0", "p-2", "p2x", "c", "q3"])
def test_a_name_that_says_no_stride(name):
    assert stride_named(name) is None


def test_levels_above_another():
    assert names_above("p5", 2) == ["p6", "p7"]
    assert names_above("ps12", 2) == ["ps24", "ps48"]


def test_strides_between_two_levels_belong_to_the_nearest():
    assert [nearest_level(t) for t in (4, 5, 6, 11, 12, 100)] == [2, 2, 3, 3, 4, 7]
