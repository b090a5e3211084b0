"""The scores of a model on each dataset of ``DATASETS.TEST``."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from ..evaluation.recall import model_with_proposals
from ..files.earlier import earlier_kept
from ..files.run_lock import in_turn
from ..reporting.json_files import write_json
from ..speed.optimize import model_for_inference
from .distributed import share_buffers
from .progress import Countdown, only_on_console

logger = logging.getLogger(__name__)

# What the console has of an evaluation in a training: that it begins, its scores, the time left.
EVALUATION = ("fpn_ext.engine.testing", "fpn_ext.engine.progress")

Scores = dict[str, Any]  # {task: {metric: value}}
Results = dict[str, Scores]  # by dataset
BuildLoader = Callable[[CfgNode, str], Any]
BuildEvaluator = Callable[..., DatasetEvaluator]  # (config, dataset[, folder])


def score(
    cfg: CfgNode,
    model: nn.Module,
    build_loader: BuildLoader,
    build_evaluator: BuildEvaluator,
    evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
) -> Results:
    """Scores of a model, with inference as configured; called in all processes.

    Files go to ``OUTPUT_DIR/inference/DATASET``.

    Args:
        model: with loaded weights; may be wrapped in DistributedDataParallel.
        build_loader: returns a dataset's batches.
        build_evaluator: returns a dataset's evaluator.
        evaluators: one per dataset, instead of those of ``build_evaluator``.

    Returns:
        {dataset: {task: {metric: value}}} in the main process, {dataset: {}} in others.

    Raises:
        ValueError: the number of evaluators is not that of datasets.
    """
    share_buffers(model)
    inferring = model_with_proposals(cfg, model_for_inference(cfg, model))
    if evaluators is not None:
        given = [evaluators] if isinstance(evaluators, DatasetEvaluator) else list(evaluators)
        _check_number(cfg, given)
        by_name = dict(zip(cfg.DATASETS.TEST, given, strict=True))
        results = _score_each(cfg, inferring, build_loader, by_name.__getitem__)
    else:
        build = functools.partial(build_evaluator, cfg)
        results = _score_each(cfg, inferring, build_loader, build)
    _write(cfg, results, "inference")
    return results


def score_augmented(
    cfg: CfgNode, model: nn.Module, build_loader: BuildLoader, build_evaluator: BuildEvaluator
) -> Results:
    """Scores with Detectron2's test-time augmentation: an image pyramid and flips.

    As :func:`score`, with task names ending in ``_TTA``; ``TEST.AUG`` sets the sizes.
    Files go to ``OUTPUT_DIR/inference_TTA/DATASET``, a folder given to ``build_evaluator``.
    """
    logger.info("evaluating with test-time augmentation (TEST.AUG)")
    share_buffers(model)
    augmented = GeneralizedRCNNWithTTA(cfg, model_for_inference(cfg, model))
    augmented.training = augmented.model.training  # the mode that evaluation restores
    cfg = changed(cfg, "TEST.FPN_EXT.EVALUATE_PROPOSALS", False)  # TTA merges detections

    def evaluator_of(name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference_TTA", name))

    results = _score_each(cfg, augmented, build_loader, evaluator_of)
    for scores in results.values():
        for task in list(scores):
            scores[f"{task}_TTA"] = scores.pop(task)
    _write(cfg, results, "inference_TTA")
    return results


def _check_number(cfg: CfgNode, evaluators: Sequence[DatasetEvaluator]) -> None:
    names = cfg.DATASETS.TEST
    if len(evaluators) != len(names):
        raise ValueError(
            f"{len(evaluators)} evaluators for the {len(names)} datasets of DATASETS.TEST; give "
            "one for each, in their order"
        )


def _score_each(
    cfg: CfgNode,
    model: nn.Module,
    build_loader: BuildLoader,
    evaluator_of: Callable[[str], DatasetEvaluator],
) -> Results:
    results: Results = {}
    for name in cfg.DATASETS.TEST:
        loader = build_loader(cfg, name)
        logger.info("evaluating on %s", name)
        batches = Countdown(loader, f"evaluating on {name}")
        results[name] = inference_on_dataset(model, batches, evaluator_of(name))
        if comm.is_main_process():
            print_csv_format(results[name])
    return results


def _write(cfg: CfgNode, results: Results, folder: str) -> None:
    if comm.is_main_process():
        for name, scores in results.items():
            file = Path(cfg.OUTPUT_DIR, folder, name, "results.json")
            write_json(file, scores)
            logger.info("%s: %s; all scores are in %s", name, headline(scores), file)


def alone_in_folder(cfg: CfgNode) -> contextlib.AbstractContextManager[None]:
    """A block of an evaluation: another of ``OUTPUT_DIR``, of whichever command, waits."""
    return in_turn(Path(cfg.OUTPUT_DIR)) if comm.is_main_process() else contextlib.nullcontext()


@contextlib.contextmanager
def during_training(cfg: CfgNode) -> Iterator[None]:
    """A block of an evaluation that a training makes."""
    with only_on_console(*EVALUATION), alone_in_folder(cfg):
        yield


def earlier_scores_kept(cfg: CfgNode) -> contextlib.AbstractContextManager[None]:
    """Keep each ``results.json`` of ``OUTPUT_DIR``, where an evaluation scores otherwise.

    A training's scores stay beside those of other weights (:mod:`fpn_ext.files.earlier`).
    """
    if not comm.is_main_process():
        return contextlib.nullcontext()
    folders = [Path(cfg.OUTPUT_DIR, kind) for kind in ("inference", "inference_TTA")]
    files = [folder / name / "results.json" for folder in folders for name in cfg.DATASETS.TEST]
    return earlier_kept(files, logger.info)


def headline(scores: Scores) -> str:
    """The scores of each task in a line, less those of single classes.

    >>> headline({"bbox": {"AP": 25.25, "AP50": 50.5, "AP-cat": 25.25}, "segm": {"AP": 20.0}})
    'bbox AP 25.2, AP50 50.5; segm AP 20.0'
    """
    tasks = []
    for task, of_task in scores.items():
        named = of_task.items() if isinstance(of_task, Mapping) else [("", of_task)]
        shown = [(k, v) for k, v in named if isinstance(v, Real) and "-" not in k]
        tasks.append(f"{task} " + ", ".join(f"{k} {float(v):.1f}".strip() for k, v in shown))
    return "; ".join(tasks)


def unnested(results: Results) -> dict[str, Any]:
    """Scores as Detectron2's ``test`` returns them: without the name of a single dataset.

    >>> unnested({"val": {"bbox": {"AP": 1.0}}})
    {'bbox': {'AP': 1.0}}
    """
    if len(results) == 1:
        (scores,) = results.values()
        return scores
    return results


def by_dataset(cfg: CfgNode, results: dict[str, Any]) -> dict[str, Scores]:
    """The inverse of :func:`unnested`: {dataset: {task: scores}}, the same objects."""
    return {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results


def changed(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    """A frozen copy of a config with one key changed."""
    copy = cfg.clone()
    copy.defrost()
    copy.merge_from_list([key, value])
    copy.freeze()
    return copy
