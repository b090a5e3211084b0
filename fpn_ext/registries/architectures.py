"""Which nodes of a config the model of ``MODEL.META_ARCHITECTURE`` reads.

Detectron2's architectures, ours and their subclasses are known. Of another, a class or a function
that somebody has registered, its own source tells: the keys and builders that it names.
"""

import inspect
import re
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from .lookup import inherits

# What each architecture of Detectron2's and ours reads, the most derived first: its nodes under
# MODEL.
READS: dict[str, tuple[str, ...]] = {
    "PyramidMaskProposals": (),
    "PanopticFPN": ("RPN", "ROI_HEADS", "SEM_SEG_HEAD"),
    "GeneralizedRCNN": ("RPN", "ROI_HEADS"),
    "ProposalNetwork": ("RPN",),
    "RetinaNet": ("RETINANET",),
    "SemanticSegmentor": ("SEM_SEG_HEAD",),
}
_BUILDERS = {"RPN": "build_proposal_generator", "ROI_HEADS": "build_roi_heads"}


def is_architecture(cfg: CfgNode, *names: str) -> bool:
    """Whether the model is one of these architectures, or a subclass."""
    asked = cfg.MODEL.META_ARCHITECTURE
    return any(inherits(META_ARCH_REGISTRY, asked, name) for name in names)


def proposes_only(cfg: CfgNode) -> bool:
    """Whether the model finds objects of any class and does not tell classes apart."""
    return is_architecture(cfg, "ProposalNetwork", "PyramidMaskProposals")


def reads_node(cfg: CfgNode, node: str) -> bool:
    """Whether the architecture reads the keys of ``MODEL.<node>``.

    Args:
        node: ``"RPN"``, ``"ROI_HEADS"``, ``"RETINANET"`` or ``"SEM_SEG_HEAD"``.
    """
    for name, nodes in READS.items():
        if is_architecture(cfg, name):
            return node in nodes
    source = _source(cfg)
    return bool(
        re.search(rf"\bMODEL\.{node}\b", source)
        or (node in _BUILDERS and re.search(rf"\b{_BUILDERS[node]}\b", source))
    )


def class_count_key(cfg: CfgNode) -> str:
    """The key that says how many classes of objects the model tells apart; "" if it has none.

    ``"MODEL.ROI_HEADS.NUM_CLASSES"`` of a GeneralizedRCNN, a cascade and PanopticFPN among them.
    """
    if is_architecture(cfg, *READS):
        if reads_node(cfg, "ROI_HEADS"):
            return "MODEL.ROI_HEADS.NUM_CLASSES" if cfg.MODEL.ROI_HEADS.NAME else ""
        return "MODEL.RETINANET.NUM_CLASSES" if reads_node(cfg, "RETINANET") else ""
    named = set(re.findall(r"\bMODEL\.([A-Z]\w*)\.NUM_CLASSES\b", _source(cfg)))
    if not named and reads_node(cfg, "ROI_HEADS"):
        named = {"ROI_HEADS"}
    nodes = [node for node in sorted(named) if "NUM_CLASSES" in cfg.MODEL.get(node, {})]
    return f"MODEL.{nodes[0]}.NUM_CLASSES" if len(nodes) == 1 else ""


def class_count(cfg: CfgNode) -> int:
    """The value under :func:`class_count_key`; 0 if there is none."""
    key = class_count_key(cfg)
    return int(cfg.MODEL[key.split(".")[1]].NUM_CLASSES) if key else 0


def _source(cfg: CfgNode) -> str:
    name = cfg.MODEL.META_ARCHITECTURE
    registered: Any = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    classes = registered.__mro__ if isinstance(registered, type) else [registered]
    texts = []
    for defined in classes:
        if getattr(defined, "__module__", "torch").partition(".")[0] in ("torch", "builtins"):
            continue
        try:
            texts.append(inspect.getsource(defined))
        except (OSError, TypeError):  # typed in at a prompt, or compiled
            continue
    return "\n".join(texts)
