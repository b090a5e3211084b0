"""Keys of Detectron2's that do nothing with the parts chosen."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from detectron2.config import CfgNode

from ..registries.architectures import is_architecture, reads_node
from .defaults import flat, get_cfg

MASK_PROPOSALS = "PyramidMaskProposals"


class Idle(NamedTuple):
    """Keys that are not read, and when.

    Attributes:
        keys: full names, or the name of a node and a dot for all of its keys.
        is_idle: of a config, whether nothing reads them.
        why: what decides, e.g. ``"TEST.AUG.ENABLED is False"``.
    """

    keys: tuple[str, ...]
    is_idle: Callable[[CfgNode], bool]
    why: str


def _node(node: str, *others: str) -> Idle:
    return Idle(
        tuple(f"MODEL.{name}." for name in (node, *others)),
        lambda cfg: not reads_node(cfg, node),
        "this MODEL.META_ARCHITECTURE has no such part",
    )


IDLE = (
    _node("RPN", "PROPOSAL_GENERATOR"),
    _node("ROI_HEADS", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"),
    _node("RETINANET"),
    Idle(
        ("MODEL.MASK_ON",),
        lambda cfg: not (reads_node(cfg, "ROI_HEADS") or is_architecture(cfg, MASK_PROPOSALS)),
        "this MODEL.META_ARCHITECTURE has no such heads",
    ),
    Idle(
        ("MODEL.KEYPOINT_ON",),
        lambda cfg: not reads_node(cfg, "ROI_HEADS"),
        "this MODEL.META_ARCHITECTURE has no such heads",
    ),
    Idle(
        ("MODEL.ROI_MASK_HEAD.", "INPUT.MASK_FORMAT"),
        lambda cfg: not cfg.MODEL.MASK_ON,
        "MODEL.MASK_ON is False",
    ),
    Idle(
        ("MODEL.ROI_KEYPOINT_HEAD.", "TEST.KEYPOINT_OKS_SIGMAS"),
        lambda cfg: not cfg.MODEL.KEYPOINT_ON,
        "MODEL.KEYPOINT_ON is False",
    ),
    *(
        Idle(
            (f"MODEL.{head}.POOLER_SAMPLING_RATIO",),
            lambda cfg, head=head: cfg.MODEL[head].POOLER_TYPE == "ROIPool",  # type: ignore[misc]
            f"MODEL.{head}.POOLER_TYPE ROIPool takes no samples",
        )
        for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")
    ),
    Idle(("TEST.AUG.",), lambda cfg: not cfg.TEST.AUG.ENABLED, "TEST.AUG.ENABLED is False"),
    Idle(
        ("INPUT.CROP.", "INPUT.FPN_EXT.CROP_LEAST_VISIBLE"),
        lambda cfg: not cfg.INPUT.CROP.ENABLED,
        "INPUT.CROP.ENABLED is False",
    ),
    Idle(
        ("TEST.PRECISE_BN.",),
        lambda cfg: not cfg.TEST.PRECISE_BN.ENABLED,
        "TEST.PRECISE_BN.ENABLED is False",
    ),
    Idle(
        ("SOLVER.FPN_EXT.AMP_DTYPE",),
        lambda cfg: not cfg.SOLVER.AMP.ENABLED,
        "SOLVER.AMP.ENABLED is False",
    ),
    Idle(
        ("SOLVER.STEPS", "SOLVER.GAMMA"),
        lambda cfg: cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR",
        "SOLVER.LR_SCHEDULER_NAME WarmupCosineLR has no steps",
    ),
    Idle(
        ("SOLVER.CLIP_GRADIENTS.",),
        lambda cfg: not cfg.SOLVER.CLIP_GRADIENTS.ENABLED,
        "SOLVER.CLIP_GRADIENTS.ENABLED is False",
    ),
    Idle(
        ("DATALOADER.REPEAT_THRESHOLD",),
        lambda cfg: cfg.DATALOADER.SAMPLER_TRAIN != "RepeatFactorTrainingSampler",
        "DATALOADER.SAMPLER_TRAIN is not RepeatFactorTrainingSampler",
    ),
    Idle(
        ("DATALOADER.RANDOM_SUBSET_RATIO",),
        lambda cfg: cfg.DATALOADER.SAMPLER_TRAIN != "RandomSubsetTrainingSampler",
        "DATALOADER.SAMPLER_TRAIN is not RandomSubsetTrainingSampler",
    ),
)


def idle_notes(cfg: CfgNode, written: Collection[str]) -> list[str]:
    """A line for each kind of key that is written with another value than its default in vain.

    Args:
        written: full names of the keys in the config file itself and on the command line. Those of
            the files it is based on serve other configs, too.
    """
    values, defaults = flat(cfg), flat(get_cfg())
    changed = [key for key in sorted(written) if key in values and values[key] != defaults[key]]
    notes = []
    said: set[str] = set()
    for idle in IDLE:
        keys = [key for key in changed if key not in said and _is_one(key, idle.keys)]
        if keys and idle.is_idle(cfg):
            said.update(keys)
            verb = "does" if len(keys) == 1 else "do"
            notes.append(f"{', '.join(keys)} {verb} nothing: {idle.why}")
    return notes


def _is_one(key: str, keys: Collection[str]) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in keys)
