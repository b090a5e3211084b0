"""fpn-ext analyze on masks and keypoints, by numbers that can be worked out on paper."""

import json
import math

import numpy as np
import pytest
from fpn_ext.__main__ import main
from fpn_ext.evaluation.coco import CocoSettings, evaluate_coco, has_hotcoco

if not has_hotcoco():
    pytest.skip("hotcoco is not installed", allow_module_level=True)

from detectron2.data import DatasetCatalog, MetadataCatalog
from fpn_ext.inspection.analysis import analyze
from fpn_ext.inspection.analysis_report import figures, html_report
from hypothesis import given, settings
from test_analysis import CAT, DOG, FOUND, TRUTH, leveled
from test_coco_evaluation import coco, datasets, people
from tiny import DATASET, register, saved_run

SIDE = 100
SAME = [0, 0, SIDE, SIDE]


def polygon(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def run_lengths(box):
    """Of a box in an image of 100 px, column by column."""
    mask = np.zeros((SIDE, SIDE), dtype=int)
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    column = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(column)) + 1
    runs = np.diff([0, *ends, column.size]).tolist()
    return {"size": [SIDE, SIDE], "counts": [0, *runs] if column[0] else runs}


def as_masks(dataset, detections, box=SAME):
    """The rectangles as masks, and the boxes all the same, so that they say nothing."""
    objects = [{**o, "segmentation": polygon(o["bbox"]), "bbox": box}
               for o in dataset["annotations"]]  # fmt: skip
    found = [{**d, "segmentation": run_lengths(d["bbox"]), "bbox": box} for d in detections]
    return {**dataset, "annotations": objects}, found


# Masks.


def test_masks_overlap_where_their_boxes_say_nothing():
    """The example of boxes, drawn as masks: every number is the same."""
    boxes, masks = analyze(TRUTH, FOUND), analyze(*as_masks(TRUTH, FOUND), task="segm")
    assert masks.errors == boxes.errors and masks.errors["localisation"]["count"] == 1
    assert masks.confusion == boxes.confusion and masks.classes == boxes.classes
    assert str(masks.sizes) == str(boxes.sizes) and masks.false_positives == boxes.false_positives
    assert analyze(*as_masks(TRUTH, FOUND)).confusion != boxes.confusion, "by the boxes"


