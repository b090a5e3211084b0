"""A training or an evaluation from its command line: prepare, log, build, run."""

import argparse
import logging
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config.level_table import level_table, level_table_in_errors
from ..config.load import written_keys
from ..config.numerics import unresolved_yaml
from ..config.prepare import Caution, Prepared, Weights, prepare
from ..evaluation.rehearsal import check_evaluation
from ..files.checkpoint import CompleteCheckpointer, checkpoints_in
from ..files.shipped import find_config
from ..reporting.json_files import write_json
from . import distributed
from .repeatable import use_deterministic_algorithms
from .schedule import learning_rate_note, scale_schedule
from .testing import by_dataset
from .trainer import Trainer


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with ``args.eval_only`` evaluate; in every process of the job.

    Args:
        args: of ``fpn-ext train`` or ``fpn-ext eval`` (:mod:`fpn_ext.tools.train`).

    Returns:
        Scores as Detectron2's trainers give them, ``{task: {metric: score}}``, by dataset if there
        are several; None where a training has nothing to verify.
    """
    cfg = setup(args)
    with level_table_in_errors(cfg):
        if args.eval_only:
            return _evaluate(cfg, args)
        trainer = Trainer(cfg)
    if args.extend:
        trainer.extend()
    else:
        trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def start(args: argparse.Namespace) -> None:
    """What ``fpn-ext train`` and ``fpn-ext eval`` do: :func:`main` in every process of the job.

    Raises:
        FileNotFoundError, TypeError, ValueError: a user's mistake, before a process is started;
            an evaluation that would fail or score wrong is one.
        RuntimeError: a process failed; says which.
    """
    args.config_file = find_config(args.config_file)  # Detectron2 reads it again, for the log
    cfg = prepared(args).cfg
    args.evaluation_notes = check_evaluation(cfg)
    distributed.launch(main, args, cfg.MODEL.DEVICE)


def prepared(args: argparse.Namespace) -> Prepared:
    """The config of the command line, and what there is to say of it.

    Raises:
        FileNotFoundError, TypeError, ValueError: options that contradict one another, or what
            :func:`fpn_ext.prepare` finds wrong.
    """
    if args.extend and args.resume:
        raise ValueError("--extend begins a training; leave --resume out")
    return prepare(
        args.config_file,
        args.opts,
        training=not args.eval_only,
        weights=lambda cfg: _weights(args, cfg.OUTPUT_DIR),
    )


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of the command line; logging, seed and output folder set up from it.

    Raises:
        FileNotFoundError, TypeError, ValueError: what :func:`fpn_ext.prepare` finds wrong.
    """
    cfg, notes = prepared(args)
    if cfg.SOLVER.FPN_EXT.DETERMINISTIC:
        use_deterministic_algorithms()
    cfg, scaled = scale_schedule(cfg, comm.get_world_size())
    cfg.freeze()
    default_setup(cfg, args)
    if comm.is_main_process():
        # Detectron2's dump pins what NUMERICS chose for this machine; on another it is to choose.
        written = written_keys(args.config_file, args.opts)
        Path(cfg.OUTPUT_DIR, "config.yaml").write_text(unresolved_yaml(cfg, written))
    logger = setup_logger(
        output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="fpn_ext", abbrev_name="fpn"
    )
    logger.info(distributed.started_by())
    if scaled:
        logger.info("SOLVER.REFERENCE_WORLD_SIZE: %s", ", ".join(scaled))
    if not args.eval_only:
        notes.append(learning_rate_note(cfg))
    notes += map(Caution, getattr(args, "evaluation_notes", ()))
    for note in filter(None, notes):
        logger.log(logging.WARNING if isinstance(note, Caution) else logging.INFO, note)
    logger.info("levels:\n%s", level_table(cfg) or "  of no known strides")
    return cfg


def _weights(args: argparse.Namespace, output: str) -> Weights:
    goes_on = args.resume and bool(checkpoints_in(output))
    if args.extend or (args.eval_only and not goes_on):
        return "required"
    return "optional" if goes_on else "start"


def _evaluate(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    model = Trainer.build_model(cfg)
    CompleteCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=args.resume
    )
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        if args.json:
            write_json(args.json, by_dataset(cfg, results))
        verify_results(cfg, results)
    return results
