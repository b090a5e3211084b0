"""Prediction: which pixels the model is given, what is written, and that no input is lost."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import photographs
import pycocotools.mask as mask_util
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fpn_ext.__main__ import main
from fpn_ext.data.formats.layout import Files
from fpn_ext.data.reading import read_picture
from fpn_ext.inference import pictures as inference
from fpn_ext.inference.pictures import check_harmless, find_pictures, predict
from fpn_ext.inference.predictor import Predictor
from fpn_ext.reporting.coco_json import annotations_of
from fpn_ext.reporting.drawing import CLASS_COLORS, draw_detections
from fpn_ext.reporting.drawn import is_drawing, write_picture
from PIL import Image


@pytest.fixture
def cfg(small_cfg, tmp_path):
    """A random model, whose checkpoint does not say its classes; nor does a dataset."""
    small_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    small_cfg.INPUT.MIN_SIZE_TEST = 64
    small_cfg.DATASETS.TRAIN = small_cfg.DATASETS.TEST = ()
    small_cfg.MODEL.WEIGHTS = str(tmp_path / "weights" / "model.pth")
    return small_cfg


def save_weights(cfg, **beside):
    Path(cfg.MODEL.WEIGHTS).parent.mkdir(exist_ok=True)
    torch.save({"model": build_model(cfg).state_dict(), **beside}, cfg.MODEL.WEIGHTS)


class Square:
    """Stands in for a predictor: one detection, in the upper left quarter of every picture."""

    pixel_format = "BGR"
    model = trained_on = None
    weights = "none"

    def __init__(self, cfg=None):
        self.classes = {1: "thing"}

    def read(self, file, page=None):
        return read_picture(file, self.pixel_format, (), page)

    def __call__(self, image):
        height, width = image.shape[:2]
        found = Instances((height, width))
        found.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, width / 2, height / 2]]))
        found.scores = torch.ones(1)
        found.pred_classes = torch.zeros(1, dtype=torch.int64)
        return {"instances": found}


@pytest.fixture
def square(monkeypatch):
    monkeypatch.setattr(inference, "build_predictor", Square)
    monkeypatch.setattr(inference, "model_for_inference", lambda cfg, model: model)


@pytest.fixture
def photos(tmp_path):
    """Three photographs, the second of them damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 6), "white").save(folder / name)
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:50])
    return folder


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Pixels


@pytest.mark.parametrize(
    ("pixel_format", "expected"),
    [
        ("BGR", [30, 20, 10]),
        ("RGB", [10, 20, 30]),
        ("L", [18]),  # (299 * 10 + 587 * 20 + 114 * 30) / 1000 = 18.15
        ("RGBA", [10, 20, 30, 255]),
    ],
)
def test_the_model_is_given_the_channels_of_the_format(cfg, tmp_path, pixel_format, expected):
    cfg.INPUT.FORMAT = pixel_format
    cfg.MODEL.PIXEL_MEAN = [100.0] * len(expected)
    cfg.MODEL.PIXEL_STD = [50.0] * len(expected)
    save_weights(cfg)
    predictor = Predictor(cfg)
    Image.new("RGB", (64, 64), (10, 20, 30)).save(tmp_path / "a.png")
    given = []
    whole = predictor.model.forward
    predictor.model.forward = lambda inputs: given.append(inputs[0]["image"]) or whole(inputs)
    output = predictor(predictor.read(tmp_path / "a.png"))
    assert set(output) == {"instances"}
    assert given[0].shape == (len(expected), 64, 64)
    assert given[0][:, 5, 5].tolist() == expected
    result = predict(cfg, [tmp_path / "a.png"], tmp_path / "out", min_score=0.0)
    drawing = Image.open(tmp_path / "out" / "a.png")
    assert (drawing.mode, drawing.size) == ("RGB", (64, 64))
    assert result["complete"] and [i["id"] for i in result["images"]] == [1]