def test_masks_by_the_level_of_an_objects_box():
    """Images of 100 px are enlarged twofold: 50 px become 100, of P2; 60 become 120, of P3."""
    opts = ["MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "224", "MODEL.FPN_EXT.CANONICAL_LEVEL", "4"]
    objects = [shape(1, [0, 0, 50, 50], 1), shape(2, [0, 0, 60, 60], 2)]
    found = [
        {**shape(1, [0, 0, 50, 50]), "score": 0.9},
        {**shape(2, [0, 0, 60, 60]), "score": 0.8},
        {**shape(2, [40, 40, 60, 60]), "score": 0.95},  # beside it: a false positive of P3
    ]
    truth = {**TRUTH, "annotations": objects}
    p2, p3, *_ = analyze(truth, found, cfg=leveled(opts), task="segm").levels
    assert (p2.objects, p3.objects, p2.detections, p3.detections) == (1, 1, 1, 2)
    assert p2.ap == pytest.approx(1) and p3.ap == pytest.approx(0.5)


def shape(image, box, number=None):
    """An object, or without a number a detection: a cat, with the mask of its box."""
    item = {"image_id": image, "category_id": CAT, "bbox": box, "segmentation": polygon(box)}
    if number is None:
        return {**item, "segmentation": run_lengths(box)}
    return {**item, "id": number, "area": box[2] * box[3], "iscrowd": 0}


@settings(max_examples=60)
@given(datasets())
def test_ap_of_boxes_is_that_of_the_evaluation(case):
    assert_ap_of_the_evaluation(*case, "bbox")


@settings(max_examples=40)
@given(datasets(masks=True))
def test_ap_of_masks_is_that_of_the_evaluation(case):
    assert_ap_of_the_evaluation(*case, "segm")


@settings(max_examples=40)
@given(people())
def test_ap_of_keypoints_is_that_of_the_evaluation(case):
    dataset, detections = case
    assert_ap_of_the_evaluation(dataset, detections, "keypoints")


def assert_ap_of_the_evaluation(dataset, detections, task):
    if not detections:
        return
    report = analyze(dataset, detections, task=task)
    expected = evaluate_coco(coco(dataset), detections, task, CocoSettings("pycocotools"))
    assert report.everything.ap == pytest.approx(expected.ap(), abs=1e-9, nan_ok=True)
    assert report.everything.ap50 == pytest.approx(expected.ap(0.5), abs=1e-9, nan_ok=True)
    for size, name in (("medium", "m"), ("large", "l")):
        value = report.sizes[size]["ap"]
        assert value == pytest.approx(expected.ap(size=name), abs=1e-9, nan_ok=True), size


def test_of_equal_scores_the_image_with_the_lower_id_comes_first():
    """Wrong in image 1, right in image 2: precision 1/2, whatever the order of the list."""
    truth = {**TRUTH, "images": TRUTH["images"][::-1], "annotations": [shape(2, [0, 0, 9, 9], 1)]}
    found = [{**shape(i, [0, 0, 9, 9]), "score": 0.5} for i in (2, 1)]
    assert analyze(truth, found).everything.ap == pytest.approx(0.5)


# Keypoints: two of an object, whose area is 400. Both moved by d pixels, the OKS is
# exp(-d^2 / (2 x 400 x (2 x 0.1)^2)) = exp(-d^2 / 32): 0.61 at 4, 0.32 at 6, 0.04 at 10.
SIGMAS = [0.1, 0.1]


def points(x, y):
    return [x, y, 2, x + 20, y + 20, 2]


def person(number, image, x, y, category=CAT, box=SAME, **changed):
    item = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": 400}
    item |= {"iscrowd": 0, "keypoints": points(x, y), "num_keypoints": 2}
    return item | changed


def seen(image, x, y, score, category=CAT, box=SAME):
    item = {"image_id": image, "category_id": category, "bbox": box, "score": score}
    return item | {"keypoints": points(x, y)}


def people_of(*objects, classes=1):
    return {**TRUTH, "categories": TRUTH["categories"][:classes], "annotations": list(objects)}


def test_keypoints_overlap_by_oks():
    """The boxes are all the same, so that they say nothing."""
    truth = people_of(person(1, 1, 10, 10), person(2, 2, 50, 50), person(3, 3, 10, 50))
    found = [
        seen(1, 14, 10, 0.9),  # 4 px off: correct
        seen(1, 10, 10, 0.8),  # exact, but second: duplicate
        seen(2, 56, 50, 0.7),  # 6 px off: localisation
        seen(2, 60, 50, 0.6),  # 10 px off: background
    ]
    report = analyze(truth, found, task="keypoints", sigmas=SIGMAS, min_score=0.5)
    counts = {name: error["count"] for name, error in report.errors.items()}
    assert counts == {
        "classification": 0,
        "localisation": 1,
        "both": 0,
        "duplicate": 1,
        "background": 1,
        "missed": 1,
    }
    assert report.everything.ap50 == pytest.approx(34 / 101), "recalls to 1/3, precision 1"
    assert report.confusion == [[1, 2], [3, 0]]
    assert "errors (TIDE, at an OKS of 0.5)" in report.tables()
    assert str(report).startswith("detections, keypoints: 3 images, 3 objects, 4 detections")


def test_keypoints_of_several_classes():
    """A dog, exactly where a cat is, with a box elsewhere: confused by OKS."""
    truth = people_of(person(1, 1, 10, 10, box=[0, 0, 5, 5]), classes=2)
    found = [seen(1, 10, 10, 0.9, DOG, box=[90, 90, 5, 5])]
    report = analyze(truth, found, task="keypoints", sigmas=SIGMAS)
    assert report.confusion == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert report.errors is None and "errors" not in figures(report)
    assert "Error types are left out: for keypoints of several classes" in str(report)
    assert not any(title.startswith("errors") for title in report.tables())
    assert "Error types are left out" in html_report({"keypoints": report}, {})


def test_objects_without_keypoints_count_nowhere():
    unmarked = person(1, 1, 10, 10, keypoints=[0] * 6, num_keypoints=0)
    truth = people_of(unmarked, person(2, 2, 10, 10))
    report = analyze(truth, [seen(2, 10, 10, 0.9)], task="keypoints", sigmas=SIGMAS)
    assert report.everything.objects == report.unmarked == 1
    assert report.confusion == [[1, 0], [0, 0]]
    assert sum(error["count"] for error in report.errors.values()) == 0
    assert "1 objects without keypoints, and detections of them, count nowhere" in str(report)


def test_keypoints_by_the_level_of_an_objects_box():
    """Boxes of 50 px are of P2, of 60 px of P3; an object's true area stays that of its OKS."""
    opts = ["MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "224", "MODEL.FPN_EXT.CANONICAL_LEVEL", "4"]
    p2_box, p3_box = [0, 0, 50, 50], [0, 0, 60, 60]
    truth = people_of(person(1, 1, 10, 10, box=p2_box), person(2, 2, 10, 10, box=p3_box))
    found = [
        seen(1, 14, 10, 0.9, box=p2_box),  # an OKS of 0.61
        seen(2, 10, 10, 0.8, box=p3_box),
        seen(3, 10, 10, 0.95, box=p3_box),
    ]
    p2, p3, p4, _ = analyze(truth, found, cfg=leveled(opts), task="keypoints", sigmas=SIGMAS).levels
    assert (p2.objects, p3.objects, p4.objects) == (1, 1, 0)
    assert (p2.detections, p3.detections) == (1, 2)
    assert p2.ap50 == pytest.approx(1) and p2.ap == pytest.approx(0.3), "0.5, 0.55, 0.6 of ten"
    assert p3.ap == pytest.approx(0.5) and math.isnan(p4.ap)


# What is refused.


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("segm", {"segmentation": None}, "annotation 1, of image 1: needs a 'segmentation'"),
        ("segm", {"segmentation": [[1, 2, 3, 4]]}, "polygons of at least 3 points"),
        (
            "segm",
            {"segmentation": {"size": [50, 50], "counts": [2500]}},
            r"'size' \[50, 50\] is not the image's \[100, 100\]",
        ),
        ("keypoints", {"keypoints": None}, "needs 'keypoints', .* 2, .* and has none"),
        ("keypoints", {"keypoints": [1, 2, 2]}, "each of 2, .* has 1 .*KEYPOINT_OKS_SIGMAS"),
    ],
)
def test_shapes_that_cannot_be_compared(task, change, message):
    item = {**person(1, 1, 10, 10), "segmentation": polygon([0, 0, 9, 9]), **change}
    with pytest.raises(ValueError, match=f"(?s){message}.*--task bbox"):
        analyze(people_of(item), [], task=task, sigmas=SIGMAS)


