import json
import math

import fpn_ext
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from fpn_ext.data.datasets import register_voc_layout
from fpn_ext.evaluation.evaluators import VOCEvaluator, build_evaluator
from voc import CLASSES, write_voc


def detections(*found):
    """(class number, score, x0, y0, x1, y1), 0-based pixels."""
    rows = torch.tensor([list(map(float, f)) for f in found]).reshape(-1, 6)
    instances = Instances((60, 80))
    instances.pred_boxes = Boxes(rows[:, 2:])
    instances.scores = rows[:, 1]
    instances.pred_classes = rows[:, 0].long()
    return {"instances": instances}


def evaluate(evaluator_class, name, found):
    evaluator = evaluator_class(name)
    evaluator.reset()
    for image_id, output in found.items():
        evaluator.process([{"image_id": image_id}], [output])
    return evaluator.evaluate()["bbox"]


@pytest.fixture
def voc(tmp_path, request):
    def register(images):
        write_voc(tmp_path, images)
        register_voc_layout(request.node.name, tmp_path, "train", CLASSES)
        return request.node.name

    return register


def test_per_class_ap_by_hand(voc):
    """Cats: one of two found, AP 50. Dogs: found, after a more certain false alarm, AP 50."""
    name = voc(
        {"a": [("cat", 1, 1, 20, 20), ("cat", 40, 20, 60, 40)], "b": [("dog", 11, 11, 50, 50)]}
    )
    found = {
        "a": detections((0, 0.9, 0, 0, 20, 20), (1, 0.9, 60, 40, 80, 60)),
        "b": detections((1, 0.8, 10, 10, 50, 50)),
    }
    scores = evaluate(VOCEvaluator, name, found)
    assert scores["AP50-cat"] == pytest.approx(50)
    assert scores["AP50-dog"] == pytest.approx(50)
    assert scores["AP50"] == scores["AP"] == scores["AP75"] == pytest.approx(50)


def test_means_are_those_of_detectron2s_evaluator(voc):
    name = voc(
        {
            "a": [("cat", 1, 1, 30, 30), ("dog", 31, 21, 70, 50)],
            "b": [("cat", 6, 6, 45, 35), ("cat", 50, 5, 70, 25)],
        }
    )
    found = {
        "a": detections((0, 0.9, 0, 0, 30, 28), (0, 0.7, 3, 3, 30, 30), (1, 0.6, 33, 20, 70, 54)),
        "b": detections((0, 0.8, 8, 8, 45, 40), (0, 0.4, 50, 4, 70, 25), (1, 0.3, 0, 0, 9, 9)),
    }
    ours = evaluate(VOCEvaluator, name, found)
    theirs = evaluate(PascalVOCDetectionEvaluator, name, found)
    assert 0 < theirs["AP"] < theirs["AP50"] < 100
    assert {k: ours[k] for k in theirs} == pytest.approx(theirs)


def test_some_images_are_scored_as_if_they_were_all(voc):
    name = voc({"a": [("cat", 1, 1, 20, 20)], "b": [("cat", 1, 1, 20, 20)]})
    evaluator = VOCEvaluator(name)
    evaluator.reset()
    evaluator.process([{"image_id": "a"}], [detections((0, 0.9, 0, 0, 20, 20))])
    assert evaluator.evaluate()["bbox"]["AP50-cat"] == pytest.approx(50)
    assert evaluator.evaluate(["a"])["bbox"]["AP50-cat"] == pytest.approx(100)


def test_a_faulty_box_is_no_missed_object(voc):
    name = voc({"a": [("cat", 1, 1, 20, 20), ("cat", 50, 50, 50, 50)]})
    found = {"a": detections((0, 0.9, 0, 0, 20, 20))}
    assert evaluate(VOCEvaluator, name, found)["AP50-cat"] == pytest.approx(100)
    # Detectron2's evaluator counts it: half of the cats are missed.
    assert evaluate(PascalVOCDetectionEvaluator, name, found)["AP50"] < 51


