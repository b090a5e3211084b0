"""In what a config is not the one that weights were trained with, though all tensors fit."""

import ast
import re
from typing import Any

from detectron2.config import CfgNode

from ..data.reading import value_range
from ..files.trained_on import TrainedOn
from .defaults import flat

# Keys of MODEL that change what weights compute, and no shape of them.
_MEANING = re.compile(
    r"MODEL\.(ANCHOR_GENERATOR\.(SIZES|ASPECT_RATIOS|ANGLES|OFFSET)"
    r"|(RPN|RETINANET|ROI_BOX_HEAD|ROI_BOX_CASCADE_HEAD)\.BBOX_REG_WEIGHTS"
    r"|ROI_\w+_HEAD\.POOLER_(RESOLUTION|SAMPLING_RATIO|TYPE)"
    r"|(RPN|RETINANET|ROI_HEADS|FPN)\.IN_FEATURES"
    r"|FPN\.FUSE_TYPE|RESNETS\.(STRIDE_IN_1X1|RES5_DILATION)"
    r"|FPN_EXT\.(ANCHOR_SIZES|LEVELS|TOP_BLOCK|CANONICAL_LEVEL|CANONICAL_BOX_SIZE|LEVEL_RULE))"
)


def model_keys(cfg: CfgNode) -> dict[str, str]:
    """The keys of MODEL that change what weights compute without changing their shapes, as text.

    >>> from fpn_ext import get_cfg
    >>> model_keys(get_cfg())["MODEL.ANCHOR_GENERATOR.OFFSET"]
    '0.0'
    """
    return {key: str(value) for key, value in flat(cfg).items() if _MEANING.fullmatch(key)}


def other_than_trained(cfg: CfgNode, trained_on: TrainedOn, file: str) -> list[str]:
    """What pixels and MODEL are for a config, and were otherwise for its weights; a sentence each.

    Args:
        file: the weights.
    """
    pixels = {
        "INPUT.FORMAT": (trained_on.pixel_format, cfg.INPUT.FORMAT),
        "MODEL.PIXEL_MEAN": (trained_on.pixel_mean, [float(v) for v in cfg.MODEL.PIXEL_MEAN]),
        "MODEL.PIXEL_STD": (trained_on.pixel_std, [float(v) for v in cfg.MODEL.PIXEL_STD]),
        "INPUT.FPN_EXT.VALUE_RANGE": (trained_on.value_range, list(value_range(cfg))),
    }
    pairs: dict[str, tuple[Any, Any]] = pixels if trained_on.pixel_format else {}
    now = model_keys(cfg)
    pairs |= {key: (was, now[key]) for key, was in trained_on.model_keys.items() if key in now}
    return [
        f"{key} is {is_now}, and {file} was trained with {was}"
        for key, (was, is_now) in pairs.items()
        if _value(was) != _value(is_now)
    ]


def _value(value: Any) -> Any:
    """A value as YAML knows it, without tuples."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    if isinstance(value, list | tuple):
        return [_value(part) for part in value]
    return value
