"""Train or evaluate a config. The options are those of Detectron2's own tools/train_net.py.

python train_net.py --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/demo/model_final.pth

Training begins with the weights of MODEL.WEIGHTS; with everything of OUTPUT_DIR's last checkpoint
(--resume); or with weights and optimizer of MODEL.WEIGHTS and a new schedule (--extend).
"""

import argparse
import os
from collections import OrderedDict
from pathlib import Path

import fpn_ext  # first: it makes an uncompiled Detectron2 v0.6 importable
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fpn_ext.checkpoint import SafeCheckpointer, checkpoints_in
from fpn_ext.data import register_datasets
from fpn_ext.evaluation import build_evaluator, write_results
from fpn_ext.optimize import model_for_inference
from fpn_ext.repeatable import use_deterministic_algorithms
from fpn_ext.trainer import ResumableTrainer


class Trainer(ResumableTrainer):
    """The project's trainer, with the evaluator that each data set's metadata asks for."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        # A folder per data set: Detectron2's single one lets the second overwrite the first.
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        results = super().test(cfg, model_for_inference(cfg, model), evaluators)
        if comm.is_main_process():
            # Detectron2 leaves the data set's name out when there is only one.
            single = len(cfg.DATASETS.TEST) == 1
            by_dataset = {cfg.DATASETS.TEST[0]: results} if single else results
            for dataset_name, scores in by_dataset.items():
                file = Path(cfg.OUTPUT_DIR, "inference", dataset_name, "results.json")
                write_results(scores, file)
        return results


def setup(args) -> CfgNode:
    """The frozen config of the command line; logging, seed and output folder set up from it."""
    if args.extend and (args.resume or args.eval_only):
        raise ValueError("--extend begins a training; leave --resume and --eval-only out")
    cfg = fpn_ext.load_config(args.config_file, args.opts)
    device_note = fpn_ext.resolve_device(cfg)
    register_datasets()
    fpn_ext.check_config(cfg, training=not args.eval_only)
    resume = args.resume and checkpoints_in(cfg.OUTPUT_DIR)
    fpn_ext.check_weights(cfg, required=args.extend or (args.eval_only and not resume))
    if cfg.MODEL.FPN_EXT.DETERMINISTIC:
        use_deterministic_algorithms()
    cfg.freeze()
    default_setup(cfg, args)
    logger = setup_logger(
        output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="fpn_ext", abbrev_name="fpn"
    )
    if device_note:
        logger.warning(device_note)
    return cfg


def main(args) -> OrderedDict:
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    if args.extend:
        trainer.extend()
    else:
        trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's options and --extend."""
    parser = default_argument_parser()
    parser.add_argument(
        "--extend",
        action="store_true",
        help="begin a new schedule with the weights and the optimizer's state of MODEL.WEIGHTS",
    )
    return parser


if __name__ == "__main__":
    args = argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
