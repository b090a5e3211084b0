"""Check a file of proposals against a dataset.

All problems are listed, with their count and the first image ids. Exit status: 0 without problems,
else 1.

example:
  fpn-ext proposals validate proposals/coco_2017_val.safetensors --dataset coco_2017_val
"""

import argparse

from .options import add_json, add_proposal_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_proposal_file(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..data.datasets import check_registered, register_datasets
    from ..proposals.validate import inspect_proposals
    from ..reporting.json_files import write_json

    register_datasets()
    check_registered([args.dataset])
    report = inspect_proposals(args.file, args.dataset)
    print(report)
    if args.json:
        write_json(args.json, report.as_json())
    return 1 if report.problems else 0
