"""Checks of training keys: solver, mixed precision, EMA, best checkpoint, determinism."""

from collections.abc import Iterable

from detectron2.config import CfgNode

AMP_DTYPES = ("float16", "bfloat16")
MODES = ("max", "min")


def determinism_problems(cfg: CfgNode) -> Iterable[str]:
    if cfg.SOLVER.FPN_EXT.DETERMINISTIC and cfg.SEED < 0:
        yield f"SOLVER.FPN_EXT.DETERMINISTIC needs a fixed seed, got SEED {cfg.SEED}; set SEED 1"
    if cfg.SOLVER.FPN_EXT.DETERMINISTIC and cfg.CUDNN_BENCHMARK:
        yield "SOLVER.FPN_EXT.DETERMINISTIC: CUDNN_BENCHMARK chooses by time; set it to False"


def solver_problems(cfg: CfgNode) -> Iterable[str]:
    solver = cfg.SOLVER
    world_size = solver.REFERENCE_WORLD_SIZE
    if solver.IMS_PER_BATCH < 1:
        yield f"SOLVER.IMS_PER_BATCH is the number of images of a step, got {solver.IMS_PER_BATCH}"
    elif world_size > 0 and solver.IMS_PER_BATCH % world_size:
        yield (
            f"SOLVER.REFERENCE_WORLD_SIZE {world_size} is the number of processes that "
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} was written for, among which it does not "
            "divide; set it to that number, or to 0 to scale nothing"
        )


def recipe_problems(cfg: CfgNode, training: bool) -> Iterable[str]:
    """Mixed precision, accumulation, best checkpoint, early stopping, validation loss, EMA."""
    solver, test = cfg.SOLVER.FPN_EXT, cfg.TEST.FPN_EXT
    if solver.AMP_DTYPE not in AMP_DTYPES:
        yield f"SOLVER.FPN_EXT.AMP_DTYPE must be one of {AMP_DTYPES}, got {solver.AMP_DTYPE!r}"
    if solver.ACCUMULATE < 1:
        yield f"SOLVER.FPN_EXT.ACCUMULATE must be at least 1, got {solver.ACCUMULATE}"
    if not 0 <= solver.EMA_DECAY < 1:
        yield (
            f"SOLVER.FPN_EXT.EMA_DECAY must be 0 (none) or more, under 1, got {solver.EMA_DECAY}"
        )
    if test.BEST_MODE not in MODES:
        yield f"TEST.FPN_EXT.BEST_MODE must be one of {MODES}, got {test.BEST_MODE!r}"
    if test.EARLY_STOP_PATIENCE < 0:
        yield (
            "TEST.FPN_EXT.EARLY_STOP_PATIENCE must be 0 (never) or more, got "
            f"{test.EARLY_STOP_PATIENCE}"
        )
    if test.EARLY_STOP_PATIENCE > 0 and not test.BEST_METRIC:
        yield (
            "TEST.FPN_EXT.EARLY_STOP_PATIENCE needs the score to go by: set "
            'TEST.FPN_EXT.BEST_METRIC, e.g. "bbox/AP"'
        )
    if test.BEST_METRIC.startswith("validation_loss/"):
        if not test.VALIDATION_LOSS:
            yield f"TEST.FPN_EXT.BEST_METRIC {test.BEST_METRIC} needs VALIDATION_LOSS True"
        if test.BEST_MODE == "max":
            yield f"TEST.FPN_EXT.BEST_METRIC {test.BEST_METRIC} is a loss: set BEST_MODE min"
    if not training:
        return
    if cfg.SOLVER.BASE_LR < 0:
        yield f"SOLVER.BASE_LR must not be negative, got {cfg.SOLVER.BASE_LR}"
    if cfg.SOLVER.MAX_ITER < 1:
        yield f"SOLVER.MAX_ITER must be at least 1 to train, got {cfg.SOLVER.MAX_ITER}"
    if cfg.SOLVER.AMP.ENABLED and solver.AMP_DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        yield (
            "SOLVER.AMP.ENABLED: float16 needs a GPU; on CPU set SOLVER.FPN_EXT.AMP_DTYPE "
            "bfloat16, or SOLVER.AMP.ENABLED False"
        )
    for key in ("BEST_METRIC", "VALIDATION_LOSS"):
        if test[key] and cfg.TEST.EVAL_PERIOD <= 0:
            yield (
                f"TEST.FPN_EXT.{key} needs evaluations during training: set TEST.EVAL_PERIOD, "
                f"got {cfg.TEST.EVAL_PERIOD}"
            )
        if test[key] and not cfg.DATASETS.TEST:
            yield f"TEST.FPN_EXT.{key} needs a dataset in DATASETS.TEST, which is empty"
