"""All findings on a config before training or evaluation: what ``fpn-ext check`` reports."""

import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BoxMode

from ..config.level_table import level_table_in_errors
from ..config.load import load_config, written_keys
from ..config.prepare import MISTAKES, Caution, Weights, prepare_loaded
from ..config.written import WrittenKeys
from ..data.check import scale_at_test
from ..data.shared_memory import check_shared_memory
from ..evaluation.rehearsal import rehearse
from ..files.checkpoint import CompleteCheckpointer, SafeCheckpointer
from ..keys import own_keys
from ..proposals.loader import training_data
from ..reporting.findings import Finding, Status
from ..reporting.only_errors import only_errors
from .repeatable import aspect_groups
from .schedule import learning_rate_note, scale_schedule

SMALL = 16  # pixels of the network input, 4 cells of P2


def examine(
    config_file: str, opts: Sequence[str] = (), eval_only: bool = False, world_size: int = 1
) -> list[Finding]:
    """All findings on a config; checks that need a valid config run only if it has no errors.

    Args:
        opts: ``KEY VALUE ...`` overrides.
        eval_only: the config is for evaluation, not training.
        world_size: number of training processes (GPUs).
    """
    try:
        cfg = load_config(config_file, opts)
    except MISTAKES as error:
        return [Finding("error", "config", str(error))]
    findings = list(_preparation(cfg, eval_only, written_keys(config_file, opts)))
    if any(finding.status == "error" for finding in findings):
        return findings
    try:
        check_shared_memory(cfg)
    except ValueError as error:
        findings.append(Finding("error", "shared memory", str(error)))
    findings += [*_evaluation(cfg, eval_only), *_model(cfg, eval_only)]
    if not eval_only:
        findings += [*_training_data(cfg), *_schedule(cfg, world_size)]
    return findings


def _preparation(cfg: CfgNode, eval_only: bool, explicitly_set: WrittenKeys) -> Iterable[Finding]:
    weights: Weights = "required" if eval_only else "start"
    without_data = False
    for stage in prepare_loaded(cfg, not eval_only, weights, explicitly_set):
        for note in stage.notes:
            status: Status = "warning" if isinstance(note, Caution) else "ok"
            yield Finding(status, stage.subject, note)
        problems = stage.problems
        if stage.subject == "data" and problems:
            without_data = True
        if without_data and stage.subject == "config":  # what follows from that error
            problems = [problem for problem in problems if not problem.startswith("DATASETS.")]
        yield from (Finding("error", stage.subject, problem) for problem in problems)
        if stage.subject == "config" and not stage.problems:
            yield Finding("ok", "config", "every key, name and level fits")


def _model(cfg: CfgNode, eval_only: bool) -> Iterable[Finding]:
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    try:
        with level_table_in_errors(cfg):
            model = build_model(cfg)
    except Exception as error:  # an AssertionError of Detectron2's, a KeyError of a user's class
        yield Finding("error", "model", _said(error))
        return
    parameters = sum(p.numel() for p in model.parameters())
    yield Finding("ok", "model", f"{parameters / 1e6:.1f} million parameters")
    if not cfg.MODEL.WEIGHTS:
        return
    if "://" in cfg.MODEL.WEIGHTS:
        yield Finding("ok", "weights", f"{cfg.MODEL.WEIGHTS} is fetched when they are needed")
        return
    checkpointer = CompleteCheckpointer(model) if eval_only else SafeCheckpointer(model)
    try:
        checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    except Exception as error:
        yield Finding("error", "weights", _said(error))
        return
    value = f"{cfg.MODEL.WEIGHTS}: {checkpointer.matched}"
    others = checkpointer.other_shapes
    if not others:
        yield Finding("ok", "weights", value)
        return
    yield Finding(
        "warning",
        "weights",
        f"{value}. Of another shape: {'; '.join(others[:3])} (of {len(others)})",
        "right if these are to be trained anew, as for other classes",
    )


def _said(error: Exception) -> str:
    """The message of an error; of one without, as an assertion of Detectron2's, its line."""
    if isinstance(error, MISTAKES) and str(error):
        return str(error)
    if str(error):
        return f"{type(error).__name__}: {error}"
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {last.line}"


