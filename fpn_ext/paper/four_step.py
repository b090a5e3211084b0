"""The 4-step training that makes RPN and detector share features (paper, Sec. 5.2.3, Table 5).

    fpn-ext four-step --rpn configs/paper/table5/rpn_R_50.yaml \\
        --detector configs/paper/table5/fast_rcnn_R_50.yaml --output output/paper/table5/R_50

1. An RPN, from its config's weights.
2. A Fast R-CNN on the RPN's proposals, from its config's weights. Nothing is shared yet.
3. An RPN on the detector's features: backbone of step 2, frozen; only the RPN's layers are trained.
4. A Fast R-CNN on the proposals of step 3: backbone and box head of step 2, the backbone frozen;
   only the box head is trained. Both now share one backbone and are merged into one Faster R-CNN.

The steps are those of Ren et al. (Faster R-CNN, 2015), cited by the paper, which does not say what
is shared: here the backbone including the pyramid; steps 3 and 4 are as long as 1 and 2.
"""

import argparse
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from ..config.digest import config_digest
from ..config.load import load_config, written_keys
from ..config.numerics import unresolved_yaml
from ..config.prepare import prepare, prepare_loaded
from ..data.summary import summary_of
from ..engine import jobs
from ..engine.finished import is_finished
from ..files.atomic import replacing, write_text
from ..files.run_folder import left_by_a_run
from ..files.trained_on import FILE, KEY
from ..files.weight_files import read_weights
from ..proposals.loader import training_data
from ..reporting.json_files import write_json

SHARED = "backbone"
DETECTOR = "roi_heads"
RPN = "proposal_generator"
RECORD = "four_step.json"  # of a step: the digest of its config


@dataclass(frozen=True)
class Step:
    """One of the four training steps.

    Args:
        name: its folder under the output folder.
        is_rpn: an RPN, whose proposals the next step trains on; else a detector.
        weights_from: the step it starts from; "" for its config's weights.
        shares: keeps that step's backbone frozen.
    """

    name: str
    is_rpn: bool
    weights_from: str = ""
    shares: bool = False


STEPS = (
    Step("step1_rpn", is_rpn=True),
    Step("step2_detector", is_rpn=False),
    Step("step3_rpn", is_rpn=True, weights_from="step2_detector", shares=True),
    Step("step4_detector", is_rpn=False, weights_from="step2_detector", shares=True),
)


def step_config(step: Step, rpn: CfgNode, detector: CfgNode, output: Path) -> CfgNode:
    """The config of one step: the RPN's or the detector's, with the step's settings.

    Args:
        rpn: config of a standalone RPN (ProposalNetwork).
        detector: config of a Fast R-CNN on precomputed proposals, on the same backbone.
        output: folder of all the steps.
    """
    cfg = (rpn if step.is_rpn else detector).clone()
    cfg.OUTPUT_DIR = str(output / step.name)
    if step.weights_from:
        cfg.MODEL.WEIGHTS = str(output / step.weights_from / "model_final.pth")
    if step.shares:
        cfg.MODEL.FPN_EXT.FREEZE = [*cfg.MODEL.FPN_EXT.FREEZE, SHARED]
    if not step.is_rpn:
        source = STEPS[STEPS.index(step) - 1]
        for split in ("TRAIN", "TEST"):
            cfg.DATASETS[f"PROPOSAL_FILES_{split}"] = tuple(
                str(_proposals(output, source, name)) for name in cfg.DATASETS[split]
            )
    return cfg


def unified_config(rpn: CfgNode, detector: CfgNode, output: Path) -> CfgNode:
    """The test config of the Faster R-CNN merged from steps 3 and 4."""
    cfg = detector.clone()
    cfg.MODEL.LOAD_PROPOSALS = False
    cfg.MODEL.PROPOSAL_GENERATOR = rpn.MODEL.PROPOSAL_GENERATOR
    cfg.MODEL.RPN = rpn.MODEL.RPN.clone()
    cfg.MODEL.ANCHOR_GENERATOR = rpn.MODEL.ANCHOR_GENERATOR
    # As many as the detector takes from a file.
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = detector.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    cfg.OUTPUT_DIR = str(output)
    return cfg


