"""The command line: ``fpn-ext VERB ...``, the same as ``python -m fpn_ext VERB ...``.

Nothing heavy is imported before a verb has parsed its arguments, so ``--help`` and a wrong option
answer at once. In every verb a user's mistake ends in one message and exit status 2; a bug keeps
its traceback.
"""

import argparse
import dis
import importlib
import logging
import os
import re
import sys
from collections.abc import MutableMapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NamedTuple

from .parent import end_with_the_parent
from .tools.options import as_overrides


class Verb(NamedTuple):
    """A command: a file in fpn_ext/tools/ with ``add_arguments(parser)`` and ``run(args)``."""

    name: str
    summary: str
    module: str

    def load(self) -> ModuleType:
        """Its module, which imports nothing heavy until run."""
        return importlib.import_module(f"fpn_ext.tools.{self.module}")

    def parser(self) -> argparse.ArgumentParser:
        """Its argument parser; the module's docstring becomes its --help."""
        module = self.load()
        description, _, examples = (module.__doc__ or "").partition("\n\n")
        parser = argparse.ArgumentParser(
            prog=f"fpn-ext {self.name}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        return parser


VERBS = {
    name: Verb(name, summary, name.replace("-", "_").replace(" ", "_"))
    for name, summary in (
        ("train", "train a config; --resume goes on with an interrupted training"),
        ("eval", "evaluate a checkpoint on the test datasets"),
        ("predict", "detect objects on images: annotated copies and COCO-format JSON"),
        ("video", "detect objects in a video or on a camera"),
        ("export", "a detector as ONNX, OpenVINO, TorchScript or .pt2, proved equal first"),
        ("check", "every problem of a config, its data and its weights, before training"),
        (
            "config",
            "print a config with all that follows from it; --plain for Detectron2's get_cfg",
        ),
        ("data", "every problem of a dataset at once"),
        ("data convert", "a dataset in another format: coco, voc or yolo"),
        ("anchors", "whether the anchors fit the boxes of a dataset, and which would"),
        ("levels", "how many boxes of a dataset are pooled from each pyramid level"),
        ("explain", "the worked example of a pyramid: maps, anchors, pooling, parameters"),
        ("look", "best anchors, proposals by level and feature maps, drawn"),
        ("analyze", "what a detector gets right and wrong: classes, errors, levels, as HTML too"),
        ("contact-sheet", "ground truth beside detections in one picture, and training curves"),
        ("compare weights", "two configs with the same weights: every stage, scores, time, memory"),
        ("compare train", "two configs trained from the same seeds"),
        ("proposals generate", "make proposals for Fast R-CNN with a trained RPN"),
        ("proposals ground-truth", "take the ground truth as proposals"),
        ("proposals selective-search", "make proposals with OpenCV's selective search"),
        ("proposals validate", "check a file of proposals against a dataset"),
        ("proposals stats", "average recall and counts of a file of proposals"),
        ("proposals convert", "convert Detectron2's .pkl to .safetensors, or back"),
        ("weights list", "pretrained weights that can be had, and whether they are here"),
        ("weights convert", "convert pretrained weights whose names differ, and prove it"),
        ("reproduce", "train and score all rows of the paper's Tables 1 to 3"),
        ("four-step", "the paper's alternating training: RPN and detector on one backbone"),
        ("pretrain", "train a classifier of generated shapes, for reproduce --scale small"),
        ("demo-data", "make the generated dataset of the demo"),
        ("doctor", "what is wrong with this installation, and how to fix it"),
    )
}

# Raised by this package for a user's mistake, and for a failed run (e.g. one that diverged).
MISTAKES = (ValueError, TypeError, OSError, ImportError)
FAILURES = (RuntimeError, FloatingPointError)

USAGE = """usage: fpn-ext VERB [options] [KEY VALUE ...]

Feature Pyramid Networks for Detectron2. Every verb has --help with an example.

verbs:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: the verb, its options and overrides; None for ``sys.argv[1:]``.

    Returns:
        The exit status: 0; 1 for a check that found errors, or a failed run; 2 for a user's
        mistake.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_of_cuda_homes)
    yield_the_core_while_waiting(os.environ)
    end_with_the_parent(os.environ)
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return 141  # 128 + SIGPIPE, as in shells


def _is_not_of_cuda_homes(record: logging.LogRecord) -> bool:
    """torch warns of a CUDA toolkit without a GPU when Detectron2 is imported; none is needed."""
    return not record.getMessage().startswith("No CUDA runtime is found")


# What says how OpenMP's threads wait for one another: the standard, GNU's and Intel's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def yield_the_core_while_waiting(environment: MutableMapping[str, str]) -> None:
    """Have OpenMP's threads sleep soon where they wait, unless the user has said how they wait.

    By default a thread that is done occupies its core until the others are done as well, which
    are then not scheduled where another process wants a core. OpenMP reads these variables once,
    when torch is loaded. docs/evidence/speed.md has what it costs and gains.

    >>> environment = {}
    >>> yield_the_core_while_waiting(environment)
    >>> environment
    {'OMP_WAIT_POLICY': 'PASSIVE', 'GOMP_SPINCOUNT': '1000'}
    >>> environment = {"KMP_BLOCKTIME": "200"}
    >>> yield_the_core_while_waiting(environment)
    >>> environment
    {'KMP_BLOCKTIME': '200'}
    """
    if not any(name in environment for name in WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment["GOMP_SPINCOUNT"] = "1000"  # GNU's OpenMP: instead of 0, which PASSIVE means


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE + _listing(VERBS))
        return 0
    name = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    if name not in VERBS:
        return _no_such_verb(words)
    verb = VERBS[name]
    try:
        args = verb.parser().parse_intermixed_args(words[len(name.split()) :])
    except SystemExit as end:  # argparse has printed the error, or its help
        return end.code if isinstance(end.code, int) else 2
    as_overrides(args)
    try:
        return verb.load().run(args) or 0
    except BrokenPipeError:
        raise
    except (*MISTAKES, *FAILURES) as error:
        if not is_users(error):
            raise
        print(f"fpn-ext {name}: error: {sentence(error)}", file=sys.stderr)
        return 1 if isinstance(error, FAILURES) else 2
    except KeyboardInterrupt:
        return 130


# How torch begins the message of an error in a process that loads images, its traceback included.
IN_A_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\n")


def sentence(error: Exception) -> str:
    """What an error says, without the traceback of a process that loaded images.

    >>> before = "Caught OSError in DataLoader worker process 0.\\nOriginal Traceback ...\\n"
    >>> sentence(OSError(before + "OSError: no a.jpg\\n"))
    'no a.jpg'
    """
    text = str(error)
    if not IN_A_WORKER.match(text):
        return text
    kind = text.split()[1]
    return text.rpartition(f"\n{kind}: ")[2].strip()


def is_users(error: Exception) -> bool:
    """Whether an error was raised deliberately, to inform the user; otherwise it is our bug.

    Every OSError (no such file, no space left) counts. Any other error does if a ``raise``
    statement in this package raised it, as opposed to Python, PyTorch or Detectron2.
    """
    if isinstance(error, OSError):
        return True
    if IN_A_WORKER.match(str(error)):  # of its traceback there is the text alone
        files = re.findall(r'^  File "(.*?)", line', str(error), flags=re.M)
        return bool(files) and Path(files[-1]).is_relative_to(Path(__file__).parent)
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    by_us = str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "fpn_ext"
    return by_us and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _listing(verbs: dict[str, Verb]) -> str:
    width = max(map(len, verbs))
    return "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in verbs.items())


def _no_such_verb(words: Sequence[str]) -> int:
    """Print what exists instead; returns the exit status."""
    under = {name: verb for name, verb in VERBS.items() if name.startswith(f"{words[0]} ")}
    if under and (len(words) == 1 or words[1].startswith("-")):
        asked = words[1:2] in (["-h"], ["--help"])
        usage = f"usage: fpn-ext {words[0]} VERB [options]\n\nverbs:\n{_listing(under)}"
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name = " ".join(words[:2]) if under else words[0]
    near = get_close_matches(name, under or VERBS, n=3)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    print(f"fpn-ext: no verb {name!r}{hint}. `fpn-ext` lists them", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
