"""Average recall in evaluations: the evaluator, the RPN inside a model, train_net.py."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fpn_ext import check_config, optimize_for_inference
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fpn_ext.data import demo_data
from fpn_ext.data.datasets import register_voc_layout
from fpn_ext.evaluation import recall
from fpn_ext.evaluation.evaluators import VOCEvaluator, build_evaluator
from fpn_ext.evaluation.ground_truth import ground_truth_of
from fpn_ext.proposals.file import ProposalFile
from voc import CLASSES, write_voc

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import recall_difference
from fpn_ext.engine.trainer import Trainer

KEYS = [f"AR{size}@{limit}" for limit in (10, 100, 1000) for size in ("", "s", "m", "l")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The name of a generated dataset of four images in COCO format."""
    name, root = "test_recall_demo", tmp_path_factory.mktemp("data") / "demo"
    demo_data.generate(root, num_train=1, num_val=4)
    json_file = root / "annotations" / "instances_val.json"
    register_coco_instances(name, {}, str(json_file), str(root / "val"))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def voc(tmp_path):
    """The name of a dataset of three images in Pascal VOC's layout."""
    write_voc(
        tmp_path / "voc",
        {"a": [("cat", 1, 1, 40, 40)], "b": [("dog", 11, 11, 30, 50)], "c": []},
    )
    name = f"test_recall_{tmp_path.name}"
    register_voc_layout(name, tmp_path / "voc", "train", CLASSES)
    return name


@pytest.fixture
def cfg(small_cfg, tmp_path):
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 200
    small_cfg.INPUT.MIN_SIZE_TEST = 96
    small_cfg.DATALOADER.NUM_WORKERS = 0
    small_cfg.OUTPUT_DIR = str(tmp_path / "output")
    return small_cfg


def model_of(cfg):
    """Random weights, scaled so that proposals and scores differ from each other."""
    torch.manual_seed(3)
    model = build_model(cfg).eval()
    for name, tensor in model.state_dict().items():
        if "predictor" in name or "rpn_head" in name:
            tensor.mul_(10)
    return model


def files_of(cfg, name):
    folder = Path(cfg.OUTPUT_DIR, "inference", name)
    return json.loads((folder / "results.json").read_text()), folder


# The evaluator


def proposals(boxes, scores):
    instances = Instances((60, 80))
    instances.proposal_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.objectness_logits = torch.tensor(scores)
    return {"proposals": instances}


FOUND = {
    "a": proposals([[50.0, 30, 70, 50], [0, 0, 40, 30]], [0.5, -1.5]),
    "b": proposals([[10.0, 10, 30, 50]], [2.0]),
    "c": proposals([], []),
}


def process(evaluator, found):
    for image_id, output in found.items():
        evaluator.process([{"image_id": image_id}], [output])


def test_evaluator_by_hand(voc, caplog):
    """The dog is found exactly; the cat, 40 x 40, with IoU 0.75: at six of ten thresholds."""
    evaluator = recall.ProposalRecallEvaluator(voc)
    process(evaluator, FOUND)
    with caplog.at_level("INFO", logger="fpn_ext"):
        scores = evaluator.evaluate()["box_proposals"]
    assert list(scores) == [*KEYS, "AR@1000-cat", "AR@1000-dog"]
    assert scores["AR@10"] == scores["AR@1000"] == pytest.approx(80)
    assert (scores["AR@1000-cat"], scores["AR@1000-dog"]) == pytest.approx((60, 100))
    assert "   10    80.00" in caplog.text and "AR@1000-cat: 60.000" in caplog.text
    evaluator.reset()
    assert evaluator.evaluate()["box_proposals"]["AR@1000"] == 0


def test_processes_are_gathered_and_the_main_one_answers(voc, monkeypatch):
    first, second = (recall.ProposalRecallEvaluator(voc) for _ in range(2))
    process(first, {"a": FOUND["a"]})
    process(second, {"b": FOUND["b"], "c": FOUND["c"]})
    sent = []
    monkeypatch.setattr(recall.comm, "is_main_process", lambda: False)
    monkeypatch.setattr(recall.comm, "gather", lambda data, dst: sent.append(data) or [])
    assert first.evaluate() is None
    monkeypatch.setattr(recall.comm, "is_main_process", lambda: True)
    monkeypatch.setattr(recall.comm, "gather", lambda data, dst: [data, *sent])
    assert second.evaluate()["box_proposals"]["AR@10"] == pytest.approx(80)


def test_outputs_without_proposals(voc):
    evaluator = recall.ProposalRecallEvaluator(voc)
    with pytest.raises(ValueError, match=r"\['instances'\], no 'proposals'.*model_with_proposals"):
        evaluator.process([{"image_id": "a"}], [{"instances": None}])


