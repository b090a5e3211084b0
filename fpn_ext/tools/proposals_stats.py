"""Measure a file of proposals on a dataset.

Average recall (AR) of the 10, 100 and 1000 best boxes of each image, of small, medium and large
objects; boxes per image; share of images with boxes.

example:
  fpn-ext proposals stats proposals/coco_2017_val.safetensors --dataset coco_2017_val
"""

import argparse

from .options import add_json, add_proposal_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_proposal_file(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from ..data.datasets import check_registered, register_datasets
    from ..evaluation.proposal_stats import as_text, proposal_stats
    from ..reporting.json_files import write_json

    register_datasets()
    check_registered([args.dataset])
    stats = proposal_stats(args.file, args.dataset)
    print(f"{args.file} on {args.dataset!r}, average recall in percent:\n\n{as_text(stats)}")
    if args.json:
        write_json(args.json, stats)
