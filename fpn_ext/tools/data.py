"""Check a dataset: annotation files, every box, and every image's pixels.

Every problem is listed at once, with its count and the first places. Exit status: 0 without errors,
1 with errors.

examples:
  fpn-ext data --data photos/                        # COCO, VOC, YOLO or DeepPCB, found out
  fpn-ext data --dataset bccd_trainval
  fpn-ext data --coco annotations/instances_train.json --images train/
  fpn-ext data --voc BCCD/ --split trainval --config-file configs/bccd/faster_rcnn_R_18_FPN.yaml
"""

import argparse
from pathlib import Path

from .options import DATA, add_config, add_json, data_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="FOLDER", dest="folder", type=data_source, help=DATA)
    source.add_argument("--dataset", metavar="NAME", help="a registered dataset")
    source.add_argument("--coco", metavar="JSON", type=Path, help="with --images")
    source.add_argument("--voc", metavar="FOLDER", type=Path, help="with --split")
    parser.add_argument("--images", metavar="FOLDER", type=Path)
    parser.add_argument("--split", metavar="NAME", help="a list in ImageSets/Main")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="default: those in the files")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode images")
    add_config(parser, required=False, has_data=False)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..config.load import load_config
    from ..data.annotation_files import read_coco, read_voc
    from ..data.check import check, read_registered
    from ..data.contents_of_data import read_data
    from ..data.datasets import register_datasets
    from ..reporting.json_files import write_json

    _check_options(args)
    cfg = load_config(args.config_file, args.opts) if args.config_file else None
    if args.folder:
        contents = read_data(args.folder)
    elif args.coco:
        contents = read_coco(args.coco, args.images)
    elif args.voc:
        contents = read_voc(args.voc, args.split, args.classes)
    else:
        register_datasets()
        contents = read_registered(args.dataset)
    report = check(contents, cfg, args.workers)
    print(report)
    if args.json:
        write_json(args.json, report.as_json())
    return 1 if report.count("error") else 0


def _check_options(args: argparse.Namespace) -> None:
    for option, needed in (("coco", "images"), ("voc", "split")):
        if bool(getattr(args, option)) != bool(getattr(args, needed)):
            raise ValueError(f"--{option} and --{needed} go together")
    if args.classes and not args.voc:
        raise ValueError("--classes goes with --voc")
    if args.opts and not args.config_file:
        raise ValueError(f"{' '.join(args.opts)}: overrides go with --config-file")
