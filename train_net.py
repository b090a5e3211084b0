"""Train or evaluate a config. The options are those of Detectron2's own tools/train_net.py.

python train_net.py --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/demo/model_final.pth
python train_net.py --config-file ... --num-gpus 8    # torchrun and srun: docs/distributed.md

Training begins with the weights of MODEL.WEIGHTS; with everything of OUTPUT_DIR's last checkpoint
(--resume); or with weights and optimizer of MODEL.WEIGHTS and a new schedule (--extend).
"""

import argparse
from collections import OrderedDict

import fpn_ext  # first: it makes an uncompiled Detectron2 v0.6 importable
from fpn_ext import distributed
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fpn_ext.checkpoint import CompleteCheckpointer, checkpoints_in
from fpn_ext.data import register_datasets
from fpn_ext.repeatable import use_deterministic_algorithms
from fpn_ext.schedule import learning_rate_note, scale_schedule
from fpn_ext.trainer import Trainer


def setup(args) -> CfgNode:
    """The frozen config of the command line; logging, seed and output folder set up from it."""
    if args.extend and (args.resume or args.eval_only):
        raise ValueError("--extend begins a training; leave --resume and --eval-only out")
    cfg = fpn_ext.load_config(args.config_file, args.opts)
    device_note = fpn_ext.resolve_device(cfg)
    register_datasets()
    fpn_ext.check_config(cfg, training=not args.eval_only)
    resume = args.resume and checkpoints_in(cfg.OUTPUT_DIR)
    fpn_ext.check_weights(
        cfg,
        required=args.extend or (args.eval_only and not resume),
        from_the_start=not args.eval_only and not resume,
    )
    pixel_notes = fpn_ext.resolve_bottom_up(cfg)
    if cfg.MODEL.FPN_EXT.DETERMINISTIC:
        use_deterministic_algorithms()
    cfg, scaled = scale_schedule(cfg, comm.get_world_size())
    cfg.freeze()
    default_setup(cfg, args)
    logger = setup_logger(
        output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="fpn_ext", abbrev_name="fpn"
    )
    logger.info(distributed.started_by())
    if device_note:
        logger.warning(device_note)
    if scaled:
        logger.info("SOLVER.REFERENCE_WORLD_SIZE: %s", ", ".join(scaled))
    notes = pixel_notes if args.eval_only else [*pixel_notes, learning_rate_note(cfg)]
    for note in filter(None, notes):
        logger.info(note)
    logger.info("levels:\n%s", fpn_ext.level_table(cfg) or "  of no known strides")
    return cfg


def main(args) -> OrderedDict:
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        CompleteCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
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
    """Detectron2's options, --num-processes and --extend."""
    parser = distributed.argument_parser()
    parser.add_argument(
        "--extend",
        action="store_true",
        help="begin a new schedule with the weights and the optimizer's state of MODEL.WEIGHTS",
    )
    return parser


def device(args) -> str:
    """``MODEL.DEVICE``, as the command line and this machine have it."""
    cfg = fpn_ext.load_config(args.config_file, args.opts)
    fpn_ext.resolve_device(cfg)
    return cfg.MODEL.DEVICE


if __name__ == "__main__":
    args = argument_parser().parse_args()
    distributed.launch(main, args, device(args))
