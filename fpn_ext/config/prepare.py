"""From a YAML file to a config ready for building a model: the one path of every command.

:func:`prepare` takes these steps, in this order: load the file and the overrides; choose the
device; register datasets, and read those of ``--data``; check all that can be checked before
building; check weights; set the bottom-up's pixel normalisation; apply NUMERICS. The order matters:
checks depend on the device and the data, pixel normalisation on the weights.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from ..bottom_up.pixels import is_from_library, resolve_bottom_up
from ..bottom_up.pretrained import check_package, how_to_obtain, is_package
from ..data.datasets import register_datasets
from ..files.weight_files import check_address
from .check import config_problems, problems_error
from .data_keys import resolve_data
from .defaults import flat
from .idle import idle_notes
from .load import load_config, written_keys
from .notes import Caution
from .numerics import resolve_numerics, slow_bfloat16
from .unread import unread_notes
from .written import WrittenKeys

# What a command needs of MODEL.WEIGHTS: "start": training starts from it, or from random weights;
# "optional": may be empty, else must exist; "required": must name a file; "unread": not read.
Weights = Literal["start", "optional", "required", "unread"]
MISTAKES = (ValueError, TypeError, OSError)  # errors that a user's mistake raises
NONE_WRITTEN = WrittenKeys()


class Stage(NamedTuple):
    """The outcome of one step of the preparation.

    Attributes:
        subject: ``"device"``, ``"config"``, ``"weights"``, ``"pixels"``, ...
        notes: for the log, one line each.
        error: None if the step succeeded.
        problems: those in ``error``, a sentence each.
    """

    subject: str
    notes: Sequence[str] = ()
    error: Exception | None = None
    problems: Sequence[str] = ()


class Prepared(NamedTuple):
    """A config ready for building a model, unfrozen, and notes for the log."""

    cfg: CfgNode
    notes: list[str]


def prepare(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    training: bool = False,
    weights: Weights | Callable[[CfgNode], Weights] = "unread",
) -> Prepared:
    """The config of a YAML file and overrides, checked and adapted to this machine.

    Args:
        config_file: a YAML file.
        opts: ``KEY VALUE ...`` on top of the file.
        training: also check what only training needs.
        weights: what the command needs of MODEL.WEIGHTS, or a function of the config.

    Raises:
        FileNotFoundError, TypeError, ValueError: that of the first stage to fail; for inconsistent
            levels the message has the level table.
    """
    cfg = load_config(config_file, opts)
    if callable(weights):
        weights = weights(cfg)
    notes: list[str] = []
    for stage in prepare_loaded(cfg, training, weights, written_keys(config_file, opts)):
        if stage.error:
            raise stage.error
        notes += stage.notes
    return Prepared(cfg, notes)


def prepare_loaded(
    cfg: CfgNode, training: bool, weights: Weights, explicitly_set: WrittenKeys = NONE_WRITTEN
) -> Iterator[Stage]:
    """The stages of :func:`prepare` after loading, run lazily, in place."""
    by_hand = explicitly_set.by_hand(flat(get_detectron2_cfg()))
    note = resolve_device(cfg)
    if note and "MODEL.DEVICE" not in by_hand:  # Detectron2's default, which nobody asked for
        yield Stage("device", ["MODEL.DEVICE cpu: no CUDA device is there"])
    else:
        yield Stage("device", [note] if note else [])
    register_datasets()
    yield _stage("data", lambda: resolve_data(cfg, training, explicitly_set))
    problems = config_problems(cfg, training)
    yield Stage("config", (), problems_error(cfg, problems) if problems else None, problems)
    notes = [
        *unread_notes(cfg, by_hand),
        # Of the file itself and of overrides: a base file serves other configs, too.
        *idle_notes(cfg, frozenset().union(*by_hand.places[-2:])),
    ]
    yield Stage("keys", [Caution(note) for note in notes])
    yield _stage("weights", lambda: check_weights(cfg, weights))
    yield _stage("pixels", lambda: [*resolve_bottom_up(cfg), _unknown_pixels(cfg)])
    yield _stage("numerics", lambda: _numerics(cfg, training, explicitly_set))


def _numerics(cfg: CfgNode, training: bool, explicitly_set: Collection[str]) -> list[str]:
    chosen = resolve_numerics(cfg, explicitly_set)
    return [chosen, *(Caution(note) for note in slow_bfloat16(cfg, training))]


def _stage(subject: str, step: Callable[[], Iterable[str | None] | None]) -> Stage:
    try:
        return Stage(subject, [note for note in step() or () if note])
    except MISTAKES as error:
        return Stage(subject, (), error, [str(error)])


def resolve_device(cfg: CfgNode) -> Caution | None:
    """Set ``MODEL.DEVICE`` to "cpu" if it is CUDA and none is available; returns a note if so.

    Detectron2's default is "cuda", and configs here are meant for machines with and without it.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        wanted, cfg.MODEL.DEVICE = cfg.MODEL.DEVICE, "cpu"
        return Caution(f"MODEL.DEVICE is {wanted!r} and no CUDA device is there: using 'cpu'")
    return None


