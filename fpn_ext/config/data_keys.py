"""From a dataset by name to a whole config: what DATASETS.FPN_EXT.DATA and EPOCHS decide."""

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..data.dataset import command_that_lists
from ..data.named import NamedData, register_data
from ..keys import declare
from ..names import did_you_mean
from .notes import Caution
from .written import WrittenKeys

EPOCHS = "SOLVER.FPN_EXT.EPOCHS"
WARMUP_SHARE = 10  # at most one in so many iterations warms up, where the config does not say,
SHORT_WARMUP = 20  # but in a short training so many, or a quarter of all
MOST_NOTES = 4

declare(
    "SOLVER.FPN_EXT.EPOCHS",
    0,
    """How often each image of DATASETS.TRAIN is seen. MAX_ITER follows, unless it is written later,
    as on the command line; so do, from MAX_ITER, where they are not written as late as this key,
    STEPS (at 2/3 and 8/9), WARMUP_ITERS (at most a tenth, or 20 and a quarter of a short training),
    CHECKPOINT_PERIOD and TEST.EVAL_PERIOD (ten times, but at most once an epoch, and at the end).
    0: MAX_ITER counts, and nothing follows.""",
    "training",
)
declare(
    "SOLVER.FPN_EXT.REFERENCE_BATCH",
    0,
    """The number of images per step that BASE_LR was written for; it is scaled in proportion to
    IMS_PER_BATCH x ACCUMULATE. 0: BASE_LR is taken as it is.""",
    "training",
)


def resolve_data(cfg: CfgNode, training: bool, written: WrittenKeys) -> list[str]:
    """Set what follows from the dataset and the number of epochs, in place; says what.

    Afterwards EPOCHS is 0 and REFERENCE_BATCH the batch, so that the config, written to a file and
    read again, is the same.

    Args:
        training: there is a schedule.
        written: the keys that somebody has written.

    Raises:
        FileNotFoundError, ValueError: what is wrong with the data, or with EPOCHS.
    """
    notes = []
    if cfg.DATASETS.FPN_EXT.DATA:
        named = register_data(cfg.DATASETS.FPN_EXT.DATA, Path(cfg.OUTPUT_DIR, "data"))
        cfg.DATASETS.FPN_EXT.DATA = str(named.source)
        notes += _set_datasets(cfg, named, training, written)
        notes += _set_classes(cfg, named, written)
    if training:
        notes += _set_schedule(cfg, written)
    return notes


def _set_datasets(
    cfg: CfgNode, named: NamedData, training: bool, written: WrittenKeys
) -> list[str]:
    names = named.names
    if training and "train" not in names:
        raise ValueError(
            f"--data {named.source}: no images to train on; its splits are {', '.join(names)}"
        )
    follow = {
        "TRAIN": tuple(names[s] for s in ("train",) if s in names),
        "TEST": tuple(names[s] for s in ("val", "test") if s in names)[:1],
    }
    counts = ", ".join(
        f"{split} {images} images with {objects} objects"
        for split, (images, objects) in named.counts.items()
    )
    shown = ", ".join(named.classes[:8]) + (", ..." if len(named.classes) > 8 else "")
    notes = [
        f"data {named.source} ({named.format}): {counts}; NUM_CLASSES {len(named.classes)}: {shown}"
    ]
    if "val" in names and "test" in names and names["test"] not in cfg.DATASETS.TEST:
        notes.append(
            f"the split {names['test']} is neither trained on nor scored on: DATASETS.TEST "
            f"\"('{names['test']}',)\" scores on it"
        )
    replaced = []
    for key, chosen in follow.items():
        before = tuple(cfg.DATASETS[key])
        is_written = f"DATASETS.{key}" in written
        # A split of the data's own may be named, DATASETS.TEST "('photos_test',)"; or no test.
        if set(before) <= set(names.values()) and (before or (key == "TEST" and is_written)):
            continue
        cfg.DATASETS[key] = chosen
        if before and is_written:
            replaced.append(f"DATASETS.{key} is {chosen}, not {before}")
    if replaced:
        notes.append(f"--data decides: {'; '.join(replaced)}")
    notes += map(Caution, named.warnings)
    notes += named.notes[:MOST_NOTES]
    if len(named.notes) > MOST_NOTES:
        more = len(named.notes) - MOST_NOTES
        notes.append(f"and {more} more such notes: {command_that_lists(named.source)}")
    return notes


