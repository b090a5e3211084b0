"""Checks of a config's names, shapes and files, before anything is built."""

import os
from collections.abc import Iterable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    ProposalNetwork,
)

from .._d2_compat import has_compiled_operators
from ..bottom_up.build import check_bottom_up_name
from ..bottom_up.norms import KINDS
from ..bottom_up.pixels import is_from_library
from ..evaluation.coco import settings_problems
from ..keys import own_keys
from ..modeling.mask_proposals import mask_proposal_problems
from ..modeling.top_blocks import TOP_BLOCK_REGISTRY
from ..names import did_you_mean
from ..registries.architectures import class_count, class_count_key, is_architecture, reads_node
from ..registries.chosen_by import CHOSEN_BY
from ..registries.lookup import check_norm, has_pyramid_heads, inherits, is_pyramid, look_up
from .check_levels import configured_level_problems
from .check_training import determinism_problems, recipe_problems, solver_problems
from .check_values import value_problems
from .defaults import get_cfg, keys_of, leaves, mapping_of, near_keys
from .level_table import level_table

INFERENCE_DTYPES = ("", "float32", "bfloat16", "float16")
RESNET_DEPTHS = (18, 34, 50, 101, 152)
RESNET_BUILDERS = (
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
)


def check_config(cfg: CfgNode, training: bool = False, also_defined: Sequence[str] = ()) -> None:
    """Check, before anything is built, that the names and shapes in a config are consistent.

    Args:
        training: also check what only training needs.
        also_defined: another project's keys within nodes defined by Detectron2 or this project;
            its own nodes need not be listed.

    Raises:
        ValueError: lists every problem with the key, its value and what is required.
    """
    problems = config_problems(cfg, training, also_defined)
    if problems:
        raise problems_error(cfg, problems)


def problems_error(cfg: CfgNode, problems: Sequence[str]) -> ValueError:
    """A config's problems as one error, with the level table if any concern levels."""
    table = level_table(cfg) if list(configured_level_problems(cfg)) else ""
    return ValueError(
        f"{len(problems)} problem(s) in the config:\n"
        + "\n".join(f"  - {problem}" for problem in problems)
        + (f"\nThe levels as configured:\n{table}" if table else "")
    )


def config_problems(
    cfg: CfgNode, training: bool = False, also_defined: Sequence[str] = ()
) -> list[str]:
    """The problems :func:`check_config` raises, one each."""
    return [
        *_undefined_key_problems(cfg, also_defined),
        *_name_problems(cfg),
        *_place_problems(cfg),
        *_cascade_problems(cfg),
        *_operator_problems(cfg),
        *_resnet_problems(cfg),
        *_inference_problems(cfg),
        *_evaluation_problems(cfg),
        *settings_problems(cfg),
        *_bottom_up_problems(cfg),
        *_mask_proposal_problems(cfg),
        *determinism_problems(cfg),
        *solver_problems(cfg),
        *recipe_problems(cfg, training),
        *value_problems(cfg, training),
        *configured_level_problems(cfg),
        *_dataset_problems(cfg, training),
        *_proposal_problems(cfg, training),
    ]


def _undefined_key_problems(cfg: CfgNode, also_defined: Sequence[str]) -> Iterable[str]:
    """Unknown keys set by Python code: yacs accepts any name there."""
    schema = get_cfg()
    valid = {*keys_of(schema), *also_defined}
    for key, value in leaves(cfg, schema):
        if key not in valid and not isinstance(value, CfgNode) and not mapping_of(key):
            yield (
                f"{key} is set to {value!r}, and nothing defines or reads it; "
                f"{near_keys(key, valid)}. If it is another project's: "
                f"check_config(cfg, also_defined=[{key!r}])"
            )


