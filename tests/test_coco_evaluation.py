"""COCO's numbers by either library, and the keys of the evaluation."""

import contextlib
import errno
import io
import json
import math
import os
from pathlib import Path

import fpn_ext
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from fpn_ext.evaluation import columns
from fpn_ext.evaluation.coco import CocoSettings, evaluate_coco, has_hotcoco, settings_of
from fpn_ext.evaluation.columns import counted_differently
from fpn_ext.evaluation.evaluators import build_evaluator
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

needs_hotcoco = pytest.mark.skipif(not has_hotcoco(), reason="hotcoco is not installed")
SIDE = 128


def quiet(call, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args)


def coco(dataset):
    api = COCO()
    api.dataset = dataset
    quiet(api.createIndex)
    return api


def by_pycocotools(dataset, detections, task, limits=(1, 10, 100)):
    """The numbers that pycocotools prints."""
    truth = coco(json.loads(json.dumps(dataset)))
    if task == "segm":
        detections = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    found = quiet(truth.loadRes, json.loads(json.dumps(detections)))
    evaluation = COCOeval(truth, found, task)
    if task != "keypoints":
        evaluation.params.maxDets = list(limits)
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        quiet(step)
    return evaluation.stats


@pytest.mark.parametrize("evaluator", ["pycocotools", pytest.param("hotcoco", marks=needs_hotcoco)])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_two_names_of_the_same_sizes_have_the_same_scores(evaluator, task):
    """An object of 20 x 20 px is found, one of 100 x 100 px is not."""
    dataset = {
        "images": [{"id": 1, "width": SIDE, "height": SIDE}],
        "categories": [{"id": 1, "name": "class 1"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": box}
            | {"area": box[2] * box[3], "segmentation": polygon(box)}
            for n, box in enumerate(([4, 4, 20, 20], [26, 26, 100, 100]), 1)
        ],
    }
    found = {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [4, 4, 20, 20]}
    found["segmentation"] = compressed([4, 4, 20, 20])
    sizes = {"small": (0.0, 32.0), "any": (0.0, 1e5), "tens": (10.0, 99.0), "again": (10.0, 99.0)}
    got = evaluate_coco(dataset, [found], task, CocoSettings(evaluator, sizes=sizes))
    ap = {size: got.ap(size=size) for size in got.sizes}
    assert ap["small"] == ap["s"] == pytest.approx(1)
    assert ap["any"] == ap["all"] == pytest.approx(51 / 101)  # of 101 recalls, those up to 0.5
    assert ap["again"] == ap["tens"] == pytest.approx(1)
    assert ap["l"] == 0
    assert got.ar(size="small") == got.ar(size="s") == 1 and got.ar(size="any") == got.ar() == 0.5


# Few values, so that scores, overlaps and areas are often equal or exactly on a bound.
corners = st.sampled_from([0, 4, 8, 16, 20, 32])
sides = st.sampled_from([1, 4, 8, 16, 31.5, 32, 33, 64, 96])
boxes = st.tuples(corners, corners, sides, sides).map(list)
scores = st.sampled_from([0.1, 0.3, 0.5, 0.5000001, 0.9, 1.0])


def polygon(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def rle(box):
    """Uncompressed run lengths of a box, column by column."""
    x, y, w, h = (int(v) for v in box)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[y : y + h, x : x + w] = 1
    values = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(values)) + 1
    runs = np.diff([0, *ends, values.size]).tolist()
    return {"size": [SIDE, SIDE], "counts": runs if values[0] == 0 else [0, *runs]}


def compressed(box):
    from pycocotools import mask

    runs = mask.frPyObjects(rle(box), SIDE, SIDE)
    return {"size": runs["size"], "counts": runs["counts"].decode()}


@st.composite
def datasets(draw, masks=False):
    categories = draw(st.sampled_from([[1], [0, 3], [2, 5, 90]]))
    images = draw(st.sampled_from([[1], [7, 0], [3, 1, 2]]))
    annotations, detections = [], []
    for image_id in images:
        for box in draw(st.lists(boxes, max_size=5)):
            crowd = draw(st.sampled_from([0, 0, 0, 1]))
            annotation = {
                "id": len(annotations) + draw(st.just(1)),
                "image_id": image_id,
                "category_id": draw(st.sampled_from(categories)),
                "bbox": box,
                "area": draw(st.sampled_from([box[2] * box[3], 1024, 9216, 1])),
                "iscrowd": crowd,
                **draw(st.sampled_from([{}, {}, {"ignore": 1}, {"ignore": 0}])),
            }
            if masks:
                annotation["segmentation"] = rle(box) if crowd else polygon(box)
            annotations.append(annotation)
        for box in draw(st.lists(boxes, max_size=6)):
            detection = {
                "image_id": image_id,
                "category_id": draw(st.sampled_from(categories)),
                "bbox": box,
                "score": draw(scores),
            }
            if masks:
                # Smaller than the box, whose area must not be taken for the mask's.
                detection["segmentation"] = compressed([*box[:2], box[2] // 2 + 1, box[3]])
            detections.append(detection)
    dataset = {
        "images": [{"id": i, "width": SIDE, "height": SIDE} for i in images],
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
        "annotations": annotations,
    }
    return dataset, detections


def assert_equal_numbers(case, task, limits=(1, 10, 100)):
    dataset, detections = case
    if not detections:
        return  # nothing is counted: build_evaluator gives NaN, as Detectron2
    expected = by_pycocotools(dataset, detections, task, limits)
    for evaluator in ("pycocotools", "auto"):
        how = CocoSettings(evaluator, limits=limits)
        got = evaluate_coco(coco(dataset), detections, task, how).stats
        assert got == pytest.approx(expected, abs=1e-9), evaluator
    if has_hotcoco():
        assert not counted_differently(dataset, detections, task), "hotcoco has counted"


@settings(max_examples=150)
@given(datasets(), st.sampled_from([(1, 10, 100), (1, 2, 100)]))
def test_the_12_numbers_of_boxes_are_those_of_pycocotools(case, limits):
    assert_equal_numbers(case, "bbox", limits)


@pytest.mark.skipif(not has_hotcoco(), reason="needs hotcoco")
@settings(max_examples=60)
@given(datasets(), st.sampled_from([1, 4, 9]))
def test_classes_can_be_counted_in_portions(case, boxes_at_once):
    dataset, detections = case
    if not detections:
        return
    whole = evaluate_coco(dataset, detections, "bbox")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "BOXES_AT_ONCE", boxes_at_once)
        in_portions = evaluate_coco(dataset, detections, "bbox")
    np.testing.assert_array_equal(in_portions.precision, whole.precision)
    np.testing.assert_array_equal(in_portions.recall, whole.recall)


@settings(max_examples=60)
@given(datasets(masks=True))
def test_the_12_numbers_of_masks_are_those_of_pycocotools(case):
    assert_equal_numbers(case, "segm")


@st.composite
def people(draw):
    points = st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 60), st.sampled_from([0, 1, 2])),
        min_size=17,
        max_size=17,
    ).map(lambda triples: [value for triple in triples for value in triple])
    annotations, detections = [], []
    for image_id in (1, 2):
        for keypoints in draw(st.lists(points, max_size=3)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": [0, 0, 60, 60],
                    "area": draw(st.sampled_from([900, 1024, 3600, 10000])),
                    "iscrowd": draw(st.sampled_from([0, 0, 1])),
                    "keypoints": keypoints,
                    "num_keypoints": sum(v > 0 for v in keypoints[2::3]),
                }
            )
        near = [a["keypoints"] for a in annotations if a["image_id"] == image_id]
        for keypoints in [*near, *draw(st.lists(points, max_size=2))]:
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": 1,
                    "keypoints": [float(v) for v in keypoints],
                    "score": draw(scores),
                }
            )
    dataset = {
        "images": [{"id": i, "width": SIDE, "height": SIDE} for i in (1, 2)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": annotations,
    }
    return dataset, detections


@settings(max_examples=40)
@given(people())
def test_the_10_numbers_of_keypoints_are_those_of_pycocotools(case):
    assert_equal_numbers(case, "keypoints")


# Cases that the libraries define differently: pycocotools counts.

IMAGES = [{"id": 1, "width": SIDE, "height": SIDE}]


def two_objects(**changed):
    objects = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [40 * i, 0, 20, 20], "area": 400}
        for i in (1, 2)
    ]
    for item in objects:
        item["iscrowd"] = 0
    objects[0] |= changed
    return {"images": IMAGES, "categories": [{"id": 1, "name": "a"}], "annotations": objects}


