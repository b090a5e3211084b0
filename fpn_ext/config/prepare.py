"""From a YAML file to a config that a model can be built from: the one way for every command.

:func:`prepare` takes these steps, in this order: load the file and the overrides; the device that
is there; the datasets by name; check what can be checked before anything is built; the weights; the
pixels the bottom-up was trained with; what NUMERICS chooses. The order matters: what is checked
depends on the device, and the normalisation of pixels on the weights.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from detectron2.config import CfgNode

from ..bottom_up.build import is_from_library, resolve_bottom_up
from ..data.datasets import register_datasets
from ..files.weight_files import check_address
from .check import config_problems, problems_error
from .idle import idle_notes, slow_notes
from .load import load_config, written_keys, written_keys_here
from .numerics import resolve_numerics
from .unread import unread_notes

# What MODEL.WEIGHTS is to a command: a training starts from it, a file or random weights; it may be
# empty, and a file that is named must exist; it must name a file; it is not read.
Weights = Literal["start", "optional", "required", "unread"]
MISTAKES = (ValueError, TypeError, OSError)  # errors that a user's mistake raises


class Caution(str):
    """A note that the log gives as a warning."""


class Stage(NamedTuple):
    """One step of the preparation, after it was taken.

    Attributes:
        subject: what it is about: ``"device"``, ``"config"``, ``"weights"``, ``"pixels"``, ...
        notes: what there is to say, one line each.
        error: what is wrong, if anything is.
        problems: the same, a sentence each.
    """

    subject: str
    notes: Sequence[str] = ()
    error: Exception | None = None
    problems: Sequence[str] = ()


class Prepared(NamedTuple):
    """A config that a model can be built from, unfrozen, and what there is to say of it."""

    cfg: CfgNode
    notes: list[str]


def prepare(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    training: bool = False,
    weights: Weights | Callable[[CfgNode], Weights] = "unread",
) -> Prepared:
    """The config of a YAML file and overrides, checked and made to fit this machine.

    Args:
        config_file: a YAML file.
        opts: ``KEY VALUE ...`` on top of the file.
        training: also check what only training needs.
        weights: what MODEL.WEIGHTS is to the command, or a function that tells from the config.

    Raises:
        FileNotFoundError, TypeError, ValueError: the first stage with an error; the level table is
            in the message where levels do not fit together.
    """
    cfg = load_config(config_file, opts)
    if callable(weights):
        weights = weights(cfg)
    notes: list[str] = []
    written = written_keys(config_file, opts)
    here = written_keys_here(config_file, opts)
    for stage in prepare_loaded(cfg, training, weights, written, here):
        if stage.error:
            raise stage.error
        notes += stage.notes
    return Prepared(cfg, notes)


def prepare_loaded(
    cfg: CfgNode,
    training: bool,
    weights: Weights,
    explicitly_set: Collection[str] = (),
    written_here: Collection[str] = (),
) -> Iterator[Stage]:
    """The stages of :func:`prepare` after loading, each taken when it is asked for; in place.

    Args:
        explicitly_set: the keys that somebody has written.
        written_here: those among them that no file has written that others are based on, too.
    """
    note = resolve_device(cfg)
    yield Stage("device", [note] if note else [])
    register_datasets()
    problems = config_problems(cfg, training)
    yield Stage("config", (), problems_error(cfg, problems) if problems else None, problems)
    notes = [
        *unread_notes(cfg, explicitly_set),
        *idle_notes(cfg, written_here),
        *slow_notes(cfg, training),
    ]
    yield Stage("keys", [Caution(note) for note in notes])
    yield _stage("weights", lambda: check_weights(cfg, weights))
    yield _stage("pixels", lambda: resolve_bottom_up(cfg))
    yield _stage("numerics", lambda: [resolve_numerics(cfg, explicitly_set)])


def _stage(subject: str, step: Callable[[], Iterable[str] | None]) -> Stage:
    try:
        return Stage(subject, [note for note in step() or () if note])
    except MISTAKES as error:
        return Stage(subject, (), error, [str(error)])


def resolve_device(cfg: CfgNode) -> Caution | None:
    """Set ``MODEL.DEVICE`` to "cpu" if it asks for CUDA and there is none; returns what to say.

    Detectron2's default is "cuda", and the configs here are meant for both kinds of machine.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        wanted, cfg.MODEL.DEVICE = cfg.MODEL.DEVICE, "cpu"
        return Caution(f"MODEL.DEVICE is {wanted!r} and no CUDA device is there: using 'cpu'")
    return None


def check_weights(cfg: CfgNode, weights: Weights) -> None:
    """Check that the weights a config names are there, before a model is built for them.

    Args:
        weights: what they are to the command; ``"unread"`` checks nothing.

    Raises:
        FileNotFoundError: a local file does not exist.
        ValueError: an http:// address; no checkpoint though one is required: random weights
            detect nothing; or a training would freeze random weights.
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
    if not file and bottom_up_file and not os.path.isfile(bottom_up_file):
        raise FileNotFoundError(f"MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS: no file {bottom_up_file}")
    if weights == "start" and not file and not bottom_up_file:
        frozen = []
        if cfg.MODEL.FPN_EXT.FREEZE:
            frozen.append(f"MODEL.FPN_EXT.FREEZE {cfg.MODEL.FPN_EXT.FREEZE}")
        # A ResNet of Detectron2's does not follow suit: there, this trains, as in Detectron2.
        if is_from_library(cfg) and cfg.MODEL.BACKBONE.FREEZE_AT > 0:
            frozen.append(f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}")
        if frozen:
            raise ValueError(
                f"{' and '.join(frozen)} would freeze random weights: name the pretrained ones in "
                "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS (or MODEL.WEIGHTS), or freeze nothing "
                "(MODEL.BACKBONE.FREEZE_AT 0)"
            )