def _name_problems(cfg: CfgNode) -> Iterable[str]:
    model = cfg.MODEL
    has_rpn, has_heads = reads_node(cfg, "RPN"), reads_node(cfg, "ROI_HEADS")
    named = {
        "MODEL.META_ARCHITECTURE": model.META_ARCHITECTURE,
        "MODEL.BACKBONE.NAME": model.BACKBONE.NAME,
        "MODEL.ANCHOR_GENERATOR.NAME": model.ANCHOR_GENERATOR.NAME,
    }
    if has_heads:
        named["MODEL.ROI_HEADS.NAME"] = model.ROI_HEADS.NAME
    if has_rpn:
        named["MODEL.RPN.HEAD_NAME"] = model.RPN.HEAD_NAME
    if has_rpn and model.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
        named["MODEL.PROPOSAL_GENERATOR.NAME"] = model.PROPOSAL_GENERATOR.NAME
    # Empty in Detectron2's defaults, for models without such a head.
    if has_heads and (model.ROI_BOX_HEAD.NAME or has_pyramid_heads(cfg)):
        named["MODEL.ROI_BOX_HEAD.NAME"] = model.ROI_BOX_HEAD.NAME
    if has_heads and model.MASK_ON:
        named["MODEL.ROI_MASK_HEAD.NAME"] = model.ROI_MASK_HEAD.NAME
    if has_heads and model.KEYPOINT_ON:
        named["MODEL.ROI_KEYPOINT_HEAD.NAME"] = model.ROI_KEYPOINT_HEAD.NAME
    lookups = [(CHOSEN_BY[key].registry, name, key) for key, name in named.items()]
    if is_pyramid(cfg):
        lookups.append((TOP_BLOCK_REGISTRY, model.FPN_EXT.TOP_BLOCK, "MODEL.FPN_EXT.TOP_BLOCK"))
        try:
            check_bottom_up_name(model.FPN_EXT.BOTTOM_UP)
        except ValueError as error:
            yield str(error)
    for registry, name, key in lookups:
        try:
            look_up(registry, name, key)
        except ValueError as error:
            yield str(error)


def _place_problems(cfg: CfgNode) -> Iterable[str]:
    """Device and output folder."""
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        yield f"MODEL.DEVICE must be cpu, cuda or cuda:N, got {cfg.MODEL.DEVICE!r}"
    if not cfg.OUTPUT_DIR:
        yield "OUTPUT_DIR is empty; name a folder"
    elif os.path.exists(cfg.OUTPUT_DIR) and not os.path.isdir(cfg.OUTPUT_DIR):
        yield f"OUTPUT_DIR {cfg.OUTPUT_DIR} is a file; name a folder"
    try:
        cfg.OUTPUT_DIR.encode()
    except UnicodeEncodeError:
        yield f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} is not UTF-8, as TensorBoard needs; name another"


def _cascade_problems(cfg: CfgNode) -> Iterable[str]:
    box_head = cfg.MODEL.ROI_BOX_HEAD
    if not (reads_node(cfg, "ROI_HEADS") and cfg.MODEL.ROI_HEADS.NAME in ROI_HEADS_REGISTRY):
        return
    is_cascade = inherits(ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME, "CascadeROIHeads")
    if is_cascade and not box_head.CLS_AGNOSTIC_BBOX_REG:
        yield (
            f"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG must be True for MODEL.ROI_HEADS.NAME "
            f"{cfg.MODEL.ROI_HEADS.NAME}, whose stages refine one box for all classes"
        )


def _operator_problems(cfg: CfgNode) -> Iterable[str]:
    if has_compiled_operators():
        return
    asks = [
        key
        for key, asked in (
            ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE)),
            ("MODEL.ANCHOR_GENERATOR.NAME", "Rotated" in cfg.MODEL.ANCHOR_GENERATOR.NAME),
            ("MODEL.PROPOSAL_GENERATOR.NAME", cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN"),
            ("MODEL.ROI_HEADS.NAME", cfg.MODEL.ROI_HEADS.NAME == "RROIHeads"),
            *(
                (f"MODEL.{head}.POOLER_TYPE", "Rotated" in cfg.MODEL[head].POOLER_TYPE)
                for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")
            ),
        )
        if asked
    ]
    for key in asks:
        yield (
            f"{key} asks for an operator that this Detectron2, installed without its compiled "
            "part, does not have; build Detectron2 from source (docs/start/install.md, 'Your own "
            "Detectron2')"
        )


