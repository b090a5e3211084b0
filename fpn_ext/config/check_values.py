"""Values that Detectron2 accepts and nobody means, or that it refuses only when they are used."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import samplers
from detectron2.solver import build_lr_scheduler, build_optimizer
from PIL import Image, ImageMode

from ..kernels import roi_align_cuda
from ..keys import own_keys
from ..registries.architectures import reads_node
from ..registries.lookup import has_pyramid_heads
from .check_matching import matching_problems
from .defaults import flat

# Keys that hold a fraction, and the node that a model reads them with; "" for every model.
FRACTIONS = {
    "MODEL.RPN.NMS_THRESH": "RPN",
    "MODEL.RPN.POSITIVE_FRACTION": "RPN",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "ROI_HEADS",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "ROI_HEADS",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": "ROI_HEADS",
    "MODEL.RETINANET.NMS_THRESH_TEST": "RETINANET",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "RETINANET",
}
# Keys that hold a count: the node, and the least that means something.
COUNTS = {
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": ("RPN", 1),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": ("RPN", 1),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": ("RPN", 1),
    "MODEL.RPN.POST_NMS_TOPK_TEST": ("RPN", 1),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": ("RPN", 1),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": ("RPN", 0),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": ("ROI_HEADS", 1),
    "MODEL.ROI_HEADS.NUM_CLASSES": ("ROI_HEADS", 1),
    "MODEL.ROI_BOX_HEAD.NUM_FC": ("ROI_HEADS", 0),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": ("ROI_HEADS", 0),
    "MODEL.RETINANET.NUM_CLASSES": ("RETINANET", 1),
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": ("RETINANET", 1),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": ("SEM_SEG_HEAD", 1),
    "MODEL.BACKBONE.FREEZE_AT": ("", 0),
    "TEST.DETECTIONS_PER_IMAGE": ("", 1),
    "DATALOADER.NUM_WORKERS": ("", 0),
    "INPUT.MIN_SIZE_TEST": ("", 0),
    "INPUT.MAX_SIZE_TEST": ("", 1),
}
TRAINING_COUNTS = {
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "INPUT.MAX_SIZE_TRAIN": 1,
}
CHOICES = {
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
}
CROP_TYPES = ("relative", "relative_range", "absolute", "absolute_range")
MASK_FORMATS = ("polygon", "bitmask")
RANDOM_SUBSET = "RandomSubsetTrainingSampler"
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", RANDOM_SUBSET)
NOT_OF_PILLOW = {"BGR": 3, "YUV-BT.601": 3}  # formats that Detectron2 makes itself: channels


def value_problems(cfg: CfgNode, training: bool) -> Iterable[str]:
    """Each value that means nothing, with what would."""
    values = flat(cfg)
    for key, node in FRACTIONS.items():
        if _is_read(cfg, node) and not 0 <= values[key] <= 1:
            yield f"{key} must be from 0 to 1, got {values[key]}"
    counts = {key: least for key, (node, least) in COUNTS.items() if _is_read(cfg, node)}
    for key, least in (counts | (TRAINING_COUNTS if training else {})).items():
        if values[key] < least:
            yield f"{key} must be at least {least}, got {values[key]}"
    yield from matching_problems(cfg)
    yield from _pixel_problems(cfg)
    yield from _pooler_problems(cfg)
    if _is_read(cfg, "ROI_HEADS") and cfg.MODEL.KEYPOINT_ON:
        yield from _keypoint_problems(cfg)
    if training:
        yield from _loading_problems(cfg, values)
        yield from _optimizer_problems(cfg)
        yield from _schedule_problems(cfg)


def _is_read(cfg: CfgNode, node: str) -> bool:
    return not node or reads_node(cfg, node)


def _pixel_problems(cfg: CfgNode) -> Iterable[str]:
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if not all(math.isfinite(value) and value > 0 for value in std):
        yield f"MODEL.PIXEL_STD is divided by and must be above 0, got {list(std)}"
    if len(mean) != len(std):
        yield (
            f"MODEL.PIXEL_MEAN {list(mean)} and MODEL.PIXEL_STD {list(std)} need a value for each "
            "channel"
        )
    channels = channels_of(cfg.INPUT.FORMAT)
    if channels is None:
        yield (
            f"INPUT.FORMAT must be BGR, RGB, L, RGBA, YUV-BT.601 or another mode of Pillow's, got "
            f"{cfg.INPUT.FORMAT!r}"
        )
    elif channels != len(mean) == len(std):
        yield (
            f"INPUT.FORMAT {cfg.INPUT.FORMAT} has {channels} channel(s), MODEL.PIXEL_MEAN "
            f"{list(mean)} has {len(mean)}: the two need the same number"
        )


def channels_of(pixel_format: str) -> int | None:
    """The channels of an image that Detectron2 reads in a format; None where it cannot.

    >>> channels_of("BGR"), channels_of("L"), channels_of("RBG")
    (3, 1, None)
    """
    if pixel_format in NOT_OF_PILLOW:
        return NOT_OF_PILLOW[pixel_format]
    try:
        Image.new("RGB", (1, 1)).convert(pixel_format)
        return len(ImageMode.getmode(pixel_format).bands)
    except (ValueError, KeyError):
        return None


def _pooler_problems(cfg: CfgNode) -> Iterable[str]:
    """What a fast pooling answers in the first step."""
    model = cfg.MODEL
    implementation = model.FPN_EXT.POOLER_IMPLEMENTATION
    if not (has_pyramid_heads(cfg) and reads_node(cfg, "ROI_HEADS")):
        return
    if implementation not in ("weighted_rows", "fused"):
        return
    key = f"MODEL.FPN_EXT.POOLER_IMPLEMENTATION {implementation}"
    on = {"ROI_BOX_HEAD": True, "ROI_MASK_HEAD": model.MASK_ON}
    on["ROI_KEYPOINT_HEAD"] = model.KEYPOINT_ON
    for branch, is_on in on.items():
        if is_on and model[branch].POOLER_TYPE == "ROIPool":
            yield (
                f"{key} is RoIAlign, MODEL.{branch}.POOLER_TYPE is ROIPool: set "
                "POOLER_IMPLEMENTATION per_level, or POOLER_TYPE ROIAlignV2"
            )
    if implementation == "weighted_rows" and model.DEVICE != "cpu":
        yield f"{key} is for CPUs, MODEL.DEVICE is {model.DEVICE}: set it to auto"
    if implementation == "fused" and model.DEVICE == "cpu" and not roi_align_cuda.INTERPRETED:
        yield f"{key} is for GPUs, MODEL.DEVICE is cpu: set it to auto"


def _keypoint_problems(cfg: CfgNode) -> Iterable[str]:
    """What COCO's evaluation of keypoints needs; its own sigmas are of 17 of a person."""
    number, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if number < 1:
        yield f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS must be at least 1, got {number}"
    elif len(sigmas or [0.0] * 17) != number and cfg.DATASETS.TEST:
        yield (
            f"TEST.KEYPOINT_OKS_SIGMAS needs one value for each of the {number} keypoints "
            f"(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS), got {len(sigmas)}"
            + ("" if sigmas else ", which means COCO's 17 of a person")
        )
    if not all(sigma > 0 for sigma in sigmas):
        yield f"TEST.KEYPOINT_OKS_SIGMAS must be above 0, got {list(sigmas)}"


