"""Resolves config names in Detectron2's registries, and tells which components are ours.

A component is ours if the class registered under its name is one we registered, or a subclass of
it; a user's subclass counts.
"""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.utils.registry import Registry

from ..names import did_you_mean

# Names get_norm accepts in every Detectron2, for the message only; main accepts more.
NORMS = ("", "BN", "FrozenBN", "GN", "SyncBN", "naiveSyncBN", "naiveSyncBN_N", "nnSyncBN")


def look_up(registry: Any, name: str, yaml_key: str) -> Any:
    """The object registered as ``name`` in a Detectron2 registry.

    Raises:
        ValueError: unknown name; the message has the YAML key and the nearest valid names.
    """
    if name not in registry:
        raise ValueError(
            f"{yaml_key}: {name!r} is not registered; "
            + did_you_mean(name, [registered for registered, _ in registry])
            + ". If it is your own, import the module that registers it before building."
        )
    return registry.get(name)


def inherits(registry: Registry, name: str, base: str) -> bool:
    """Whether ``name`` is registered to the class registered as ``base``, or to a subclass.

    False for a function that builds a component, and for an unregistered name.
    """
    registered = registry.get(name) if name in registry else None
    return isinstance(registered, type) and issubclass(registered, registry.get(base))


def pyramids() -> list[str]:
    """Registered names of :class:`fpn_ext.FeaturePyramid` and its subclasses, including a user's.

    These build a pyramid over ``MODEL.FPN_EXT.BOTTOM_UP``.
    """
    return [name for name, _ in BACKBONE_REGISTRY if _is_pyramid(name)]


def is_pyramid(cfg: CfgNode) -> bool:
    """Whether a config's backbone is :class:`fpn_ext.FeaturePyramid` or a subclass."""
    return _is_pyramid(cfg.MODEL.BACKBONE.NAME)


def _is_pyramid(name: str) -> bool:
    return inherits(BACKBONE_REGISTRY, name, "FeaturePyramid")


def is_finest_level_alone(cfg: CfgNode) -> bool:
    """Whether a config's backbone is :class:`fpn_ext.FinestLevelPyramid` or a subclass."""
    return inherits(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "FinestLevelPyramid")


def has_pyramid_heads(cfg: CfgNode) -> bool:
    """Whether a config's RoI heads are :class:`fpn_ext.PyramidROIHeads` or a subclass.

    These read the pooling keys of ``MODEL.FPN_EXT``.
    """
    return inherits(ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME, "PyramidROIHeads")


def pools_from_all_levels(cfg: CfgNode) -> bool:
    """Whether a config's RoI heads are :class:`fpn_ext.AllLevelsROIHeads` or a subclass."""
    return inherits(ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME, "AllLevelsROIHeads")


def check_norm(norm: object, yaml_key: str) -> None:
    """Raise ValueError if ``norm`` is a name unknown to :func:`detectron2.layers.get_norm`."""
    if isinstance(norm, str):
        try:
            get_norm(norm, 32)
        except KeyError:
            raise ValueError(
                f"{yaml_key}: no normalisation {norm!r}; {did_you_mean(norm, NORMS)}"
            ) from None