def test_what_voc_eval_cannot_read_is_rewritten_for_it(voc, tmp_path):
    """No pose, truncated or difficult; corners between pixels. Training accepts all of that."""
    name = voc({"a": []})
    (tmp_path / "Annotations" / "a.xml").write_text(
        "<annotation><size><width>80</width><height>60</height></size><object><name>cat</name>"
        "<bndbox><xmin>1.2</xmin><ymin>0.9</ymin><xmax>20.0</xmax><ymax>20</ymax></bndbox>"
        "</object></annotation>"
    )
    found = {"a": detections((0, 0.9, 0, 0, 20, 20))}
    assert evaluate(VOCEvaluator, name, found)["AP50-cat"] == pytest.approx(100)


def test_a_difficult_object_is_neither_found_nor_missed(voc, tmp_path):
    name = voc({"a": [("cat", 1, 1, 20, 20), ("cat", 40, 20, 60, 40)]})
    file = tmp_path / "Annotations" / "a.xml"
    easy, hard = "<difficult>0</difficult>", "<difficult>1</difficult>"
    file.write_text(file.read_text().replace(easy, hard, 1))
    found = {"a": detections((0, 0.9, 0, 0, 20, 20), (0, 0.8, 39, 19, 60, 40))}
    assert evaluate(VOCEvaluator, name, found)["AP50-cat"] == pytest.approx(100)
    # Nor is there anything to find where all are difficult.
    file.write_text(file.read_text().replace(easy, hard))
    for nothing_or_something in (found, {"a": detections()}):
        assert math.isnan(evaluate(VOCEvaluator, name, nothing_or_something)["AP50-cat"])


def test_a_class_without_objects_has_no_ap_and_no_say(voc):
    name = voc({"a": [("cat", 1, 1, 20, 20)]})
    found = {"a": detections((0, 0.9, 0, 0, 20, 20), (1, 0.9, 0, 0, 20, 20))}
    scores = evaluate(VOCEvaluator, name, found)
    assert math.isnan(scores["AP50-dog"]) and scores["AP50"] == pytest.approx(100)


def test_no_detections_at_all(voc):
    name = voc({"a": [("cat", 1, 1, 20, 20)]})
    scores = evaluate(VOCEvaluator, name, {"a": detections()})
    assert scores["AP"] == scores["AP50-cat"] == 0


# Which evaluator


@pytest.fixture
def coco_set(tmp_path):
    name = "test_evaluation_coco"
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    MetadataCatalog.get(name).set(json_file=str(file), evaluator_type="coco")
    yield name
    MetadataCatalog.remove(name)


def test_the_metadata_chooses(coco_set, voc, tmp_path):
    cfg = fpn_ext.get_cfg()
    assert isinstance(build_evaluator(cfg, coco_set, str(tmp_path)), COCOEvaluator)
    assert isinstance(build_evaluator(cfg, voc({"a": []}), str(tmp_path)), VOCEvaluator)


def test_what_only_cocos_scores_have_is_said_not_to_be_counted(coco_set, voc, tmp_path, caplog):
    cfg, name = fpn_ext.get_cfg(), voc({"a": []})
    build_evaluator(cfg, name, str(tmp_path))
    cfg.TEST.FPN_EXT.AREA_RANGES.tiny = [0, 16]
    cfg.TEST.FPN_EXT.AP_AT = [33]
    build_evaluator(cfg, coco_set, str(tmp_path))
    assert "Pascal VOC" not in caplog.text
    build_evaluator(cfg, name, str(tmp_path))
    assert "TEST.FPN_EXT.AREA_RANGES, TEST.FPN_EXT.AP_AT, for" in caplog.text


@pytest.mark.parametrize(("limit", "reported"), [(50, 100), (100, 100), (300, 300)])
def test_a_higher_limit_of_detections_reaches_coco(coco_set, tmp_path, limit, reported):
    cfg = fpn_ext.get_cfg()
    cfg.TEST.DETECTIONS_PER_IMAGE = limit
    evaluator = build_evaluator(cfg, coco_set, str(tmp_path))
    assert evaluator._max_dets_per_image[-1] == reported


@pytest.mark.parametrize("evaluator_type", ["lvis", "coco_panoptic_seg"])
def test_an_evaluator_we_do_not_run(evaluator_type, tmp_path):
    name = f"test_evaluation_{evaluator_type}"
    MetadataCatalog.get(name).set(evaluator_type=evaluator_type)
    with pytest.raises(ValueError, match=rf"{name}.*{evaluator_type}.*'coco' and 'pascal_voc'"):
        build_evaluator(fpn_ext.get_cfg(), name, str(tmp_path))