def _unknown_pixels(cfg: CfgNode) -> Caution | None:
    """A warning if the file that may name its own pixels is missing."""
    own = cfg.MODEL.FPN_EXT
    file = own.BOTTOM_UP_WEIGHTS
    if not is_from_library(cfg) or own.KEEP_PIXELS or not file or os.path.isfile(file):
        return None
    if is_package(file):
        return None
    return Caution(
        f"MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS {file} is not there, and with it what it may say of "
        f"pixels: those of {own.BOTTOM_UP} are taken. A training's OUTPUT_DIR/config.yaml has its "
        "pixels; use it as --config-file"
    )


def check_weights(cfg: CfgNode, weights: Weights) -> None:
    """Check that a config's weights exist, before a model is built for them.

    Args:
        weights: what the command needs; ``"unread"`` checks nothing.

    Raises:
        FileNotFoundError: a local file does not exist.
        ValueError: an http:// address; no checkpoint though one is required (random weights
            detect nothing); or training would freeze random weights.
    """
    if weights == "unread":
        return
    file, bottom_up_file = cfg.MODEL.WEIGHTS, cfg.MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS
    if weights == "required" and not file:
        raise ValueError(
            "MODEL.WEIGHTS is empty: name the checkpoint, e.g. "
            "MODEL.WEIGHTS output/demo/model_final.pth"
        )
    check_address(file)
    if file and "://" not in file and not os.path.isfile(file):
        raise FileNotFoundError(f"MODEL.WEIGHTS: no file {file}")
    if not file and is_package(bottom_up_file):
        check_package(bottom_up_file, cfg.MODEL.FPN_EXT.BOTTOM_UP)
    elif not file and bottom_up_file and not os.path.isfile(bottom_up_file):
        raise FileNotFoundError(
            f"MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS: no file {bottom_up_file}. "
            + how_to_obtain(cfg.MODEL.FPN_EXT.BOTTOM_UP, bottom_up_file)
        )
    if weights == "start" and not file and not bottom_up_file:
        frozen = []
        if cfg.MODEL.FPN_EXT.FREEZE:
            frozen.append(f"MODEL.FPN_EXT.FREEZE {cfg.MODEL.FPN_EXT.FREEZE}")
        # With Detectron2's ResNets this trains, as it does in Detectron2.
        if is_from_library(cfg) and cfg.MODEL.BACKBONE.FREEZE_AT > 0:
            frozen.append(f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}")
        if frozen:
            raise ValueError(
                f"{' and '.join(frozen)} would freeze random weights: name the pretrained ones in "
                "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS (or MODEL.WEIGHTS), or freeze nothing "
                "(MODEL.BACKBONE.FREEZE_AT 0)"
            )