def _resnet_problems(cfg: CfgNode) -> Iterable[str]:
    """Mistakes on which Detectron2's ResNet builder raises a bare KeyError or AssertionError."""
    model, resnets = cfg.MODEL, cfg.MODEL.RESNETS
    own = is_pyramid(cfg)
    if (model.FPN_EXT.BOTTOM_UP if own else model.BACKBONE.NAME) not in RESNET_BUILDERS:
        return
    if resnets.DEPTH not in RESNET_DEPTHS:
        yield f"MODEL.RESNETS.DEPTH must be one of {RESNET_DEPTHS}, got {resnets.DEPTH}"
    if resnets.DEPTH in (18, 34) and resnets.RES2_OUT_CHANNELS != 64:
        yield (
            f"MODEL.RESNETS.DEPTH {resnets.DEPTH} needs MODEL.RESNETS.RES2_OUT_CHANNELS 64, "
            f"got {resnets.RES2_OUT_CHANNELS}"
        )
    try:
        check_norm(resnets.NORM, "MODEL.RESNETS.NORM")
    except ValueError as error:
        yield str(error)


def _inference_problems(cfg: CfgNode) -> Iterable[str]:
    dtype = cfg.MODEL.FPN_EXT.INFERENCE_DTYPE
    if dtype not in INFERENCE_DTYPES:
        yield f"MODEL.FPN_EXT.INFERENCE_DTYPE must be one of {INFERENCE_DTYPES}, got {dtype!r}"
    elif dtype == "float16" and cfg.MODEL.DEVICE == "cpu":
        yield "MODEL.FPN_EXT.INFERENCE_DTYPE float16 needs a GPU; on CPU use bfloat16 or float32"
    architectures = ("GeneralizedRCNN", "ProposalNetwork")
    if dtype and not is_architecture(cfg, *architectures):
        yield (
            f"MODEL.FPN_EXT.INFERENCE_DTYPE serves MODEL.META_ARCHITECTURE {architectures}, "
            f"got {cfg.MODEL.META_ARCHITECTURE}; leave it empty"
        )


def _evaluation_problems(cfg: CfgNode) -> Iterable[str]:
    model = cfg.MODEL
    if own_keys(cfg, "TEST").EVALUATE_PROPOSALS:
        key = "TEST.FPN_EXT.EVALUATE_PROPOSALS"
        if _has_precomputed_proposals(cfg):
            yield f"{key} scores a model's own RPN; with precomputed proposals leave it False"
        elif not _is_architecture(cfg, GeneralizedRCNN, ProposalNetwork):
            yield (
                f"{key} needs a model with an RPN (MODEL.META_ARCHITECTURE GeneralizedRCNN or "
                f"ProposalNetwork), got {model.META_ARCHITECTURE}; leave it False"
            )
        elif is_architecture(cfg, "ImagePyramidRCNN"):
            yield (
                f"{key} scores the proposals on one image; MODEL.META_ARCHITECTURE "
                "ImagePyramidRCNN has those on several scales of it, and merges only detections: "
                "leave it False"
            )
    if cfg.TEST.AUG.ENABLED:
        # Detectron2's test-time augmentation raises AssertionErrors on these, after training.
        key = "TEST.AUG.ENABLED"
        if not _is_architecture(cfg, GeneralizedRCNN):
            yield (
                f"{key}: test-time augmentation merges the detections of MODEL.META_ARCHITECTURE "
                f"GeneralizedRCNN, got {model.META_ARCHITECTURE}; leave it False"
            )
        if _has_precomputed_proposals(cfg):
            yield f"{key}: test-time augmentation needs the model's own RPN; leave it False"
        if model.KEYPOINT_ON:
            yield f"{key}: test-time augmentation has no keypoints; leave it False"
        if not cfg.TEST.AUG.MIN_SIZES:
            yield f"{key} needs the shorter sides of its images, TEST.AUG.MIN_SIZES is empty"


def _has_precomputed_proposals(cfg: CfgNode) -> bool:
    return cfg.MODEL.LOAD_PROPOSALS or cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals"


