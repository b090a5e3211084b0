"""The report on a config: it lists all findings at once, and what it does not check."""

import json
import logging

import fpn_ext
import pytest
import tiny
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from fpn_ext.__main__ import main
from fpn_ext.data.datasets import check_classes
from fpn_ext.engine import check_run
from fpn_ext.engine.schedule import learning_rate_note, scale_schedule


@pytest.fixture(scope="module", autouse=True)
def tiny_training(tmp_path_factory):
    tiny.register(tmp_path_factory.mktemp("tiny"))


def findings(folder, *opts, **how):
    return check_run.examine(tiny.FILE, tiny.options(folder, *opts), **how)


def of_status(status, found):
    return {(f.subject, f.text) for f in found if f.status == status}


def test_a_config_in_order(tmp_path):
    found = findings(tmp_path)
    assert not of_status("error", found)
    assert [f.subject for f in found if f.status == "ok"] == [
        "config",
        "numerics",
        "model",
        "training data",
    ]
    boxes = sum(len(r["annotations"]) for r in DatasetCatalog.get(tiny.DATASET))
    # 8 iterations of 2 images, 6 images.
    assert found[3].text == f"{tiny.DATASET}: 6 images with {boxes} boxes; 2.7 epochs"
    assert "SOLVER.BASE_LR 0.01 is 4 times the 0.0025 usual" in found[-1].text
    assert not (tmp_path / "log.txt").exists()  # nothing is written


