"""Set a config against its control: two models that are the same in all but the components.

    python -m fpn_ext.compare weights --weights output/demo/model_final.pth \\
        --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
        --control configs/demo/faster_rcnn_R_18_FPN_builtin.yaml
    python -m fpn_ext.compare train --seeds 1 2 3 --output output/compare \\
        --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
        --control configs/demo/faster_rcnn_R_18_FPN_builtin.yaml
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import compare_training, compare_weights
from .compare_configs import differences, load_sides, warnings
from .json_files import plain, write_json
from .provenance import commit, hardware, versions

WEIGHTS = """One checkpoint in both models. How far every stage, the detections and the scores
differ, how long an image takes and how much memory. Ends with exit code 1 where a difference is
larger than the project's parity tests hold."""
TRAIN = """Both models are trained, with train_net.py, from the same seeds. Mean and spread of
every score, and the difference of the means with its standard error. Started again, it goes on
where it was interrupted."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    both = argparse.ArgumentParser(add_help=False)
    add = both.add_argument
    add("--config-file", required=True, metavar="YAML", help="the config")
    add("--control", required=True, metavar="YAML", help="the config it is set against")
    help_on_different = "compare configs that differ in more than the components"
    add("--allow-different", action="store_true", help=help_on_different)

    parser = argparse.ArgumentParser(
        prog="python -m fpn_ext.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modes = parser.add_subparsers(dest="mode", required=True)

    weights = modes.add_parser("weights", parents=[both], help=WEIGHTS, description=WEIGHTS)
    add = weights.add_argument
    add("--weights", required=True, help="a .pth or .pkl file, or detectron2://... (model zoo)")
    add("--images", type=int, metavar="N", help="the first N of each data set; default: all")
    add("--rounds", type=int, default=5, metavar="R", help="of timing, 0 for none; default 5")
    add("--output", type=Path, metavar="DIR", help="folder for the report and the detections")

    train = modes.add_parser("train", parents=[both], help=TRAIN, description=TRAIN)
    add = train.add_argument
    add("--seeds", type=int, nargs="+", required=True, metavar="SEED", help="one training each")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for runs and report")
    add("--num-gpus", type=int, default=1, metavar="N", help="as of train_net.py; default 1")

    for mode in (weights, train):
        help_on_opts = "overrides of both configs"
        mode.add_argument("opts", nargs="*", metavar="KEY VALUE", help=help_on_opts)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a difference is beyond what the parity tests hold."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    began = time.perf_counter()
    training = args.mode == "train"
    sides = load_sides(args.config_file, args.control, args.opts, training)
    remarks = _remarks(sides, training, args.allow_different)
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    mode = compare_training if training else compare_weights
    results = _train(sides, args) if training else _weights(sides, args)
    about = {
        "command": shlex.join(["python", "-m", "fpn_ext.compare", *argv]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(sides["ours"].MODEL.DEVICE),
        "threads": torch.get_num_threads(),
        **versions(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    report = plain({"about": about, "remarks": remarks, **results})
    lines = [f"- {key}: {value}" for key, value in about.items()]
    lines += [f"- **{remark}**" for remark in remarks]
    title = f"# ours: {args.config_file}, control: {args.control}"
    text = "\n\n".join([title, "\n".join(lines), mode.markdown(report)])
    print(text)
    if args.output:
        write_json(args.output / f"{args.mode}.json", report)
        (args.output / f"{args.mode}.md").write_text(text + "\n")
    return 1 if results.get("agrees") is False else 0


def _remarks(sides: dict[str, Any], training: bool, allow_different: bool) -> list[str]:
    different = [
        f"{d['key']} is {d['ours']!r} in ours, {d['control']!r} in the control"
        for d in differences(sides, ("OUTPUT_DIR", "SEED" if training else "MODEL.WEIGHTS"))
    ]
    if different and not allow_different:
        raise ValueError(
            "--config-file and --control differ in more than the components (--allow-different "
            "compares them all the same):" + "".join(f"\n  - {line}" for line in different)
        )
    return [*different, *warnings(sides)]


def _weights(sides: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    for option, value, least in (("--images", args.images, 1), ("--rounds", args.rounds, 0)):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        return compare_weights.compare_weights(
            sides, args.weights, args.images, args.rounds, folder
        )


def _train(sides: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    files = {"ours": args.config_file, "control": args.control}
    return compare_training.compare_training(
        sides, files, args.opts, args.seeds, args.output, args.num_gpus
    )


if __name__ == "__main__":
    sys.exit(main())
