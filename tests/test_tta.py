"""Detectron2's test-time augmentation, the paper's image pyramid (Fig. 1(a)), on our models."""

import json
import sys
from pathlib import Path

import pytest
import torch
from fpn_ext import check_config, load_config, optimize_for_inference
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from fpn_ext.data import demo_data
from fpn_ext.data.datasets import register_voc_layout
from voc import CLASSES, write_voc

sys.path.insert(0, str(Path(__file__).parents[1]))
from fpn_ext.engine.trainer import Trainer

BUILTIN = {
    "BACKBONE": "build_resnet_fpn_backbone",
    "ANCHOR_GENERATOR": "DefaultAnchorGenerator",
    "PROPOSAL_GENERATOR": "RPN",
    "ROI_HEADS": "StandardROIHeads",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The names of two generated datasets, of one and of two images in COCO format."""
    root = tmp_path_factory.mktemp("data") / "demo"
    demo_data.generate(root, num_train=1, num_val=2)
    names = [f"test_tta_{split}" for split in ("train", "val")]
    for name, split in zip(names, ("train", "val"), strict=True):
        json_file = root / "annotations" / f"instances_{split}.json"
        register_coco_instances(name, {}, str(json_file), str(root / split))
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def cfg(small_cfg, demo, tmp_path):
    small_cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = "per_level"
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 100
    small_cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    small_cfg.INPUT.MIN_SIZE_TEST = 80
    small_cfg.TEST.AUG.ENABLED = True
    small_cfg.TEST.AUG.MIN_SIZES = (64, 96)
    small_cfg.DATASETS.TEST = (demo[1],)
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


def loaded(cfg):
    """The model's inputs for the generated images, as the test loader makes them."""
    mapper = DatasetMapper(cfg, is_train=False)
    return [mapper(record) for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])]


def augmented(cfg, model):
    with torch.no_grad():
        return [out["instances"] for out in GeneralizedRCNNWithTTA(cfg, model)(loaded(cfg))]


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) > 10
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        assert ours.has("pred_masks") == theirs.has("pred_masks")
        if ours.has("pred_masks"):
            assert torch.equal(ours.pred_masks, theirs.pred_masks)


def assert_close(found, expected):
    """Sums in a different order: NMS may differ for overlaps near the threshold."""
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) > 10
        torch.testing.assert_close(ours.scores[:10], theirs.scores[:10], rtol=0, atol=1e-4)
        distance = (ours.pred_boxes.tensor[:, None] - theirs.pred_boxes.tensor).abs().amax(dim=2)
        assert (distance.amin(dim=1) < 0.01).float().mean() > 0.95


@pytest.mark.parametrize("mask_on", [False, True])
def test_equal_to_detectron2s_model_to_the_bit(cfg, mask_on):
    cfg.MODEL.MASK_ON = mask_on
    model = model_of(cfg)
    for part, name in BUILTIN.items():
        cfg.MODEL[part].NAME = name
    control = build_model(cfg).eval()
    control.load_state_dict(model.state_dict())
    assert_equal(augmented(cfg, model), augmented(cfg, control))


def test_every_size_and_flip_takes_part(cfg):
    model = model_of(cfg)
    both = augmented(cfg, model)
    for key, value in (("MIN_SIZES", (64,)), ("FLIP", False)):
        cfg.TEST.AUG[key] = value
        for one, all_of_them in zip(augmented(cfg, model), both, strict=True):
            assert not torch.equal(one.scores[:10], all_of_them.scores[:10])


def test_pooled_levels_are_let_go(cfg):
    """A detection merges several images: there is no single level."""
    plain = augmented(cfg, model_of(cfg))
    cfg.MODEL.FPN_EXT.KEEP_LEVELS = True
    keeping = augmented(cfg, model_of(cfg))
    assert_equal(keeping, plain)
    assert not any(found.has("pooled_level") for found in keeping)


@pytest.mark.parametrize("kind", ["ChunkedROIHeads", "weighted_rows", "float32", "bfloat16"])
def test_other_ways_to_infer(cfg, kind):
    cfg.MODEL.MASK_ON = True  # masks come from a second pass, with given boxes
    model = model_of(cfg)
    expected = augmented(cfg, model)
    if kind in ("float32", "bfloat16"):
        other = optimize_for_inference(model, getattr(torch, kind))
    else:
        if kind == "ChunkedROIHeads":
            cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.FPN_EXT.BOXES_PER_CHUNK = kind, 7
        else:
            cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = kind
        other = build_model(cfg).eval()
        other.load_state_dict(model.state_dict())
    found = augmented(cfg, other)
    if kind == "bfloat16":
        assert all(len(instances) > 10 for instances in found)
    else:
        assert_close(found, expected)
    assert all(instances.has("pred_masks") for instances in found)


