"""The two configs of a comparison: loading them and listing their differences."""

import sys
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from ..config.defaults import flat, get_cfg
from ..config.numerics import as_chosen
from ..config.prepare import prepare
from ..config.unread import unread_keys

COMPONENTS = (
    "MODEL.BACKBONE.NAME",
    "MODEL.ANCHOR_GENERATOR.NAME",
    "MODEL.PROPOSAL_GENERATOR.NAME",
    "MODEL.ROI_HEADS.NAME",
)


def load_sides(
    config_file: str, control: str, opts: Sequence[str], training: bool
) -> dict[str, CfgNode]:
    """The configs ``ours`` and ``control``, checked, with the same overrides, unfrozen.

    Args:
        config_file: a YAML file.
        control: another one.
        opts: ``KEY VALUE ...`` for both.
        training: also check what only training needs.

    Raises:
        FileNotFoundError, ValueError: what :func:`fpn_ext.prepare` finds wrong; or the two have no
            datasets to be compared on, or different ones.
    """
    sides = {}
    for side, file in (("ours", config_file), ("control", control)):
        sides[side], notes = prepare(file, opts, training=training)
        for note in notes:
            print(f"{side}: {note}", file=sys.stderr)
    ours, theirs = (tuple(cfg.DATASETS.TEST) for cfg in sides.values())
    if ours != theirs or not ours:
        raise ValueError(
            "DATASETS.TEST names what the two are compared on and must be the same in both, got "
            f"{ours} and, in the control, {theirs}"
        )
    return sides


def differences(sides: dict[str, CfgNode], set_here: Sequence[str]) -> list[dict[str, Any]]:
    """The keys in which two configs differ beyond the components, with both values.

    Args:
        sides: the configs ``ours`` and ``control``.
        set_here: keys that the comparison overrides in both.

    Returns:
        ``{"key", "ours", "control"}`` for each, except keys that only one side has a component to
        read, see :func:`warnings`, and values chosen by NUMERICS.
    """
    ours, control = flat(sides["ours"]), flat(sides["control"])
    expected = {*COMPONENTS, *set_here}
    expected |= unread_keys(sides["ours"]) | unread_keys(sides["control"])
    expected |= _chosen(sides["ours"]) & _chosen(sides["control"])
    return [
        {"key": key, "ours": ours.get(key), "control": control.get(key)}
        for key in sorted({**ours, **control})
        if key not in expected and ours.get(key) != control.get(key)
    ]


def _chosen(cfg: CfgNode) -> set[str]:
    """The keys whose values NUMERICS chose for a config."""
    values = flat(cfg)
    return {key for key, value in as_chosen(cfg).items() if values[key] == value}


def warnings(sides: dict[str, CfgNode]) -> list[str]:
    """Warnings about non-default keys that only one side reads."""
    defaults = flat(get_cfg())
    found = []
    for side, other in (("ours", "control"), ("control", "ours")):
        values = flat(sides[side])
        for key in sorted(unread_keys(sides[other]) - unread_keys(sides[side])):
            if values[key] != defaults[key] and key not in _chosen(sides[side]):
                found.append(
                    f"{key} is {values[key]!r} ({side}, default {defaults[key]!r}); {other} has no "
                    "component that reads it"
                )
    return found
