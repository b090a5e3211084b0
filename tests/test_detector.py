"""fpn_ext.Detector: one result whatever a picture comes as, batches, own boxes, features."""

import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import fpn_ext
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from fpn_ext.__main__ import main
from fpn_ext.reporting.coco_json import annotations_of
from PIL import Image
from tiny import CLASSES, FILE, photo, register, saved_run

FIELDS = ("boxes", "scores", "class_ids", "proposal_levels", "pooled_levels")


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    """Registers the network."""
    register(tmp_path_factory.mktemp("images") / "tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def detector(run):
    return fpn_ext.Detector.load(run)


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for name in FIELDS:
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


# What it takes


def test_the_same_picture_however_it_comes(detector, tmp_path):
    rgb = photo()
    Image.fromarray(rgb).save(tmp_path / "photo.png")
    np.save(tmp_path / "photo.npy", rgb)
    expected = detector(rgb)
    for source in (
        str(tmp_path / "photo.png"),
        tmp_path / "photo.npy",
        Image.fromarray(rgb),
        torch.from_numpy(rgb).permute(2, 0, 1),
    ):
        assert_same(detector(source), expected)
    assert_same(detector(rgb[:, :, ::-1], channels="BGR"), expected)
    opaque = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    assert_same(detector(opaque, channels="RGBA"), expected)
    with pytest.raises(AssertionError):
        assert_same(detector(rgb, channels="BGR"), expected)


def test_grey(detector):
    grey = photo()[:, :, 0]
    expected = detector(np.dstack([grey] * 3))
    assert_same(detector(grey, channels="L"), expected)
    assert_same(detector(grey[:, :, None], channels="L"), expected)
    assert_same(detector(torch.from_numpy(grey)[None], channels="L"), expected)
    assert_same(detector(Image.fromarray(grey)), expected)


def test_a_pillow_picture_is_turned_as_its_exif_says(detector, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(photo()).save(tmp_path / "turned.jpg", exif=exif)
    of_file = detector(tmp_path / "turned.jpg")
    assert (of_file.width, of_file.height) == (48, 64)
    with Image.open(tmp_path / "turned.jpg") as picture:
        assert_same(detector(picture), of_file)


def test_it_finds_what_fpn_ext_predict_finds(detector, run, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    words = [str(tmp_path / "photo.png"), "--output", str(tmp_path / "out"), "--min-score", "0"]
    assert main(["predict", "--run", str(run), *words]) == 0
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    found = detector(tmp_path / "photo.png")
    assert found.to_coco() == [
        {k: v for k, v in annotation.items() if k != "id"} for annotation in written["annotations"]
    ]
    assert [*found.categories.values()] == CLASSES
    assert {c["id"]: c["name"] for c in written["categories"]} == found.categories


@pytest.mark.parametrize(
    ("source", "options", "error", "said"),
    [
        (photo().astype(np.float32), {}, TypeError, "must be uint8, from 0 to 255, got float32"),
        (photo().astype(np.int64), {}, TypeError, "got int64"),
        (photo() > 3, {}, TypeError, "got bool"),
        (torch.rand(3, 48, 64), {}, TypeError, "got float32"),
        (torch.rand(3, 48, 64).bfloat16(), {}, TypeError, "got a tensor of torch.bfloat16"),
        (photo()[:, :, 0], {}, ValueError, r"shape \(H, W, 3\), got \(48, 64\)"),
        (photo().transpose(2, 0, 1), {}, ValueError, r"got \(3, 48, 64\)"),
        (torch.from_numpy(photo()), {}, ValueError, r"shape \(3, H, W\), got \(48, 64, 3\)"),
        (photo()[None], {}, ValueError, "several pictures are given as a list"),
        (photo()[:0], {}, ValueError, r"got \(0, 64, 3\)"),
        (photo(), {"channels": "RBG"}, ValueError, "'RBG': no such order of channels; nearest"),
        (photo(), {"channels": "RGBA"}, ValueError, r"shape \(H, W, 4\)"),
        (b"jpeg", {}, TypeError, "got bytes"),
        (3, {}, TypeError, "got int"),
        (iter(()), {}, TypeError, r"\.stream\(\.\.\.\) takes any iterable"),
        ([photo(), None], {}, TypeError, "got NoneType"),
        ([photo(), "none.jpg"], {}, FileNotFoundError, r"no file none.jpg \(1 of 2\)"),
    ],
)  # fmt: skip
def test_what_is_no_picture(detector, source, options, error, said):
    with pytest.raises(error, match=said):
        detector(source, **options)


def test_values_of_more_than_8_bits_need_a_range(run, tmp_path):
    deep = photo().astype(np.uint16) * 257
    np.save(tmp_path / "deep.npy", deep)
    detector = fpn_ext.Detector.load(run, opts=["INPUT.FPN_EXT.VALUE_RANGE", "[0.0, 65535.0]"])
    assert_same(detector(deep), detector(photo()))
    assert_same(detector(deep), detector(tmp_path / "deep.npy"))
    with pytest.raises(ValueError, match="from 0 to 65536, outside of 0 to 65535"):
        detector(np.full((48, 64, 3), 65536.0) * (np.arange(3) / 2))


# Several


SIZES = [(48, 64), (64, 48), (48, 64), (56, 56), (48, 64), (64, 48), (96, 128)]


@pytest.fixture
def pictures():
    return [photo(*size, seed=seed) for seed, size in enumerate(SIZES)]


def test_a_list_on_a_cpu_is_one_by_one_to_the_bit(detector, pictures):
    assert detector.batch_size == 1
    for found, picture in zip(detector(pictures), pictures, strict=True):
        assert (found.height, found.width) == picture.shape[:2]
        assert_same(found, detector(picture))
    assert detector([]) == []


def test_batches_are_of_one_size_and_equal_within_rounding_error(detector, pictures, monkeypatch):
    in_batches = fpn_ext.Detector(detector.model, batch_size=2)
    shapes = []
    infer = detector.model.infer

    def watched(inputs):
        shapes.append([tuple(entry["image"].shape) for entry in inputs])
        return infer(inputs)

    expected = detector(pictures)
    monkeypatch.setattr(detector.model, "infer", watched)
    for found, alone in zip(in_batches(pictures), expected, strict=True):
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)
        assert np.array_equal(found.class_ids, alone.class_ids)
    # 64x85 after resizing: numbers 0, 2, 4 and 6; 85x64: 1 and 5.
    assert [len(batch) for batch in shapes] == [2, 2, 2, 1]
    assert all(len(set(batch)) == 1 for batch in shapes)


def test_a_stream_reads_no_further_ahead_than_it_says(detector):
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield photo(seed=len(read))

    in_batches = fpn_ext.Detector(detector.model, batch_size=2)
    found = in_batches.stream(endless())
    assert read == []
    first = next(found)
    assert len(read) == 4 * 2
    assert_same(first, in_batches([photo(seed=1)] * 2)[0])
    for _ in range(8):
        next(found)
    assert len(read) == 2 * 4 * 2


@pytest.mark.parametrize("score", [50, -0.1, float("nan"), "0.5", None])
def test_a_score_that_is_none(detector, score):
    with pytest.raises(ValueError, match=f"min_score must be a number from 0 to 1, got {score!r}"):
        detector(photo(), min_score=score)
    with pytest.raises(ValueError, match="min_score"):
        detector.tiled(photo(), min_score=score)


def test_one_picture_is_no_stream(detector):
    """The letters of a name, and the rows of an array, would be taken for pictures."""
    for one in (
        "photo.jpg",
        Path("photo.jpg"),
        photo(),
        torch.zeros(3, 9, 9),
        Image.new("L", (9, 9)),
    ):
        with pytest.raises(TypeError, match="stream takes several pictures, got one"):
            detector.stream(one)


def test_a_picture_that_has_no_pixel_at_the_models_size(run, tmp_path):
    """Of 2000 x 1 px, whose longer side becomes 480, a quarter of a pixel would be left."""
    opts = ["INPUT.MIN_SIZE_TEST", "256", "INPUT.MAX_SIZE_TEST", "480"]
    small = fpn_ext.Detector.load(run, opts=opts)
    thin = np.zeros((1, 2000, 3), np.uint8)
    Image.fromarray(thin).save(tmp_path / "thin.png")
    said = r"2000 x 1 px, would be resized to 480 x 0 px by INPUT.MIN_SIZE_TEST 256 and MAX_SIZE"
    for call in (
        lambda: small(thin),
        lambda: small([photo(), tmp_path / "thin.png"]),
        lambda: small.features(thin, []),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(ValueError, match=r"thin\.png, 2000"):
        small(tmp_path / "thin.png")
    with pytest.raises(ValueError, match="the picture is empty: 0 x 5 px"):
        small(Image.new("RGB", (0, 5)))
    assert small(thin[:, :900]).height == 1
    unresized = fpn_ext.Detector.load(run, opts=["INPUT.MIN_SIZE_TEST", "0"])
    assert unresized(thin).width == 2000


# Its own boxes

BOXES = [[4.0, 4.0, 36.0, 28.0], [10.0, 2.0, 60.5, 47.0], [-3.0, 20.0, 30.0, 90.0]]


def test_own_boxes_are_what_a_datasets_proposals_are(tmp_path):
    """Detectron2's mapper, which resizes, clips and orders them, and its model."""
    opts = ["MODEL.LOAD_PROPOSALS", True, "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"]
    folder = saved_run(tmp_path / "fast", *opts)
    detector = fpn_ext.Detector.load(folder)
    cfg = fpn_ext.load_config(str(folder / "config.yaml"))
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    mapper = DatasetMapper(cfg, is_train=False)
    record = {
        "file_name": str(tmp_path / "photo.png"),
        "height": 48,
        "width": 64,
        "proposal_boxes": np.array(BOXES),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
        "proposal_objectness_logits": np.array([3.0, 2.0, 1.0]),
    }
    with torch.no_grad():
        (output,) = detector.model.model([mapper(record)])
    found = detector(tmp_path / "photo.png", proposals=BOXES)
    expected = list(annotations_of(output["instances"], [*found.categories]))
    assert found.to_coco() == [{"image_id": 1, **annotation} for annotation in expected]
    assert len(found) > 3 and found.proposal_levels is None
    with pytest.raises(ValueError, match=r"has no RPN .* proposals=boxes"):
        detector(photo())


def test_a_detector_with_an_rpn_scores_given_boxes(detector):
    found = detector(photo(), proposals=torch.tensor(BOXES))
    both = detector([photo(), photo(seed=1)], proposals=[BOXES, np.zeros((0, 4))])
    assert_same(both[0], found)
    assert len(both[1]) == 0 and both[1].boxes.shape == (0, 4)
    # A box's class scores are those of its own features: one box alone is scored as among others.
    alone = detector(photo(), proposals=BOXES[:1])
    near = np.isclose(found.scores[:, None], alone.scores[None], atol=1e-6).any(axis=0)
    assert near.all()


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([[0, 0, 5]], r"must be \(R, 4\).*got \(1, 3\)"),
        ([0, 0, 5, 5], r"got \(4,\)"),
        ([[0, 0, 5, 5], [1, 2]], r"boxes must be numbers, \(R, 4\)"),
        ("boxes", r"boxes must be numbers, \(R, 4\)"),
        (
            [[0, 0, 5, 5], [5, 5, 5, 9]],
            r"box 1, \[5.0, 5.0, 5.0, 9.0\], is none on a picture of 64",
        ),
        ([[9, 0, 5, 5]], "x0 < x1 and y0 < y1"),
        ([[0, 0, float("nan"), 5]], "box 0"),
        ([[64, 0, 70, 5]], "at least in part on it"),
    ],
)
def test_boxes_that_are_none(detector, boxes, said):
    with pytest.raises(ValueError, match=said):
        detector(photo(), proposals=boxes)
    with pytest.raises(ValueError, match=said):
        detector.features(photo(), boxes)


def test_boxes_of_more_or_fewer_pictures(detector):
    for boxes in ([BOXES], [BOXES] * 3, [BOXES, None]):
        with pytest.raises(ValueError, match="the boxes of each picture, in order"):
            detector([photo(), photo()], proposals=boxes)


# Features


def test_features_are_of_the_box_in_pixels_of_the_picture(run):
    """A side of 480 px becomes 640: a box of 168 px is pooled as one of 224."""
    picture = photo(480, 640)
    opts = ["INPUT.MIN_SIZE_TEST", "640", "INPUT.MAX_SIZE_TEST", "2000"]
    small = fpn_ext.Detector.load(run, opts=[*opts, "MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "224"])
    sides = np.array([83, 85, 167, 169, 335, 337])  # x 4/3: around 112, 224, 448
    boxes = [[0, 0, side, side] for side in sides]
    found = small.features(picture, boxes)
    assert found.levels.tolist() == [2, 3, 3, 4, 4, 5]
    assert found.pooled.shape == (6, 8, 7, 7) and found.vectors.shape == (6, 16)
    assert found.pooled.dtype == found.vectors.dtype == torch.float32
    model = small.model.model
    entry = small.model.network_input(picture[:, :, ::-1])
    with torch.no_grad():
        maps = model.backbone(model.preprocess_image([entry]).tensor)
        one = torch.tensor([[0.0, 0.0, 335 * 853 / 640, 335 * 640 / 480]])
        by_hand = torch.ops.torchvision.roi_align(
            maps["p4"], torch.cat([torch.zeros(1, 1), one], dim=1), 1 / 16, 7, 7, 2, True
        )
    torch.testing.assert_close(found.pooled[4:5], by_hand, atol=1e-4, rtol=1e-4)
    empty = small.features(picture, [])
    assert empty.pooled.shape == (0, 8, 7, 7) and empty.vectors.shape == (0, 16)


def test_features_need_boxes_and_one_box_head(detector, tmp_path):
    with pytest.raises(TypeError, match=r"features are of boxes.* got None"):
        detector.features(photo(), None)
    agnostic = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
    for name, opts in (("CascadeROIHeads", agnostic), ("UnsharedROIHeads", [])):
        folder = saved_run(tmp_path / name, "MODEL.ROI_HEADS.NAME", name, *opts)
        with_several = fpn_ext.Detector.load(folder)
        assert len(with_several(photo(), proposals=BOXES)) > 0
        with pytest.raises(TypeError, match=f"one box head.* {name} .* have several"):
            with_several.features(photo(), BOXES)


def test_a_model_without_heads_on_boxes(tmp_path):
    folder = saved_run(tmp_path / "rpn", "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    detector = fpn_ext.Detector.load(folder)
    found = detector(photo())
    assert len(found) > 0 and set(found.class_names) == {"object"}
    assert found.pooled_levels is None and set(found.proposal_levels.tolist()) <= {2, 3, 4, 5, 6}
    for call in (
        lambda: detector(photo(), proposals=BOXES),
        lambda: detector.features(photo(), []),
    ):
        with pytest.raises(TypeError, match="no heads on boxes"):
            call()


# Results


def test_a_result_is_chosen_from_as_an_array(detector):
    found = detector(photo())
    best = found[found.scores >= found.scores[2]]
    assert len(best) == 3 and len(found[:2]) == 2 and len(found[0]) == len(found[-1]) == 1
    assert best.class_names == [CLASSES[number] for number in best.class_ids]
    assert best.category_ids.tolist() == [[1, 2, 3, 4, 9][number] for number in best.class_ids]
    assert found[[2, 0]].scores.tolist() == [found.scores[2], found.scores[0]]
    assert_same(detector(photo(), min_score=float(found.scores[2])), best)
    assert (
        repr(best[:1]) == f"<Detections: 1 on 64 x 48: {best.class_names[0]} {best.scores[0]:.2f}>"
    )
    assert len([*best]) == 3
    with pytest.raises(IndexError):
        best[3]


def test_masks_and_keypoints(tmp_path):
    opts = ["MODEL.MASK_ON", True, "MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 5]
    opts += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1]
    opts += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "TEST.DETECTIONS_PER_IMAGE", 5]
    opts += ["TEST.KEYPOINT_OKS_SIGMAS", str([0.1] * 17)]
    detector = fpn_ext.Detector.load(saved_run(tmp_path / "both", *opts))
    found = detector(photo())
    entry = detector.model.network_input(photo()[:, :, ::-1])
    (expected,) = detector.model.infer([entry])
    assert found.masks.dtype == bool and found.masks.any()
    assert np.array_equal(found.masks, expected.pred_masks.numpy())
    assert np.array_equal(found.keypoints, expected.pred_keypoints.numpy())
    assert found.to_coco() == [
        {"image_id": 1, **a} for a in annotations_of(expected, [*found.categories])
    ]
    assert found[:0].masks.shape == (0, 48, 64)
    assert np.array_equal(found[[1]].masks, found.masks[1:2])
    drawn = np.asarray(found.draw())
    assert drawn.shape == (48, 64, 3) and not np.array_equal(drawn, photo())


def test_drawing(detector, tmp_path):
    picture = photo()
    found = detector(picture)[:1]
    assert found.draw(scale=2.0).size == (128, 96)
    assert np.array_equal(picture, photo())
    assert np.array_equal(np.asarray(found[:0].draw()), photo())
    assert np.array_equal(
        np.asarray(detector(picture[:, :, ::-1], channels="BGR")[:0].draw()), picture
    )
    Image.fromarray(picture).save(tmp_path / "photo.png")
    assert np.array_equal(np.asarray(detector(tmp_path / "photo.png")[:0].draw()), picture)


def test_detections_go_to_another_process(detector, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    for source in (tmp_path / "photo.png", photo()):
        found = detector(source)
        sent = pickle.loads(pickle.dumps(found))
        assert_same(sent, found)
        assert np.array_equal(np.asarray(sent.draw()), np.asarray(found.draw()))


def test_supervision(detector):
    supervision = pytest.importorskip("supervision", reason="supervision, an extra, is missing")
    found = detector(photo())
    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert np.array_equal(theirs.xyxy, found.boxes)
    assert np.array_equal(theirs.confidence, found.scores)
    assert theirs.class_id.tolist() == found.class_ids.tolist()
    assert theirs["class_name"].tolist() == found.class_names
    assert theirs["pooled_level"].tolist() == found.pooled_levels.tolist()
    assert len(found[:0].to_supervision()) == 0


def test_without_supervision_it_is_named(detector, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[supervision\]'"):
        detector(photo()).to_supervision()


# Loading


@pytest.mark.parametrize("page", ["README.md", "docs/guides/detector.md"])
def test_the_python_in_the_documents_runs(page, run, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", Path(page).read_text(), flags=re.S)
    shutil.copytree(run, tmp_path / "output" / "mine")
    Image.fromarray(photo()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    with Image.open("detections.png") as drawn:
        assert drawn.size == (64, 48)


def test_from_a_config_and_weights(run, detector):
    other = fpn_ext.Detector.load(
        config_file=str(run / "config.yaml"), weights=str(run / "model_final.pth"), batch_size=3
    )
    assert other.batch_size == 3 and other.categories == dict(
        zip([1, 2, 3, 4, 9], CLASSES, strict=True)
    )
    assert_same(other(photo()), detector(photo()))


def test_nothing_is_printed(run, capsys):
    fpn_ext.Detector.load(run)(photo())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, TypeError, r'load\("output/mine"\)'),
        ({"run": "a", "config_file": "b"}, TypeError, r'load\("output/mine"\)'),
        ({"run": "none"}, FileNotFoundError, "the run none: no such folder"),
        ({"run": "none.onnx"}, FileNotFoundError, "none.onnx: no such file"),
        ({"run": "m.pth"}, FileNotFoundError, "the run m.pth: no such folder"),
        ({"run": FILE}, ValueError, r"is of a training.*load the training's folder"),
        ({"run": FILE, "opts": ["A", "B"]}, ValueError, "is of a training"),
        ({"config_file": FILE, "opts": "MODEL.DEVICE cpu"}, TypeError, "words.* in a list"),
        ({"run": "none", "batch_size": 2.5}, TypeError, "must be an int, got 2.5"),
        ({"run": "none", "batch_size": "2"}, TypeError, "must be an int, got '2'"),
        ({"run": "configs"}, FileNotFoundError, "no config.yaml in this folder"),
        ({"config_file": "none.yaml"}, FileNotFoundError, "'none.yaml' does not exist"),
        ({"config_file": "configs/Base-FPN.yaml", "weights": "none.pth"}, FileNotFoundError,
         "MODEL.WEIGHTS: no file none.pth"),
        ({"config_file": "configs/Base-FPN.yaml", "weights": ""}, ValueError,
         "MODEL.WEIGHTS is empty"),
    ],
)  # fmt: skip
def test_what_is_no_model(arguments, error, said):
    with pytest.raises(error, match=said):
        fpn_ext.Detector.load(**arguments)


def test_batches_of_no_picture(detector):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        fpn_ext.Detector(detector.model, 0)
