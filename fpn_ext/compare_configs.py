"""The two configs of a comparison: loading them, and in what they differ."""

import sys
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)

from .all_levels import AllLevelsROIHeads
from .anchors import PyramidAnchorGenerator
from .bifpn import BiFPN
from .bottom_ups import resolve_bottom_up
from .config import check_config, flat, get_cfg, load_config, resolve_device
from .data import register_datasets
from .fpn import FeaturePyramid
from .roi_heads import ChunkedROIHeads, PyramidROIHeads
from .rpn import PyramidRPN

COMPONENTS = (
    "MODEL.BACKBONE.NAME",
    "MODEL.ANCHOR_GENERATOR.NAME",
    "MODEL.PROPOSAL_GENERATOR.NAME",
    "MODEL.ROI_HEADS.NAME",
)
# Keys of MODEL.FPN_EXT that few components read, each with its registry and the key that names it.
READERS: tuple[tuple[Any, str, type, tuple[str, ...]], ...] = (
    (
        BACKBONE_REGISTRY,
        "BACKBONE",
        FeaturePyramid,
        (
            *("BOTTOM_UP", "BOTTOM_UP_WEIGHTS", "BOTTOM_UP_NORM", "KEEP_PIXELS"),
            *("IN_FEATURES", "CHANNELS_LAST", "LEVELS", "TOP_BLOCK"),
        ),
    ),
    (BACKBONE_REGISTRY, "BACKBONE", BiFPN, ("BIFPN_REPEATS",)),
    (
        ROI_HEADS_REGISTRY,
        "ROI_HEADS",
        PyramidROIHeads,
        (
            *("CANONICAL_LEVEL", "CANONICAL_BOX_SIZE", "LEVEL_RULE", "POOLER_IMPLEMENTATION"),
            "KEEP_LEVELS",
        ),
    ),
    (PROPOSAL_GENERATOR_REGISTRY, "PROPOSAL_GENERATOR", PyramidRPN, ("KEEP_LEVELS",)),
    (
        ANCHOR_GENERATOR_REGISTRY,
        "ANCHOR_GENERATOR",
        PyramidAnchorGenerator,
        ("ANCHOR_SIZES",),
    ),
    (ROI_HEADS_REGISTRY, "ROI_HEADS", ChunkedROIHeads, ("BOXES_PER_CHUNK",)),
    (ROI_HEADS_REGISTRY, "ROI_HEADS", AllLevelsROIHeads, ("LEVEL_FUSION",)),
)


def load_sides(
    config_file: str, control: str, opts: Sequence[str], training: bool
) -> dict[str, CfgNode]:
    """The configs ``ours`` and ``control``, checked, with the same overrides, unfrozen.

    Args:
        config_file: a YAML file.
        control: another one.
        opts: ``KEY VALUE ...`` for both.
        training: also require what only training needs.

    Raises:
        FileNotFoundError, ValueError: of :func:`fpn_ext.load_config`, :func:`fpn_ext.check_config`;
            or the two have no, or not the same, data sets to be compared on.
    """
    register_datasets()
    sides = {"ours": load_config(config_file, opts), "control": load_config(control, opts)}
    for side, cfg in sides.items():
        device_note = resolve_device(cfg)
        check_config(cfg, training)
        for note in filter(None, (device_note, *resolve_bottom_up(cfg))):
            print(f"{side}: {note}", file=sys.stderr)
    ours, theirs = (tuple(cfg.DATASETS.TEST) for cfg in sides.values())
    if ours != theirs or not ours:
        raise ValueError(
            "DATASETS.TEST names what the two are compared on and must be the same in both, got "
            f"{ours} and, in the control, {theirs}"
        )
    return sides


def unread_keys(cfg: CfgNode) -> set[str]:
    """The keys under ``MODEL.FPN_EXT`` that the config has no component to read.

    >>> sorted(unread_keys(get_cfg()))[2:4]  # of Detectron2's components
    ['MODEL.FPN_EXT.BOTTOM_UP', 'MODEL.FPN_EXT.BOTTOM_UP_NORM']
    """
    known, read = set(), set()
    for registry, node, component, keys in READERS:
        known |= {f"MODEL.FPN_EXT.{key}" for key in keys}
        name = cfg.MODEL[node].NAME
        if name not in registry:  # PrecomputedProposals
            continue
        registered = registry.get(name)  # a class, or a function that builds
        if isinstance(registered, type) and issubclass(registered, component):
            read |= {f"MODEL.FPN_EXT.{key}" for key in keys}
    return known - read


def differences(sides: dict[str, CfgNode], set_here: Sequence[str]) -> list[dict[str, Any]]:
    """The keys in which two configs differ beyond the components, with both values.

    Args:
        sides: the configs ``ours`` and ``control``.
        set_here: keys that are going to be the same whatever the configs hold.

    Returns:
        ``{"key", "ours", "control"}`` of each. What one of the two has no component to read is not
        among them, see :func:`warnings`.
    """
    ours, control = flat(sides["ours"]), flat(sides["control"])
    expected = {*COMPONENTS, *set_here}
    expected |= unread_keys(sides["ours"]) | unread_keys(sides["control"])
    return [
        {"key": key, "ours": ours.get(key), "control": control.get(key)}
        for key in sorted({**ours, **control})
        if key not in expected and ours.get(key) != control.get(key)
    ]


def warnings(sides: dict[str, CfgNode]) -> list[str]:
    """Of keys that are not at their default, and that one side reads and the other does not."""
    defaults = flat(get_cfg())
    found = []
    for side, other in (("ours", "control"), ("control", "ours")):
        values = flat(sides[side])
        for key in sorted(unread_keys(sides[other]) - unread_keys(sides[side])):
            if values[key] != defaults[key]:
                found.append(
                    f"{key} is {values[key]!r} ({side}, default {defaults[key]!r}); {other} has no "
                    "component that reads it"
                )
    return found