def test_the_proposals_are_written(voc, tmp_path):
    evaluator = recall.ProposalRecallEvaluator(voc, tmp_path / "new")
    process(evaluator, FOUND)
    evaluator.evaluate()
    written = ProposalFile(tmp_path / "new" / "box_proposals.safetensors")
    assert written.dataset == voc and written.image_ids == list(FOUND)
    for image_id, (boxes, scores) in written.items():
        expected = FOUND[image_id]["proposals"]
        order = expected.objectness_logits.argsort(descending=True)
        assert np.array_equal(boxes, expected.proposal_boxes.tensor[order])
        assert np.array_equal(scores, expected.objectness_logits[order])


def test_a_dataset_without_annotations_has_no_scores(tmp_path, request):
    file = tmp_path / "image_info.json"
    file.write_text(json.dumps({"images": [{"id": 1, "height": 60, "width": 80}]}))
    MetadataCatalog.get(request.node.name).json_file = str(file)
    evaluator = recall.ProposalRecallEvaluator(request.node.name, tmp_path)
    process(evaluator, {1: FOUND["a"]})
    assert evaluator.evaluate() == {}
    assert (tmp_path / "box_proposals.safetensors").is_file()


@pytest.mark.parametrize(
    ("architecture", "key", "expected"),
    [
        ("ProposalNetwork", False, [recall.ProposalRecallEvaluator]),
        ("ProposalNetwork", True, [recall.ProposalRecallEvaluator]),
        ("GeneralizedRCNN", False, ["detections"]),
        ("GeneralizedRCNN", True, ["detections", recall.ProposalRecallEvaluator]),
    ],
)
def test_which_evaluators(cfg, demo, voc, architecture, key, expected):
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.TEST.FPN_EXT.EVALUATE_PROPOSALS = key
    for name, of_detections in ((demo, COCOEvaluator), (voc, VOCEvaluator)):
        evaluator = build_evaluator(cfg, name, cfg.OUTPUT_DIR)
        found = getattr(evaluator, "_evaluators", [evaluator])
        assert len(found) == len(expected)
        for one, kind in zip(found, expected, strict=True):
            assert isinstance(one, of_detections if kind == "detections" else kind)


# The RPN inside a two-stage model


def images():
    """Their files are larger, and of another shape, than the input."""
    return [
        {"image": torch.rand(3, 96, 128) * 255, "height": 200, "width": 250, "image_id": 1},
        {"image": torch.rand(3, 128, 96) * 255, "image_id": 2},
    ]


@pytest.mark.parametrize("optimised", [False, True])
def test_proposals_inside_are_those_of_an_rpn_alone(cfg, optimised):
    cfg.TEST.FPN_EXT.EVALUATE_PROPOSALS = True
    model, batch = model_of(cfg), images()
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    rpn = build_model(cfg).eval()
    rpn.load_state_dict({k: v for k, v in model.state_dict().items() if "roi_heads" not in k})
    if optimised:
        model, rpn = optimize_for_inference(model), optimize_for_inference(rpn)
    assert recall.model_with_proposals(cfg, rpn) is rpn
    with torch.no_grad():
        expected = model(batch)
        found = recall.model_with_proposals(cfg, model)(batch)
        alone = rpn(batch)
    for ours, theirs, proposals in zip(found, expected, alone, strict=True):
        assert set(ours) == {"instances", "proposals"}
        assert_equal(ours["instances"], theirs["instances"])
        assert_equal(ours["proposals"], proposals["proposals"])
    assert found[0]["proposals"].image_size == (200, 250)


def assert_equal(found, expected):
    """To the bit, field by field."""
    assert len(found) == len(expected) > 10
    assert found.image_size == expected.image_size
    assert found.get_fields().keys() == expected.get_fields().keys()
    for name, field in found.get_fields().items():
        other = expected.get(name)
        if isinstance(field, Boxes):
            field, other = field.tensor, other.tensor
        assert torch.equal(field, other), name


def test_the_model_is_left_as_it_was(cfg, demo):
    cfg.TEST.FPN_EXT.EVALUATE_PROPOSALS = True
    loader = build_detection_test_loader(cfg, demo)
    for training in (True, False):
        model = model_of(cfg).train(training)
        wrapped = recall.model_with_proposals(cfg, model)
        inference_on_dataset(wrapped, loader, build_evaluator(cfg, demo, cfg.OUTPUT_DIR))
        assert model.training is training
        assert not model.proposal_generator._forward_hooks


