"""Train or evaluate a config. The options are those of Detectron2's own tools/train_net.py.

python train_net.py --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/demo/model_final.pth
python train_net.py --config-file ... --num-gpus 8    # torchrun and srun: docs/distributed.md

Training begins with the weights of MODEL.WEIGHTS; with everything of OUTPUT_DIR's last checkpoint
(--resume); or with weights and optimizer of MODEL.WEIGHTS and a new schedule (--extend).
"""

import argparse
import logging
import os
from collections import OrderedDict
from pathlib import Path

import fpn_ext  # first: it makes an uncompiled Detectron2 v0.6 importable
from fpn_ext import distributed
from detectron2.config import CfgNode
from detectron2.engine import default_setup, hooks
from detectron2.evaluation import verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fpn_ext.checkpoint import CompleteCheckpointer, checkpoints_in
from fpn_ext.data import register_datasets
from fpn_ext.evaluation import build_evaluator
from fpn_ext.folded_norms import fold_frozen_norms
from fpn_ext.freezing import freeze
from fpn_ext.json_files import write_json
from fpn_ext.nonfinite import NonFiniteGuard
from fpn_ext.optimize import model_for_inference
from fpn_ext.proposal_loader import build_test_loader, training_data
from fpn_ext.recall import model_with_proposals
from fpn_ext.recipes import RecipeTrainer
from fpn_ext.repeatable import RepeatableTrainLoader, use_deterministic_algorithms
from fpn_ext.schedule import learning_rate_note, scale_schedule
from fpn_ext.winograd_training import train_with_winograd


class Trainer(RecipeTrainer):
    """The project's trainer, with the evaluator that each data set's metadata asks for."""

    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.TEST.AUG.ENABLED:
            # Each image takes many passes: as in Detectron2's script, only when training is over.
            cfg, self.cfg = self.cfg, changed(self.cfg, "TEST.AUG.ENABLED", False)
            evaluate = lambda: self.test_with_TTA(cfg, self.evaluated_model)  # noqa: E731
            self.register_hooks([hooks.EvalHook(0, evaluate)])

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        freeze(model, cfg.MODEL.FPN_EXT.FREEZE)
        if cfg.MODEL.FPN_EXT.FOLD_NORMS:
            fold_frozen_norms(model)
        if cfg.MODEL.FPN_EXT.WINOGRAD:
            train_with_winograd(model)
        return model

    def build_hooks(self):
        return [*super().build_hooks(), NonFiniteGuard(self.cfg)]  # last: it raises

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        # A folder per data set: Detectron2's single one lets the second overwrite the first.
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def build_train_loader(cls, cfg):
        return RepeatableTrainLoader(cfg, **training_data(cfg))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Detectron2's; with ``TEST.AUG.ENABLED`` also what :meth:`test_with_TTA` finds.

        With ``evaluators`` of the caller's, without augmentation.
        """
        distributed.share_buffers(model)
        inferring = model_with_proposals(cfg, model_for_inference(cfg, model))
        results = super().test(cfg, inferring, evaluators)
        write(cfg, results, "inference")
        if cfg.TEST.AUG.ENABLED and evaluators is None:
            augmented = by_dataset(cfg, cls.test_with_TTA(cfg, model))
            for dataset_name, scores in by_dataset(cfg, results).items():
                scores.update(augmented[dataset_name])
        return results

    @classmethod
    def test_with_TTA(cls, cfg, model):
        """Scores with Detectron2's test-time augmentation: an image pyramid and flips.

        As :meth:`test` gives them, the names of the tasks ending in ``_TTA``; ``TEST.AUG`` says
        which sizes. Files go to the folder ``inference_TTA``.
        """
        logging.getLogger("fpn_ext").info("evaluating with test-time augmentation (TEST.AUG)")
        distributed.share_buffers(model)
        augmented = GeneralizedRCNNWithTTA(cfg, model_for_inference(cfg, model))
        augmented.training = augmented.model.training  # what an evaluation sets it back to
        cfg = changed(cfg, "MODEL.FPN_EXT.EVALUATE_PROPOSALS", False)  # it merges detections
        evaluators = [
            cls.build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference_TTA", name))
            for name in cfg.DATASETS.TEST
        ]
        results = super().test(cfg, augmented, evaluators)
        for scores in by_dataset(cfg, results).values():
            for task in list(scores):
                scores[task + "_TTA"] = scores.pop(task)
        write(cfg, results, "inference_TTA")
        return results


def changed(cfg, key, value) -> CfgNode:
    """A frozen copy of a config with another value under one key."""
    copy = cfg.clone()
    copy.defrost()
    copy.merge_from_list([key, value])
    copy.freeze()
    return copy


def by_dataset(cfg, results) -> dict:
    """What ``test`` returned, {data set: {task: scores}}, the inner ones the same objects."""
    # Detectron2 leaves the data set's name out when there is only one.
    return {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results


def write(cfg, results, folder) -> None:
    if comm.is_main_process():
        for dataset_name, scores in by_dataset(cfg, results).items():
            write_json(Path(cfg.OUTPUT_DIR, folder, dataset_name, "results.json"), scores)


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
