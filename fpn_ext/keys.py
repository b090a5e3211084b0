"""Config keys: each is declared once, by the component that reads it.

Each component declares the keys it reads beside its class, with default and meaning;
``fpn_ext.get_cfg`` adds them all to Detectron2's config, and the key tables in docs/ are generated
from them.

    declare("MODEL.FPN_EXT.BIFPN_REPEATS", 3, "Layers of weighted fusion.", "BiFPN")
"""

import copy
from typing import Any, NamedTuple

from detectron2.config import CfgNode

# The config nodes under which keys may be declared.
NODES = tuple(f"{parent}.FPN_EXT" for parent in ("MODEL", "INPUT", "DATASETS", "SOLVER", "TEST"))


class Key(NamedTuple):
    """One config key.

    Attributes:
        name: full name, e.g. ``"MODEL.FPN_EXT.TOP_BLOCK"``.
        default: value if no file sets one; its type is the key's.
        comment: meaning, in a sentence or two.
        readers: registered components that read it, as do their subclasses; or the kinds of
            command that do (``"training"``, ``"evaluation"``, ``"inference"``).
    """

    name: str
    default: Any
    comment: str
    readers: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Type of its values: ``"str"``, ``"int"``, ``"list"``, ``"mapping"``, ..."""
        return "mapping" if isinstance(self.default, dict) else type(self.default).__name__


_declared: dict[str, Key] = {}


def declare(name: str, default: Any, comment: str, *readers: str) -> None:
    """Declare a key, at import.

    Args:
        name: full name, under one of ``NODES``.
        default: of the type all its values have; ``{}`` for a user-defined mapping.
        comment: meaning.
        readers: as in :class:`Key`.

    Raises:
        ValueError: a conflicting declaration of the key, or a key of another node.
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
    """Copies of the defaults of a node's keys, by last part of the name."""
    return {
        name.rpartition(".")[2]: copy.deepcopy(key.default)
        for name, key in _declared.items()
        if name.rpartition(".")[0] == node
    }


def own_keys(cfg: CfgNode, parent: str = "MODEL") -> CfgNode:
    """The node ``FPN_EXT`` under a parent (``MODEL``, ``SOLVER``, ...) of a config, for reading.

    A config from Detectron2's ``get_cfg``, with only component names changed, has none and gets
    the defaults.
    """
    if "FPN_EXT" in cfg[parent]:
        return cfg[parent].FPN_EXT
    node = CfgNode(defaults(f"{parent}.FPN_EXT"))
    node.freeze()
    return node