def test_a_grey_model_is_looked_into(cfg, tmp_path):
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "L", [128.0], [60.0]
    save_weights(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    Image.new("L", (64, 64), 77).save(tmp_path / "a.png")
    words = ["--config-file", str(tmp_path / "config.yaml"), "--input", str(tmp_path / "a.png")]
    assert main(["look", *words, "--output", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "a_feature_maps.png") as drawing:
        colors = {color for _, color in drawing.convert("RGB").getcolors(1 << 16)}
    assert (77, 77, 77) in colors
    assert main(["look", *words, "--output", str(tmp_path)]) == 0
    Image.new("L", (64, 64)).save(tmp_path / "a_proposals.png")  # a photograph of that name
    words = [*words, str(tmp_path / "a_proposals.png")]
    assert main(["look", *words, "--output", str(tmp_path)]) == 2


def test_classes_that_nobody_names_are_numbered(cfg, caplog):
    save_weights(cfg)
    assert Predictor(cfg).classes == {1: "class 0", 2: "class 1", 3: "class 2"}
    assert "they are numbered. TEST.FPN_EXT.CLASS_NAMES gives them names" in caplog.text
    cfg.TEST.FPN_EXT.CLASS_NAMES = ["a", "b", "c"]
    assert Predictor(cfg).classes == {1: "a", 2: "b", 3: "c"}
    cfg.TEST.FPN_EXT.CLASS_NAMES = ["a", "b"]
    with pytest.raises(ValueError, match="CLASS_NAMES has 2 names, the model 3 classes"):
        Predictor(cfg)


def test_classes_are_those_of_the_checkpoint(cfg, capsys):
    record = {"classes": ["x", "y", "z"], "category_ids": [7, 9, 3], "pixel_format": "RGB"}
    save_weights(cfg, trained_on=record, iteration=9)
    predictor = Predictor(cfg)
    assert predictor.classes == {7: "x", 9: "y", 3: "z"}
    assert predictor.weights == f"{cfg.MODEL.WEIGHTS}, after 10 iterations"
    assert "warning: INPUT.FORMAT is BGR" in capsys.readouterr().out


def test_a_dataset_of_other_classes_is_refused(cfg, demo_images):
    save_weights(cfg, trained_on={"classes": ["x", "y", "z"]})
    cfg.DATASETS.TEST = ("demo_multiscale_val",)
    with pytest.raises(ValueError, match=r"\(3 and 5 classes\):\n  the model's: \['x', 'y', 'z'\]"):
        Predictor(cfg)
    save_weights(cfg)  # an old file: its box predictor alone tells
    with pytest.raises(ValueError, match="has 3 classes, but there are names for 5"):
        Predictor(cfg)


# What is written


def test_masks_are_run_lengths_and_keypoints_are_triples():
    found = Instances((4, 6))
    found.pred_boxes = Boxes(torch.tensor([[1.0, 1.0, 4.0, 3.0]]))
    found.scores, found.pred_classes = torch.tensor([0.5]), torch.tensor([1])
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 1:3, 1:4] = True
    mask[0, 1, 1] = False
    found.pred_masks = mask
    found.pred_keypoints = torch.tensor([[[1.5, 2.5, 0.25], [3.0, 1.0, 0.5]]])
    (annotation,) = annotations_of(found, [10, 20])
    assert json.loads(json.dumps(annotation)) == annotation
    np.testing.assert_array_equal(mask_util.decode(annotation["segmentation"]), mask[0])
    assert annotation["area"] == 5 and annotation["bbox"] == [1, 1, 3, 2]
    assert annotation["keypoints"] == [1.0, 2.0, 0.25, 2.5, 0.5, 0.5]
    assert annotation["num_keypoints"] == 2 and annotation["category_id"] == 20

    image = np.zeros((240, 240, 3), np.uint8)
    large = Instances((240, 240), scores=found.scores, pred_classes=found.pred_classes)
    large.pred_boxes = Boxes(torch.tensor([[20.0, 20.0, 220.0, 220.0]]))
    large.pred_masks = torch.zeros(1, 240, 240, dtype=torch.bool)
    large.pred_masks[0, 50:100, 50:100] = True
    large.pred_keypoints = torch.tensor([[[150.0, 160.0, 0.5]]])
    drawn = draw_detections(image, large, ["a", "b"])
    assert drawn.getpixel((75, 75)) == tuple(c // 2 for c in CLASS_COLORS[1])
    assert drawn.getpixel((150, 160)) == CLASS_COLORS[1]
    assert drawn.getpixel((150, 75)) == (0, 0, 0)
    assert not image.any(), "what was given is not painted on"


def test_a_mask_rcnn_predicts_masks(cfg, tmp_path):
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 1, 8
    save_weights(cfg)
    Image.new("RGB", (64, 96)).save(tmp_path / "a.png")
    result = predict(cfg, [tmp_path / "a.png"], tmp_path / "out", min_score=0.0)
    assert result["annotations"]
    for annotation in result["annotations"]:
        assert annotation["segmentation"]["size"] == [96, 64]
        assert annotation["area"] == mask_util.area(annotation["segmentation"])


def test_every_page_is_a_picture(square, tmp_path):
    pages = [Image.new("L", (8 + i, 6)) for i in range(2)]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    np.save(tmp_path / "scan.npy", np.zeros((6, 20), np.uint8))
    result = predict(None, find_pictures([tmp_path]), tmp_path / "out")
    named = [(i.get("page"), i["drawing"], i["width"]) for i in result["images"]]
    assert named == [
        (None, "scan.png", 20), (0, "scan_page0.png", 8), (1, "scan_page1.png", 9)
    ]  # fmt: skip


def test_two_pictures_of_one_name_have_two_drawings(square, tmp_path):
    for name in ("x/a.png", "y/a.png", "y/a_2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    result = predict(None, find_pictures([tmp_path / "x", tmp_path / "y"]), tmp_path / "out")
    assert [i["drawing"] for i in result["images"]] == ["a.png", "a_3.png", "a_2.png"]
    assert {f.name for f in (tmp_path / "out").glob("*.png")} == {"a.png", "a_2.png", "a_3.png"}


# No input is lost


@pytest.mark.parametrize("through", ["itself", "link", "hard link"])
def test_an_output_that_is_an_input_is_refused(square, photos, tmp_path, through):
    output = photos
    if through == "link":
        output = tmp_path / "link"
        output.symlink_to(photos)
    elif through == "hard link":
        output = tmp_path / "out"
        output.mkdir()
        os.link(photos / "c.png", output / "c.png")
    before = content(photos)
    with pytest.raises(ValueError, match=r"is the input .*\.png: name another --output"):
        predict(None, find_pictures([photos]), output)
    assert content(photos) == before


def test_detections_may_be_an_input_too(tmp_path):
    (tmp_path / "detections.json").touch()
    with pytest.raises(ValueError, match="which this command would write"):
        check_harmless([tmp_path / "detections.json"], [tmp_path / "detections.json"])
    check_harmless([tmp_path / "detections.json"], [tmp_path / "other.json"])


def test_the_users_photograph_stays(cfg, photos, capsys):
    """`--input pics/photo.png --output pics`, from the command line."""
    save_weights(cfg)
    (photos / "config.yaml").write_text(cfg.dump())
    before = content(photos)
    words = ["--config-file", str(photos / "config.yaml"), str(photos / "a.png")]
    assert main(["predict", *words, "--output", str(photos)]) == 2
    assert "is the input" in capsys.readouterr().err and content(photos) == before


def test_a_damaged_picture_is_named_and_skipped(square, photos, tmp_path, capsys):
    result = predict(None, find_pictures([photos]), tmp_path / "out")
    assert [Path(i["file_name"]).name for i in result["images"]] == ["a.png", "c.png"]
    assert [i["id"] for i in result["images"]] == [1, 2]
    assert [a["image_id"] for a in result["annotations"]] == [1, 2]
    (skipped,) = result["skipped"]
    assert skipped["file_name"] == str(photos / "b.png") and skipped["error"]
    assert f"skipped {photos / 'b.png'}: " in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == result
    written = {f.name for f in (tmp_path / "out").iterdir() if not f.name.startswith(".")}
    assert written == {"a.png", "c.png", "detections.json"}


def test_what_is_found_among_the_photographs_is_not_read_as_data(square, tmp_path, capsys):
    photos = photographs.write_coco(tmp_path / "photos")
    assert main(["data", "--data", str(photos)]) == 0
    before = capsys.readouterr().out
    predict(None, find_pictures([photos]), photos / "found")
    capsys.readouterr()
    assert main(["data", "--data", str(photos)]) == 0
    assert capsys.readouterr().out == before


def draw_levels(cfg, photos, into):
    words = ["--config-file", cfg, "--data", str(photos), "--output", str(into)]
    assert main(["levels", *words]) == 0


def draw_anchors(cfg, photos, into):
    words = ["--config-file", cfg, "--data", str(photos), "--output", str(into)]
    assert main(["anchors", *words]) == 0


def draw_features(cfg, photos, into):
    file = min(photos.rglob("*.png"))
    words = ["--config-file", cfg, "--input", str(file), "--output", str(into)]
    assert main(["look", *words]) == 0


def draw_sheet(cfg, photos, into):
    words = ["--config-file", cfg, "--data", str(photos), "--output", str(into)]
    assert main(["contact-sheet", *words]) == 0


@pytest.mark.parametrize("draw", [draw_levels, draw_anchors, draw_features, draw_sheet])
def test_drawings_among_the_photographs_are_no_photographs(draw, cfg, tmp_path, capsys):
    photos = photographs.write_coco(tmp_path / "photos")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(photographs.CLASSES)
    save_weights(cfg)
    config = yaml.safe_load(cfg.dump())
    del config["DATASETS"]  # for those of --data
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["data", "--data", str(photos)]) == 0
    data = capsys.readouterr().out
    folder = min(photos.rglob("*.png")).parent
    pictures = find_pictures([folder])
    draw(str(tmp_path / "config.yaml"), photos, folder)
    drawn = {*folder.glob("*.png")} - {*pictures}
    assert drawn and all(is_drawing(file) for file in drawn)
    capsys.readouterr()
    assert main(["data", "--data", str(photos)]) == 0
    assert capsys.readouterr().out == data
    assert find_pictures([folder]) == pictures
    assert f"{len(drawn)} drawing(s) of fpn-ext left out" in capsys.readouterr().out


def test_a_photograph_is_no_drawing(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    for name in ("a.png", "pipe.png", "empty.png", "missing.png"):
        assert not is_drawing(tmp_path / name)
    write_picture(Image.new("RGB", (8, 8)), tmp_path / "b.png")
    assert is_drawing(tmp_path / "b.png")


def test_a_damaged_picture_is_in_the_exit_status(cfg, photos, tmp_path, capsys):
    save_weights(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    words = ["predict", "--config-file", str(tmp_path / "config.yaml")]
    words += ["--output", str(tmp_path / "out")]
    assert main([*words, str(photos)]) == 1
    assert "1 image(s) could not be read and were skipped" in capsys.readouterr().err
    assert main([*words, str(photos / "a.png")]) == 0


def test_a_picture_too_thin_to_be_resized_is_skipped(cfg, photos, tmp_path, capsys):
    """It does not end the command: the pictures after it are looked at."""
    cfg.INPUT.MAX_SIZE_TEST = 96
    save_weights(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    Image.new("RGB", (500, 1)).save(photos / "aa.png")
    words = ["--config-file", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out")]
    assert main(["predict", *words, str(photos / "aa.png"), str(photos / "c.png")]) == 1
    assert "500 x 1 px, would be resized to 96 x 0 px" in capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [Path(image["file_name"]).name for image in result["images"]] == ["c.png"]
    assert [Path(image["file_name"]).name for image in result["skipped"]] == ["aa.png"]


@pytest.mark.parametrize("verb", ["predict", "video", "contact-sheet", "analyze"])
@pytest.mark.parametrize("score", ["50", "-1", "nan", "half"])
def test_a_score_that_is_none(verb, score, capsys):
    """With 50, for percent, nothing would be found, and nothing said."""
    assert main([verb, "--run", "none", "--min-score", score]) == 2
    assert f"{score!r} is no number from 0 to 1" in capsys.readouterr().err


def test_the_next_picture_is_read_while_one_is_looked_at(square, photos, tmp_path, monkeypatch):
    """And only the next, for its size."""
    read, seen = [], []
    damaged_is_read = threading.Event()
    read_one, look_at_one = Square.read, Square.__call__

    def reading(self, file, page=None):
        read.append(file.name)
        if file.name == "b.png":
            damaged_is_read.set()
        return read_one(self, file, page)

    def looking(self, image):
        if not seen:
            assert damaged_is_read.wait(60)
            assert read == ["a.png", "b.png"]
        seen.append(image)
        return look_at_one(self, image)

    monkeypatch.setattr(Square, "read", reading)
    monkeypatch.setattr(Square, "__call__", looking)
    result = predict(None, find_pictures([photos]), tmp_path / "out")
    assert [image["file_name"][-5:] for image in result["images"]] == ["a.png", "c.png"]
    assert read == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left")])
def test_what_was_found_is_kept(square, photos, tmp_path, monkeypatch, error, capsys):
    saved = []

    def save(picture, file, *args, **options):
        if saved:
            raise error
        saved.append(file)
        whole(picture, file, *args, **options)

    whole = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(type(error)):
        predict(None, find_pictures([photos]), tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [Path(i["file_name"]).name for i in kept["images"]] == ["a.png"]
    assert len(kept["annotations"]) == 1 and kept["complete"] is False
    assert "ended after 1 of 3 pictures" in capsys.readouterr().err


def test_nothing_found_replaces_nothing(square, photos, tmp_path, monkeypatch):
    predict(None, [photos / "b.png"], tmp_path)
    of_yesterday = (tmp_path / "detections.json").read_text()

    def full(picture, file, *args, **options):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space left"):
        predict(None, [photos / "a.png"], tmp_path)
    assert (tmp_path / "detections.json").read_text() == of_yesterday


@pytest.mark.parametrize(
    ("number", "status", "least"),
    [(signal.SIGTERM, 143, 2), (signal.SIGHUP, 129, 2), (signal.SIGKILL, -9, 1)],
)
def test_an_end_from_outside_keeps_what_was_found(cfg, tmp_path, number, status, least):
    """As a batch scheduler ends a job: the JSON is whole, and the status is 143.

    On SIGKILL, which no program is told of, it is as it was when last written.
    """
    save_weights(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "many").mkdir()
    for i in range(300):
        Image.new("RGB", (64, 64)).save(tmp_path / "many" / f"{i:03}.png")
    words = ["predict", "--config-file", str(tmp_path / "config.yaml"), str(tmp_path / "many")]
    process = subprocess.Popen(
        [sys.executable, "-m", "fpn_ext", *words, "--output", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it is not
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "002.png").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == status, said
    kept = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert least <= len(kept["images"]) < 300 and not kept["complete"]
    for image in kept["images"]:
        assert (tmp_path / "out" / image["drawing"]).is_file()


def test_photographs_that_are_no_input_are_not_replaced_either(square, photos, tmp_path):
    """Of the name of an input, in the folder to write to."""
    others = tmp_path / "others"
    others.mkdir()
    for name in ("a.png", "detections.json"):
        (others / name).write_bytes(b"of somebody")
        with pytest.raises(ValueError, match=rf"others/{re.escape(name)} is there already"):
            predict(square, [photos / "a.png"], others)
        assert [file.name for file in others.iterdir()] == [name]
        assert (others / name).read_bytes() == b"of somebody"
        (others / name).unlink()
    (others / "more.txt").touch()  # not all in the folder is of predict, but what is may go
    for _ in range(2):
        predict(square, [photos / "a.png"], others)


def test_what_was_found_among_photographs_is_not_read_as_data(square, tmp_path):
    """In their own folder: neither the drawings nor the detections, which are in COCO's format."""
    photos = photographs.write_coco(tmp_path / "photos")
    other = tmp_path / "other.png"
    shutil.copy(photos / "a.png", other)
    before = Files(photos)
    for name in ("other.png", "another.png"):  # the second time, what was found is kept
        predict(square, [other.rename(tmp_path / name)], photos)
        other = tmp_path / name
    assert (photos / "other.png").is_file() and (photos / "detections-1.json").is_file()
    after = Files(photos)
    assert (after.pictures, after.others) == (before.pictures, before.others)


def test_a_link_to_nothing_is_skipped_as_a_damaged_picture_is(square, photos, tmp_path):
    (photos / "gone.png").symlink_to("/nowhere.png")
    result = predict(square, find_pictures([photos]), tmp_path / "out")
    assert [Path(skipped["file_name"]).name for skipped in result["skipped"]] == [
        "b.png",
        "gone.png",
    ]
    assert result["images"] and result["complete"]