def _evaluation(cfg: CfgNode, eval_only: bool) -> Iterable[Finding]:
    for found in rehearse(cfg, not eval_only):
        if found.stage != "test data" or not found.error:
            yield Finding("ok", "test data", f"{found.dataset}: {found.images} images")
        for note in found.notes:
            yield Finding("warning", "evaluation", note)
        if found.error:
            yield Finding("error", found.stage, found.error)
        else:
            yield Finding("ok", "evaluation", f"{found.dataset}: {found.summary}")


def _training_data(cfg: CfgNode) -> Iterable[Finding]:
    try:
        records = training_data(cfg)["records"]
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING and isinstance(records, list):
            aspect_groups(records)
        boxes = sum(len(record.get("annotations", ())) for record in records)
        names = ", ".join(cfg.DATASETS.TRAIN)
        value = f"{names}: {len(records)} images with {boxes} boxes"
        per_epoch = len(records) / cfg.SOLVER.IMS_PER_BATCH
        epochs = cfg.SOLVER.MAX_ITER / per_epoch
        yield Finding("ok", "training data", f"{value}; {epochs:.1f} epochs")
        yield from small_boxes(cfg, records)
        if cfg.INPUT.CROP.ENABLED and not own_keys(cfg, "INPUT").CROP_LEAST_VISIBLE:
            yield Finding(
                "note",
                "training data",
                "INPUT.CROP cuts objects, and every sliver of one is trained on as the object",
                "INPUT.FPN_EXT.CROP_LEAST_VISIBLE 0.5 trains on those of which half is left",
            )
    except Exception as error:  # whatever a registered function raises
        yield Finding("error", "training data", _said(error))


def small_boxes(cfg: CfgNode, records: Any) -> Iterable[Finding]:
    """A note where half of the boxes cover no more than a few cells of the finest map."""
    if not isinstance(records, list):
        return
    sides, before = [], []
    for record in records:
        if "width" not in record or "height" not in record:
            return  # known when the image is read
        scale = scale_at_test(cfg, (record["width"], record["height"]))
        for annotation in record.get("annotations", ()):
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
            before.append(max(box[2] * box[3], 0) ** 0.5)
            sides.append(before[-1] * scale)
    if sides and (side := median(sides)) < SMALL:
        yield Finding(
            "note",
            "training data",
            f"half of the boxes are smaller than {side:.0f} pixels at the config's size, "
            f"{median(before):.0f} in the images: small for an FPN",
            "larger INPUT.MIN_SIZE_TRAIN and MIN_SIZE_TEST, or crops at full resolution, as in "
            "configs/start/small_objects.yaml; fpn-ext anchors says which anchors fit",
        )


def _schedule(cfg: CfgNode, world_size: int) -> Iterable[Finding]:
    scaled, changes = scale_schedule(cfg, world_size)
    if changes:
        value = f"scaled to {world_size} process(es), as SOLVER.REFERENCE_WORLD_SIZE asks: "
        yield Finding("ok", "schedule", value + ", ".join(changes))
    if cfg.MODEL.DEVICE.startswith("cuda") and world_size > torch.cuda.device_count():
        yield Finding(
            "warning",
            "schedule",
            f"--num-gpus {world_size}: this machine has {torch.cuda.device_count()} GPU(s)",
        )
    solver = scaled.SOLVER
    if solver.IMS_PER_BATCH % world_size:
        yield Finding(
            "error",
            "schedule",
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is the batch of all {world_size} "
            "processes and does not divide among them",
        )
    has_steps = solver.LR_SCHEDULER_NAME != "WarmupCosineLR"
    late = [step for step in solver.STEPS if step >= solver.MAX_ITER]
    if late and has_steps:
        yield Finding(
            "warning",
            "schedule",
            f"SOLVER.STEPS {late} are not before the end, SOLVER.MAX_ITER {solver.MAX_ITER}",
            "the learning rate will not fall there; set SOLVER.STEPS",
        )
    note = learning_rate_note(scaled)
    if note:
        yield Finding(
            "warning",
            "schedule",
            note,
            "a rate that is too high ends in NaN, one too low in a low AP; SOLVER.BASE_LR",
        )
    else:
        steps = f"steps at {', '.join(map(str, solver.STEPS))}" if has_steps else "along a cosine"
        yield Finding(
            "ok",
            "schedule",
            f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images, learning rate "
            f"{solver.BASE_LR:g}, {steps}",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Restrict the loggers used by :func:`examine` to errors within the block."""
    with only_errors("fpn_ext", "fvcore.common.checkpoint"):
        yield
