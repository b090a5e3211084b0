"""Compare a config with its control: two models that differ only in their components.

    fpn-ext compare weights --weights output/demo_R_18/model_final.pth \\
        --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
        --control configs/demo/faster_rcnn_R_18_FPN_builtin.yaml
    fpn-ext compare train --seeds 1 2 3 --output output/compare \\
        --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
        --control configs/demo/faster_rcnn_R_18_FPN_builtin.yaml
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import write_text
from ..reporting.json_files import plain, write_json
from ..reporting.provenance import command_line, commit, hardware, versions
from . import compare_training, compare_weights
from .compare_configs import differences, load_sides, warnings


def compare(args: argparse.Namespace, mode: str) -> int:
    """Implements ``fpn-ext compare weights`` and ``fpn-ext compare train``.

    Args:
        mode: ``"weights"`` or ``"train"``.

    Returns:
        The exit status: 1 if a difference exceeds what the parity tests allow.

    Raises:
        FileNotFoundError, TypeError, ValueError: invalid arguments.
    """
    began = time.perf_counter()
    training = mode == "train"
    sides = load_sides(args.config_file, args.control, args.opts, training)
    remarks = _remarks(sides, training, args.allow_different)
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    markdown = (compare_training if training else compare_weights).markdown
    results = _train(sides, args) if training else _weights(sides, args)
    about = {
        "command": command_line(),
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
    text = "\n\n".join([title, "\n".join(lines), markdown(report)])
    print(text)
    if results.get("agrees") is False:
        for remark in remarks:
            print(f"note, it may be why the two do not agree: {remark}", file=sys.stderr)
    if args.output:
        write_json(args.output / f"{mode}.json", report)
        write_text(args.output / f"{mode}.md", text + "\n")
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
    for option, value, least in (
        ("--num-images", args.num_images, 1),
        ("--rounds", args.rounds, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        return compare_weights.compare_weights(
            sides, args.weights, args.num_images, args.rounds, folder
        )


def _train(sides: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    files = {"ours": args.config_file, "control": args.control}
    return compare_training.compare_training(
        sides, files, args.opts, args.seeds, args.output, args.num_gpus
    )
