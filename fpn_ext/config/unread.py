"""Keys that a config sets and none of its components reads."""

from collections.abc import Collection
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)

from ..bottom_up.configured_levels import value_of
from ..keys import declared_keys
from ..registries.lookup import inherits
from .defaults import flat, get_cfg

# The key of MODEL that selects a component -> the registry it is in.
REGISTRIES: dict[str, Any] = {
    "META_ARCHITECTURE": META_ARCH_REGISTRY,
    "BACKBONE.NAME": BACKBONE_REGISTRY,
    "ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
}


def unread_keys(cfg: CfgNode) -> set[str]:
    """Component keys that no component of this config reads.

    >>> sorted(unread_keys(get_cfg()))[2:4]  # of Detectron2's components
    ['MODEL.FPN_EXT.BOTTOM_UP', 'MODEL.FPN_EXT.BOTTOM_UP_NORM']
    """
    return {
        key.name
        for key in declared_keys()
        if all(map(_is_component, key.readers)) and not any(_has(cfg, name) for name in key.readers)
    }


def _is_component(name: str) -> bool:
    return any(name in registry for registry in REGISTRIES.values())


def _has(cfg: CfgNode, component: str) -> bool:
    """Whether a config has this component, or a subclass of it."""
    return any(
        component in registry and inherits(registry, value_of(cfg.MODEL, key), component)
        for key, registry in REGISTRIES.items()
    )


def unread_notes(cfg: CfgNode, explicitly_set: Collection[str]) -> list[str]:
    """A line for each explicitly set, non-default key that has no effect.

    Args:
        explicitly_set: full names of keys set in a file or on the command line.
    """
    values, defaults = flat(cfg), flat(get_cfg())
    return [
        f"{key} {values[key]} does nothing: no component of this config reads it"
        for key in sorted(unread_keys(cfg) & set(explicitly_set))
        if values[key] != defaults[key]
    ]