def test_models_without_an_rpn(cfg):
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    model = build_model(cfg)
    assert recall.model_with_proposals(cfg, model) is model
    cfg.TEST.FPN_EXT.EVALUATE_PROPOSALS = True
    with pytest.raises(TypeError, match=r"EVALUATE_PROPOSALS needs .* RPN .*GeneralizedRCNN"):
        recall.model_with_proposals(cfg, model)
    with pytest.raises(ValueError, match=r"EVALUATE_PROPOSALS .*precomputed proposals"):
        check_config(cfg)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PyramidRPN"
    check_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(ValueError, match=r"EVALUATE_PROPOSALS needs .*got RetinaNet"):
        check_config(cfg)


# train_net.py


def test_an_rpn_alone_is_scored(cfg, demo):
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.DATASETS.TEST = (demo,)
    results = Trainer.test(cfg, model_of(cfg))
    assert set(results) == {"box_proposals"}
    scores = results["box_proposals"]
    assert list(scores)[:12] == KEYS and len(scores) == 12 + len(demo_data.CLASS_NAMES)
    assert 0 < scores["AR@10"] < scores["AR@1000"] < 100
    written, folder = files_of(cfg, demo)
    assert written["box_proposals"]["AR@1000"] == scores["AR@1000"]

    saved = ProposalFile(folder / "box_proposals.safetensors")
    again = recall.average_recall(
        ground_truth_of(demo),
        {image_id: boxes for image_id, (boxes, _) in saved.items()},
        {image_id: scores for image_id, (_, scores) in saved.items()},
    )
    assert again == {key: scores[key] for key in KEYS}


@pytest.mark.parametrize("dtype", ["", "float32"])
def test_the_rpn_of_a_two_stage_model_is_scored_beside_its_detections(cfg, demo, dtype):
    cfg.MODEL.FPN_EXT.INFERENCE_DTYPE = dtype
    cfg.DATASETS.TEST = (demo,)
    model = model_of(cfg)
    plain = Trainer.test(cfg, model)
    detections = (files_of(cfg, demo)[1] / "coco_instances_results.json").read_bytes()
    assert set(plain) == {"bbox"} and plain["bbox"]["AP"] >= 0 and len(detections) > 1000

    cfg.TEST.FPN_EXT.EVALUATE_PROPOSALS = True
    results = Trainer.test(cfg, model)
    assert set(results) == {"bbox", "box_proposals"}
    assert str(results["bbox"]) == str(plain["bbox"])  # as text, where NaN equals NaN
    written, folder = files_of(cfg, demo)
    assert (folder / "coco_instances_results.json").read_bytes() == detections
    assert written["box_proposals"]["AR@1000"] == results["box_proposals"]["AR@1000"] > 0

    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.TEST.FPN_EXT.EVALUATE_PROPOSALS = False
    rpn = build_model(cfg)
    rpn.load_state_dict({k: v for k, v in model.state_dict().items() if "roi_heads" not in k})
    assert str(Trainer.test(cfg, rpn)["box_proposals"]) == str(results["box_proposals"])


@pytest.mark.parametrize("architecture", ["ProposalNetwork", "GeneralizedRCNN"])
def test_a_voc_layout_is_scored(cfg, voc, architecture):
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CLASSES)
    cfg.TEST.FPN_EXT.EVALUATE_PROPOSALS = True
    cfg.DATASETS.TEST = (voc,)
    results = Trainer.test(cfg, model_of(cfg))
    expected = {"box_proposals"} | ({"bbox"} if architecture == "GeneralizedRCNN" else set())
    assert set(results) == expected == set(files_of(cfg, voc)[0])
    assert {"AR@1000", "AR@1000-cat", "AR@1000-dog"} <= set(results["box_proposals"])
    assert results["box_proposals"]["AR@1000"] > 0


# The difference to Detectron2's own routine


def test_detectron2s_routine_is_compared_on_the_same_proposals(cfg, demo, tmp_path):
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.DATASETS.TEST = (demo,)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": model_of(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    (tmp_path / "rpn.yaml").write_text(cfg.dump())
    file = tmp_path / "figures.json"
    recall_difference.main(["--config-file", str(tmp_path / "rpn.yaml"), "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["metric"] for row in rows] == KEYS[4:]  # not AR@10
    ours = Trainer.test(cfg, model_of(cfg))["box_proposals"]
    for row in rows:
        assert row["pycocotools"] == pytest.approx(ours[row["metric"]])
        assert row["Detectron2"] == pytest.approx(row["pycocotools"], abs=2)
        assert row["difference"] == row["Detectron2"] - row["pycocotools"]
    assert rows[0]["Detectron2"] > 0


def test_the_document_shows_what_was_measured():
    figures = json.loads(Path("results/average_recall/recall_difference.json").read_text())
    document = Path("docs/evidence/average_recall.md").read_text()
    assert recall_difference.table(figures["rows"]) in document
    assert "dirty" not in figures["commit"]
