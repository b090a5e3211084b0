"""Config keys: each is declared once, by the component that reads it.

A component says beside its class what it reads, with default and meaning; ``fpn_ext.get_cfg`` adds
all of them to Detectron2's config, and the tables of keys in docs/ are made from the same
declarations.

    declare("MODEL.FPN_EXT.BIFPN_REPEATS", 3, "Layers of weighted fusion.", "BiFPN")
"""

import copy
from typing import Any, NamedTuple

from detectron2.config import CfgNode

# The nodes of a config that keys may be declared under.
NODES = ("MODEL.FPN_EXT", "INPUT.FPN_EXT", "SOLVER.FPN_EXT", "TEST.FPN_EXT")


class Key(NamedTuple):
    """One config key.

    Attributes:
        name: in full, e.g. ``"MODEL.FPN_EXT.TOP_BLOCK"``.
        default: its value where no file sets it; its type is the key's.
        comment: what it means, in a sentence or two.
        readers: the registered components that read it, with their subclasses; or what of a
            command reads it (``"training"``, ``"evaluation"``, ``"inference"``).
    """

    name: str
    default: Any
    comment: str
    readers: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The type of its values: ``"str"``, ``"int"``, ``"list"``, ``"mapping"``, ..."""
        return "mapping" if isinstance(self.default, dict) else type(self.default).__name__


_declared: dict[str, Key] = {}


def declare(name: str, default: Any, comment: str, *readers: str) -> None:
    """Declare a key, at import.

    Args:
        name: in full, under one of ``NODES``.
        default: of the type that all its values have; ``{}`` for a mapping of the user's.
        comment: what it means.
        readers: as in :class:`Key`.

    Raises:
        ValueError: another declaration of the same key, or a key of another node.
    """
    key = Key(name, default, " ".join(comment.split()), readers)
    if name.rpartition(".")[0] not in NODES:
        raise ValueError(f"{name} must be a key of one of the nodes {NODES}")
    if _declared.setdefault(name, key) != key:
        raise ValueError(f"{name} is declared twice: {_declared[name]} and {key}")


def declared_keys() -> list[Key]:
    """All keys declared so far, in alphabetical order within each node."""
    return sorted(
        _declared.values(), key=lambda key: (NODES.index(key.name.rpartition(".")[0]), key.name)
    )


def defaults(node: str) -> dict[str, Any]:
    """Copies of the defaults of a node's keys, by the last part of their names."""
    return {
        name.rpartition(".")[2]: copy.deepcopy(key.default)
        for name, key in _declared.items()
        if name.rpartition(".")[0] == node
    }


def own_keys(cfg: CfgNode, parent: str = "MODEL") -> CfgNode:
    """The node ``FPN_EXT`` under ``MODEL``, ``INPUT``, ``SOLVER`` or ``TEST``, to read from.

    A config of Detectron2's own ``get_cfg``, in which only names are swapped, has none: it means
    the defaults.
    """
    if "FPN_EXT" in cfg[parent]:
        return cfg[parent].FPN_EXT
    node = CfgNode(defaults(f"{parent}.FPN_EXT"))
    node.freeze()
    return node
