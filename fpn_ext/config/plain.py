"""A config for tools that know Detectron2 alone: its own components and keys, the same model."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import build_model

from ..keys import declared_keys
from ..registries.architectures import reads_node
from ..registries.chosen_by import CHOSEN_BY
from .defaults import flat, get_cfg
from .unread import unread_keys

# Components that are Detectron2's in another implementation.
THEIRS = {
    "FeaturePyramid": "build_resnet_fpn_backbone",
    "PyramidAnchorGenerator": "DefaultAnchorGenerator",
    "PyramidRPN": "RPN",
    "PyramidROIHeads": "StandardROIHeads",
    "ChunkedROIHeads": "StandardROIHeads",
}
# RetinaNet's P6 and P7, which have weights, are in a backbone of their own.
RETINANETS = "build_retinanet_resnet_fpn_backbone"
TOP_BLOCK = "MODEL.FPN_EXT.TOP_BLOCK"
# What is in Detectron2's own keys as well, and what changes no more than speed or rounding.
EXPRESSED = ("LEVELS", "ANCHOR_SIZES", "KEEP_PIXELS")
SPEED = (
    *("NUMERICS", "POOLER_IMPLEMENTATION", "CHANNELS_LAST", "WINOGRAD", "FOLD_NORMS"),
    *("INFERENCE_DTYPE", "BOXES_PER_CHUNK"),
)
# What the finished model does not depend on.
OF_TRAINING = ("BOTTOM_UP_WEIGHTS", "FREEZE", "KEEP_LEVELS")


def plain_config(cfg: CfgNode) -> tuple[CfgNode, list[str]]:
    """A config of the same model that Detectron2's own ``get_cfg()`` loads, and what it leaves out.

    Our components become Detectron2's, whose detections with the same weights are equal within
    rounding error. Both models are built, without memory for their weights, and must have the same
    parameters.

    Args:
        cfg: of :func:`fpn_ext.prepare`.

    Returns:
        The config, unfrozen, and a line for each of our keys that is left out of it with another
        value than its default.

    Raises:
        ValueError: a model that Detectron2's keys cannot describe; names all obstacles.
    """
    names = {key: _value(cfg, key) for key in CHOSEN_BY}
    retinanets = names["MODEL.BACKBONE.NAME"] == "FeaturePyramid" and (
        _value(cfg, TOP_BLOCK) == "ConvolutionsOnC"
    )
    theirs = {**THEIRS, "FeaturePyramid": RETINANETS} if retinanets else THEIRS
    plain = get_detectron2_cfg()
    for key, value in flat(cfg).items():
        if ".FPN_EXT." not in key:
            _set(plain, key, value)
    for key, name in names.items():
        _set(plain, key, theirs.get(name, name))
    obstacles = [
        f"{key} {name}: Detectron2 has no such component"
        for key, name in names.items()
        if _counts(cfg, key) and not _is_detectron2s(key, theirs.get(name, name))
    ]
    left_out = []
    values, defaults = flat(cfg), flat(get_cfg())
    for key in sorted(key.name for key in declared_keys()):
        node, _, name = key.rpartition(".")
        if values[key] == defaults[key] or key in unread_keys(cfg):
            continue
        if node in ("MODEL.FPN_EXT", "INPUT.FPN_EXT"):
            if name in EXPRESSED or (key == TOP_BLOCK and retinanets):
                continue
            if name not in (*SPEED, *OF_TRAINING):
                obstacles.append(f"{key} {values[key]}: Detectron2 has no such key")
                continue
        left_out.append(f"{key} {values[key]} is left out: Detectron2 has no such key")
    if not obstacles:
        obstacles = _differences(cfg, plain)
    if obstacles:
        raise ValueError(
            "this model cannot be described in Detectron2's own keys; load it with "
            "fpn_ext.load_config, or export it:\n" + "\n".join(f"  - {o}" for o in obstacles)
        )
    return plain, left_out


def _value(cfg: CfgNode, key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    return value


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    parent, _, name = key.rpartition(".")
    node = _value(cfg, parent) if parent else cfg
    node[name] = value


def _counts(cfg: CfgNode, key: str) -> bool:
    """Whether the model has the part that a key of ``CHOSEN_BY`` chooses."""
    node = CHOSEN_BY[key].node
    return not node or reads_node(cfg, node)


def _is_detectron2s(key: str, name: str) -> bool:
    """Whether Detectron2 itself has registered the name; "" stands for none of this part."""
    registry = CHOSEN_BY[key].registry
    if name in ("", "PrecomputedProposals"):
        return True
    registered = registry.get(name) if name in registry else None
    return str(getattr(registered, "__module__", "")).startswith("detectron2.")


def _differences(cfg: CfgNode, plain: CfgNode) -> list[str]:
    """What is wrong with Detectron2's model, or other about its parameters than ours."""
    ours = _shapes(cfg)
    try:
        theirs = _shapes(plain)
    except (AssertionError, KeyError, ValueError) as error:
        return [f"Detectron2 cannot build it: {type(error).__name__}: {error}"]
    return [
        f"{name} is {ours.get(name, 'missing')} here, {theirs.get(name, 'missing')} in Detectron2"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _shapes(cfg: CfgNode) -> dict[str, tuple[int, ...]]:
    built = cfg.clone()
    built.defrost()
    built.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(built)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
