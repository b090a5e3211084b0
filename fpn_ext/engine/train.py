"""Training and evaluation from the command line: prepare, log, build, run."""

import argparse
import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup, defaults
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..config.level_table import level_table, level_table_in_errors
from ..config.load import load_config, written_keys
from ..config.numerics import unresolved_yaml
from ..config.prepare import Caution, Prepared, Weights, prepare
from ..data.datasets import first_test_dataset
from ..data.shared_memory import check_shared_memory
from ..evaluation.rehearsal import check_evaluation
from ..files.atomic import write_text
from ..files.checkpoint import CompleteCheckpointer, checkpoints_in, described
from ..files.run_folder import CONFIG, left_by_a_run, next_free
from ..files.run_lock import is_in_use, only_one_in
from ..files.shipped import find_config
from ..reporting.json_files import write_json
from . import distributed
from .agreement import decided_by_first
from .interrupts import Interrupted, interruptible
from .progress import set_up_logging, short_on_console
from .repeatable import use_deterministic_algorithms
from .schedule import learning_rate_note, scale_schedule
from .testing import alone_in_folder, by_dataset, earlier_scores_kept
from .trained_on import check_test_classes
from .trainer import Trainer

logger = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``args.eval_only``; called in every process of the job.

    Args:
        args: of ``fpn-ext train`` or ``fpn-ext eval`` (:mod:`fpn_ext.tools.train`).

    Returns:
        Scores as returned by Detectron2's trainers, ``{task: {metric: score}}``, by dataset if
        there are several; None if training has no results to verify.

    Raises:
        SystemExit: a signal stopped the training; everything is in a checkpoint.
    """
    cfg = setup(args)
    with level_table_in_errors(cfg):
        if args.eval_only:
            return _evaluate(cfg, args)
        with short_on_console():
            trainer = Trainer(cfg)
    with short_on_console():
        if args.extend:
            trainer.extend()
        else:
            trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process():  # not before: a run that does not go on stays as it was
        write_text(Path(cfg.OUTPUT_DIR, CONFIG), _config_text(cfg, args))
    try:
        with interruptible(args.stop_signals) as trainer.interrupts:
            return trainer.train()
    except Interrupted as interrupted:
        logger.info("the same command with --resume goes on, and loses nothing")
        raise SystemExit(interrupted.status) from None


def start(args: argparse.Namespace) -> None:
    """What ``fpn-ext train`` and ``fpn-ext eval`` do: :func:`main` in every process of the job.

    A training has its folder for itself (:mod:`fpn_ext.files.run_lock`).

    Raises:
        FileNotFoundError, TypeError, ValueError: a user error, before any process is started;
            an evaluation that would fail or score wrong is one.
        RuntimeError: a process failed; says which.
    """
    args.config_file = find_config(args.config_file)  # Detectron2 reads it again, for the log
    place = distributed.place_unless_launching(args)
    with contextlib.ExitStack() as stack:
        if place is None or place.world_size == 1:
            cfg = _made_ready(args, stack)
        else:  # one speaks for all: it names the folder, writes the data, and says what is wrong

            def opts_once_ready() -> list[str]:
                _made_ready(args, stack)
                return args.opts

            args.opts = decided_by_first(place, opts_once_ready)
            cfg = prepared(args).cfg
        distributed.launch(main, args, cfg.MODEL.DEVICE)


def _made_ready(args: argparse.Namespace, stack: contextlib.ExitStack) -> CfgNode:
    """The config, after all that is to be known and done before any process begins.

    Args:
        stack: gets the lock of the folder.
    """
    if args.resume:
        _check_folder_of_config(args)
    if args.new_folder:
        _take_new_folder(args, stack)
    elif not args.eval_only and args.machine_rank == 0:
        # Before the preparation, which writes the data there.
        output = load_config(args.config_file, args.opts).OUTPUT_DIR
        try:
            stack.enter_context(only_one_in(Path(output)))
        except OSError:  # no folder can be made there
            prepared(args)  # says why
            raise
        check_unused(args, output)
    cfg, notes = prepared(args)
    # Those of the preparation in each process are of the data as this one left them.
    args.notes = [*notes, *map(Caution, check_evaluation(cfg, not args.eval_only))]
    if args.eval_only:
        first_test_dataset(cfg)
    return cfg


def check_unused(args: argparse.Namespace, output: str) -> None:
    """Raise unless a training may go into a folder: a new one into a folder without a run.

    Raises:
        ValueError: there is one; says how to go on with it, and how to keep it.
    """
    left = left_by_a_run(Path(output))
    if left and not args.resume:
        raise ValueError(
            f"OUTPUT_DIR {output} holds a training already ({left}), and two are not mixed: "
            "--resume goes on with it; --new-folder trains into a new folder beside it "
            f"({_free(output)}); or name another OUTPUT_DIR"
        )


def _check_folder_of_config(args: argparse.Namespace) -> None:
    """Raise where the config is that of a run which was copied or moved, and names the old folder.

    Raises:
        ValueError: it would be the run there that goes on, or nothing; says what to append.
    """
    run = Path(args.config_file).parent
    if Path(args.config_file).name != CONFIG or not left_by_a_run(run):
        return
    output = Path(load_config(args.config_file, args.opts).OUTPUT_DIR)
    if "OUTPUT_DIR" not in args.opts[::2] and output.resolve() != run.resolve():
        raise ValueError(
            f"--resume: {args.config_file} is of the run in {run}, and its OUTPUT_DIR is {output}: "
            f"was it copied, or moved? Append OUTPUT_DIR {run} to go on with it there"
        )


def _free(output: str) -> Path:
    return next_free(Path(output), lambda f: bool(left_by_a_run(f)) or is_in_use(f))


def _take_new_folder(args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Override OUTPUT_DIR by the next folder without a training; once, for all processes.

    Args:
        stack: gets the folder's lock: of several commands that look at once, each has its own.
    """
    if args.resume:
        raise ValueError("--new-folder begins a training; leave --resume out")
    wanted = load_config(args.config_file, args.opts).OUTPUT_DIR
    output = _free(wanted)
    if args.num_machines > 1:
        raise ValueError(
            f"--new-folder: the {args.num_machines} machines are started one by one and would each "
            f"look for a folder; in its place, append to the command on each: OUTPUT_DIR {output}"
        )
    while not _is_ours(output, stack):
        output = _free(wanted)
    args.opts = [*args.opts, "OUTPUT_DIR", str(output)]
    print(f"--new-folder: OUTPUT_DIR {output}")


