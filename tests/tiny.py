"""A training that takes seconds: a few generated images and a detector of about 10 000 weights."""

import fpn_ext
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from fpn_ext.data import demo_data
from torch import nn

DATASET = "tiny_train"


class TinyBottomUp(Backbone):
    """C2 to C5, each one convolution with batch normalisation after the one before."""

    def __init__(self):
        super().__init__()
        self.names = ["res2", "res3", "res4", "res5"]
        for i, name in enumerate(self.names):
            stride = 2 if i else 4
            inner = nn.Conv2d(8 if i else 3, 8, stride + 1, stride, padding=stride // 2)
            self.add_module(name, nn.Sequential(inner, nn.BatchNorm2d(8), nn.ReLU()))

    def forward(self, x):
        maps = {}
        for name in self.names:
            maps[name] = x = getattr(self, name)(x)
        return maps

    def output_shape(self):
        return {n: ShapeSpec(channels=8, stride=4 * 2**i) for i, n in enumerate(self.names)}


def register(root):
    """Register the network and, under ``DATASET``, six images, generated in ``root``."""
    demo_data.ensure(root, num_train=6, num_val=1, image_size=128)
    if DATASET not in DatasetCatalog:
        annotations = root / "annotations" / "instances_train.json"
        register_coco_instances(DATASET, {}, str(annotations), str(root / "train"))
    if "build_tiny_bottom_up" not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY._do_register("build_tiny_bottom_up", lambda cfg, shape: TinyBottomUp())


FILE = "configs/demo/faster_rcnn_R_18_FPN.yaml"


def options(folder, *opts):
    """Overrides of ``FILE``: eight iterations, a checkpoint after every second."""
    values = {
        "MODEL.DEVICE": "cpu",
        "MODEL.FPN_EXT.BOTTOM_UP": "build_tiny_bottom_up",
        "MODEL.FPN.OUT_CHANNELS": 8,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "DATASETS.TRAIN": (DATASET,),
        "DATASETS.TEST": (),
        "INPUT.MIN_SIZE_TRAIN": (48, 64),
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.WARMUP_ITERS": 3,
        "SOLVER.STEPS": (6,),
        "SOLVER.MAX_ITER": 8,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "TEST.EVAL_PERIOD": 0,
        "OUTPUT_DIR": folder,
    }
    return [str(word) for pair in values.items() for word in pair] + [str(word) for word in opts]


def config(folder, *opts):
    return fpn_ext.load_config(FILE, options(folder, *opts))


def leaves(value, path=""):
    """{path: leaf} of what a checkpoint holds."""
    if not isinstance(value, dict | list | tuple):
        return {path: value}
    found = {}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found |= leaves(inner, f"{path}/{key}")
    return found


CLASSES = ["disc", "ring", "cross", "bar", "star"]


def saved_run(folder, *opts):
    """A folder as a training leaves it, of random weights."""
    folder.mkdir()
    words = ["INPUT.MIN_SIZE_TEST", 64, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    cfg = config(folder, *words, "DATASETS.TRAIN", "()", *opts)
    torch.manual_seed(0)
    record = {"classes": CLASSES, "category_ids": [1, 2, 3, 4, 9]}
    state = build_model(cfg).state_dict()
    torch.save({"model": state, "trained_on": record}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


def photo(height=48, width=64, seed=0):
    """(H, W, 3) uint8 RGB."""
    values = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3))
    return np.kron(values, np.ones((8, 8, 1))).astype(np.uint8)
