"""Default config with Detectron2's keys and this project's, and suggestions for unknown keys."""

import difflib
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from ..keys import NODES, declared_keys, defaults
from ..names import did_you_mean

# Old name -> new: training and evaluation keys are no longer under MODEL.
MOVED = {
    f"MODEL.FPN_EXT.{name}": f"{node}.FPN_EXT.{name}"
    for node, names in {
        "SOLVER": ("DETERMINISTIC", "AMP_DTYPE", "ACCUMULATE", "EMA_DECAY"),
        "TEST": (
            *("BEST_METRIC", "BEST_MODE", "EARLY_STOP_PATIENCE"),
            *("VALIDATION_LOSS", "EVALUATE_PROPOSALS"),
        ),
    }.items()
    for name in names
}


def add_fpn_ext_config(cfg: CfgNode) -> None:
    """Add this project's keys to a Detectron2 config, in place.

    They are in a node ``FPN_EXT`` under each of ``MODEL``, ``INPUT``, ``DATASETS``, ``SOLVER`` and
    ``TEST``.
    Keys already in the config keep their values.
    """
    from .. import api  # noqa: F401  (declares the keys of the rooms above this one)

    for name in NODES:
        parent, _, own = name.rpartition(".")
        node = cfg[parent].setdefault(own, CfgNode())
        for key, default in defaults(name).items():
            if key not in node:
                is_mapping = isinstance(default, dict)
                node[key] = CfgNode(new_allowed=True) if is_mapping else default


def get_cfg() -> CfgNode:
    """Detectron2's default config plus this project's keys."""
    cfg = get_detectron2_cfg()
    add_fpn_ext_config(cfg)
    return cfg


def mapping_of(key: str) -> str:
    """The declared key of kind mapping that ``key`` names an entry of; "" if there is none.

    >>> mapping_of("MODEL.FPN_EXT.ANCHOR_SIZES.p2")
    'MODEL.FPN_EXT.ANCHOR_SIZES'
    """
    node = key.rpartition(".")[0]
    return node if any(k.name == node and k.kind == "mapping" for k in declared_keys()) else ""


def near_keys(key: str, valid: Iterable[str]) -> str:
    """The nearest valid keys; if none is near, the other keys of its node."""
    if key in MOVED:
        return f"it is {MOVED[key]} now"
    valid = list(valid)
    node = key.rpartition(".")[0]
    beside = [k for k in valid if k.rpartition(".")[0] == node]
    near = difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
    return did_you_mean(key, near or beside or [k for k in valid if "." not in k])


def leaves(values: dict[str, Any], schema: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(key, value) pairs of nested values, as deep as ``schema`` has nodes."""
    for name, value in values.items():
        known = schema.get(name)
        if isinstance(value, dict) and isinstance(known, CfgNode):
            yield from leaves(value, known, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def keys_of(node: CfgNode, prefix: str = "") -> Iterable[str]:
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from keys_of(value, f"{prefix}{name}.")


def flat(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """A config as one flat dictionary, for comparing two of them.

    >>> flat(get_cfg())["MODEL.FPN_EXT.CANONICAL_LEVEL"]
    4
    """
    values: dict[str, Any] = {}
    for key, value in node.items():
        if not isinstance(value, CfgNode):
            values[prefix + key] = value
        elif value.is_new_allowed():  # a user-defined mapping, the value of one key
            values[prefix + key] = dict(value)
        else:
            values |= flat(value, f"{prefix}{key}.")
    return values
