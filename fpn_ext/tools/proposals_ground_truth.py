"""Take the ground truth as proposals: the upper bound for any box head.

Crowd regions are left out; all boxes have the same score.

example:
  fpn-ext proposals ground-truth --datasets coco_2017_val --output proposals
"""

import argparse

from .options import add_datasets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_datasets(parser)


def run(args: argparse.Namespace) -> None:
    from ..proposals.sources import ground_truth_proposals, write_for_each

    write_for_each(args.datasets, args.output, ground_truth_proposals)