def found(dataset):
    return [
        {"image_id": 1, "category_id": 1, "bbox": item["bbox"], "score": 0.9}
        for item in dataset["annotations"]
    ]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"id": 0}, "the id of an annotation is 0"),
        ({"id": 2}, "the id of an annotation repeats"),
        ({"id": "1"}, "an id is no whole number from 0"),
        ({"iscrowd": 2}, "an iscrowd is neither 0 nor 1"),
        ({"category_id": 9}, "an annotation or detection of an unknown image or category"),
        ({"bbox": [40, 0, math.nan, 20]}, "a box is not finite"),
        ({}, ""),
        ({"iscrowd": True}, ""),
    ],
)
def test_what_is_counted_differently(changed, reason):
    dataset = two_objects(**changed)
    assert counted_differently(dataset, found(two_objects()), "bbox") == reason


@pytest.mark.parametrize("field", ["area", "iscrowd"])
def test_a_missing_field_is_counted_differently(field):
    dataset = two_objects()
    del dataset["annotations"][0][field]
    assert counted_differently(dataset, [], "bbox") == f"an annotation has no {field}"


def test_detections_that_are_counted_differently():
    dataset = two_objects()
    nan = [{**d, "score": math.nan} for d in found(dataset)]
    assert counted_differently(dataset, nan, "bbox") == "a score is not finite"
    elsewhere = [{**d, "image_id": 5} for d in found(dataset)]
    assert "unknown image" in counted_differently(dataset, elsewhere, "bbox")