def test_one_size_the_models_own_and_no_flip_is_plain_inference(cfg):
    """The same scores, bit for bit; the boxes, scaled in a different order, up to rounding."""
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (80,), False
    model = model_of(cfg)
    with torch.no_grad():  # one by one: in a batch, convolutions round otherwise
        plain = [model([image])[0]["instances"] for image in loaded(cfg)]
    for found, expected in zip(augmented(cfg, model), plain, strict=True):
        assert len(found) > 10
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.pred_classes, expected.pred_classes)
        torch.testing.assert_close(
            found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-3
        )


# train_net.py


def written(cfg, folder, name):
    return json.loads(Path(cfg.OUTPUT_DIR, folder, name, "results.json").read_text())


@pytest.mark.parametrize("dtype", ["", "float32"])
def test_evaluation_scores_both_ways(cfg, demo, dtype):
    cfg.DATASETS.TEST = tuple(demo)
    cfg.MODEL.FPN_EXT.INFERENCE_DTYPE = dtype
    cfg.TEST.FPN_EXT.EVALUATE_PROPOSALS = True
    model = model_of(cfg)
    results = Trainer.test(cfg, model)
    assert not model.training
    assert list(results) == demo
    for name in demo:
        assert list(results[name]) == ["bbox", "box_proposals", "bbox_TTA"]
        assert results[name]["bbox"] != results[name]["bbox_TTA"]
        assert set(written(cfg, "inference", name)) == {"bbox", "box_proposals"}
        assert set(written(cfg, "inference_TTA", name)) == {"bbox_TTA"}
        assert written(cfg, "inference_TTA", name)["bbox_TTA"]["AP50"] == pytest.approx(
            results[name]["bbox_TTA"]["AP50"]
        )


def test_without_the_key_there_is_none(cfg):
    cfg.TEST.AUG.ENABLED = False
    assert set(Trainer.test(cfg, model_of(cfg))) == {"bbox"}
    assert not Path(cfg.OUTPUT_DIR, "inference_TTA").exists()


def test_a_voc_layout(cfg, tmp_path):
    write_voc(tmp_path, {"a": [("cat", 1, 1, 40, 40)], "b": [("dog", 11, 11, 30, 50)]})
    name = f"test_tta_{tmp_path.name}"
    register_voc_layout(name, tmp_path, "train", CLASSES)
    cfg.DATASETS.TEST = (name,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CLASSES)
    results = Trainer.test(cfg, model_of(cfg))
    assert set(results) == {"bbox", "bbox_TTA"}
    assert {"AP", "AP50-cat", "AP50-dog"} <= set(written(cfg, "inference_TTA", name)["bbox_TTA"])


def test_training_is_evaluated_with_augmentation_only_at_its_end(cfg, demo):
    cfg.DATASETS.TRAIN = (demo[0],)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 1, 2, 1
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    evaluated = []

    class Noting(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            evaluated.append("at the end" if output_folder else "during training")
            return []

    trainer = Noting(cfg)
    trainer.train()
    assert evaluated == ["during training"] * 2 + ["at the end"]
    assert trainer.model.training, "as it was before"


def test_what_cannot_be_augmented_is_said_before_training():
    demo_config = "configs/demo/faster_rcnn_R_18_FPN.yaml"
    precomputed = [
        *("MODEL.LOAD_PROPOSALS", "True"),
        *("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
        *("DATASETS.PROPOSAL_FILES_TEST", "('README.md',)"),  # any file that is there
    ]
    for opts, message in (
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "GeneralizedRCNN, got ProposalNetwork"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "5",
          "MODEL.RETINANET.IN_FEATURES", "['p2', 'p3', 'p4', 'p5', 'p6']"],
         "GeneralizedRCNN, got RetinaNet"),
        (precomputed, "needs the model's own RPN"),
        (["MODEL.KEYPOINT_ON", "True"], "has no keypoints"),
        (["TEST.AUG.MIN_SIZES", "()"], r"TEST\.AUG\.MIN_SIZES is empty"),
    ):  # fmt: skip
        cfg = load_config(demo_config, opts)
        check_config(cfg)
        cfg.TEST.AUG.ENABLED = True
        with pytest.raises(ValueError, match=rf"1 problem\(s\).*\n.*TEST\.AUG\.ENABLED.*{message}"):
            check_config(cfg)
