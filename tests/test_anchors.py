import fpn_ext
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from fpn_ext.modeling.anchors import MAX_CACHED_GRIDS, PyramidAnchorGenerator

RATIOS = [[0.5, 1.0, 2.0]]
FPN = {"sizes": [[32], [64], [128], [256], [512]], "strides": [4, 8, 16, 32, 64]}
ALL_SIZES = [32, 64, 128, 256, 512]


def maps(image_size, strides, batch=1):
    height, width = image_size
    return [torch.zeros(batch, 1, -(-height // s), -(-width // s)) for s in strides]


@pytest.mark.parametrize(
    ("row", "sizes", "strides", "count"),
    [
        ("C4, Table 1 (a)", [ALL_SIZES], [16], 47_250),
        ("C5, Table 1 (b)", [ALL_SIZES], [32], 12_000),
        ("P2..P6, Table 1 (c)", FPN["sizes"], FPN["strides"], 199_974),
        ("P2, Table 1 (f)", [ALL_SIZES], [4], 750_000),
    ],
)
def test_the_counts_of_the_papers_set_ups(row, sizes, strides, count):
    """Sec. 5.1 speaks of 47k, 12k, 200k and 750k anchors; the input is 1000 x 800 pixels."""
    generator = PyramidAnchorGenerator(sizes=sizes, aspect_ratios=RATIOS, strides=strides)
    assert sum(len(boxes) for boxes in generator(maps((800, 1000), strides))) == count


def test_anchors_by_hand():
    generator = PyramidAnchorGenerator(
        sizes=[[32]], aspect_ratios=[[0.25, 1, 4]], strides=[4], offset=0.0
    )
    (boxes,) = generator([torch.zeros(1, 1, 2, 2)])
    wide, square, tall = (-32, -8, 32, 8), (-16, -16, 16, 16), (-8, -32, 8, 32)
    by_hand = [
        [x0 + dx, y0 + dy, x1 + dx, y1 + dy]
        for dy in (0, 4)  # rows
        for dx in (0, 4)  # columns
        for x0, y0, x1, y1 in (wide, square, tall)
    ]
    assert boxes.tensor.tolist() == by_hand


def test_offset_moves_the_centres_by_its_share_of_the_stride():
    generator = PyramidAnchorGenerator(
        sizes=[[2], [2]], aspect_ratios=[[1]], strides=[4, 8], offset=0.5
    )
    p2, p3 = generator([torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1)])
    assert p2.tensor.tolist() == [[1, 1, 3, 3], [5, 1, 7, 3]]
    assert p3.tensor.tolist() == [[3, 3, 5, 5]]


def test_area_and_ratio():
    generator = PyramidAnchorGenerator(sizes=[[40]], aspect_ratios=RATIOS, strides=[8])
    (boxes,) = generator([torch.zeros(1, 1, 3, 5)])
    width, height = (boxes.tensor[:, 2:] - boxes.tensor[:, :2]).unbind(1)
    torch.testing.assert_close(width * height, torch.full_like(width, 1600), rtol=1e-4, atol=0)
    torch.testing.assert_close(height / width, torch.tensor(RATIOS[0]).repeat(15))


def test_any_sizes_and_ratios_per_level():
    generator = PyramidAnchorGenerator(
        sizes=[[8, 16], [32]], aspect_ratios=[[1.0], [0.5, 1.0, 2.0]], strides=[4, 8]
    )
    assert generator.num_anchors == generator.num_cell_anchors == [2, 3]
    counts = [len(b) for b in generator([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)])]
    assert counts == [12, 3]


@pytest.mark.parametrize("offset", [0.0, 0.5, 0.3])
@pytest.mark.parametrize("image_size", [(800, 1000), (801, 1333), (64, 64)])
def test_equal_to_detectron2(offset, image_size):
    arguments = {**FPN, "aspect_ratios": RATIOS, "offset": offset}
    features = maps(image_size, FPN["strides"])
    for ours, theirs in zip(
        PyramidAnchorGenerator(**arguments)(features),
        DefaultAnchorGenerator(**arguments)(features),
        strict=True,
    ):
        # Bit-equal where the centres are exact in float32; else both round, each its own way.
        tolerance = 0 if offset != 0.3 else 1e-6
        torch.testing.assert_close(ours.tensor, theirs.tensor, rtol=tolerance, atol=0)


def test_the_second_call_returns_the_same_anchors():
    generator = PyramidAnchorGenerator(**FPN, aspect_ratios=RATIOS)
    first = generator(maps((64, 96), FPN["strides"]))
    other = generator(maps((96, 64), FPN["strides"], batch=2))
    again = generator(maps((64, 96), FPN["strides"], batch=4))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.tensor.data_ptr() == b.tensor.data_ptr()
        assert a.tensor.data_ptr() != c.tensor.data_ptr()


def test_the_cache_is_bounded_and_keeps_what_was_used_last():
    generator = PyramidAnchorGenerator(sizes=[[8]], aspect_ratios=[[1]], strides=[4])
    favourite = generator([torch.zeros(1, 1, 1, 1)])[0].tensor.data_ptr()
    for width in range(2, 2 * MAX_CACHED_GRIDS):
        generator([torch.zeros(1, 1, 1, width)])
        assert generator([torch.zeros(1, 1, 1, 1)])[0].tensor.data_ptr() == favourite
    assert len(generator.cache.entries) == MAX_CACHED_GRIDS


def test_anchors_made_in_inference_mode_serve_training():
    generator = PyramidAnchorGenerator(sizes=[[8]], aspect_ratios=[[1]], strides=[4])
    with torch.inference_mode():
        generator([torch.zeros(1, 1, 2, 2)])
    (boxes,) = generator([torch.zeros(1, 1, 2, 2)])
    scale = torch.ones(1, requires_grad=True)
    (boxes.tensor * scale).sum().backward()  # an inference tensor cannot be saved for this
    assert scale.grad is not None


def test_anchors_stay_float32_in_a_half_precision_model():
    generator = PyramidAnchorGenerator(**FPN, aspect_ratios=RATIOS)
    expected = generator(maps((800, 1000), FPN["strides"]))
    features = [f.half() for f in maps((800, 1000), FPN["strides"])]
    for a, b in zip(generator.half()(features), expected, strict=True):
        assert a.tensor.dtype == torch.float32
        assert torch.equal(a.tensor, b.tensor)


def test_an_empty_map_has_no_anchors():
    generator = PyramidAnchorGenerator(sizes=[[8]], aspect_ratios=[[1]], strides=[4])
    assert generator([torch.zeros(1, 1, 0, 5)])[0].tensor.shape == (0, 4)


def test_nothing_is_kept_in_checkpoints():
    assert not PyramidAnchorGenerator(**FPN, aspect_ratios=RATIOS).state_dict()


@pytest.mark.torchscript
def test_torchscript_equals_eager():
    generator = PyramidAnchorGenerator(**FPN, aspect_ratios=RATIOS, offset=0.5)
    generator(maps((64, 64), FPN["strides"]))  # something in the cache
    scripted = torch.jit.script(generator)
    features = maps((101, 133), FPN["strides"])
    for a, b in zip(generator(features), scripted(features), strict=True):
        assert torch.equal(a.tensor, b.tensor)


def test_yaml(small_cfg):
    small_cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    shapes = [ShapeSpec(stride=s) for s in FPN["strides"]]
    generator = ANCHOR_GENERATOR_REGISTRY.get("PyramidAnchorGenerator")(small_cfg, shapes)
    assert isinstance(generator, fpn_ext.PyramidAnchorGenerator)
    assert (generator.strides, generator.offset) == (FPN["strides"], 0.5)
    assert generator.num_anchors == [3] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [[32], [64]]}, r"ANCHOR_GENERATOR\.SIZES.*got 2 lists .* for 5 levels"),
        ({"sizes": []}, r"ANCHOR_GENERATOR\.SIZES needs one list"),
        ({"sizes": [[32], [], [1], [1], [1]]}, r"ANCHOR_GENERATOR\.SIZES needs one list"),
        ({"sizes": [[32], 64, [1], [1], [1]]}, r"ANCHOR_GENERATOR\.SIZES needs one list"),
        ({"sizes": [["a"]]}, r"ANCHOR_GENERATOR\.SIZES needs one list of positive numbers"),
        ({"sizes": [[-32]]}, r"ANCHOR_GENERATOR\.SIZES needs one list of positive numbers"),
        ({"sizes": [[float("nan")]]}, r"ANCHOR_GENERATOR\.SIZES needs one list of positive"),
        ({"sizes": "32"}, r"ANCHOR_GENERATOR\.SIZES needs one list"),
        ({"aspect_ratios": [[0.0]]}, r"ANCHOR_GENERATOR\.ASPECT_RATIOS needs one list"),
        ({"aspect_ratios": [[1], [1]]}, r"ANCHOR_GENERATOR\.ASPECT_RATIOS.*got 2 lists"),
        ({"offset": 1.0}, r"ANCHOR_GENERATOR\.OFFSET.*got 1\.0"),
        ({"offset": -0.1}, r"ANCHOR_GENERATOR\.OFFSET.*got -0\.1"),
        ({"strides": []}, r"strides must be positive"),
        ({"strides": [4, 8, 16, 32, 0]}, r"strides must be positive"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        PyramidAnchorGenerator(**{**FPN, "aspect_ratios": RATIOS, **change})


def test_sizes_by_level():
    """Matched by stride, in any order; others are ignored."""
    sizes = {"ps12": [60, 70], "p5": [9], "p2": [32]}
    generator = PyramidAnchorGenerator(
        sizes=sizes, aspect_ratios=[[1]], strides=[4, 12], offset=0.0
    )
    p2, ps12 = generator([torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 2)])
    assert p2.tensor.tolist() == [[-16, -16, 16, 16]]
    assert ps12.tensor.tolist() == [
        [-30, -30, 30, 30],
        [-35, -35, 35, 35],
        [-18, -30, 42, 30],
        [-23, -35, 47, 35],
    ]
    with pytest.raises(ValueError, match=r"ANCHOR_SIZES needs .* levels \['p2', 'p3'\], got"):
        PyramidAnchorGenerator(sizes=sizes, aspect_ratios=[[1]], strides=[4, 8])


def test_another_number_of_maps_than_levels():
    generator = PyramidAnchorGenerator(**FPN, aspect_ratios=RATIOS)
    with pytest.raises(ValueError, match=r"5 levels, got 4"):
        generator(maps((64, 64), FPN["strides"][:4]))
