"""Options shared by several verbs."""

import argparse
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

DATA = "photographs with annotations (COCO, VOC, YOLO, DeepPCB), or a YAML file that describes them"


def add_config(
    parser: argparse.ArgumentParser,
    required: bool = True,
    run: bool = False,
    paths: str = "",
    has_data: bool = True,
) -> None:
    """``--config-file FILE``, ``--data FOLDER`` and trailing ``KEY VALUE`` overrides.

    Args:
        run: also ``--run DIR`` in its place; :func:`take_run` reads it.
        has_data: also ``--data``; :func:`as_overrides` reads it.
        paths: what other words are, if they may be among the overrides (:func:`split_words`).
    """
    config: argparse._ActionsContainer = parser
    if run:
        config = parser.add_mutually_exclusive_group(required=required)
    config.add_argument(
        "--config-file", required=required and not run, metavar="FILE", help="a YAML config"
    )
    if run:
        config.add_argument(
            "--run",
            type=Path,
            metavar="DIR",
            help="folder of a training (its OUTPUT_DIR): config and weights are taken from it",
        )
    if has_data:
        parser.add_argument("--data", metavar="FOLDER", type=data_source, help=DATA)
    meaning = "overrides of the config"
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="PATH or KEY VALUE" if paths else "KEY VALUE",
        help=f"{paths}, and {meaning}" if paths else meaning,
    )


def take_run(args: argparse.Namespace, weights: bool = True) -> None:
    """Put the config of ``--run DIR``, and its weights, in the place of ``--config-file``.

    Overrides come after what is taken from the folder.

    Raises:
        FileNotFoundError: the folder is none of a training, or has no weights.
    """
    from ..files.run_folder import taken_from

    if args.run is not None:
        args.config_file, args.opts = taken_from(args.run, args.opts, weights)


def output_of_run(args: argparse.Namespace, name: str) -> None:
    """Without ``--output``, that folder of ``--run``.

    Raises:
        ValueError: there is neither.
    """
    if args.output is None:
        if args.run is None:
            raise ValueError("--output FOLDER is needed without --run")
        args.output = args.run / name


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files and folders, and ``KEY VALUE`` overrides, among words in any order.

    A word that begins as a config key is one, and the next is its value; what is left must exist.

    Raises:
        FileNotFoundError: a word is neither.
        ValueError: a word is both.
    """
    from ..config.defaults import get_cfg

    nodes = get_cfg().keys()
    paths, overrides = [], []
    left = iter(words)
    for word in left:
        is_key = word.partition(".")[0] in nodes
        if is_key and Path(word).exists():
            raise ValueError(
                f"{word!r} is a config key, and a file here has that name; write "
                f"{os.path.join('.', word)!r} for the file"
            )
        if is_key or re.fullmatch(r"[A-Z_]+(\.[A-Z0-9_]+)+", word):  # a misspelt one is told so
            overrides += [word, *itertools.islice(left, 1)]
        elif Path(word).exists():
            paths.append(word)
        else:
            raise FileNotFoundError(f"{word}: no such file or folder, nor a config key")
    return paths, overrides


def add_tuning(parser: argparse.ArgumentParser) -> None:
    """``--no-tune``; :func:`as_overrides` reads it."""
    parser.add_argument(
        "--no-tune",
        action="store_true",
        help="on a CPU, choose how each layer is computed from a table, without timing any",
    )


def as_overrides(args: argparse.Namespace) -> None:
    """Make ``--data FOLDER`` and ``--no-tune`` the overrides that they stand for, in place."""
    if getattr(args, "data", None) is not None:
        args.opts = [*args.opts, "DATASETS.FPN_EXT.DATA", repr(args.data)]
    if getattr(args, "no_tune", False):
        args.opts = [*args.opts, "MODEL.FPN_EXT.TUNE", "False"]


def data_source(text: str) -> str:
    """A folder or a file; an argparse error for the empty word that an unset variable leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: name a folder of photographs, or a YAML file")
    return text


def _folder(text: str) -> Path:
    """A folder that exists or can be created; otherwise an argparse error."""
    path = Path(text)
    if not text or any(part.exists() and not part.is_dir() for part in (path, *path.parents)):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder, and none can be made there")
    return path


def file_to_write(text: str) -> Path:
    """A writable file; otherwise an argparse error."""
    path = Path(text)
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file")
    _folder(str(path.parent))
    return path


