"""Values that Detectron2 accepts and nobody means; class counts by architecture; idle keys."""

import fpn_ext
import pytest
from coco_files import Datasets, coco, config
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN
from detectron2.modeling import RetinaNet as Detectron2RetinaNet
from fpn_ext.config import check_values, numerics
from fpn_ext.config.check import config_problems
from fpn_ext.config.prepare import Caution, prepare
from fpn_ext.evaluation.rehearsal import check_evaluation
from fpn_ext.proposals.loader import training_data
from fpn_ext.registries.architectures import class_count_key, reads_node
from torch import nn

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
CPU = ["MODEL.DEVICE", "cpu"]


@pytest.fixture
def data(tmp_path):
    datasets = Datasets(tmp_path)
    yield datasets
    datasets.forget()


def problems(*opts, training=True):
    return config_problems(fpn_ext.load_config(DEMO, [*CPU, *map(str, opts)]), training)


POOLING = "MODEL.FPN_EXT.POOLER_IMPLEMENTATION"
CASCADE = [
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["OUTPUT_DIR", "caf\udce9"], r"OUTPUT_DIR 'caf\udce9' is not UTF-8, as TensorBoard needs"),
        (["MODEL.RPN.NMS_THRESH", 1.5], "MODEL.RPN.NMS_THRESH must be from 0 to 1, got 1.5"),
        (["MODEL.ROI_HEADS.NMS_THRESH_TEST", -0.5], "NMS_THRESH_TEST must be from 0 to 1, got -0"),
        (["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 5.0], "SCORE_THRESH_TEST must be from 0 to 1"),
        (["MODEL.RPN.POST_NMS_TOPK_TRAIN", -1], "POST_NMS_TOPK_TRAIN must be at least 1, got -1"),
        (["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 0], "BATCH_SIZE_PER_IMAGE must be at least 1"),
        (["TEST.DETECTIONS_PER_IMAGE", -1], "TEST.DETECTIONS_PER_IMAGE must be at least 1, got -1"),
        (["DATALOADER.NUM_WORKERS", -2], "DATALOADER.NUM_WORKERS must be at least 0, got -2"),
        (["SOLVER.WARMUP_ITERS", -1], "SOLVER.WARMUP_ITERS must be at least 0, got -1"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD must be at least 1, got 0"),
        (["MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"], "MODEL.PIXEL_STD is divided by and must be above"),
        (["MODEL.PIXEL_MEAN", "[1.0]"], "need a value for each channel"),
        (["INPUT.FORMAT", "RBG"], "INPUT.FORMAT must be BGR, RGB, L, RGBA"),
        (["INPUT.FORMAT", "L"], "INPUT.FORMAT L has 1 channel(s), MODEL.PIXEL_MEAN"),
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "'Cosine' (STEPS, GAMMA, WARMUP_METHOD 'linear')"),
        (["SOLVER.WARMUP_METHOD", "slow"], "WARMUP_METHOD 'slow'): "),
        (["SOLVER.STEPS", "(9, 5)"], "SOLVER.LR_SCHEDULER_NAME 'WarmupMultiStepLR' (STEPS"),
        (["DATALOADER.SAMPLER_TRAIN", "Random"], "SAMPLER_TRAIN must be one of ['TrainingSampler'"),
        (["INPUT.RANDOM_FLIP", "both"], "INPUT.RANDOM_FLIP must be one of"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "range needs two sides in MIN_SIZE_TRAIN"),
        (["INPUT.MIN_SIZE_TRAIN", "()"], "INPUT.MIN_SIZE_TRAIN lists sides in pixels"),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "square"], "INPUT.CROP.TYPE must be one"),
        (["INPUT.FPN_EXT.CROP_LEAST_VISIBLE", 1.5], "CROP_LEAST_VISIBLE is a share, from 0 to 1"),
        (["INPUT.FPN_EXT.CROP_LEAST_VISIBLE", -0.5], "CROP_LEAST_VISIBLE is a share, from 0 to 1"),
        (["MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "rle"], "INPUT.MASK_FORMAT must be one of"),
        (["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5],
         "one value for each of the 5 keypoints (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS), got 0"),
        (["MODEL.KEYPOINT_ON", True, "TEST.KEYPOINT_OKS_SIGMAS", "[0.1]"], "17 keypoints"),
        ([POOLING, "weighted_rows", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"],
         "MODEL.ROI_BOX_HEAD.POOLER_TYPE is ROIPool: set POOLER_IMPLEMENTATION per_level"),
        (["MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]"], "RPN.IOU_THRESHOLDS must ascend, above 0 and"),
        (["MODEL.RPN.IOU_THRESHOLDS", "[0.0, 0.3]"], "RPN.IOU_THRESHOLDS must ascend, above 0 and"),
        (["MODEL.ROI_HEADS.IOU_THRESHOLDS", "[1.5]"], "up to 1, got [1.5]"),
        (["MODEL.RPN.IOU_LABELS", "[0, 1]"],
         "needs one label more than MODEL.RPN.IOU_THRESHOLDS [0.3, 0.7] has"),
        (["MODEL.ROI_HEADS.IOU_LABELS", "[0, 2]"], "and 1 (object), got [0, 2]"),
        (["MODEL.RPN.BBOX_REG_WEIGHTS", "(1.0, 1.0)"], "RPN.BBOX_REG_WEIGHTS needs four weights"),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(9.0, 9.0, 0.0, 5.0)"], "four weights above 0"),
        (["MODEL.RPN.BBOX_REG_LOSS_TYPE", "l2"], "RPN.BBOX_REG_LOSS_TYPE must be one of"),
        ([*CASCADE, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5, 0.6)"], "got 2 and 3"),
        ([*CASCADE, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.6, 0.6, 0.7)"],
         "MODEL.ROI_HEADS.IOU_THRESHOLDS [0.5] is that of the first stage"),
        (["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "max"],
         "CLIP_GRADIENTS.CLIP_TYPE 'max', NESTEROV False): 'max' is not a valid"),
        (["SOLVER.MOMENTUM", -1.0], "MOMENTUM -1.0, WEIGHT_DECAY"),
        ([POOLING, "weighted_rows", "MODEL.DEVICE", "cuda"], "is for CPUs, MODEL.DEVICE is cuda"),
    ],
)  # fmt: skip
def test_values_that_nobody_means(opts, message):
    (problem,) = problems(*opts)
    assert message in problem


def test_a_random_subset():
    """Of which Detectron2 v0.6 has the sampler, and not the key that it reads."""
    cfg = fpn_ext.load_config(DEMO, CPU)
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    if "RANDOM_SUBSET_RATIO" in cfg.DATALOADER:
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 2.0
    (problem,) = config_problems(cfg, training=True)
    assert "must be above 0, up to 1" in problem or "must be one of" in problem


def test_fused_pooling_on_a_cpu(monkeypatch):
    monkeypatch.setattr(check_values.roi_align_cuda, "INTERPRETED", False)
    (problem,) = problems(POOLING, "fused")
    assert "POOLER_IMPLEMENTATION fused is for GPUs, MODEL.DEVICE is cpu: set it to auto" in problem


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["MODEL.RPN.NMS_THRESH", 1.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0],
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.STEPS", "()"],
        ["SOLVER.STEPS", "(10, 99999999)"],  # after the end: said, and no error
        ["INPUT.FORMAT", "YUV-BT.601"],
        ["INPUT.FORMAT", "RGBA", "MODEL.PIXEL_MEAN", "[1.0, 1.0, 1.0, 1.0]",
         "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0, 1.0]"],
        ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"],
        ["MODEL.KEYPOINT_ON", True],
        [POOLING, "weighted_rows"],
        ["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIPool", POOLING, "weighted_rows"],  # no such head
        ["INPUT.CROP.TYPE", "square"],  # not read
        ["MODEL.RETINANET.NMS_THRESH_TEST", 7.0],  # not read
    ],
)  # fmt: skip
def test_values_that_somebody_means(opts):
    assert not problems(*opts)


def test_what_only_a_training_reads():
    opts = ["SOLVER.WARMUP_ITERS", -1, "DATALOADER.SAMPLER_TRAIN", "x", "INPUT.RANDOM_FLIP", "x"]
    assert len(problems(*opts)) == 3 and not problems(*opts, training=False)


# Architectures

RETINANET = (
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 3),
    *("MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
)


class CheckedPanopticFPN(PanopticFPN):
    """A subclass, by its own name."""


class CheckedDetector(nn.Module):
    """Another architecture, whose class count has a key of its own choice."""

    @classmethod
    def from_config(cls, cfg):
        return {"classes": cfg.MODEL.RETINANET.NUM_CLASSES}


for architecture in (CheckedPanopticFPN, CheckedDetector):
    META_ARCH_REGISTRY.register(architecture)

OF_HEADS, OF_RETINANET = "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("GeneralizedRCNN", OF_HEADS), ("PanopticFPN", OF_HEADS), ("CheckedPanopticFPN", OF_HEADS),
        ("RetinaNet", OF_RETINANET), ("CheckedDetector", OF_RETINANET), ("ProposalNetwork", ""),
        ("SemanticSegmentor", ""),
    ],
)  # fmt: skip
def test_the_key_of_the_class_count(architecture, key, tmp_path):
    opts = "MODEL.META_ARCHITECTURE", architecture
    assert class_count_key(config(tmp_path, [], [], *opts)) == key


def test_a_cascade_counts_classes_as_its_heads():
    cfg = fpn_ext.load_config(DEMO, [*CPU, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"])
    assert class_count_key(cfg) == OF_HEADS


def test_what_architectures_read():
    cfg = fpn_ext.load_config(DEMO, CPU)
    assert reads_node(cfg, "RPN") and reads_node(cfg, "ROI_HEADS")
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert not reads_node(cfg, "RPN") and reads_node(cfg, "RETINANET")
    assert {Detectron2RetinaNet, GeneralizedRCNN} <= {entry for _, entry in META_ARCH_REGISTRY}


@pytest.mark.parametrize("architecture", ["RetinaNet", "CheckedDetector"])
def test_a_class_count_under_another_key(architecture, data, tmp_path):
    name = data.write("train", coco())
    opts = [*RETINANET, "MODEL.META_ARCHITECTURE", architecture, "MODEL.ROI_HEADS.NUM_CLASSES", 80]
    cfg = config(tmp_path, [name], [name], *opts)
    assert not check_evaluation(cfg)
    training_data(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    message = r"MODEL\.RETINANET\.NUM_CLASSES is 2, but train has 3 classes \(cat.*set it to 3"
    with pytest.raises(ValueError, match=message):
        training_data(cfg)
    assert any("MODEL.RETINANET.NUM_CLASSES is 2" in p for p in config_problems(cfg, True))


def test_a_retinanet_is_not_asked_for_an_rpn(tmp_path):
    """Its pyramid has no p2, which the RPN's and the heads' keys still name."""
    opts = [
        *RETINANET[:4], "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"],
        "MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6"],
        "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256]],
        "MODEL.RPN.HEAD_NAME", "NoSuchHead", "MODEL.RPN.NMS_THRESH", 7.0,
        "MODEL.ROI_HEADS.NAME", "NoSuchHeads",
    ]  # fmt: skip
    cfg = config(tmp_path, [], [], *opts)
    assert not config_problems(cfg)
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p7"]
    absent, number = config_problems(cfg)
    assert "MODEL.RETINANET.IN_FEATURES asks for ['p7']" in absent
    assert "SIZES has 4 lists" in number and "3 maps of MODEL.RETINANET.IN_FEATURES" in number


# Keys that do nothing


@pytest.mark.parametrize(
    ("opts", "note"),
    [
        (["TEST.AUG.FLIP", False], "TEST.AUG.FLIP does nothing: TEST.AUG.ENABLED is False"),
        (["INPUT.CROP.SIZE", "[0.5, 0.5]"], "INPUT.CROP.SIZE does nothing"),
        (["INPUT.FPN_EXT.CROP_LEAST_VISIBLE", 0.5], "VISIBLE does nothing: INPUT.CROP.ENABLED is"),
        (["MODEL.RETINANET.PRIOR_PROB", 0.1, "MODEL.RETINANET.NUM_CLASSES", 5],
         "MODEL.RETINANET.NUM_CLASSES, MODEL.RETINANET.PRIOR_PROB do nothing: this MODEL.META"),
        (["MODEL.ROI_MASK_HEAD.NUM_CONV", 3], "NUM_CONV does nothing: MODEL.MASK_ON is False"),
        (["TEST.KEYPOINT_OKS_SIGMAS", "[0.1]"], "SIGMAS does nothing: MODEL.KEYPOINT_ON is False"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.STEPS", "(5,)"],
         "SOLVER.STEPS does nothing: SOLVER.LR_SCHEDULER_NAME WarmupCosineLR has no steps"),
        (["DATALOADER.REPEAT_THRESHOLD", 0.1], "REPEAT_THRESHOLD does nothing"),
        (["SOLVER.FPN_EXT.AMP_DTYPE", "bfloat16"], "AMP_DTYPE does nothing: SOLVER.AMP.ENABLED"),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool",
          "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2], "SAMPLING_RATIO does nothing"),
    ],
)  # fmt: skip
def test_keys_that_do_nothing_are_said(opts, note):
    notes = prepare(DEMO, [*CPU, *map(str, opts)], training=True).notes
    assert any(note in said and isinstance(said, Caution) for said in notes)


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["TEST.AUG.ENABLED", "True", "TEST.AUG.FLIP", "False"],
        ["TEST.AUG.FLIP", "True"],  # its default
        ["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "2"],
    ],
)
def test_keys_that_do_something_are_not(opts):
    assert not any("nothing" in note for note in prepare(DEMO, [*CPU, *opts]).notes)


@pytest.mark.parametrize("is_there", [True, False])
def test_bfloat16_where_the_processor_has_none(is_there, monkeypatch):
    monkeypatch.setattr(numerics, "has_bfloat16_convolutions", lambda: is_there)
    opts = [*CPU, "MODEL.FPN_EXT.INFERENCE_DTYPE", "bfloat16"]
    said = [note for note in prepare(DEMO, opts).notes if "no bfloat16 convolutions" in note]
    assert len(said) == (not is_there)
    opts = [*CPU, "SOLVER.AMP.ENABLED", "True", "SOLVER.FPN_EXT.AMP_DTYPE", "bfloat16"]
    said = prepare(DEMO, opts, training=True).notes
    assert any("AMP_DTYPE bfloat16: this CPU" in note for note in said) == (not is_there)