def _is_architecture(cfg: CfgNode, *architectures: type) -> bool:
    """Whether the model's class is one of them, or a subclass."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        return True  # reported elsewhere
    found = META_ARCH_REGISTRY.get(name)
    return isinstance(found, type) and issubclass(found, architectures)


def _bottom_up_problems(cfg: CfgNode) -> Iterable[str]:
    own = cfg.MODEL.FPN_EXT
    if not all(isinstance(name, str) and name for name in own.FREEZE):
        yield f"MODEL.FPN_EXT.FREEZE must list names of modules, got {own.FREEZE}"
    if own.BOTTOM_UP_NORM not in ("", *KINDS):
        yield (
            f"MODEL.FPN_EXT.BOTTOM_UP_NORM must be one of {('', *KINDS)}, "
            f"got {own.BOTTOM_UP_NORM!r}"
        )
    if own.BIFPN_REPEATS < 1:
        yield f"MODEL.FPN_EXT.BIFPN_REPEATS must be at least 1, got {own.BIFPN_REPEATS}"
    if is_from_library(cfg) and "ImageNetPretrained" in cfg.MODEL.WEIGHTS:
        yield (
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} are those of a network of Detectron2's, not of "
            f"{own.BOTTOM_UP}: name a file of its own in MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS and leave "
            'MODEL.WEIGHTS ""; to train from scratch, leave both ""'
        )


def _mask_proposal_problems(cfg: CfgNode) -> Iterable[str]:
    return mask_proposal_problems(cfg) if is_architecture(cfg, "PyramidMaskProposals") else ()


def _dataset_problems(cfg: CfgNode, training: bool) -> Iterable[str]:
    if training and not cfg.DATASETS.TRAIN:
        yield "DATASETS.TRAIN names no dataset to train on"
    count_key, count = class_count_key(cfg), class_count(cfg)
    # Those of another split are found by name (fpn_ext.data.class_numbers).
    by_name = _knows_trained_classes(cfg)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                yield (
                    f"DATASETS.{key}: {name!r} is not a registered dataset; "
                    + did_you_mean(name, DatasetCatalog.keys())
                )
                continue
            # COCO-format datasets may know their classes only once loaded.
            classes = MetadataCatalog.get(name).get("thing_classes")
            if key == "TEST" and by_name:
                continue
            if count_key and classes and len(classes) != count:
                yield (
                    f"{count_key} is {count}, but DATASETS.{key} {name!r} has {len(classes)} "
                    "classes"
                )


def _knows_trained_classes(cfg: CfgNode) -> bool:
    count = class_count(cfg)
    return count > 0 and any(
        len(MetadataCatalog.get(name).get("thing_classes") or ()) == count
        for name in cfg.DATASETS.TRAIN
        if name in DatasetCatalog
    )


def _proposal_problems(cfg: CfgNode, training: bool) -> Iterable[str]:
    """Precomputed proposals: keys that go together, and one file per dataset."""
    name, load = cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.LOAD_PROPOSALS
    if name == "PrecomputedProposals" and not load:
        yield "MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals needs MODEL.LOAD_PROPOSALS True"
    if not load:
        return
    if name != "PrecomputedProposals":
        yield (
            "MODEL.LOAD_PROPOSALS True needs MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals, "
            f"got {name}, which makes proposals of its own"
        )
    for split in ("TRAIN", "TEST") if training else ("TEST",):
        names, files = cfg.DATASETS[split], cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
        if len(names) != len(files):
            yield (
                f"DATASETS.PROPOSAL_FILES_{split} has {len(files)} files for the {len(names)} "
                f"datasets of DATASETS.{split}; MODEL.LOAD_PROPOSALS needs one for each, in order"
            )
        for file in files:
            if "://" not in file and not os.path.isfile(file):
                yield (
                    f"DATASETS.PROPOSAL_FILES_{split}: no file {file}; fpn-ext proposals makes them"
                )
        limit = cfg.DATASETS[f"PRECOMPUTED_PROPOSAL_TOPK_{split}"]
        if limit < 1:
            yield f"DATASETS.PRECOMPUTED_PROPOSAL_TOPK_{split} must be at least 1, got {limit}"