def _loading_problems(cfg: CfgNode, values: dict[str, Any]) -> Iterable[str]:
    loader = cfg.DATALOADER
    known = [
        name
        for name in SAMPLERS
        if hasattr(samplers, name)
        and (name != RANDOM_SUBSET or "RANDOM_SUBSET_RATIO" in loader)  # v0.6 has not the key
    ]
    if loader.SAMPLER_TRAIN not in known:
        yield f"DATALOADER.SAMPLER_TRAIN must be one of {known}, got {loader.SAMPLER_TRAIN!r}"
    elif loader.SAMPLER_TRAIN == RANDOM_SUBSET and not 0 < loader.RANDOM_SUBSET_RATIO <= 1:
        yield (
            "DATALOADER.RANDOM_SUBSET_RATIO must be above 0, up to 1, got "
            f"{loader.RANDOM_SUBSET_RATIO}"
        )
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            yield f"{key} must be one of {choices}, got {values[key]!r}"
    sides = cfg.INPUT.MIN_SIZE_TRAIN
    if not sides or min(sides) < 0:
        yield f"INPUT.MIN_SIZE_TRAIN lists sides in pixels (0: as it is), got {sides}"
    elif cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sides) != 2:
        yield f"INPUT.MIN_SIZE_TRAIN_SAMPLING range needs two sides in MIN_SIZE_TRAIN, got {sides}"
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE not in CROP_TYPES:
        yield f"INPUT.CROP.TYPE must be one of {CROP_TYPES}, got {cfg.INPUT.CROP.TYPE!r}"
    least = own_keys(cfg, "INPUT").CROP_LEAST_VISIBLE
    if not 0 <= least <= 1:
        yield f"INPUT.FPN_EXT.CROP_LEAST_VISIBLE is a share, from 0 to 1, got {least}"
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT not in MASK_FORMATS:
        yield f"INPUT.MASK_FORMAT must be one of {MASK_FORMATS}, got {cfg.INPUT.MASK_FORMAT!r}"


def _optimizer_problems(cfg: CfgNode) -> Iterable[str]:
    """What PyTorch and Detectron2 say when they build the optimizer, after the model."""
    try:
        build_optimizer(cfg, torch.nn.Linear(1, 1))
    except Exception as error:
        solver = cfg.SOLVER
        yield (
            f"SOLVER (BASE_LR {solver.BASE_LR}, MOMENTUM {solver.MOMENTUM}, WEIGHT_DECAY "
            f"{solver.WEIGHT_DECAY}, CLIP_GRADIENTS.CLIP_TYPE {solver.CLIP_GRADIENTS.CLIP_TYPE!r}, "
            f"NESTEROV {solver.NESTEROV}): {error}"
        )


def _schedule_problems(cfg: CfgNode) -> Iterable[str]:
    """What Detectron2 says when it builds the schedule, after the model."""
    if cfg.SOLVER.MAX_ITER < 1:
        return  # said elsewhere
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.STEPS = [step for step in cfg.SOLVER.STEPS if step <= cfg.SOLVER.MAX_ITER]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        build_lr_scheduler(cfg, optimizer)
    except Exception as error:
        yield (
            f"SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME!r} (STEPS, GAMMA, "
            f"WARMUP_METHOD {cfg.SOLVER.WARMUP_METHOD!r}): {error}"
        )