def _is_ours(output: Path, stack: contextlib.ExitStack) -> bool:
    """Whether a folder is still without a training once we have its lock, which a stack gets."""
    with contextlib.ExitStack() as taken:
        try:
            taken.enter_context(only_one_in(output))
        except ValueError:
            return False
        if left_by_a_run(output):
            return False
        stack.push(taken.pop_all())
    return True


def prepared(args: argparse.Namespace) -> Prepared:
    """The config of the command line, and its findings.

    Raises:
        FileNotFoundError, TypeError, ValueError: contradictory options, or what
            :func:`fpn_ext.prepare` finds wrong; shared memory that cannot be written.
    """
    if args.extend and args.resume:
        raise ValueError("--extend begins a training; leave --resume out")
    result = prepare(
        args.config_file,
        args.opts,
        training=not args.eval_only,
        weights=lambda cfg: _weights(args, cfg.OUTPUT_DIR),
    )
    check_shared_memory(result.cfg)
    return result


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of the command line; sets up logging, seed and output folder.

    Raises:
        FileNotFoundError, TypeError, ValueError: what :func:`fpn_ext.prepare` finds wrong.
    """
    cfg, notes = prepared(args)
    notes = vars(args).pop("notes", notes)
    if cfg.SOLVER.FPN_EXT.DETERMINISTIC:
        use_deterministic_algorithms()
    cfg, scaled = scale_schedule(cfg, comm.get_world_size())
    cfg.freeze()
    set_up_logging(cfg.OUTPUT_DIR, comm.get_rank())
    file = Path(cfg.OUTPUT_DIR, CONFIG)
    with short_on_console(), _config_file_left_to_us():
        default_setup(cfg, args)
    kept = (args.eval_only or args.resume) and file.is_file()  # the training's stays as it was
    if comm.is_main_process() and not kept:
        write_text(file, _config_text(cfg, args))
    logger.info("%s/log.txt has environment, config, model and data in full", cfg.OUTPUT_DIR)
    logger.info(distributed.started_by())
    if scaled:
        logger.info("SOLVER.REFERENCE_WORLD_SIZE: %s", ", ".join(scaled))
    if not args.eval_only:
        notes.append(learning_rate_note(cfg))
    for note in filter(None, notes):
        logger.log(logging.WARNING if isinstance(note, Caution) else logging.INFO, note)
    logger.info("levels:\n%s", level_table(cfg) or "  of no known strides")
    return cfg


def _config_text(cfg: CfgNode, args: argparse.Namespace) -> str:
    """Detectron2's dump pins what NUMERICS chose here; another machine must choose again."""
    return unresolved_yaml(cfg, written_keys(args.config_file, args.opts))


class _WithoutWriting:
    """What ``default_setup`` has of PathManager, without the ``config.yaml`` it writes in place."""

    mkdirs = staticmethod(PathManager.mkdirs)

    @staticmethod
    def open(path: str, mode: str = "r") -> IO[str]:
        return PathManager.open(path, mode) if mode == "r" else io.StringIO()


@contextlib.contextmanager
def _config_file_left_to_us() -> Iterator[None]:
    original, defaults.PathManager = defaults.PathManager, _WithoutWriting
    try:
        yield
    finally:
        defaults.PathManager = original


def _weights(args: argparse.Namespace, output: str) -> Weights:
    goes_on = args.resume and bool(checkpoints_in(output))
    if args.extend or (args.eval_only and not goes_on):
        return "required"
    return "optional" if goes_on else "start"


def _evaluate(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    with short_on_console():
        model = Trainer.build_model(cfg)
        checkpointer = CompleteCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpoint = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    logger.info("evaluating %s", described(checkpointer.file, checkpoint))
    check_test_classes(cfg, checkpointer.file, checkpoint)
    with alone_in_folder(cfg), earlier_scores_kept(cfg):
        results = Trainer.test(cfg, model)
    if comm.is_main_process():
        if args.json:
            write_json(args.json, by_dataset(cfg, results))
        verify_results(cfg, results)
    return results
