import logging

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from fpn_ext.kernels import roi_align_cpu, roi_align_samples
from fpn_ext.modeling.level_rules import assign_levels
from fpn_ext.modeling.pooler import MAX_COORDINATE, POOLER_TYPES, LevelMappedROIPooler
from hypothesis import given, settings
from hypothesis import strategies as st

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
INF, NAN = float("inf"), float("nan")


def pyramid(batch=2, channels=3, size=256, requires_grad=False, dtype=torch.float32):
    return [
        torch.randn(batch, channels, size // s, size // s, dtype=dtype, requires_grad=requires_grad)
        for s in (4, 8, 16, 32)
    ]


def random_boxes(count, size=256, seed=0):
    """Boxes with sides from 4 to 2 x size, some across the border."""
    generator = torch.Generator().manual_seed(seed)
    side = 4 * (size / 2) ** torch.rand(count, 2, generator=generator)
    centre = torch.rand(count, 2, generator=generator) * size
    return Boxes(torch.cat([centre - side / 2, centre + side / 2], dim=1))


def pooler(pooler_type="ROIAlignV2", output_size=7, sampling_ratio=0, scales=SCALES, **kwargs):
    """The reference implementation, unless told otherwise."""
    kwargs.setdefault("implementation", "per_level")
    return LevelMappedROIPooler(
        output_size=output_size,
        scales=scales,
        sampling_ratio=sampling_ratio,
        pooler_type=pooler_type,
        **kwargs,
    )


def squares(*sides):
    side = torch.tensor(sides)
    return torch.stack([0 * side, 0 * side, side, side], dim=1)


# Eq. 1


@pytest.mark.parametrize(
    ("side", "level"),
    [
        (0.0, 2),
        (1.0, 2),
        (56.0, 2),
        (111.99, 2),
        (112.0, 3),
        (223.99, 3),
        (224.0, 4),
        (447.99, 4),
        (448.0, 5),
        (1e6, 5),
    ],
)
def test_level_of_a_square(side, level):
    assert assign_levels(squares(side), 2, 5).tolist() == [level]


def test_the_level_is_that_of_the_area_whatever_the_shape():
    boxes = torch.tensor([[0.0, 0, 224, 224], [5, 5, 453, 117], [0, 9, 56, 905], [0, 0, 1e-3, 9]])
    assert assign_levels(boxes, 2, 5).tolist() == [4, 4, 4, 2]


def test_k0_and_224_are_arguments():
    boxes = squares(112.0, 224.0)
    assert assign_levels(boxes, 1, 7, canonical_level=5).tolist() == [4, 5]
    assert assign_levels(boxes, 1, 7, canonical_box_size=112).tolist() == [4, 5]
    assert assign_levels(boxes, 1, 7, canonical_box_size=112.5).tolist() == [3, 4]


def test_levels_are_clamped_to_those_there_are():
    assert assign_levels(squares(1.0, 224.0, 1e6), 3, 4).tolist() == [3, 4, 4]
    assert assign_levels(squares(1.0, 224.0, 1e6), 4, 4).tolist() == [4, 4, 4]


def test_boxes_without_a_size_go_to_the_finest_level():
    boxes = torch.tensor([[9.0, 9, 5, 30], [NAN, 0, 9, 9], [3, 3, 3, 3]])
    assert assign_levels(boxes, 2, 5).tolist() == [2, 2, 2]


def test_no_boxes_no_levels():
    levels = assign_levels(torch.zeros(0, 4), 2, 5)
    assert levels.shape == (0,) and levels.dtype == torch.int64


def test_half_precision_boxes_are_measured_in_float32():
    """In float16 the area of a 300 x 300 box is infinite."""
    assert assign_levels(squares(300.0).half(), 2, 5).tolist() == [4]


# The pooler


@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
def test_a_constant_map_pools_to_its_constant_and_shows_the_level(pooler_type):
    maps = [
        torch.full((1, 2, 512 // s, 512 // s), float(k))
        for k, s in zip((2, 3, 4, 5), (4, 8, 16, 32), strict=True)
    ]
    boxes = torch.tensor([[8.0, 8, 64, 64], [8, 8, 128, 128], [8, 8, 260, 260], [8, 8, 500, 500]])
    pooled = pooler(pooler_type)(maps, [Boxes(boxes)])
    assert pooled.shape == (4, 2, 7, 7)
    for row, level in enumerate((2, 3, 4, 5)):
        assert pooled[row].unique().tolist() == [level]


def test_a_bin_by_hand():
    """RoIAlign of a map whose value is its x: a bin's value is the x of its centre, in cells."""
    x = torch.arange(16.0).expand(1, 1, 16, 16)
    box = [Boxes(torch.tensor([[16.0, 16, 32, 32]]))]  # cells 4 to 8 of stride 4
    pooled = pooler(output_size=2, scales=[1 / 4])([x], box)
    # Bins are 2 cells wide with centres 5 and 7; cell i has its centre at i + 0.5.
    torch.testing.assert_close(pooled[0, 0], torch.tensor([[4.5, 6.5], [4.5, 6.5]]))
    unaligned = pooler("ROIAlign", output_size=2, scales=[1 / 4])([x], box)
    torch.testing.assert_close(unaligned[0, 0], torch.tensor([[5.0, 7.0], [5.0, 7.0]]))
    # RoIPool takes whole cells 4..8 inclusive, 2.5 a bin: the maxima of 4..6 and 6..8.
    maximum = pooler("ROIPool", output_size=2, scales=[1 / 4])([x], box)
    torch.testing.assert_close(maximum[0, 0], torch.tensor([[6.0, 8.0], [6.0, 8.0]]))


def test_rows_come_in_the_order_of_the_boxes():
    maps = pyramid(batch=2)
    first, second = random_boxes(20, seed=1), random_boxes(30, seed=2)
    pooled = pooler()(maps, [first, second])
    for i, box in enumerate(first):
        alone = pooler()([m[:1] for m in maps], [Boxes(box[None])])
        assert torch.equal(pooled[i : i + 1], alone)
    for i, box in enumerate(second):
        alone = pooler()([m[1:] for m in maps], [Boxes(box[None])])
        assert torch.equal(pooled[20 + i : 21 + i], alone)


def test_a_permutation_of_the_boxes_permutes_the_rows():
    maps, boxes = pyramid(batch=1), random_boxes(40)
    order = torch.randperm(40)
    assert torch.equal(pooler()(maps, [boxes[order]]), pooler()(maps, [boxes])[order])


@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("output_size", [7, 14])
def test_bit_equal_to_detectron2(pooler_type, sampling_ratio, output_size):
    boxes = [random_boxes(60, seed=3), random_boxes(0), random_boxes(17, seed=4)]
    boxes[2].tensor[0, 2:] = boxes[2].tensor[0, :2]  # one without area
    results = []
    maps = pyramid(batch=3, requires_grad=True)
    for pool in (
        pooler(pooler_type, output_size, sampling_ratio),
        ROIPooler(output_size, SCALES, sampling_ratio, pooler_type),
    ):
        pooled = pool(maps, boxes)
        weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(5))
        results.append((pooled, torch.autograd.grad((pooled * weights).sum(), maps)))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert torch.equal(ours, theirs)
    assert all(map(torch.equal, our_gradients, their_gradients))


def test_same_positional_arguments_as_detectron2():
    ours = LevelMappedROIPooler((7, 7), SCALES, 2, "ROIAlign", 112, 3)
    theirs = ROIPooler((7, 7), SCALES, 2, "ROIAlign", 112, 3)
    maps, boxes = pyramid(batch=1), [random_boxes(50)]
    assert torch.equal(ours(maps, boxes), theirs(maps, boxes))


@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
def test_a_non_square_output_is_the_square_ones_rows(pooler_type):
    """Along x, 3 bins of a box are the 3 bins of any box with the same x; so for y."""
    maps = [m.mean(dim=2, keepdim=True).expand_as(m) for m in pyramid(batch=1)]  # constant in y
    boxes = [random_boxes(20, size=100)]
    boxes[0].tensor.add_(70)  # inside the image, where a constant stays one
    wide = pooler(pooler_type, (2, 5))(maps, boxes)
    square = pooler(pooler_type, 5)(maps, boxes)
    assert wide.shape == (20, 3, 2, 5)
    torch.testing.assert_close(wide, square[:, :, :2])


def test_no_boxes_and_no_images():
    maps = pyramid(requires_grad=True)
    pooled = pooler(output_size=(2, 3))(maps, [random_boxes(0), random_boxes(0)])
    assert pooled.shape == (0, 3, 2, 3)
    pooled.sum().backward()  # still part of the graph, as distributed training needs
    assert all(m.grad is not None and not m.grad.any() for m in maps)
    assert pooler()([m[:0] for m in maps], []).shape == (0, 3, 7, 7)


def test_levels_without_boxes():
    maps = pyramid(batch=1, requires_grad=True)
    pooler()(maps, [Boxes(squares(100.0))]).sum().backward()
    assert [bool(m.grad.any()) for m in maps] == [True, False, False, False]


DEGENERATE = {
    "NaN": [NAN, 10, 90, 90],
    "infinite": [0, 0, INF, 90],
    "minus infinite": [-INF, 0, 90, 90],
    "huge": [0, 0, 4e4, 90],
    "x1 < x0": [90, 10, 10, 90],
    "y1 < y0": [10, 90, 90, 10],
    "both inverted": [90, 90, 10, 10],
}


@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("levels", [4, 1])
@pytest.mark.parametrize("implementation", ["per_level", "auto"])
def test_boxes_that_are_no_boxes(pooler_type, sampling_ratio, levels, implementation, caplog):
    """Zero rows, no gradient, counted, logged once; their neighbours are unaffected."""
    pool = pooler(
        pooler_type,
        sampling_ratio=sampling_ratio,
        scales=SCALES[:levels],
        implementation=implementation,
    )
    maps = [m.requires_grad_() for m in pyramid(batch=1)[:levels]]
    good = random_boxes(3).tensor
    boxes = torch.cat([good[:1], torch.tensor(list(DEGENERATE.values())), good[1:]])
    with caplog.at_level(logging.WARNING, logger="fpn_ext"):
        pooled = pool(maps, [Boxes(boxes)])
        pool(maps, [Boxes(boxes)])
    bad = slice(1, 1 + len(DEGENERATE))
    assert not pooled[bad].any()
    gradients = torch.autograd.grad(pooled[bad].sum(), maps, retain_graph=True)
    assert not any(g.any() for g in gradients)
    assert torch.equal(pooled[[0, -2, -1]], pool(maps, [Boxes(good)]))
    assert pool.num_degenerate == 2 * len(DEGENERATE)
    (record,) = caplog.records
    assert record.getMessage().startswith("7 of 10 boxes to pool are not boxes")


@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
def test_a_box_far_outside_gives_zeros_and_is_a_box(pooler_type):
    far = torch.tensor([[1e4, 1e4, 1e4 + 50, 1e4 + 50], [-900.0, 10, -850, 60]])
    pool = pooler(pooler_type)
    assert not pool(pyramid(batch=1), [Boxes(far)]).any()
    assert pool.num_degenerate == 0


def test_a_box_without_area_takes_what_lies_there():
    """RoIAlign without area: nothing to sample adaptively; a point with a fixed ratio."""
    maps = [torch.full((1, 1, 64, 64), 7.0), *pyramid(batch=1, channels=1)[1:]]
    point = [Boxes(torch.tensor([[50.0, 50, 50, 50]]))]
    assert not pooler(sampling_ratio=0)(maps, point).any()
    assert pooler(sampling_ratio=2)(maps, point).unique().tolist() == [7]
    assert pooler("ROIPool")(maps, point).unique().tolist() == [7]


def test_the_limit_of_coordinates_is_inclusive():
    pool = pooler(sampling_ratio=1)
    pool(pyramid(batch=1), [Boxes(torch.tensor([[0, 0, MAX_COORDINATE, 10.0]]))])
    assert pool.num_degenerate == 0


@pytest.mark.parametrize("implementation", ["per_level", "weighted_rows"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_pooled_where_the_box_is(dtype, implementation):
    """Coordinates are not rounded to the dtype of the maps: bfloat16 cannot represent 257."""
    maps = [torch.arange(512.0).expand(1, 1, 8, 512).to(dtype)]
    pool = pooler(output_size=1, scales=[1.0], implementation=implementation)
    pooled = pool(maps, [Boxes(torch.tensor([[253.0, 1, 262, 6]]))])
    assert pooled.dtype == dtype
    assert pooled.item() == torch.tensor(257.0).to(dtype)  # cells 253..261
    pooled = pool(maps, [Boxes(torch.tensor([[100.25, 1, 101.25, 6]]))])
    assert pooled.float().item() == pytest.approx(100.25, abs=0.25)


@pytest.mark.parametrize("implementation", ["per_level", "weighted_rows"])
def test_double_precision_gradients(implementation):
    maps = pyramid(batch=1, channels=1, size=64, dtype=torch.float64)
    maps = [m.requires_grad_() for m in maps]
    boxes = [Boxes(torch.tensor([[3.0, 5, 20, 30], [2, 2, 60, 50]]))]
    pool = pooler(output_size=2, canonical_box_size=64, implementation=implementation)
    assert torch.autograd.gradcheck(lambda *m: pool(list(m), boxes), maps)


# The fast implementation, against the reference. Features have unit variance.


def both(maps, boxes, pooler_type="ROIAlignV2", output_size=7, sampling_ratio=0, scales=SCALES):
    """(pooled, gradients of the maps) of the reference and of the fast implementation."""
    results = []
    for implementation in ("per_level", "weighted_rows"):
        pool = pooler(
            pooler_type, output_size, sampling_ratio, scales, implementation=implementation
        )
        pooled = pool(maps, boxes)
        weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(5))
        gradients = torch.autograd.grad((pooled * weights).sum(), maps)
        results.append((pooled.detach(), gradients))
    return results


def assert_equal_to_rounding(results):
    (expected, expected_gradients), (pooled, gradients) = results
    torch.testing.assert_close(pooled, expected, rtol=0, atol=2e-5)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(gradient, reference, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("pooler_type", ["ROIAlignV2", "ROIAlign"])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("output_size", [7, 14, (2, 5), 1])
@pytest.mark.parametrize("size", [256, 100])
def test_weighted_rows(pooler_type, sampling_ratio, output_size, size):
    maps = pyramid(batch=3, size=size, requires_grad=True)
    boxes = [random_boxes(60, size, seed=3), random_boxes(0), random_boxes(17, size, seed=4)]
    odd = [[9, 9, 9, 9], [9, 9, 9, 50], [-500, -500, -400, -400], [-500, -500, 900, 900]]
    odd += [[0, 0, 1e-3, 1e-3], [size - 1, size - 1, size + 3, size + 3], [-4, 20, 0, 40]]
    boxes[1] = Boxes(torch.tensor(odd, dtype=torch.float32))
    assert_equal_to_rounding(both(maps, boxes, pooler_type, output_size, sampling_ratio))


@st.composite
def pooling_problems(draw):
    """Maps, boxes and a pooler of any shape, including invalid boxes."""
    coarsest = draw(st.integers(2, 6))
    levels = list(range(draw(st.integers(1, coarsest)), coarsest + 1))
    side = 2**coarsest * draw(st.integers(1, max(1, 160 >> coarsest)))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    batch = draw(st.integers(1, 3))
    maps = [torch.randn(batch, 4, side >> k, (side >> k) + 1, requires_grad=True) for k in levels]
    odd = st.sampled_from(
        [
            [5, 5, 5, 5],
            [30, 30, 10, 40],
            [NAN, 0, 9, 9],
            [0, 0, float("inf"), 9],
            [-900, -900, -800, -850],
            [-2 * side, -2 * side, 3 * side, 3 * side],
            [side - 1, 0, side + 0.5, side],
        ]
    )
    boxes = []
    for _ in range(batch):
        plain = random_boxes(draw(st.integers(0, 12)), side).tensor
        strange = torch.tensor(draw(st.lists(odd, max_size=4)), dtype=torch.float32).reshape(-1, 4)
        boxes.append(Boxes(torch.cat([plain, strange])))
    return maps, boxes, {
        "pooler_type": draw(st.sampled_from(["ROIAlign", "ROIAlignV2"])),
        "output_size": (draw(st.integers(1, 14)), draw(st.integers(1, 14))),
        "sampling_ratio": draw(st.integers(0, 4)),
        "scales": [2.0**-k for k in levels],
    }  # fmt: skip


@settings(max_examples=60)
@given(pooling_problems())
def test_weighted_rows_of_anything(problem):
    maps, boxes, kwargs = problem
    assert_equal_to_rounding(both(maps, boxes, **kwargs))


def test_weighted_rows_do_not_depend_on_the_number_of_threads():
    maps = pyramid(channels=32, requires_grad=True)
    boxes = [random_boxes(200), random_boxes(100, seed=1)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            pooled = pooler(implementation="weighted_rows")(maps, boxes)
            results.append([pooled.detach(), *torch.autograd.grad(pooled.square().sum(), maps)])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_weighted_rows_of_permuted_boxes():
    """The rows permute, bit for bit; a cell's gradient is the same sum in another order."""
    maps = pyramid(batch=1, requires_grad=True)
    boxes = random_boxes(300)
    order = torch.randperm(300)
    results = []
    for these, back in ((boxes, torch.arange(300)), (boxes[order], order.argsort())):
        pooled = pooler(implementation="weighted_rows")(maps, [these])
        results.append((pooled.detach()[back], torch.autograd.grad(pooled.sum(), maps)))
    assert torch.equal(results[0][0], results[1][0])
    assert_equal_to_rounding(results)


def test_weighted_rows_of_channels_last_maps():
    maps = [m.to(memory_format=torch.channels_last).requires_grad_() for m in pyramid(channels=16)]
    results = both(maps, [random_boxes(40), random_boxes(10, seed=1)])
    assert_equal_to_rounding(results)
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    assert results[1][1][0].is_contiguous(memory_format=torch.channels_last)


def test_weighted_rows_of_one_level_and_of_a_level_without_boxes():
    maps = pyramid(batch=1, requires_grad=True)
    assert_equal_to_rounding(both(maps[:1], [random_boxes(30)], scales=SCALES[:1]))
    assert_equal_to_rounding(both(maps, [Boxes(squares(100.0))]))


def test_weighted_rows_without_boxes():
    maps = pyramid(requires_grad=True)
    pool = pooler(output_size=(2, 3), implementation="weighted_rows")
    pooled = pool(maps, [random_boxes(0), random_boxes(0)])
    assert pooled.shape == (0, 3, 2, 3)
    pooled.sum().backward()
    assert all(m.grad is not None and not m.grad.any() for m in maps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_rows_of_half_precision(dtype):
    maps = [m.to(dtype) for m in pyramid(batch=1, channels=8)]
    boxes = [random_boxes(80, seed=6)]
    pooled = pooler(implementation="weighted_rows")(maps, boxes)
    in_float32 = [m.float() for m in maps]
    reference = pooler(implementation="per_level")(in_float32, boxes)
    assert pooled.dtype == dtype
    # The weights of a bin sum up to 1 at most; they are rounded, and so is what they sum up.
    largest = max(m.abs().max().item() for m in maps)
    atol = torch.finfo(dtype).eps * largest
    torch.testing.assert_close(pooled.float(), reference, rtol=0, atol=atol)

    # With gradients to come, what is summed up is rounded alone: half a unit in the last place, and
    # what the order of the sums does in float32 (the kernels of the two dtypes may differ in it).
    for m in maps:
        m.requires_grad_()
    pooled = pooler(implementation="weighted_rows")(maps, boxes).double()
    reference = pooler(implementation="per_level")(in_float32, boxes).double()
    of_order = 8 * torch.finfo(torch.float32).eps * largest
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rtol = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(pooled, reference, rtol=rtol, atol=of_order + smallest)


@pytest.mark.parametrize(
    "high, samples, length, cells, weights",
    [
        # Samples at 1 and 3 of four cells, on cells themselves: the last has no neighbour.
        (4.0, 2, 4, [1, 2, 3], [0.5, 0, 0.5]),
        # At 2 and 6: further than a cell apart, two cells each.
        (8.0, 2, 20, [2, 3, 6, 7], [0.5, 0, 0.5, 0]),
        # At 0.25 and 0.75, between the same two cells.
        (1.0, 2, 20, [0, 1], [0.5, 0.5]),
        # At 1.5, 4.5 and 7.5 of a map of seven cells: the last is outside.
        (9.0, 3, 7, [1, 2, 3, 4, 5, 6], [1 / 6, 1 / 6, 0, 1 / 6, 1 / 6, 0]),
    ],
)
def test_the_cells_of_a_bin(high, samples, length, cells, weights):
    """A bin from 0 to ``high`` on a map of the given number of cells, computed by hand."""
    settings = roi_align_samples.Settings((1.0,), (1, 1), samples, aligned=False)
    ends = torch.tensor([[0.0], [high]])
    found = roi_align_samples.taps_along(
        roi_align_samples.samples_along(*ends, 1, 1.0, settings), 1, length
    )
    assert found.taps.tolist() == [len(cells)]
    assert found.cell[0, 0, : len(cells)].tolist() == cells
    torch.testing.assert_close(found.weight[0, 0, : len(cells)], torch.tensor(weights))


@pytest.mark.parametrize("sampling_ratio", [0, 3])
@pytest.mark.parametrize("limit", ["BOXES_AT_ONCE", "MOST_AT_ONCE"])
def test_weighted_rows_a_box_at_a_time(monkeypatch, limit, sampling_ratio):
    maps = pyramid(batch=1, channels=4, requires_grad=True)
    boxes = [random_boxes(50, seed=7)]

    def pooled_and_gradients():
        pooled = pooler(sampling_ratio=sampling_ratio, implementation="weighted_rows")(maps, boxes)
        return [pooled, *torch.autograd.grad(pooled.square().sum(), maps)]

    together = pooled_and_gradients()
    sizes = []
    sums = roi_align_cpu.weighted_sums
    monkeypatch.setattr(
        roi_align_cpu, "weighted_sums", lambda *a: sizes.append(len(a[3])) or sums(*a)
    )
    monkeypatch.setattr(roi_align_cpu, limit, 1)
    assert all(map(torch.equal, together, pooled_and_gradients()))
    assert sizes[:50] == [49] * 50  # bins of one box; the backward pass takes a map at once


@pytest.mark.parametrize("at_once", [1, 3 * 40, 10**6])
def test_nchw_maps_are_turned_in_parts(monkeypatch, at_once):
    monkeypatch.setattr(roi_align_cpu, "TURNED_AT_ONCE", at_once)
    maps = pyramid(batch=2, channels=3)
    assert not maps[0].is_contiguous(memory_format=torch.channels_last)
    boxes = [random_boxes(60), random_boxes(20, seed=8)]
    found = pooler(implementation="weighted_rows")(maps, boxes)
    maps = [m.to(memory_format=torch.channels_last) for m in maps]
    assert torch.equal(found, pooler(implementation="weighted_rows")(maps, boxes))


@pytest.mark.parametrize("at_once", [1, 8 * 11, 10**6])
def test_gradients_are_laid_out_as_their_maps(monkeypatch, at_once):
    monkeypatch.setattr(roi_align_cpu, "GRADIENT_AT_ONCE", at_once)
    found, boxes = [], [random_boxes(60), random_boxes(20, seed=8)]
    nchw = pyramid(batch=2, channels=8)
    nhwc = [m.to(memory_format=torch.channels_last) for m in nchw]
    for maps, layout in ((nchw, torch.contiguous_format), (nhwc, torch.channels_last)):
        received = []
        for m in maps:
            m.requires_grad_().register_hook(received.append)
        pooler(implementation="weighted_rows")(maps, boxes).sum().backward()
        assert len(received) == len(maps)
        assert all(g.is_contiguous(memory_format=layout) for g in received)
        found.append([m.grad for m in maps])
    assert found[0][0].any()
    assert all(map(torch.equal, *found))


def test_weighted_rows_give_the_same_gradient_every_time():
    maps = pyramid(batch=1, channels=8, requires_grad=True)
    boxes = [random_boxes(200)]
    pool = pooler(implementation="weighted_rows")
    gradients = [torch.autograd.grad(pool(maps, boxes).square().sum(), maps) for _ in range(3)]
    for again in gradients[1:]:
        assert all(map(torch.equal, gradients[0], again))


def test_a_frozen_level_gets_no_gradient():
    maps = pyramid(batch=1)
    maps[1].requires_grad_()
    pooler(implementation="weighted_rows")(maps, [random_boxes(50)]).sum().backward()
    assert [m.grad is not None for m in maps] == [False, True, False, False]


def test_auto_takes_the_fast_one_where_it_can_serve(monkeypatch):
    calls = []
    fast = roi_align_cpu.roi_align
    monkeypatch.setattr(
        roi_align_cpu, "roi_align", lambda *a: calls.append("weighted_rows") or fast(*a)
    )
    maps, boxes = pyramid(batch=1), [random_boxes(5)]
    for pool, features, expected in (
        (pooler(implementation="auto"), maps, ["weighted_rows"]),
        (pooler(implementation="per_level"), maps, []),
        (pooler("ROIPool", implementation="auto"), maps, []),
        (pooler(implementation="auto"), [m.double() for m in maps], ["weighted_rows"]),
        (pooler(implementation="auto"), [m.bfloat16() for m in maps], ["weighted_rows"]),
    ):
        calls.clear()
        pool(features, boxes)
        assert calls == expected


def test_what_weighted_rows_cannot_serve_is_an_error():
    maps, boxes = pyramid(batch=1), [random_boxes(5)]
    with pytest.raises(ValueError, match="weighted_rows cannot serve POOLER_TYPE ROIPool"):
        pooler("ROIPool", implementation="weighted_rows")(maps, boxes)


@pytest.mark.torchscript
def test_torchscript_equals_eager():
    maps, boxes = pyramid(), [random_boxes(30), random_boxes(5, seed=1)]
    boxes[0].tensor[3, 0] = NAN
    for pooler_type in POOLER_TYPES:
        eager = pooler(pooler_type)
        scripted = torch.jit.script(eager)
        assert torch.equal(eager(maps, boxes), scripted(maps, boxes))
        assert eager.num_degenerate == scripted.num_degenerate == 1


@pytest.mark.torchscript
def test_a_trace_serves_any_number_of_boxes():
    class Traceable(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = pooler()

        def forward(self, p2, p3, p4, p5, boxes):
            return self.pool([p2, p3, p4, p5], [Boxes(boxes)])

    maps, module = pyramid(batch=1), Traceable()
    traced = torch.jit.trace(module, (*maps, random_boxes(1).tensor), check_trace=False)
    for count in (0, 3, 50):
        boxes = random_boxes(count, seed=7).tensor
        assert torch.equal(traced(*maps, boxes), module(*maps, boxes))


def test_yaml(small_cfg):
    shapes = {f"p{k}": ShapeSpec(channels=32, stride=2**k) for k in range(2, 6)}
    small_cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "ROIPool"
    small_cfg.MODEL.FPN_EXT.CANONICAL_LEVEL = 5
    small_cfg.MODEL.FPN_EXT.CANONICAL_BOX_SIZE = 300
    pool = LevelMappedROIPooler(small_cfg, shapes, branch="ROI_MASK_HEAD")
    assert (pool.output_size, pool.pooler_type) == ((14, 14), "ROIPool")
    assert (pool.canonical_level, pool.canonical_box_size) == (5, 300)
    assert pool.levels == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooler_type": "RoIAlignV2"}, r"POOLER_TYPE: 'RoIAlignV2'.*nearest valid: 'ROIAlignV2'"),
        ({"output_size": 0}, r"POOLER_RESOLUTION must be one or two.*got 0"),
        ({"output_size": (7, -1)}, r"POOLER_RESOLUTION"),
        ({"output_size": (7, 7, 7)}, r"POOLER_RESOLUTION.*\(7, 7, 7\)"),
        ({"implementation": "fast"}, r"POOLER_IMPLEMENTATION must be one of .*got 'fast'"),
        ({"sampling_ratio": -1}, r"POOLER_SAMPLING_RATIO.*got -1"),
        ({"scales": []}, r"IN_FEATURES.*at least one level"),
        ({"scales": [1 / 8, 1 / 4]}, r"IN_FEATURES.*fine to coarse"),
        ({"scales": [1 / 6, 1 / 12]}, r"IN_FEATURES.*power of two.*LEVEL_RULE StrideRule"),
        ({"level_rule": "StrideRul"}, r"LEVEL_RULE: 'StrideRul' .*nearest valid: 'StrideRule'"),
        ({"scales": [0.0]}, r"scales .* must be positive"),
        ({"canonical_box_size": 0}, r"MODEL\.FPN_EXT\.CANONICAL_BOX_SIZE.*got 0"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        pooler(**change)


def test_wrong_inputs():
    maps = pyramid()
    with pytest.raises(ValueError, match="4 levels, got 3 maps"):
        pooler()(maps[:3], [random_boxes(1)] * 2)
    with pytest.raises(ValueError, match="1 lists of boxes for a batch of 2 images"):
        pooler()(maps, [random_boxes(1)])


@pytest.mark.parametrize("maps", [1, 2])
def test_a_second_derivative_is_refused_in_a_sentence(maps):
    """The first one is as without create_graph, and so is what depends on other things."""
    features = [torch.rand(1, 3, 8 >> i, 8 >> i, requires_grad=True) for i in range(maps)]
    rois = torch.tensor([[0, 1, 1, 12.0, 14.0]] * maps)
    pooled = roi_align_cpu.roi_align(
        *(features, rois, torch.arange(maps), [1 / 2, 1 / 4][:maps], (2, 2), 0, True)
    )
    loss = pooled.square().sum()
    plain = torch.autograd.grad(loss, features, retain_graph=True)
    again = torch.autograd.grad(loss, features, create_graph=True)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="RoIAlign has no second derivative here"):
        torch.autograd.grad(again[0].sum(), features, allow_unused=True)
