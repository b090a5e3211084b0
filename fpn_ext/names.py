"""Finding what names in YAML stand for, and saying what was meant when they stand for nothing."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.layers import get_norm
from detectron2.modeling import BACKBONE_REGISTRY

# RoI heads that pool by this project's rules.
PYRAMID_HEADS = ("PyramidROIHeads", "ChunkedROIHeads", "UnsharedROIHeads", "AllLevelsROIHeads")

# What get_norm knows by name in every Detectron2, for the message only; main knows more.
NORMS = ("", "BN", "FrozenBN", "GN", "SyncBN", "naiveSyncBN", "naiveSyncBN_N", "nnSyncBN")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The valid names nearest to a wrong one, as the end of an error message.

    >>> did_you_mean("FeaturePyramide", ["FeaturePyramid", "build_resnet_backbone"])
    "nearest valid: 'FeaturePyramid'"
    >>> did_you_mean("x", ["FeaturePyramid", "build_resnet_backbone"])
    "valid: 'FeaturePyramid', 'build_resnet_backbone'"
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    label = "nearest valid" if near else "valid"
    return f"{label}: " + (", ".join(repr(n) for n in near or names) or "(none)")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, indented, one line each, the columns below one another.

    >>> print(aligned([["level", "stride"], ["p2", "4"]]))
      level  stride
      p2     4
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def pyramids() -> list[str]:
    """Names of the backbones that build a pyramid over ``MODEL.FPN_EXT.BOTTOM_UP``.

    These are the registered :class:`fpn_ext.FeaturePyramid` and its subclasses, a user's own, too.
    """
    return [name for name, made in BACKBONE_REGISTRY if getattr(made, "has_bottom_up_key", False)]


def own_keys(cfg: Any) -> Any:
    """The node ``MODEL.FPN_EXT`` of a config.

    Raises:
        ValueError: the config was made without this project's keys.
    """
    if "FPN_EXT" not in cfg.MODEL:
        raise ValueError(
            "the config has no MODEL.FPN_EXT: make it with fpn_ext.get_cfg(), or call "
            "fpn_ext.add_fpn_ext_config(cfg) before merging files into it"
        )
    return cfg.MODEL.FPN_EXT


def look_up(registry: Any, name: str, yaml_key: str) -> Any:
    """What is registered under ``name`` in a Detectron2 registry.

    Raises:
        ValueError: nothing is; names the YAML key to change and the nearest valid names.
    """
    if name not in registry:
        raise ValueError(
            f"{yaml_key}: {name!r} is not registered; "
            + did_you_mean(name, [registered for registered, _ in registry])
            + ". If it is your own, import the module that registers it before building."
        )
    return registry.get(name)


def check_norm(norm: object, yaml_key: str) -> None:
    """Raise ValueError if ``norm`` is a name that :func:`detectron2.layers.get_norm` knows not."""
    if isinstance(norm, str):
        try:
            get_norm(norm, 32)
        except KeyError:
            raise ValueError(
                f"{yaml_key}: no normalisation {norm!r}; {did_you_mean(norm, NORMS)}"
            ) from None