def _set_classes(cfg: CfgNode, named: NamedData, written: WrittenKeys) -> list[str]:
    """The number of classes, under each key of the model that counts objects' classes."""
    count, replaced = len(named.classes), []
    for name, node in cfg.MODEL.items():
        if name == "SEM_SEG_HEAD" or not isinstance(node, CfgNode) or "NUM_CLASSES" not in node:
            continue
        key = f"MODEL.{name}.NUM_CLASSES"
        if key in written and count != node.NUM_CLASSES:
            replaced.append(f"{key} is {count}, not {node.NUM_CLASSES}")
        node.NUM_CLASSES = count
    return [f"--data decides: {'; '.join(replaced)}"] if replaced else []


def _set_schedule(cfg: CfgNode, written: WrittenKeys) -> list[str]:
    solver, keys = cfg.SOLVER, cfg.SOLVER.FPN_EXT
    for key in ("EPOCHS", "REFERENCE_BATCH"):
        if keys[key] < 0:
            raise ValueError(f"SOLVER.FPN_EXT.{key} must be 0 or more, got {keys[key]}")
    if keys.REFERENCE_BATCH and solver.REFERENCE_WORLD_SIZE:
        raise ValueError(
            f"SOLVER.FPN_EXT.REFERENCE_BATCH {keys.REFERENCE_BATCH} and "
            f"SOLVER.REFERENCE_WORLD_SIZE {solver.REFERENCE_WORLD_SIZE} both scale the learning "
            "rate: set one of them to 0"
        )
    batch = solver.IMS_PER_BATCH * keys.ACCUMULATE
    notes = []
    if keys.REFERENCE_BATCH:
        rate = solver.BASE_LR * batch / keys.REFERENCE_BATCH
        if batch != keys.REFERENCE_BATCH:
            notes.append(
                f"SOLVER.BASE_LR {rate:g}: {solver.BASE_LR:g} for {keys.REFERENCE_BATCH} images, "
                f"scaled to {batch}"
            )
        solver.BASE_LR, keys.REFERENCE_BATCH = rate, batch
    if not keys.EPOCHS:
        return notes
    images = _count_images(cfg)
    kept = written.since(EPOCHS)
    # Of the two lengths, the one that is written later; load_config refuses both in one place.
    by_epochs = "SOLVER.MAX_ITER" not in kept
    iterations = max(-(-keys.EPOCHS * images // batch), 1) if by_epochs else solver.MAX_ITER
    warmup = max(iterations // WARMUP_SHARE, min(SHORT_WARMUP, iterations // 4))
    period = min(max(iterations // 10, -(-images // batch)), iterations)
    follow: dict[str, Any] = {
        "SOLVER.STEPS": tuple(dict.fromkeys((iterations * 2 // 3, iterations * 8 // 9))),
        "SOLVER.WARMUP_ITERS": min(solver.WARMUP_ITERS, warmup),
        "SOLVER.CHECKPOINT_PERIOD": period,
        "TEST.EVAL_PERIOD": period if cfg.DATASETS.TEST else 0,
    }
    values = {key: value for key, value in follow.items() if key not in kept}
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    said = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in values.items())
    exactly = keys.EPOCHS if by_epochs else iterations * batch / images
    epochs = f"{exactly:.3g} epochs of {images} images in steps of {batch}"
    notes.append(f"{epochs}: SOLVER.MAX_ITER {iterations}" + (f", {said}" if said else ""))
    solver.MAX_ITER, keys.EPOCHS = iterations, 0
    return notes


def _count_images(cfg: CfgNode) -> int:
    """Of ``DATASETS.TRAIN``, which epochs are of.

    Raises:
        ValueError: there are none, or a name is not registered.
    """
    names = list(cfg.DATASETS.TRAIN)
    for name in names:
        if name not in DatasetCatalog:
            raise ValueError(
                f"DATASETS.TRAIN: {name!r} is not a registered dataset; "
                f"{did_you_mean(name, DatasetCatalog.keys())}"
            )
    images = sum(len(DatasetCatalog.get(name)) for name in names)
    if not images:
        what = f"{names} have no images" if names else "names no dataset"
        raise ValueError(
            f"DATASETS.TRAIN {what}, and {EPOCHS} {cfg.SOLVER.FPN_EXT.EPOCHS} counts its images: "
            "name your photographs with --data FOLDER, or a registered dataset in DATASETS.TRAIN"
        )
    return images
