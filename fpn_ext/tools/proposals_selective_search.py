"""Make proposals with OpenCV's selective search; needs pip install 'fpn-ext[selective-search]'.

It gives an order, not scores: the first box gets 0, the second -1, and so on.

example:
  fpn-ext proposals selective-search --datasets coco_2017_val --output proposals
"""

import argparse
import functools

from .options import add_datasets, add_top_k


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_datasets(parser)
    add_top_k(parser)
    parser.add_argument(
        "--quality",
        action="store_true",
        help="more boxes, several times slower, instead of its fast mode",
    )


def run(args: argparse.Namespace) -> None:
    from ..proposals.sources import selective_search_proposals, write_for_each

    search = functools.partial(selective_search_proposals, top_k=args.top_k, quality=args.quality)
    write_for_each(args.datasets, args.output, search)
