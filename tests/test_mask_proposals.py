"""Segmentation proposals on the pyramid: windows, what they learn, what is found, its score."""

import json
import math
from pathlib import Path

import fpn_ext
import numpy as np
import pytest
import tiny
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from fpn_ext.config.idle import idle_notes
from fpn_ext.config.unread import unread_notes
from fpn_ext.engine.trainer import Trainer
from fpn_ext.evaluation.coco import as_coco
from fpn_ext.evaluation.evaluators import build_evaluators
from fpn_ext.evaluation.mask_recall import (
    Mask,
    MaskProposalRecallEvaluator,
    mask_average_recall,
)
from fpn_ext.evaluation.rehearsal import rehearse
from fpn_ext.inspection.explain import explain
from fpn_ext.modeling.mask_proposals import Samples
from fpn_ext.modeling.mask_windows import (
    NO_OBJECT,
    OUTSIDE,
    WindowGrid,
    match_windows,
    nearest_scale,
)
from fpn_ext.modeling.window_mlp import WindowMLP
from pycocotools import mask as run_lengths

DEMO = "configs/demo/mask_proposals_R_18_FPN.yaml"
LEVELS = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
SIDE = 64  # of the image most of these tests use


def grids_of(windows, side=640):
    """Those on P2 to P6 of a square image."""
    cells = [(stride, -(-side // stride)) for stride in LEVELS.values()]
    return [WindowGrid(stride, w, count, count) for stride, count in cells for w in windows]


def box_around(x, y, width, height):
    return torch.tensor([[x - width / 2, y - height / 2, x + width / 2, y + height / 2]])


# Windows


@pytest.mark.parametrize(
    ("level", "scale", "side"),
    [("p2", 32, 40), ("p3", 64, 80), ("p4", 128, 160), ("p5", 256, 320), ("p6", 512, 640)],
)
def test_objects_and_masks_of_each_level(level, scale, side):
    """The paper's appendix: scales 32 to 512 on P2 to P6, with 25 % padding; 7x7 is for sqrt(2)."""
    small, large = (WindowGrid(LEVELS[level], window, 1, 1) for window in (5, 7))
    assert (small.scale, small.side) == (scale, side)
    assert large.scale == pytest.approx(scale * 2**0.5)
    assert large.side == pytest.approx(side * 2**0.5)


def test_objects_may_be_smaller_for_smaller_images():
    grid = WindowGrid(4, 7, 1, 1, object_cells=4)
    assert grid.scale == pytest.approx(16 * 2**0.5) and grid.side == pytest.approx(20 * 2**0.5)


def test_the_regions_of_masks_are_centred_on_cells():
    """Cell (1, 2) of P4 is at x = 2.5 * 16 = 40, y = 1.5 * 16 = 24; its mask is 160 px wide."""
    regions = WindowGrid(16, 5, height=3, width=4).regions()
    assert regions.shape == (12, 4)
    assert regions[1 * 4 + 2].tolist() == [40 - 80, 24 - 80, 40 + 80, 24 + 80]


@pytest.mark.parametrize(
    ("windows", "longer_side", "stride", "window"),
    [
        ([5, 7], 32, 4, 5),
        ([5, 7], 128, 16, 5),
        ([5, 7], 128 * 2**0.5, 16, 7),  # the paper's example: P4, 7x7
        # Half-way, in log space, from 128 to 128 * 2^(1/2), is 128 * 2^(1/4) = 152.2.
        ([5, 7], 152, 16, 5),
        ([5, 7], 153, 16, 7),
        # Without half octaves it is 128 * 2^(1/2) = 181.0.
        ([5], 180, 16, 5),
        ([5], 182, 32, 5),
        ([7], 32, 4, 7),
        ([5, 7], 3, 4, 5),  # beyond the scales: the nearest
        ([5, 7], 2000, 64, 7),
    ],
)
@pytest.mark.parametrize("elongation", [1, 3])
def test_which_level_and_window_an_object_belongs_to(
    windows, longer_side, stride, window, elongation
):
    grids = grids_of(windows)
    for sides in ((longer_side, longer_side / elongation), (longer_side / elongation, longer_side)):
        (index,) = nearest_scale(box_around(0, 0, *sides), [grid.scale for grid in grids])
        assert (grids[index].stride, grids[index].window) == (stride, window)


# What a window is to find


def matched(boxes, windows=(5, 7), side=640, image_size=None):
    """{(stride, window, row, column): object} of the positive windows; and all matches."""
    grids = grids_of(windows, side)
    match = match_windows(boxes, grids, image_size or (side, side))
    of_grids = match.split([grid.num_windows for grid in grids])
    found = {}
    for grid, of_grid in zip(grids, of_grids, strict=True):
        for place in (of_grid >= 0).nonzero().flatten().tolist():
            found[grid.stride, grid.window, place // grid.width, place % grid.width] = int(
                of_grid[place]
            )
    return found, match


def test_positive_windows_are_at_most_a_cell_away_horizontally_and_vertically():
    """A centre between cells has two within a cell on each axis; one on a cell's middle, three."""
    # Middles of P4's cells: 8, 24, 40, 56, ... From (30, 40): x 24 (6 px off) and 40 (10 px);
    # y 24, 40, 56 (16, 0, 16 px).
    found, match = matched(box_around(30.0, 40.0, 128.0, 100.0))
    assert found == {(16, 5, row, column): 0 for row in (1, 2, 3) for column in (1, 2)}
    assert set(match.unique().tolist()) == {NO_OBJECT, 0}


def test_a_window_between_two_objects_finds_the_nearer_one():
    boxes = torch.cat((box_around(24.0, 24.0, 128.0, 128.0), box_around(40.0, 24.0, 128.0, 128.0)))
    found, _ = matched(boxes)
    assert found[16, 5, 1, 1] == 0 and found[16, 5, 1, 2] == 1
    assert found[16, 5, 1, 0] == 0 and found[16, 5, 1, 3] == 1


def test_objects_of_different_scales_do_not_compete():
    boxes = torch.cat((box_around(40.0, 40.0, 32.0, 32.0), box_around(40.0, 40.0, 512.0, 512.0)))
    found, _ = matched(boxes)
    assert {(stride, number) for (stride, *_), number in found.items()} == {(4, 0), (64, 1)}


def test_without_objects_everything_is_negative():
    found, match = matched(torch.zeros(0, 4))
    assert not found and (match == NO_OBJECT).all()


def test_windows_in_the_padding_of_a_batch_are_left_out():
    """An image of 40 px height in a batch of 64 x 64: the middles of P5's rows are at 16 and 48."""
    grids = grids_of([5], 64)
    match = match_windows(torch.zeros(0, 4), grids, (40, 60))
    of_p5 = match.split([grid.num_windows for grid in grids])[3]
    assert of_p5.tolist() == [NO_OBJECT, NO_OBJECT, OUTSIDE, OUTSIDE]


# The MLP


@pytest.mark.parametrize("window", [5, 7])
def test_single_windows_are_computed_as_in_a_map(window):
    """Values, and gradients of weights and map, as if the whole map had been computed."""
    mlp = WindowMLP(3, window, hidden=6, mask_size=4).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    image, row, column = torch.tensor([[0, 0, 0], [0, 8, 7], [1, 4, 3], [1, 0, 7]]).t()
    whole = mlp(x)
    assert whole.shape == (2, 6, 9, 8)
    assert (whole == 0).any() and (whole > 0).any() and not (whole < 0).any()  # of a ReLU
    single = mlp.hidden(mlp.at(x, image, row, column))
    assert single.shape == (4, 6, 1, 1)
    expected = whole[image, :, row, column]
    torch.testing.assert_close(single[:, :, 0, 0], expected)
    wanted = [x, mlp.hidden.weight]
    for ours, theirs in zip(
        torch.autograd.grad(single.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_mask_is_as_many_units_as_it_has_pixels():
    mlp = WindowMLP(3, 5)
    assert mlp.masks(torch.zeros(2, 512, 1, 1)).shape == (2, 14, 14)
    assert mlp.score(torch.zeros(2, 512, 1, 1)).shape == (2, 1, 1, 1)


# The model


def config(*opts):
    """Of a small network on images of 64 px; windows and objects as in the paper."""
    tiny_opts = {
        "MODEL.DEVICE": "cpu",
        "MODEL.FPN_EXT.BOTTOM_UP": "build_tiny_bottom_up",
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.FPN_EXT.MASK_PROPOSAL_OBJECT_CELLS": 8,
        "MODEL.FPN_EXT.MASK_PROPOSAL_HIDDEN": 64,
        "INPUT.MIN_SIZE_TRAIN": (SIDE,),
        "INPUT.MIN_SIZE_TEST": SIDE,
        "SOLVER.IMS_PER_BATCH": 2,
    }
    words = [str(word) for pair in tiny_opts.items() for word in pair]
    return fpn_ext.load_config(DEMO, [*words, *map(str, opts)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six generated images; the name of their dataset."""
    tiny.register(tmp_path_factory.mktemp("tiny") / "data")
    return tiny.DATASET


@pytest.fixture
def cfg(data, tmp_path):
    return config("DATASETS.TRAIN", f"('{data}',)", "DATASETS.TEST", "()",
                  "OUTPUT_DIR", tmp_path / "output")  # fmt: skip


def disc(x, y, radius, height=SIDE, width=SIDE):
    """(H, W) bool."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def objects_of(masks, size=(SIDE, SIDE)):
    masks = BitMasks(np.stack(masks))
    return Instances(size, gt_boxes=masks.get_bounding_boxes(), gt_masks=masks)


def entry_of(masks):
    """An input that shows the objects in white on black, with what there is to learn."""
    picture = np.any(masks, axis=0)[None].repeat(3, 0) * 255.0
    return {
        "image": torch.tensor(picture, dtype=torch.float32),
        "instances": objects_of(masks),
        "image_id": 1,
    }


def test_it_is_built_on_any_pyramid_and_network(data):
    for backbone in ("BottomUpPyramid", "PathAggregationPyramid", "build_resnet_fpn_backbone"):
        cfg = config("MODEL.BACKBONE.NAME", backbone)
        fpn_ext.check_config(cfg)
        model = build_model(cfg).eval()
        with torch.no_grad():
            (found,) = model([{"image": torch.zeros(3, SIDE, SIDE)}])
        assert len(found["instances"]) > 0


def test_heads_are_shared_by_the_levels(cfg):
    names = {name for name, _ in build_model(cfg).head.named_parameters()}
    layers = [f"{layer}.{of}" for layer in ("hidden", "mask", "score") for of in ("weight", "bias")]
    assert names == {f"window{w}.{layer}" for w in (5, 7) for layer in layers}


def test_sampled_windows(cfg):
    """A quarter positive where there are as many, the rest negative, none in the padding."""
    cfg.MODEL.FPN_EXT.MASK_PROPOSAL_BATCH_SIZE_PER_IMAGE = 20
    model = build_model(cfg)
    maps = [torch.zeros(3, 16, SIDE // s, SIDE // s) for s in LEVELS.values()]
    grids = model.grids(maps)
    many = objects_of([disc(x, y, 8) for x in (12, 32, 52) for y in (12, 32, 52)])
    one = objects_of([disc(32, 32, 16)])
    none = Instances((SIDE, 40), gt_boxes=Boxes(torch.zeros(0, 4)))
    samples = model.sample(grids, [many, one, none])
    assert [int((samples.image == n).sum()) for n in range(3)] == [20, 20, 20]
    positive = [int(samples.positive[samples.image == n].sum()) for n in range(3)]
    # The disc of 32 px at (32, 32), a corner of cells of P2, has 2 x 2 windows of 5x5.
    assert positive == [5, 4, 0]
    assert not samples.masks[~samples.positive].any()
    regions = torch.cat([grid.regions() for grid in grids])[samples.window[samples.image == 2]]
    assert ((regions[:, 0] + regions[:, 2]) / 2 < 40).all()


@pytest.mark.parametrize("form", ["bits", "polygons"])
def test_the_mask_to_be_learned_is_the_object_in_the_windows_region(cfg, form):
    """A square of 32 px from (16, 16) to (48, 48); the four windows around (32, 32) on P2.

    That at (34, 34) covers 14 to 54 px with 14 cells of 40 / 14 = 2.86 px: the square begins 2 px
    and ends 34 px after the region, so that it holds the middles of the cells 1 to 11.
    """
    square = np.zeros((SIDE, SIDE), dtype=bool)
    square[16:48, 16:48] = True
    objects = objects_of([square])
    if form == "polygons":
        objects.gt_masks = PolygonMasks([[np.array([16.0, 16, 48, 16, 48, 48, 16, 48])]])
    model = build_model(cfg)
    grids = model.grids([torch.zeros(1, 16, SIDE // s, SIDE // s) for s in LEVELS.values()])
    samples = model.sample(grids, [objects])
    rows = {int(window): row for row, window in enumerate(samples.window)}
    (row,) = [rows[w] for w in rows if w == 8 * 16 + 8]  # row and column 8 of P2: middle at 34 px
    found = samples.masks[row]
    expected = torch.zeros(14, 14, dtype=torch.bool)
    expected[1:12, 1:12] = True
    assert samples.positive[row]
    assert (found != expected).sum() <= 2 * 14  # rasters differ by up to a cell at the edge
    assert torch.equal(found, found.t())


def test_each_window_learns_its_own_object(cfg):
    """Which is in the middle of its region, within a cell; the other one is elsewhere."""
    model = build_model(cfg)
    grids = model.grids([torch.zeros(1, 16, SIDE // s, SIDE // s) for s in LEVELS.values()])
    samples = model.sample(grids, [objects_of([disc(14, 14, 12), disc(50, 50, 12)])])
    assert samples.positive.sum() >= 8
    assert samples.masks[samples.positive, 6:8, 6:8].all()


def test_losses_on_paper(cfg):
    """Zero logits cost log 2 each; the masks' loss counts ten times."""
    model = build_model(cfg)
    for mlp in model.head.values():
        for layer in (mlp.mask, mlp.score):
            torch.nn.init.zeros_(layer.weight)
    maps = [torch.randn(1, 16, SIDE // s, SIDE // s) for s in LEVELS.values()]
    samples = Samples(
        image=torch.zeros(3, dtype=torch.int64),
        window=torch.tensor([0, 256, 700]),  # the 256 of 5x5 on P2 come first, then its 7x7
        positive=torch.tensor([True, False, False]),
        masks=torch.ones(3, 14, 14, dtype=torch.bool),
    )
    losses = model.losses(maps, samples)
    assert losses["loss_score"].item() == pytest.approx(np.log(2))
    assert losses["loss_mask"].item() == pytest.approx(10 * np.log(2))


@pytest.mark.parametrize(("window", "reach"), [(5, 2), (7, 3)])
def test_a_windows_losses_depend_on_its_cells_alone(cfg, window, reach):
    """Row 3, column 4 of P3, whose 8 x 8 windows of 5x5 come after the 2 * 256 of P2."""
    model = build_model(cfg)
    maps = [torch.randn(1, 16, SIDE // s, SIDE // s, requires_grad=True) for s in LEVELS.values()]
    samples = Samples(
        image=torch.tensor([0]),
        window=torch.tensor([512 + 64 * (window == 7) + 3 * 8 + 4]),
        positive=torch.tensor([True]),
        masks=torch.ones(1, 14, 14, dtype=torch.bool),
    )
    sum(model.losses(maps, samples).values()).backward()
    reached = [x.grad[0].abs().sum(dim=0) > 0 for x in maps]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[3 - reach : 4 + reach, 4 - reach : 5 + reach] = True
    assert torch.equal(reached[1], expected)
    assert not any(of_map.any() for of_map in (reached[0], *reached[2:]))


def test_masks_are_compared_with_the_targets_of_their_own_windows(cfg):
    """The 5x5 MLP says everything, the 7x7 MLP nothing, and both are right."""
    model = build_model(cfg)
    for name, bias in (("window5", 30.0), ("window7", -30.0)):
        torch.nn.init.zeros_(model.head[name].mask.weight)
        torch.nn.init.constant_(model.head[name].mask.bias, bias)
    maps = [torch.randn(1, 16, SIDE // s, SIDE // s) for s in LEVELS.values()]
    samples = Samples(
        image=torch.zeros(3, dtype=torch.int64),
        window=torch.tensor([300, 3, 260]),  # of P2: the 256 of 5x5 come first, then the 7x7
        positive=torch.tensor([True, True, False]),
        masks=torch.tensor([False, True, False])[:, None, None].repeat(1, 14, 14),
    )
    assert model.losses(maps, samples)["loss_mask"] < 1e-9
    samples.masks[:2] = ~samples.masks[:2]
    assert model.losses(maps, samples)["loss_mask"].item() == pytest.approx(10 * 30)


def test_negatives_train_the_scores_alone(cfg):
    """And all parameters have a gradient, as DistributedDataParallel needs."""
    model = build_model(cfg).train()
    nothing = {
        "image": torch.rand(3, SIDE, SIDE) * 255,
        "instances": Instances((SIDE, SIDE), gt_boxes=Boxes(torch.zeros(0, 4))),
    }
    losses = model([nothing, nothing])
    assert losses["loss_mask"] == 0 and losses["loss_score"] > 0
    sum(losses.values()).backward()
    for name, parameter in model.head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() == (".mask." not in name), name


def test_it_learns_where_an_object_is_and_its_mask(cfg):
    """Overfitted on one image; the best proposal is the disc, in the image's own size."""
    shape = disc(40, 28, 15)
    entry = entry_of([shape])
    model = build_model(cfg).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    totals = []
    for _ in range(40):
        losses = model([entry, entry])
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert np.isfinite(totals).all()
    assert totals[19] < totals[0] / 2 and totals[-1] < totals[19]
    model.eval()
    with torch.no_grad():
        ((found,), (twice,)) = (
            [output["instances"] for output in model([{"image": entry["image"], **size}])]
            for size in ({}, {"height": 2 * SIDE, "width": 3 * SIDE})
        )
    assert iou(found.pred_masks[0], shape) > 0.7
    assert iou(twice.pred_masks[0], np.kron(shape, np.ones((2, 3)))) > 0.7
    assert twice.image_size == (2 * SIDE, 3 * SIDE)


def iou(mask, other):
    mask, other = np.asarray(mask, bool), np.asarray(other, bool)
    return (mask & other).sum() / (mask | other).sum()


def test_proposals(cfg):
    """At most top-k, best first, boxes tight around the masks; none from windows in the padding."""
    cfg.MODEL.FPN_EXT.MASK_PROPOSAL_TOPK = 50
    model = build_model(cfg).eval()
    for mlp in model.head.values():
        torch.nn.init.normal_(mlp.mask.weight, std=1)
    entries = [{"image": torch.rand(3, 48, 64) * 255}, {"image": torch.rand(3, 64, 40) * 255}]
    with torch.no_grad():
        found = [output["instances"] for output in model(entries)]
        alone = model(entries[1:])[0]["instances"]
    for instances, size in zip(found, [(48, 64), (64, 40)], strict=True):
        assert instances.image_size == size and len(instances) == 50
        assert instances.pred_masks.shape == (50, *size)
        assert instances.pred_masks.dtype == torch.bool
        assert (instances.scores.diff() <= 0).all()
        assert instances.scores.min() >= 0 and instances.scores.max() <= 1
        assert (instances.pred_classes == 0).all()
        boxes = instances.pred_boxes.tensor
        assert (boxes[:, 2] <= size[1]).all() and (boxes[:, 3] <= size[0]).all()
        for mask, (x0, y0, x1, y1) in zip(instances.pred_masks, boxes.int().tolist(), strict=True):
            inside = torch.zeros_like(mask)
            inside[y0:y1, x0:x1] = True
            assert not (mask & ~inside).any()
    assert len(alone) == 50


def test_a_mask_is_pasted_where_its_window_is(cfg):
    """All pixels of each mask set: windows are squares of 40 px around cells of P2 and 80 px around
    those of P3, cut off at the image's border."""
    cfg.MODEL.FPN_EXT.MASK_PROPOSAL_WINDOWS = [5]
    model = build_model(cfg).eval()
    mlp = model.head["window5"]
    torch.nn.init.constant_(mlp.mask.bias, 20)
    torch.nn.init.zeros_(mlp.score.weight)
    # The best windows: row 2, column 4 of P3, middle (36, 20); row 4, column 9 of P2, (38, 18).
    maps = [torch.zeros(1, 16, SIDE // s, SIDE // s) for s in LEVELS.values()]
    torch.nn.init.zeros_(mlp.hidden.weight)
    mlp.hidden.weight.data[0, 0, 2, 2] = 1
    mlp.score.weight.data[0, 0] = 1
    maps[1][0, 0, 2, 4], maps[0][0, 0, 4, 9] = 6, 5
    masks, regions, scores = model.propose(maps, (SIDE, SIDE))
    assert regions[0].tolist() == [36 - 40, 20 - 40, 36 + 40, 20 + 40]
    assert regions[1].tolist() == [38 - 20, 18 - 20, 38 + 20, 18 + 20]
    assert masks[0].min() > 0.99 and scores[1] == pytest.approx(1 / (1 + np.exp(-5)))
    model.backbone.forward = lambda image: dict(zip(LEVELS, maps, strict=True))
    found = model([{"image": torch.zeros(3, SIDE, SIDE)}])[0]["instances"]
    assert found.pred_boxes.tensor[:2].tolist() == [[0, 0, 64, 60], [18, 0, 58, 38]]
    assert found.pred_masks[0].sum() == 64 * 60
    assert found.pred_masks[1].sum() == 40 * 38 - 2  # resizing takes a pixel off each corner


def test_images_without_masks_cannot_be_trained_on(cfg):
    entry = entry_of([disc(32, 32, 16)])
    entry["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match=r"no gt_masks: set MODEL\.MASK_ON True"):
        build_model(cfg).train()([entry])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.MASK_ON", False, r"set MODEL\.MASK_ON True"),
        (
            "MODEL.FPN_EXT.MASK_PROPOSAL_WINDOWS",
            [3],
            r"must be \[5\], \[7\] or \[5, 7\], got \[3\]",
        ),
        ("MODEL.FPN_EXT.MASK_PROPOSAL_WINDOWS", [7, 5], r"got \[7, 5\]"),
        ("MODEL.FPN_EXT.MASK_PROPOSAL_WINDOWS", [], r"got \[\]"),
        ("MODEL.FPN_EXT.MASK_PROPOSAL_OBJECT_CELLS", 0, "OBJECT_CELLS must be at least 1, got 0"),
        ("MODEL.FPN_EXT.MASK_PROPOSAL_SIZE", 0, "SIZE must be at least 1, got 0"),
        ("MODEL.FPN_EXT.MASK_PROPOSAL_TOPK", 0, "TOPK must be at least 1, got 0"),
        ("MODEL.FPN_EXT.MASK_PROPOSAL_THRESHOLD", 1.0, "must be between 0 and 1, got 1.0"),
        ("MODEL.FPN_EXT.MASK_PROPOSAL_LOSS_WEIGHT", -1.0, "at least 0, got -1.0"),
    ],
)
def test_values_that_mean_nothing(cfg, key, value, message):
    cfg.merge_from_list([key, value])
    for refuse in (fpn_ext.check_config, build_model):
        with pytest.raises(ValueError, match=message):
            refuse(cfg)


def test_maps_of_different_channels_cannot_share_a_head(cfg):
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    with pytest.raises(ValueError, match=r"the same number of channels, got \{'res2': 64,"):
        build_model(cfg)


def test_keys_are_read_by_this_architecture_alone(cfg):
    key = "MODEL.FPN_EXT.MASK_PROPOSAL_TOPK"
    cfg.MODEL.FPN_EXT.MASK_PROPOSAL_TOPK = 10
    assert unread_notes(cfg, [key]) == idle_notes(cfg, ["MODEL.MASK_ON"]) == []
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    (unread,) = unread_notes(cfg, [key])
    assert unread.startswith(f"{key} 10 does nothing")
    (idle,) = idle_notes(cfg, ["MODEL.MASK_ON"])
    assert idle.startswith("MODEL.MASK_ON does nothing")


# Average recall of masks


def truth_of(masks):
    """COCO's ground truth: an image for each list of masks, ids from 1."""
    images, annotations = [], []
    for image_id, of_image in enumerate(masks, start=1):
        images.append({"id": image_id, "height": SIDE, "width": SIDE})
        for pixels in of_image:
            rows, columns = np.nonzero(pixels)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1 + len(annotations) % 2,
                    "bbox": [float(value) for value in box],
                    "area": float(pixels.sum()),
                    "iscrowd": 0,
                    "segmentation": encoded(pixels),
                }
            )
    categories = [{"id": 1, "name": "disc"}, {"id": 2, "name": "other"}]
    return as_coco({"images": images, "annotations": annotations, "categories": categories})


def encoded(pixels):
    return run_lengths.encode(np.asfortranarray(np.asarray(pixels, np.uint8)))


SMALL, MEDIUM = disc(10, 10, 8), disc(40, 40, 20)  # 200 and 1260 px: COCO's bound is 1024


def test_average_recall_of_perfect_masks_is_all_and_of_none_nothing():
    truth = truth_of([[SMALL, MEDIUM], [MEDIUM], []])
    perfect = {
        1: [Mask(0, 0.9, encoded(MEDIUM)), Mask(1, 0.8, encoded(SMALL))],
        2: [Mask(0, 0.1, encoded(MEDIUM))],
    }
    found = mask_average_recall(truth, perfect)
    large = [found.pop(f"ARl@{limit}") for limit in (10, 100, 1000)]
    assert all(map(math.isnan, large))  # there is none
    assert len(found) == 9 and set(found.values()) == {100.0}
    nothing = mask_average_recall(truth, {})
    assert {nothing[key] for key in found} == {0.0}


def test_average_recall_of_masks_on_paper():
    """One mask with IoU 0.75: found at 0.50, 0.55, ..., 0.75, six of ten thresholds."""
    square, part = np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))
    square[:40, :40] = 1
    part[:40, :30] = 1  # the boxes have the same IoU; and a mask with the square's box:
    frame = square.copy()
    frame[5:35, 5:35] = 0  # 700 of 1600 px
    truth = truth_of([[square]])
    assert mask_average_recall(truth, {1: [Mask(0, 1.0, encoded(part))]})["AR@100"] == (
        pytest.approx(60)
    )
    assert mask_average_recall(truth, {1: [Mask(0, 1.0, encoded(frame))]})["AR@100"] == 0


def test_only_the_best_masks_count():
    """Object found by the 101st proposal of its image."""
    truth = truth_of([[MEDIUM]])
    found = mask_average_recall(truth, {1: [Mask(100, 0.1, encoded(MEDIUM))]})
    assert (found["AR@10"], found["AR@100"], found["AR@1000"]) == (0, 0, 100)


def test_masks_of_unknown_images_and_wrong_limits():
    truth = truth_of([[MEDIUM]])
    with pytest.raises(ValueError, match="no image of the ground truth has the id 7"):
        mask_average_recall(truth, {7: []})
    with pytest.raises(ValueError, match="limits"):
        mask_average_recall(truth, {}, limits=[0])


def outputs_of(masks, scores=None):
    stacked = torch.tensor(np.array(masks, dtype=bool).reshape(-1, SIDE, SIDE))
    found = Instances((SIDE, SIDE), pred_masks=stacked)
    found.scores = torch.linspace(1, 0, len(stacked)) if scores is None else torch.tensor(scores)
    return [{"instances": found}]


@pytest.fixture
def registered(tmp_path, request):
    """Two images, three objects; the name of the dataset."""
    dataset = truth_of([[SMALL, MEDIUM], [MEDIUM]]).dataset
    for annotation in dataset["annotations"]:
        annotation["segmentation"]["counts"] = annotation["segmentation"]["counts"].decode()
    for image in dataset["images"]:
        image["file_name"] = f"{image['id']}.jpg"
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(dataset))
    register_coco_instances(request.node.name, {}, str(file), str(tmp_path))
    yield request.node.name
    DatasetCatalog.remove(request.node.name)
    MetadataCatalog.remove(request.node.name)


def test_the_evaluator(registered):
    evaluator = MaskProposalRecallEvaluator(registered)
    nothing = np.zeros((SIDE, SIDE))
    evaluator.process([{"image_id": 1}], outputs_of([nothing, MEDIUM, SMALL]))
    evaluator.process([{"image_id": 2}], outputs_of([]))
    scores = evaluator.evaluate()["mask_proposals"]
    assert scores["AR@10"] == scores["AR@1000"] == pytest.approx(100 * 2 / 3)
    assert (scores["ARs@1000"], scores["ARm@1000"]) == pytest.approx((100, 50))
    assert evaluator.evaluate(img_ids=[1])["mask_proposals"]["AR@1000"] == 100
    evaluator.reset()
    assert evaluator.evaluate()["mask_proposals"]["AR@1000"] == 0
    with pytest.raises(ValueError, match=r"\['proposals'\], no 'instances' with 'pred_masks'"):
        evaluator.process([{"image_id": 1}], [{"proposals": None}])


def test_the_order_of_scores_decides_which_masks_count(registered):
    nothing = np.zeros((SIDE, SIDE))
    evaluator = MaskProposalRecallEvaluator(registered)
    scores = [0.1] + [0.5] * 10
    evaluator.process([{"image_id": 2}], outputs_of([MEDIUM, *[nothing] * 10], scores))
    found = evaluator.evaluate(img_ids=[2])["mask_proposals"]
    assert (found["AR@10"], found["AR@100"]) == (0, 100)


def test_a_config_is_scored_by_it_and_the_rehearsal_is_perfect(cfg, registered):
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (registered,)
    (evaluator,) = build_evaluators(cfg, registered, None)
    assert isinstance(evaluator, MaskProposalRecallEvaluator)
    (rehearsed,) = rehearse(cfg)
    assert rehearsed.error == ""
    assert rehearsed.summary.endswith("mask_proposals/AR@1000 100.0")


# Configs and training


@pytest.mark.parametrize(
    ("row", "windows", "mask_size", "iterations"),
    [
        ("5x5", [5], 14, 80_000),
        ("7x7", [7], 14, 80_000),
        ("dual", [5, 7], 14, 80_000),
        ("dual28", [5, 7], 28, 80_000),
        ("dual28_2x", [5, 7], 28, 160_000),
    ],
)
def test_the_rows_of_table_6(row, windows, mask_size, iterations):
    cfg = fpn_ext.load_config(f"configs/paper/table6/{row}.yaml")
    own = cfg.MODEL.FPN_EXT
    found = {key.removeprefix("MASK_PROPOSAL_"): value for key, value in own.items()}
    assert (found["WINDOWS"], found["SIZE"]) == (windows, mask_size)
    assert (found["HIDDEN"], found["OBJECT_CELLS"], found["LOSS_WEIGHT"]) == (512, 8, 10)
    solver, channels = cfg.SOLVER, cfg.MODEL.FPN.OUT_CHANNELS
    assert found["BATCH_SIZE_PER_IMAGE"] * solver.IMS_PER_BATCH == 2048
    assert (channels, solver.BASE_LR, solver.MAX_ITER) == (128, 0.03, iterations)
    assert list(solver.STEPS) == [iterations * 3 // 4]


def test_it_is_trained_and_scored(cfg, data):
    cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "TEST.EVAL_PERIOD", 0,
                         "DATASETS.TEST", (data,), "SOLVER.CHECKPOINT_PERIOD", 2])  # fmt: skip
    fpn_ext.check_config(cfg, training=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    metrics = json.loads(Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()[0])
    # Logarithms of 2: at the start nothing is more probable than anything else.
    assert metrics["loss_score"] == pytest.approx(np.log(2), rel=0.05)
    assert metrics["loss_mask"] == pytest.approx(10 * np.log(2), rel=0.05)
    results = Trainer.test(cfg, trainer.model)
    scores = results["mask_proposals"]
    assert {"AR@100", "AR@1000", "ARs@1000", "ARm@1000", "ARl@1000"} <= scores.keys()
    assert 0 <= scores["AR@100"] <= scores["AR@1000"] <= 100
    file = Path(cfg.OUTPUT_DIR, "inference", data, "results.json")
    assert json.loads(file.read_text())["mask_proposals"]["AR@1000"] == scores["AR@1000"]


def test_a_trained_model_finds_objects_without_class(cfg, tmp_path):
    """Though its checkpoint has the names of the classes of what it was trained on."""
    state = build_model(cfg).state_dict()
    trained_on = {"classes": tiny.CLASSES, "category_ids": [1, 2, 3, 4, 9]}
    torch.save({"model": state, "trained_on": trained_on}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    found = fpn_ext.Detector.load(str(tmp_path))(tiny.photo(height=48, width=64), min_score=0.0)
    assert set(found.class_names) == {"object"}
    assert found.masks.shape == (len(found.boxes), 48, 64)


def test_its_pyramid_is_explained(cfg):
    """Maps and parameters; there are no anchors."""
    explained = explain(cfg, (SIDE, SIDE))
    assert [level.name for level in explained.levels] == list(LEVELS)
    assert explained.anchors == []
    head = sum(p.numel() for p in build_model(cfg).head.parameters())
    assert explained.parameters["rest of the model"] == head