def test_a_schedule_without_steps(tmp_path):
    opts = ["SOLVER.BASE_LR", 0.0025, "SOLVER.STEPS", "(5, 99999)"]
    stepped = of_status("warning", findings(tmp_path, *opts))
    assert any("SOLVER.STEPS [99999] are not before the end" in text for _, text in stepped)
    cosine = findings(tmp_path, *opts, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR")
    assert not any("not before the end" in f.text for f in cosine)
    text = "8 iterations of 2 images, learning rate 0.0025, along a cosine"
    assert ("schedule", text) in of_status("ok", cosine)


def test_everything_wrong_at_once(tmp_path):
    opts = ["MODEL.RPN.HEAD_NAME", "Head", "MODEL.WEIGHTS", "none.pth", "SOLVER.IMS_PER_BATCH", 0]
    errors = of_status("error", findings(tmp_path, *opts))
    assert {name for name, _ in errors} == {"config", "weights"} and len(errors) == 3


def test_a_config_that_cannot_be_read():
    found = check_run.examine(tiny.FILE, ["MODEL.WEIGTHS", "x", "SEED", "y"])
    assert [f.status for f in found] == ["error"]
    assert "'MODEL.WEIGHTS'" in found[0].text and "SEED must be" in found[0].text


@pytest.mark.parametrize(("eval_only", "status"), [(False, "warning"), (True, "error")])
def test_weights_for_other_classes(tmp_path, eval_only, status):
    torch.save({"model": build_model(tiny.config(tmp_path)).state_dict()}, tmp_path / "five.pth")
    register_of_classes("tiny_three", 3)
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.WEIGHTS", tmp_path / "five.pth"]
    opts += ["DATASETS.TRAIN", "('tiny_three',)"]
    found = findings(tmp_path, *opts, eval_only=eval_only)
    (value,) = (value for name, value in of_status(status, found) if name == "weights")
    # 5 classes and background; 4 numbers for each class.
    assert "cls_score.weight is (6, 16), the model's (4, 16)" in value
    assert "bbox_pred.weight is (20, 16), the model's (12, 16)" in value


def register_of_classes(name, number):
    if name not in DatasetCatalog:
        box = {"category_id": number - 1, "bbox": [0, 0, 9, 9], "bbox_mode": 0, "iscrowd": 0}
        record = {"file_name": "", "image_id": 0, "width": 9, "height": 9, "annotations": [box]}
        DatasetCatalog.register(name, lambda: [record])
        MetadataCatalog.get(name).set(evaluator_type="coco")  # and no list of classes


def test_classes_beyond_those_of_the_head(tmp_path):
    register_of_classes("tiny_nine", 9)
    found = findings(tmp_path, "DATASETS.TRAIN", "('tiny_nine',)")
    ((name, value),) = of_status("error", found)
    assert name == "training data"
    assert value == (
        "MODEL.ROI_HEADS.NUM_CLASSES is 5, but tiny_nine has no list of classes and boxes of "
        "class 8: set it to 9"
    )
    found = findings(tmp_path, "DATASETS.TEST", "('tiny_nine',)")
    assert {name for name, _ in of_status("error", found)} == {"test data"}


def test_a_list_of_classes_that_is_known_once_the_file_is_read(small_cfg):
    MetadataCatalog.get("tiny_listed").set(thing_classes=["a", "b"])
    with pytest.raises(ValueError, match=r"tiny_listed has 2 classes \(a, b\): set it to 2"):
        check_classes(small_cfg, ["tiny_listed"], [])
    small_cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"  # has no classes
    check_classes(small_cfg, ["tiny_listed"], [])


def test_the_schedule_for_fewer_processes():
    cfg = fpn_ext.get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 8, 16, 0.02
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 90000, (60000, 80000)
    scaled, changes = scale_schedule(cfg, 2)
    assert "SOLVER.BASE_LR 0.02 -> 0.005" in changes
    assert "SOLVER.IMS_PER_BATCH 16 -> 4" in changes
    assert "SOLVER.STEPS (60000, 80000) -> (240000, 320000)" in changes
    assert "SOLVER.MAX_ITER 90000 -> 360000" in changes
    assert not learning_rate_note(scaled)
    assert scale_schedule(scaled, 2) == (scaled, [])  # Detectron2's trainer will do it again
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    assert scale_schedule(cfg, 2) == (cfg, [])


def test_a_batch_that_does_not_divide(tmp_path):
    errors = of_status("error", findings(tmp_path, "SOLVER.REFERENCE_WORLD_SIZE", 3))
    assert any("REFERENCE_WORLD_SIZE 3" in value for _, value in errors)
    errors = of_status("error", findings(tmp_path, world_size=4))
    assert any("IMS_PER_BATCH 2 is the batch of all 4 processes" in value for _, value in errors)


def test_the_command(tmp_path, capsys):
    level = logging.getLogger("fpn_ext").level
    file = tmp_path / "report.json"
    words = ["check", "--config-file", tiny.FILE, "--json", str(file), *tiny.options(tmp_path)]
    assert main(words) == 0
    assert "0 error(s)" in capsys.readouterr().out
    assert {f["status"] for f in json.loads(file.read_text())["findings"]} <= {"ok", "warning"}
    assert main([*words, "MODEL.WEIGHTS", "none.pth"]) == 1
    assert "no file none.pth" in capsys.readouterr().out
    assert logging.getLogger("fpn_ext").level == level


@pytest.mark.parametrize(("size", "is_said"), [(240, True), (1200, False)])
def test_boxes_that_become_small_are_said(size, is_said, tmp_path):
    """34 px on images of 640 px, as in DeepPCB: 12.75 at a shorter side of 240."""
    box = {"bbox": [9, 9, 34, 34], "bbox_mode": 1, "category_id": 0}
    record = {"file_name": "a", "image_id": 1, "width": 640, "height": 640, "annotations": [box]}
    cfg = tiny.config(tmp_path, "INPUT.MIN_SIZE_TEST", size)
    found = list(check_run.small_boxes(cfg, [record]))
    assert bool(found) == is_said
    if is_said:
        assert found[0].status == "note" and "13 pixels" in found[0].text
        assert "34 in the images" in found[0].text and "fpn-ext anchors" in found[0].remedy


@pytest.mark.parametrize(
    ("opts", "is_said"),
    [
        ([], False),
        (["INPUT.CROP.ENABLED", True], True),
        (["INPUT.CROP.ENABLED", True, "INPUT.FPN_EXT.CROP_LEAST_VISIBLE", 0.5], False),
    ],
)
def test_slivers_of_cut_objects_are_said(opts, is_said, tmp_path):
    notes = of_status("note", findings(tmp_path, *opts))
    assert any("every sliver" in text for _, text in notes) == is_said
