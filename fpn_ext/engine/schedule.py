"""The learning-rate schedule and the batch size: scaling, and a warning if they do not match."""

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..config.defaults import flat

# Detectron2's and the paper's: 0.02 for 16 images; linear scaling (Goyal et al., "Accurate, Large
# Minibatch SGD", 2017, Sec. 2.1).
REFERENCE_RATE = 0.02 / 16
TOLERATED = 1.5


def scale_schedule(cfg: CfgNode, world_size: int) -> tuple[CfgNode, list[str]]:
    """Detectron2's scaling of batch size, learning rate and schedule to the number of processes.

    Enabled by ``SOLVER.REFERENCE_WORLD_SIZE``, the number the config was written for; 0 disables
    it.

    Returns:
        A config for ``world_size`` processes, and one line per changed value.
    """
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    before, after = flat(cfg), flat(scaled)
    changed = [key for key in after if after[key] != before[key]]
    return scaled, [f"{key} {before[key]} -> {after[key]}" for key in changed]


def learning_rate_note(cfg: CfgNode) -> str:
    """A note on a learning rate far from the usual one for its batch size, or ``""``.

    >>> from fpn_ext import get_cfg
    >>> cfg = get_cfg()
    >>> cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH = 0.02, 2
    >>> learning_rate_note(cfg)
    'SOLVER.BASE_LR 0.02 is 8 times the 0.0025 usual for SOLVER.IMS_PER_BATCH 2 (0.02 for 16)'
    """
    rate, times = cfg.SOLVER.BASE_LR, cfg.SOLVER.FPN_EXT.ACCUMULATE
    batch = cfg.SOLVER.IMS_PER_BATCH * times
    if batch == cfg.SOLVER.FPN_EXT.REFERENCE_BATCH:
        return ""  # the config says what batch its rate is for
    usual = REFERENCE_RATE * batch
    if 1 / TOLERATED <= rate / usual <= TOLERATED:
        return ""
    return (
        f"SOLVER.BASE_LR {rate:g} is {rate / usual:.2g} times the {usual:g} usual for "
        f"SOLVER.IMS_PER_BATCH {batch // times}{f' x {times}' * (times > 1)} (0.02 for 16)"
    )
