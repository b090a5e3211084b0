"""Make proposals with a trained RPN, a file for each dataset.

The model is a ProposalNetwork or a detector with an RPN inside; images are resized as for a test,
none is left out, and boxes are in pixels of the original image. MODEL.RPN.POST_NMS_TOPK_TEST bounds
what the RPN gives. To train and test Fast R-CNN on the files: MODEL.LOAD_PROPOSALS True,
MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals, and a file for each dataset in
DATASETS.PROPOSAL_FILES_TRAIN and DATASETS.PROPOSAL_FILES_TEST.

example:
  fpn-ext proposals generate --config-file configs/paper/table1/c.yaml \\
      --datasets coco_2017_train coco_2017_val --output proposals MODEL.WEIGHTS model_final.pth
"""

import argparse

from .options import add_config, add_datasets, add_top_k, add_tuning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_tuning(parser)
    add_datasets(parser)
    add_top_k(parser)


def run(args: argparse.Namespace) -> None:
    from ..inference.proposals import generate

    generate(args.config_file, args.opts, args.datasets, args.output, args.top_k)