def unify(rpn_file: Path, detector_file: Path, output: Path) -> None:
    """Write one checkpoint with the RPN of one and the backbone and box head of the other.

    Raises:
        ValueError: their backbones differ.
    """
    rpn, whole = (read_weights(str(file)) for file in (rpn_file, detector_file))
    rpn, detector = rpn["model"], whole["model"]
    beside = {KEY: whole[KEY]} if KEY in whole else {}
    shared = [name for name in detector if name.startswith(f"{SHARED}.")]
    different = [n for n in shared if n not in rpn or not torch.equal(rpn[n], detector[n])]
    if different or not shared:
        raise ValueError(
            f"{rpn_file} and {detector_file} do not share their backbone: "
            f"{different[:3] or 'no tensor'} of {len(shared)} differ"
        )
    own = {name: tensor for name, tensor in rpn.items() if name.startswith(f"{RPN}.")}
    with replacing(output) as stream:
        torch.save({"model": {**detector, **own}, **beside}, stream)


def check_pair(rpn: CfgNode, detector: CfgNode) -> None:
    """Raise ValueError unless the configs are an RPN and a Fast R-CNN with the same backbone."""
    problems = []
    if rpn.MODEL.META_ARCHITECTURE != "ProposalNetwork":
        problems.append(
            "--rpn needs MODEL.META_ARCHITECTURE ProposalNetwork, "
            f"got {rpn.MODEL.META_ARCHITECTURE}"
        )
    if detector.MODEL.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
        problems.append(
            "--detector needs MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals, "
            f"got {detector.MODEL.PROPOSAL_GENERATOR.NAME}"
        )
    for key in ("BACKBONE", "RESNETS", "FPN", "PIXEL_MEAN", "PIXEL_STD"):
        if rpn.MODEL[key] != detector.MODEL[key]:
            problems.append(f"MODEL.{key} must be the same in both, to be shared")
    for key in ("BOTTOM_UP", "BOTTOM_UP_NORM", "IN_FEATURES", "TOP_BLOCK"):
        if rpn.MODEL.FPN_EXT[key] != detector.MODEL.FPN_EXT[key]:
            problems.append(f"MODEL.FPN_EXT.{key} must be the same in both, to be shared")
    if problems:
        raise ValueError("\n".join(problems))


def digest(step: Step, rpn: CfgNode, detector: CfgNode) -> str:
    """A hash of a step's config, independent of folders."""
    cfg = step_config(step, rpn, detector, Path())
    cfg.OUTPUT_DIR = ""
    cfg.MODEL.WEIGHTS = step.weights_from or cfg.MODEL.WEIGHTS
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    return config_digest(cfg)


def check_earlier(rpn: CfgNode, detector: CfgNode, output: Path) -> None:
    """Raise unless the steps in a folder are the first ones of these configs.

    Raises:
        ValueError: a step was made with another config, or an earlier one of it is not there.
    """
    begun = [step for step in STEPS if left_by_a_run(output / step.name)]
    for step in begun:
        record = output / step.name / RECORD
        made_with = json.loads(record.read_text()) if record.is_file() else {}
        if made_with.get("config_sha256") != digest(step, rpn, detector):
            raise ValueError(
                f"{output / step.name} was made with another config: move it and the steps after "
                "it away, or name another --output"
            )
    missing = [step.name for step in STEPS[: len(begun)] if step not in begun]
    if missing:
        raise ValueError(
            f"{output / begun[-1].name} is there and {missing[0]} is not, which it was made from: "
            "move it away, or name another --output"
        )


def check_same_data(now: str, output: Path) -> None:
    """Raise unless the RPNs in a folder were trained on these data.

    Args:
        now: the digest of what an RPN is trained on (:func:`fpn_ext.data.digest.data_digest`).

    Raises:
        ValueError: images, sizes or boxes changed since; names the step.
    """
    for step in STEPS:
        record = output / step.name / FILE
        if step.is_rpn and record.is_file():
            before = json.loads(record.read_text()).get("data_sha256")
            if before and before != now:
                raise ValueError(
                    f"{output / step.name} was trained on other data: images or boxes changed "
                    "since. Move it and the steps after it away, or name another --output"
                )