@pytest.mark.parametrize(("annotation_id", "hot"), [(0, False), (1, True)])
def test_the_log_says_what_counts(annotation_id, hot, caplog):
    """pycocotools takes the match with annotation 0 for none: AP .252 of perfect detections."""
    caplog.set_level("INFO", logger="fpn_ext")
    dataset = two_objects(id=annotation_id)
    got = evaluate_coco(coco(dataset), found(dataset), "bbox")
    assert got.stats == pytest.approx(by_pycocotools(dataset, found(dataset), "bbox"), abs=1e-9)
    if hot and has_hotcoco():
        assert "bbox counted by hotcoco 1" in caplog.text
    else:
        assert "bbox counted by pycocotools 2" in caplog.text
    if has_hotcoco():
        assert ("(the id of an annotation is 0)" in caplog.text) == (not hot)


@pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
def test_some_images_are_scored_as_if_they_were_all(evaluator):
    """One of two objects is found, that of image 1: AP 51/101, and 1 of image 1 alone."""
    dataset = two_objects()
    dataset["images"] = [*IMAGES, {**IMAGES[0], "id": 2}]
    dataset["annotations"][1]["image_id"] = 2
    first = found(dataset)[:1]
    how = CocoSettings(evaluator)
    assert evaluate_coco(coco(dataset), first, "bbox", how).ap() == pytest.approx(51 / 101)
    assert evaluate_coco(coco(dataset), first, "bbox", how, [1]).ap() == pytest.approx(1)


# The keys.