# What is in a JSON file that is none of a report, by keys that are in it together.
_OF_OTHERS = {
    ("images", "annotations"): "annotations or detections",
    ("images", "categories"): "a list of images",
    ("classes", "data_sha256"): "what a training was on",
    ("iterations", "files"): "the record of a training",
    ("iteration",): "the curves of a training",
    ("train", "val"): "a split",
    ("image_id",): "detections",
}
_MOST_OF_A_REPORT = 1 << 26  # bytes


def report_to_write(text: str) -> Path:
    """A writable file; an argparse error, too, where another file than a report has that name."""
    path = file_to_write(text)
    if path.is_file() and (what := _other_than_a_report(path)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is there, and {what}, which the report would replace; name another file"
        )
    return path


def _other_than_a_report(file: Path) -> str:
    """What a file is that ``--json`` may not replace; "" for one that it may."""
    if file.stat().st_size > _MOST_OF_A_REPORT:
        return "larger than a report"
    content = file.read_bytes()
    if not content.strip():
        return ""
    try:
        # Of JSON lines, the first.
        value = json.JSONDecoder().raw_decode(content.decode().lstrip())[0]
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(value, dict | list):
        return "not JSON of a report"
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict):
        return ""
    for names, what in _OF_OTHERS.items():
        if first.keys() >= set(names):
            return what
    if first and all(isinstance(scores, dict) and "AP" in scores for scores in first.values()):
        return "scores of a training"
    return ""


def score(text: str) -> float:
    """A number from 0 to 1; otherwise an argparse error."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def add_output(parser: argparse.ArgumentParser, what: str, required: bool = True) -> None:
    """``--output FOLDER``."""
    parser.add_argument(
        "--output", required=required, type=_folder, metavar="FOLDER", help=f"folder for {what}"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json FILE``."""
    parser.add_argument(
        "--json",
        type=report_to_write,
        metavar="FILE",
        help="write what is reported to this file, as JSON",
    )


def add_detections(parser: argparse.ArgumentParser) -> None:
    """``--min-score`` and ``--label-levels``."""
    parser.add_argument(
        "--min-score",
        type=score,
        default=0.5,
        metavar="S",
        help="of a detection to show, from 0 to 1 (%(default)s)",
    )
    parser.add_argument(
        "--label-levels",
        action="store_true",
        help="label each box with its levels, p3>p4: proposed by P3, pooled from P4; and colour it "
        "by the second instead of by its class",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Detectron2's options for several processes, and ``--num-processes``."""
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="per machine")
    parser.add_argument(
        "--num-processes",
        type=int,
        default=1,
        metavar="N",
        help="processes on the CPU, per machine (with MODEL.DEVICE cpu)",
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="N", help="of this machine")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where several machines meet, tcp://HOST:PORT; auto: a free port of this one",
    )


def add_datasets(parser: argparse.ArgumentParser) -> None:
    """``--datasets NAME ...`` and ``--output FOLDER`` for a proposal file of each."""
    parser.add_argument(
        "--datasets",
        required=True,
        nargs="+",
        metavar="NAME",
        help="registered datasets, for training and test alike",
    )
    add_output(parser, "the files, NAME.safetensors; existing ones are replaced")


def add_top_k(parser: argparse.ArgumentParser) -> None:
    """``--top-k N``."""
    parser.add_argument(
        "--top-k",
        type=int,
        default=2000,
        metavar="N",
        help="max proposals of an image (default: %(default)s)",
    )


def add_proposal_file(parser: argparse.ArgumentParser) -> None:
    """A proposal file, and ``--dataset NAME``."""
    parser.add_argument("file", metavar="FILE", help="a .safetensors, or Detectron2's .pkl")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="the dataset it is for")


def add_sides(parser: argparse.ArgumentParser) -> None:
    """``--config-file``, ``--control`` and ``--allow-different`` of a comparison."""
    add_config(parser)
    parser.add_argument(
        "--control", required=True, metavar="FILE", help="the config it is compared with"
    )
    parser.add_argument(
        "--allow-different",
        action="store_true",
        help="compare configs that differ in more than the components",
    )


def add_boxes_report(parser: argparse.ArgumentParser) -> None:
    """The options of a report on a dataset's boxes: config, dataset and output."""
    add_config(parser, run=True)
    parser.add_argument(
        "--dataset", metavar="NAME", help="a registered dataset, instead of DATASETS.TRAIN"
    )
    add_json(parser)
    add_output(parser, "an image (PNG)", required=False)