# The command.


@pytest.fixture
def files(tmp_path):
    truth, found = (tmp_path / name for name in ("truth.json", "found.json"))
    dataset, detections = as_masks(TRUTH, FOUND)
    truth.write_text(json.dumps(dataset))
    found.write_text(json.dumps(detections))
    return truth, found


def command(files, *words):
    return main(["analyze", "--detections", str(files[1]), "--annotations", str(files[0]), *words])


def test_all_that_is_detected_is_analysed_in_one_page(files, tmp_path, capsys):
    out, result = tmp_path / "out", tmp_path / "result.json"
    assert command(files, "--output", str(out), "--json", str(result)) == 0
    printed = capsys.readouterr().out
    assert "truth.json, boxes: 3 images" in printed and "truth.json, masks: 3 images" in printed
    written = json.loads(result.read_text())
    assert written["segm"]["errors"]["duplicate"]["count"] == 1 and set(written) == {"bbox", "segm"}
    page = (out / "analysis.html").read_text()
    assert "<h2>boxes</h2>" in page and "<h2>masks</h2>" in page
    images = {file.stem for file in out.glob("*.png")}
    assert {"bbox_confusion", "segm_confusion"} < images
    assert page.count('src="data:image/png;base64,') == len(images) == page.count("<img")


def test_one_task_alone(files, capsys):
    assert command(files, "--task", "segm") == 0
    assert "boxes: 3 images" not in capsys.readouterr().out
    assert command(files, "--task", "keypoints") == 2
    assert "--task keypoints: the detections have no 'keypoints'" in capsys.readouterr().err


def test_detections_of_masks_alone(files, capsys):
    """As pycocotools takes them: without boxes."""
    found = json.loads(files[1].read_text())
    files[1].write_text(json.dumps([{k: v for k, v in d.items() if k != "bbox"} for d in found]))
    assert command(files) == 0
    printed = capsys.readouterr().out
    assert "masks: 3 images" in printed and "boxes: 3 images" not in printed


def test_a_run_with_masks_scores_as_its_evaluation(tmp_path):
    register(tmp_path / "tiny")
    try:
        names = str(["disc", "square", "triangle", "star", "ring"])
        words = ("DATASETS.TEST", f"('{DATASET}',)", "TEST.FPN_EXT.CLASS_NAMES", names)
        masks = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", 8)
        run = str(saved_run(tmp_path / "run", *words, *masks))
        analysed, evaluated = tmp_path / "analysed.json", tmp_path / "evaluated.json"
        assert main(["analyze", "--run", run, "--json", str(analysed)]) == 0
        assert main(["eval", "--run", run, "--json", str(evaluated)]) == 0
        report, scores = json.loads(analysed.read_text()), json.loads(evaluated.read_text())
        assert set(report) == set(scores[DATASET]) == {"bbox", "segm"}
        for task, expected in scores[DATASET].items():
            everything = report[task]["everything"]
            assert everything["detections"] > 0
            assert 100 * everything["ap50"] == pytest.approx(expected["AP50"])
    finally:
        DatasetCatalog.remove(DATASET)
        MetadataCatalog.remove(DATASET)