def config(*opts):
    cfg = fpn_ext.get_cfg()
    cfg.merge_from_list(list(opts))
    return cfg


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("COCO_EVALUATOR", "fast", "COCO_EVALUATOR must be one of .*, got 'fast'"),
        ("MAX_DETECTIONS", [10, 1], r"MAX_DETECTIONS needs ascending .*, got \[10, 1\]"),
        ("MAX_DETECTIONS", [0, 5], "MAX_DETECTIONS needs ascending"),
        ("MAX_DETECTIONS", [5, 5], "MAX_DETECTIONS needs ascending"),
        ("AP_AT", [0.33], r"AP_AT needs whole numbers .* \[33\] for AP33; got 0\.33"),
        ("AP_AT", [33, 50], "AP_AT needs whole numbers of percent .* got 50"),
        ("AP_AT", [100], "AP_AT needs whole numbers of percent .* got 100"),
    ],
)
def test_keys_that_do_not_fit(key, value, message):
    cfg = config(f"TEST.FPN_EXT.{key}", value)
    with pytest.raises(ValueError, match=message):
        settings_of(cfg)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("s: [0, 16]", "not one of COCO's all, s, m, l; got 's'"),
        ("x1: [0, 16]", "letters only"),
        ("tiny: [16, 0]", r"tiny needs \[MIN, MAX\], sides in pixels, .*, got \[16, 0\]"),
        ("tiny: [16]", "tiny needs"),
    ],
)
def test_areas_that_do_not_fit_are_refused_before_training(tmp_path, entry, message):
    file = tmp_path / "areas.yaml"
    file.write_text(f"TEST:\n  FPN_EXT:\n    AREA_RANGES:\n      {entry}\n")
    with pytest.raises(ValueError, match=message):
        fpn_ext.check_config(fpn_ext.load_config(str(file)))


def test_an_area_on_the_command_line(tmp_path):
    file = tmp_path / "none.yaml"
    file.write_text("VERSION: 2\n")
    cfg = fpn_ext.load_config(str(file), ["TEST.FPN_EXT.AREA_RANGES.tiny", "[0, 16]"])
    assert settings_of(cfg).sizes == {"tiny": (0.0, 16.0)}


@pytest.mark.parametrize(
    ("opts", "limits"),
    [
        ((), (1, 10, 100)),
        (("TEST.DETECTIONS_PER_IMAGE", 50), (1, 10, 100)),
        (("TEST.DETECTIONS_PER_IMAGE", 300), (1, 10, 300)),
        (("TEST.FPN_EXT.MAX_DETECTIONS", [5, 1000]), (5, 1000)),
    ],
)
def test_limits_of_detections(opts, limits):
    assert settings_of(config(*opts)).limits == limits


