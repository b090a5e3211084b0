"""Print a config and all that follows from it; --plain: for tools that know Detectron2 alone.

With --plain the names and keys are Detectron2's own, so that its get_cfg() loads the file, and the
model is the same with the same weights. A model that Detectron2 cannot describe is an error that
says why; what is left out of the file is said on standard error.

examples:
  fpn-ext config --run output/mine --plain > plain.yaml
  fpn-ext config --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
"""

import argparse
import sys

from .options import add_config, take_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, run=True)
    parser.add_argument(
        "--plain", action="store_true", help="Detectron2's own names and keys, and no others"
    )


def run(args: argparse.Namespace) -> None:
    from ..config.load import load_config
    from ..config.plain import plain_config
    from ..config.prepare import prepare
    from ..inference.predictor import without_unknown_datasets

    take_run(args)
    if args.run is not None:
        args.opts += without_unknown_datasets(args.config_file, args.opts)
    cfg, notes = prepare(args.config_file, args.opts)
    # For the machine that loads it, not this one.
    cfg.MODEL.DEVICE = load_config(args.config_file, args.opts).MODEL.DEVICE
    if args.plain:
        cfg, left_out = plain_config(cfg)
        notes += left_out
    for note in notes:
        print(note, file=sys.stderr)
    print(cfg.dump(), end="")
