"""Likely causes of NaN or infinity in training, each with what to change."""

import statistics
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ..keys import own_keys
from .first_nonfinite import Diagnosis

# Detectron2's 1x recipes: SOLVER.BASE_LR 0.02 for 16 images, after 1000 iterations of warm-up.
RECIPE_LR, RECIPE_BATCH, RECIPE_WARMUP = 0.02, 16, 1000


def causes_in_diagnosis(found: Diagnosis) -> Iterable[str]:
    yield from found.weight_faults
    yield from found.batch_faults
    if found.finite_in_float32:
        yield (
            "float16 overflow: in float32 the same batch is finite; set SOLVER.FPN_EXT.AMP_DTYPE "
            "bfloat16, which reaches as far as float32, or SOLVER.AMP.ENABLED False"
        )
    if found.first is None and comm.get_world_size() > 1:
        yield (
            f"another of the {comm.get_world_size()} processes had the batch: Detectron2 averages "
            "their losses and gradients; its report is beside this one"
        )


def causes_in_config(
    cfg: CfgNode, optimizer: torch.optim.Optimizer, iteration: int
) -> Iterable[str]:
    solver = cfg.SOLVER
    batches = own_keys(cfg, "SOLVER").ACCUMULATE
    fitting = RECIPE_LR * solver.IMS_PER_BATCH * batches / RECIPE_BATCH
    if isinstance(optimizer, torch.optim.SGD) and 1.5 * fitting < solver.BASE_LR:
        yield (
            f"SOLVER.BASE_LR {solver.BASE_LR:g} for SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}"
            + (f" x SOLVER.FPN_EXT.ACCUMULATE {batches}" if batches > 1 else "")
            + f" is {solver.BASE_LR / fitting:.3g} times that of Detectron2's recipes "
            f"({RECIPE_LR} for {RECIPE_BATCH}); try {fitting:g}"
        )
    if iteration < RECIPE_WARMUP and solver.WARMUP_ITERS < RECIPE_WARMUP / 2:
        yield (
            f"iteration {iteration}, and SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}: "
            f"Detectron2's recipes warm up for {RECIPE_WARMUP}"
        )
    resnets = cfg.MODEL.RESNETS
    if not cfg.MODEL.WEIGHTS and resnets.NORM == "FrozenBN":
        yield (
            "MODEL.WEIGHTS is empty and MODEL.RESNETS.NORM is FrozenBN, whose statistics come from "
            'a checkpoint alone; train from scratch with "BN" or "GN"'
        )
    if 0 in cfg.MODEL.PIXEL_STD:
        yield f"MODEL.PIXEL_STD {cfg.MODEL.PIXEL_STD} divides by 0"


def causes_in_losses(storage: EventStorage) -> Iterable[str]:
    if "total_loss" not in storage.histories():
        return
    losses = [value for value, _ in storage.history("total_loss").values()][-20:]
    usual = statistics.median(losses)
    if len(losses) >= 3 and losses[-1] > 10 * usual > 0:
        yield (
            f"the loss was growing: {losses[-1]:.3g} in the last iteration, {usual:.3g} in the "
            f"median of {len(losses)}; training has diverged, this batch is not to blame"
        )
