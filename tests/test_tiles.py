"""Detection in tiles: what small objects in a large picture are found by.

The model is one that can be followed on paper: an RPN on the mean redness of each 8 x 8 cell.
"""

import json
import sys
from types import SimpleNamespace

import fpn_ext
import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from fpn_ext.__main__ import main
from fpn_ext.inference import tiles
from fpn_ext.inference.detections import Detections
from PIL import Image

CONFIG = """
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: ProposalNetwork
  BACKBONE: {NAME: MeanRedness}
  PIXEL_MEAN: [0.0, 0.0, 0.0]
  PIXEL_STD: [255.0, 255.0, 255.0]
  ANCHOR_GENERATOR: {SIZES: [[24]], ASPECT_RATIOS: [[1.0]]}
  PROPOSAL_GENERATOR: {NAME: PyramidRPN}
  RPN: {IN_FEATURES: ["p3"], NMS_THRESH: 0.2}
DATASETS: {TRAIN: [], TEST: []}
INPUT: {MIN_SIZE_TEST: 640, MAX_SIZE_TEST: 960, FORMAT: RGB}
"""
SIDE = 24


class MeanRedness(Backbone):
    """One map of stride 8: the mean of red less the mean of green, of each cell."""

    size_divisibility = 8

    def forward(self, x):
        return {"p3": torch.nn.functional.avg_pool2d(x[:, :1] - x[:, 1:2], 8)}

    def output_shape(self):
        return {"p3": ShapeSpec(channels=1, stride=8)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of a training, of a model with hand-set weights."""
    if "MeanRedness" not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY._do_register("MeanRedness", lambda cfg, shape: MeanRedness())
    folder = tmp_path_factory.mktemp("runs") / "red"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    model = build_model(fpn_ext.load_config(str(folder / "config.yaml")))
    head = model.proposal_generator.rpn_head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.conv.weight[0, 0] = 1 / 9  # the mean redness of 3 x 3 cells, the side of the anchor
        head.objectness_logits.weight[0] = 40.0  # the score is 1/2 where 3/4 of it is red
        head.objectness_logits.bias[0] = -30.0
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    return folder


def picture(height, width, centres):
    """Grey, with a red square of SIDE px around each centre (x, y)."""
    rgb = np.full((height, width, 3), 90, np.uint8)
    for x, y in centres:
        rgb[y - SIDE // 2 : y + SIDE // 2, x - SIDE // 2 : x + SIDE // 2] = (255, 0, 0)
    return rgb


def centres_of(boxes):
    return sorted(map(tuple, np.round((boxes[:, :2] + boxes[:, 2:]) / 2).astype(int).tolist()))


@pytest.fixture
def sahi():
    return pytest.importorskip("sahi", reason="sahi, the extra tiles, is not installed")


# On cells of 8 px, counted from the corner of any tile of 640 that begins at a multiple of 512.
SMALL = sorted((x, y) for x in (212, 1204, 2092, 3060, 3908) for y in (156, 1108, 1900, 2908))


def test_small_objects_in_a_large_picture_are_found_so_only(sahi, run, tmp_path):
    """4000 x 3000, 20 squares of 24 px: 8 px after resizing to 960 x 720, less than the anchor."""
    rgb = picture(3000, 4000, SMALL)
    Image.fromarray(rgb).save(tmp_path / "large.bmp")
    whole, tiled = (
        main(["predict", "--run", str(run), *words, "--output", str(tmp_path / name),
              str(tmp_path / "large.bmp")])
        for name, words in (("whole", []), ("tiled", ["--tiles", "640"]))
    )  # fmt: skip
    assert whole == tiled == 0
    of = {}
    for name in ("whole", "tiled"):
        written = json.loads((tmp_path / name / "detections.json").read_text())
        assert [(i["width"], i["height"]) for i in written["images"]] == [(4000, 3000)]
        of[name] = np.array([a["bbox"] for a in written["annotations"]]).reshape(-1, 4)
    assert len(of["whole"]) == 0
    boxes = of["tiled"]
    boxes[:, 2:] += boxes[:, :2]
    found = centres_of(boxes)
    assert len(found) == len(SMALL)
    for (x, y), (want_x, want_y) in zip(found, SMALL, strict=True):
        assert abs(x - want_x) <= 8 and abs(y - want_y) <= 8
    assert ((boxes[:, 2:] - boxes[:, :2]) <= SIDE + 16).all()


def test_an_object_in_several_tiles_is_found_once(sahi, run):
    """At (580, 580) four tiles of 640 that overlap by 128 meet."""
    detector = fpn_ext.Detector.load(run)
    rgb = picture(1104, 1104, [(580, 580)])
    found = detector.tiled(rgb, 640)
    assert len(found) == 1 and np.abs(np.array(centres_of(found.boxes)) - 580).max() <= 8
    assert found.class_names == ["object"] and 0.5 < found.scores[0] <= 1
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.pooled_levels is None and found.masks is None
    assert found.draw().size == (1104, 1104)
    assert found.to_coco()[0]["category_id"] == 1
    bgr = rgb[:, :, ::-1]
    assert np.array_equal(detector.tiled(bgr, 640, channels="BGR").boxes, found.boxes)
    in_batches = fpn_ext.Detector(detector.model, batch_size=3)
    np.testing.assert_allclose(in_batches.tiled(rgb, 640).boxes, found.boxes, atol=1e-3)


CARS = np.array([[0, 0, 100, 60], [80, 0, 180, 60]], dtype=np.float32)
BETWEEN = np.array([[78, 0, 102, 60]], dtype=np.float32)  # mostly in both


def test_a_box_between_two_objects_takes_in_one_and_leaves_the_other():
    boxes, scores, classes = tiles.merged(
        np.concatenate([CARS, BETWEEN]), np.array([0.8, 0.7, 0.9]), np.zeros(3, dtype=np.int64)
    )
    assert boxes.tolist() == [[0, 0, 102, 60], [80, 0, 180, 60]]
    assert scores.tolist() == [0.9, 0.7] and classes.tolist() == [0, 0]


def test_merging_joins_parts_of_one_object_in_any_order_and_of_one_class_only():
    parts = np.array([[0, 0, 60, 20], [25, 0, 85, 20], [50, 50, 60, 60]], dtype=np.float32)
    scores, classes = np.array([0.6, 0.9, 0.7]), np.array([1, 1, 1])
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        boxes, left, _ = tiles.merged(parts[order], scores[order], classes)
        assert boxes.tolist() == [[0, 0, 85, 20], [50, 50, 60, 60]]
        assert left.tolist() == [0.9, 0.7]
    apart = tiles.merged(parts, scores, np.array([0, 1, 1]))
    assert sorted(apart[0].tolist()) == sorted(parts.tolist())
    assert len(tiles.merged(parts[:0], scores[:0], classes[:0])[0]) == 0


class AlwaysTheCars:
    """In place of a detector: the same three boxes on any picture."""

    def __init__(self):
        self.batch_size = 1
        self.categories = {1: "car"}
        self.model = SimpleNamespace(pixel_format="RGB")

    def __call__(self, pictures, min_score=0.5):
        return [
            Detections(
                *rgb.shape[:2],
                boxes=np.concatenate([BETWEEN, CARS]),
                scores=np.array([0.9, 0.8, 0.7], dtype=np.float32),
                class_ids=np.zeros(3, dtype=np.int64),
                categories=self.categories,
                read_rgb=None,
            )
            for rgb in pictures
        ]


@pytest.mark.parametrize("min_score, found", [(0.5, [0.9, 0.7]), (0.05, [0.9, 0.8, 0.7])])
def test_two_neighbouring_objects_in_a_tile_are_two(sahi, min_score, found):
    rgb = np.zeros((60, 180, 3), np.uint8)
    scores = tiles.detect_in_tiles(AlwaysTheCars(), rgb, 200, min_score=min_score).scores
    np.testing.assert_allclose(scores, found, rtol=1e-6)


def test_merging_loses_no_detection():
    """Each box lies by more than half in one of the result, of its class."""
    drawn = np.random.default_rng(0)
    corners = drawn.integers(0, 80, (200, 2))
    boxes = np.concatenate([corners, corners + drawn.integers(5, 50, (200, 2))], axis=1)
    boxes = boxes.astype(np.float32)
    classes = drawn.integers(0, 3, 200)
    found, _, found_classes = tiles.merged(boxes, drawn.random(200), classes)
    for box, number in zip(boxes, classes, strict=True):
        assert tiles.part_inside(box, found[found_classes == number]).max() > 0.5


def test_a_picture_of_one_tile_is_the_picture(sahi, run):
    detector = fpn_ext.Detector.load(run)
    rgb = picture(640, 640, [(100, 100), (500, 300)])
    whole, tiled = detector(rgb, min_score=0.5), detector.tiled(rgb, 640)
    assert len(whole) == 2 and np.array_equal(whole.boxes, tiled.boxes)
    assert np.array_equal(whole.scores, tiled.scores)
    assert len(detector.tiled(picture(640, 640, []), 640)) == 0


def test_sahis_own_functions_take_the_model(sahi, run, monkeypatch):
    from sahi.predict import get_prediction

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # restored afterwards
    model = tiles.sahi_model(fpn_ext.Detector.load(run), min_score=0.5)
    assert model.category_mapping == {"0": "object"}
    (found,) = get_prediction(picture(640, 640, [(100, 100)]), model).object_prediction_list
    assert found.category.name == "object" and found.score.value > 0.5


def test_pillows_limit_on_the_size_of_pictures_stays(sahi, run):
    """sahi takes it away."""
    limit = Image.MAX_IMAGE_PIXELS
    assert limit
    fpn_ext.Detector.load(run).tiled(picture(700, 700, []), 640)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tile": 31}, "at least 32 px wide, got 31"),
        ({"overlap": 1.0}, "from 0 to 0.9, got 1.0"),
        ({"overlap": -0.1}, "from 0 to 0.9, got -0.1"),
        ({"image": picture(4, 700, [])}, "700 x 4 px is too small for tiles"),
    ],
)
def test_tiles_that_cannot_be(sahi, run, options, said):
    options = {"image": picture(100, 100, []), **options}
    with pytest.raises(ValueError, match=said):
        fpn_ext.Detector.load(run).tiled(**options)


def test_the_command_refuses_before_it_begins(run, tmp_path, capsys):
    pytest.importorskip("sahi", reason="sahi, the extra tiles, is not installed")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    words = ["predict", "--run", str(run), str(tmp_path / "a.png"), "--tiles", "3"]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert "at least 32 px wide, got 3" in printed.err and "weights" not in printed.out


def test_a_picture_too_small_for_tiles_is_skipped(sahi, run, tmp_path):
    Image.new("RGB", (700, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    words = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--output", str(tmp_path / "out")]
    assert main(["predict", "--run", str(run), "--tiles", "640", *words]) == 1
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert "too small for tiles" in written["skipped"][0]["error"]
    assert [image["width"] for image in written["images"]] == [64]


def test_without_sahi_it_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sahi", None)
    monkeypatch.setitem(sys.modules, "sahi.predict", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[tiles\]'"):
        fpn_ext.Detector.load(run).tiled(picture(100, 100, []))