def train(
    step: Step,
    rpn: CfgNode,
    detector: CfgNode,
    output: Path,
    num_gpus: int,
    explicitly_set: Collection[str] = (),
) -> None:
    """Run one step; skip it if it is finished, resume it if it was interrupted.

    Args:
        rpn, detector, output: as in :func:`step_config`; the configs as loaded, since each command
            prepares its own.
        num_gpus: per training; 0 for the default of ``fpn-ext train``.
        explicitly_set: the keys set explicitly in the step's config.

    Raises:
        RuntimeError: training or proposal generation failed; names its log.
    """
    cfg = step_config(step, rpn, detector, output)
    folder = output / step.name
    config_file = folder / "four_step.yaml"
    write_text(config_file, unresolved_yaml(cfg, explicitly_set))
    write_json(folder / RECORD, {"config_sha256": digest(step, rpn, detector)})
    start = f"starts from {cfg.MODEL.WEIGHTS or 'random weights'}"
    trained = RPN if step.is_rpn else DETECTOR
    frozen = f"{SHARED} frozen, trains {trained}" if step.shares else f"trains {SHARED}, {trained}"
    print(f"{step.name}: {start}; {frozen}", flush=True)
    if not is_finished(folder):
        arguments = ["train", "--config-file", str(config_file)]
        arguments += ["--num-gpus", str(num_gpus)] if num_gpus else []
        arguments += ["--resume"] if left_by_a_run(folder) else []
        jobs.run(arguments, folder / "train.log")
    if step.is_rpn:
        datasets = [*detector.DATASETS.TRAIN, *detector.DATASETS.TEST]
        if not all(_proposals(output, step, name).exists() for name in datasets):
            arguments = ["proposals", "generate", "--config-file", str(config_file)]
            arguments += ["--datasets", *datasets, "--output", str(folder / "proposals")]
            arguments += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
            jobs.run(arguments, folder / "proposals.log")
    for name in cfg.DATASETS.TEST:
        print(f"{step.name}: {_scores(folder, name)} on {name}", flush=True)


def _proposals(output: Path, step: Step, dataset: str) -> Path:
    return output / step.name / "proposals" / f"{dataset}.safetensors"


def _scores(folder: Path, dataset: str) -> str:
    file = folder / "inference" / dataset / "results.json"
    scores: dict[str, dict[str, Any]] = json.loads(file.read_text())
    shown = ("AR@100", "AR@1000", "AP", "AP50")
    return ", ".join(
        f"{metric} {of_task[metric]:.1f}"
        for of_task in scores.values()
        for metric in shown
        if of_task.get(metric) is not None
    )


def four_step(args: argparse.Namespace) -> None:
    """Implements ``fpn-ext four-step``.

    Raises:
        FileNotFoundError, ValueError: invalid configs; other ones than those of the steps that are
            there, or other data.
        RuntimeError: a step failed; names its log.
    """
    rpn, detector = (load_config(file, args.opts) for file in (args.rpn, args.detector))
    check_pair(rpn, detector)
    output = Path(args.output).absolute()
    check_earlier(rpn, detector, output)
    prepared, notes = prepare(args.rpn, args.opts, training=True, weights="start")
    print("\n".join(notes))
    check_same_data(summary_of(training_data(prepared)["records"]).sha256, output)
    # The detector's proposal files do not exist yet: check it with the RPN in it.
    unified = unified_config(rpn, detector, output)
    unified.MODEL.WEIGHTS = detector.MODEL.WEIGHTS
    written = {
        is_rpn: written_keys(file, args.opts)
        for is_rpn, file in ((True, args.rpn), (False, args.detector))
    }
    for stage in prepare_loaded(unified, True, "start", written[False]):
        if stage.error:
            raise stage.error
    for step in STEPS[: args.steps]:
        train(step, rpn, detector, output, args.num_gpus, written[step.is_rpn])
    if args.steps < len(STEPS):
        return
    third, fourth = (output / step.name / "model_final.pth" for step in STEPS[2:])
    unify(third, fourth, output / "model_final.pth")
    config_file = output / "config.yaml"
    unified = unified_config(rpn, detector, output)
    write_text(config_file, unresolved_yaml(unified, written[False]))
    evaluate = ["eval", "--config-file", str(config_file)]
    jobs.run(evaluate, output / "evaluate.log")
    for name in detector.DATASETS.TEST:
        print(f"one Faster R-CNN, shared backbone: {_scores(output, name)} on {name}")
    print(f"{output / 'model_final.pth'}: to use with --config-file {config_file}")