@pytest.fixture
def registered(tmp_path):
    """Cats of 10x10 and 20x20 px, a dog of 20x20 px."""
    name = "test_coco_evaluation"
    objects = [(1, [0, 0, 10, 10]), (1, [40, 0, 20, 20]), (2, [0, 40, 20, 20])]
    dataset = {
        "images": [{"id": 1, "width": 80, "height": 80, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {
                "id": i,
                "image_id": 1,
                "category_id": c,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, (c, box) in enumerate(objects, start=1)
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(dataset))
    register_coco_instances(name, {}, str(tmp_path / "instances.json"), str(tmp_path))
    DatasetCatalog.get(name)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def scores_of(name, folder, boxes, *opts):
    cfg = config(*opts)
    cfg.TEST.FPN_EXT.AREA_RANGES.tiny = [0, 16]
    evaluator = build_evaluator(cfg, name, str(folder))
    evaluator.reset()
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6)
    instances = Instances((80, 80), pred_boxes=Boxes(rows[:, 2:]), scores=rows[:, 1])
    instances.pred_classes = rows[:, 0].long()
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
def test_further_scores_by_hand(registered, tmp_path, evaluator):
    """The tiny cat is found with an overlap of .5, the dog exactly, the other cat is missed.

    Cats: half of two are found, AP50 51/101 of the recalls 0, .01, ... 1.
    """
    boxes = [(0, 0.9, 0, 0, 10, 5), (1, 0.8, 0, 40, 20, 60)]
    keys = (
        *("TEST.FPN_EXT.COCO_EVALUATOR", evaluator),
        *("TEST.FPN_EXT.MAX_DETECTIONS", [1, 7]),
    )
    scores = scores_of(registered, tmp_path, boxes, *keys)
    assert scores["AP50-cat"] == pytest.approx(100 * 51 / 101)
    assert scores["AP50-dog"] == pytest.approx(100)
    assert scores["AP-dog"] == pytest.approx(100)
    assert scores["AP-cat"] == pytest.approx(10 * 51 / 101), "at one of ten thresholds"
    assert scores["APtiny"] == scores["ARtiny"] == pytest.approx(10), "one class, 1 of 10"
    assert scores["AR@1"] == scores["AR@7"] == pytest.approx((100 + 5) / 2)
    assert scores["AP"] == pytest.approx((scores["AP-cat"] + scores["AP-dog"]) / 2)


@pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
def test_ap_at_further_overlaps_by_hand(registered, tmp_path, evaluator):
    """The tiny cat is found with an overlap of .4, the other missed, the dog found exactly."""
    boxes = [(0, 0.9, 0, 0, 10, 4), (1, 0.8, 0, 40, 20, 60)]
    keys = ("TEST.FPN_EXT.COCO_EVALUATOR", evaluator, "TEST.FPN_EXT.AP_AT", [33, 44])
    scores = scores_of(registered, tmp_path, boxes, *keys)
    assert scores["AP33"] == pytest.approx(50 * (51 / 101 + 1))
    for name in ("AP44", "AP50", "AP"):
        assert scores[name] == pytest.approx(50), name
    assert scores["AP-cat"] == 0, "COCO's thresholds alone"


def test_without_the_keys_the_names_are_detectron2s_and_ap50_per_class(registered, tmp_path):
    cfg = fpn_ext.get_cfg()
    evaluator = build_evaluator(cfg, registered, str(tmp_path))
    evaluator.reset()
    instances = Instances((80, 80), pred_boxes=Boxes(torch.tensor([[0.0, 40, 20, 60]])))
    instances.scores, instances.pred_classes = torch.ones(1), torch.tensor([1])
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cat", "AP-dog"]
    assert list(evaluator.evaluate()["bbox"]) == [*names, "AP50-cat", "AP50-dog"]
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [d["category_id"] for d in written] == [2], "ids of the annotation file"


def test_a_class_that_the_dataset_lacks(registered, tmp_path):
    with pytest.raises(ValueError, match="class index 2, and the dataset has 2 classes; set"):
        scores_of(registered, tmp_path, [(2, 0.9, 0, 0, 10, 10)])


def test_a_full_disk_leaves_no_part_of_a_file(registered, tmp_path, monkeypatch):
    def full(value, stream, save=torch.save):
        save(value, stream)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*instances_predictions\.pth'"):
        scores_of(registered, tmp_path / "out", [(0, 0.9, 0, 0, 10, 10)])
    assert os.listdir(tmp_path / "out") == []
    monkeypatch.undo()
    scores_of(registered, tmp_path / "out", [(0, 0.9, 0, 0, 10, 10)])
    assert {*os.listdir(tmp_path / "out")} == {
        *("instances_predictions.pth", "coco_instances_results.json")
    }


def test_no_detections_are_no_score(registered, tmp_path):
    assert math.isnan(scores_of(registered, tmp_path, [])["AP"])


@needs_hotcoco
def test_the_benchmark_compares_the_same_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import evaluation

    file = tmp_path / "evaluation.json"
    evaluation.main(["--images", "4", "--rounds", "1", "--json", str(file)])
    results = json.loads(file.read_text())
    assert results["difference"] == 0
    assert [side["side"] for side in results["sides"]] == ["pycocotools", "hotcoco"]
    assert all(-1 <= value <= 1 for value in results["stats"]["hotcoco"])
