"""Every config key of this project, and what is checked before a model is built from a config."""

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    GeneralizedRCNN,
    ProposalNetwork,
)

from ._d2_compat import has_compiled_operators
from .all_levels import FUSIONS
from .bottom_ups import check_bottom_up_name
from .level_keys import (
    LEVELS,
    in_features_key,
    level_problems,
    level_rule,
    level_table,
    levels_given,
    resolve_levels,
)
from .levels import stride_named
from .names import (
    DEFAULTS,
    check_norm,
    did_you_mean,
    has_pyramid_heads,
    inherits,
    is_pyramid,
    look_up,
)
from .norms import KINDS
from .top_blocks import TOP_BLOCK_REGISTRY
from .weight_files import check_address

NAMED_BY_LEVEL = "MODEL.FPN_EXT.ANCHOR_SIZES."
ANCHOR_SIZES_AS_LIST = "MODEL.ANCHOR_GENERATOR.SIZES"
INFERENCE_DTYPES = ("", "float32", "bfloat16", "float16")
AMP_DTYPES = ("float16", "bfloat16")
MODES = ("max", "min")
RESNET_DEPTHS = (18, 34, 50, 101, 152)
RESNET_BUILDERS = (
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
)


def add_fpn_ext_config(cfg: CfgNode) -> None:
    """Add this project's keys, all under ``MODEL.FPN_EXT``, to a Detectron2 config in place.

    Adding them to a config that has them changes nothing.
    """
    if "FPN_EXT" in cfg.MODEL:
        return
    cfg.MODEL.FPN_EXT = CfgNode()
    # The network under the pyramid: a name in Detectron2's BACKBONE_REGISTRY, or
    # "torchvision/resnet50", "timm/convnext_tiny", "detectron2/regnetx_4gf". What of the latter the
    # pyramid does not need is not built. Pyramids only, as all keys with BOTTOM_UP.
    cfg.MODEL.FPN_EXT.BOTTOM_UP = "build_resnet_backbone"
    # Local file (.pth, .safetensors) with pretrained weights of the bottom-up, read unless
    # MODEL.WEIGHTS names those of the whole model. Training from scratch: leave both empty.
    cfg.MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS = ""
    # What becomes of the bottom-up's batch norms: "" (they stay), "FrozenBN", "SyncBN", "GN".
    cfg.MODEL.FPN_EXT.BOTTOM_UP_NORM = ""
    # MODEL.PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT follow a bottom-up of torchvision, timm or
    # detectron2/...; True: they stay as they are written.
    cfg.MODEL.FPN_EXT.KEEP_PIXELS = False
    # Names of the bottom-up's maps to build on, fine to coarse; [] for MODEL.FPN.IN_FEATURES.
    # For a bottom-up that is itself a pyramid and reads that key. Pyramids only.
    cfg.MODEL.FPN_EXT.IN_FEATURES = []
    # The pyramid's levels, fine to coarse, e.g. ["p2", "p3", "p4", "p5", "p6"]: what it is built
    # on, what RPN and RoI heads read, and the anchors' sizes follow (docs/levels.md). []: every
    # key says it for itself. Pyramids only.
    cfg.MODEL.FPN_EXT.LEVELS = []
    # How levels above the bottom-up's coarsest map are made: Subsample (the paper),
    # ConvolutionsOnP (of stride 2, on the coarsest P_k), ConvolutionsOnC (on C5). Pyramids only.
    cfg.MODEL.FPN_EXT.TOP_BLOCK = "Subsample"
    # Layers of weighted fusion, one after the other: 3 for EfficientDet-D0. BiFPN only.
    cfg.MODEL.FPN_EXT.BIFPN_REPEATS = 3
    # Anchor sizes by level, e.g. {p2: [32], p3: [64, 90], ...}, in the place of
    # MODEL.ANCHOR_GENERATOR.SIZES; {} for those. PyramidAnchorGenerator only.
    cfg.MODEL.FPN_EXT.ANCHOR_SIZES = CfgNode(new_allowed=True)
    # Bottom-up and pyramid in channels_last memory: faster training on CPU. Pyramids only.
    cfg.MODEL.FPN_EXT.CHANNELS_LAST = False
    # Training on CPU computes 3x3 convolutions of 256 channels and more by Winograd's algorithm,
    # equal to rounding. Detectron2's networks, pyramid and RPN alone; best with CHANNELS_LAST.
    cfg.MODEL.FPN_EXT.WINOGRAD = False
    # Training computes a convolution and the frozen norm after it as one convolution, equal to
    # rounding. Detectron2's networks alone; of use with CHANNELS_LAST.
    cfg.MODEL.FPN_EXT.FOLD_NORMS = False
    # Names of modules (or parameters) of the whole model that training leaves as they are, e.g.
    # ["backbone.bottom_up.stem"]; batch norms in them use their running statistics. train_net.py.
    cfg.MODEL.FPN_EXT.FREEZE = []
    # k0 of Eq. 1: the level a box of CANONICAL_BOX_SIZE is pooled from. PyramidROIHeads only.
    cfg.MODEL.FPN_EXT.CANONICAL_LEVEL = 4
    # The 224 of Eq. 1: side in pixels of the square box that goes to CANONICAL_LEVEL.
    # PyramidROIHeads only.
    cfg.MODEL.FPN_EXT.CANONICAL_BOX_SIZE = 224
    # Which level a box is pooled from: PaperRule (Eq. 1), RoundedRule, LongerSideRule, StrideRule
    # (for any strides), or one of yours. PyramidROIHeads only.
    cfg.MODEL.FPN_EXT.LEVEL_RULE = "PaperRule"
    # What AllLevelsROIHeads make of a box's features of all levels: their "max" or "sum".
    cfg.MODEL.FPN_EXT.LEVEL_FUSION = "max"
    # How boxes are pooled: per_level (torchvision's operator, bit-equal to Detectron2's pooler),
    # weighted_rows (RoIAlign on CPU, fast), fused (RoIAlign on CUDA, one Triton kernel), or auto:
    # the fast one where it can serve.
    # PyramidROIHeads only.
    cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = "auto"
    # Boxes pooled at once, per image, in inference: bounds the memory. ChunkedROIHeads only.
    cfg.MODEL.FPN_EXT.BOXES_PER_CHUNK = 256
    # How train_net.py's evaluations and fpn_ext.predict infer: "" for the model as trained, or the
    # dtype to give to fpn_ext.optimize_for_inference: float32, bfloat16, or float16 (GPU only).
    cfg.MODEL.FPN_EXT.INFERENCE_DTYPE = ""
    # Evaluations score the proposals of a two-stage model's RPN, too, by their average recall.
    # An RPN alone (ProposalNetwork) is always scored.
    cfg.MODEL.FPN_EXT.EVALUATE_PROPOSALS = False
    # Give every proposal a field proposal_level, the level k that proposed it (PyramidRPN), and
    # every detection that of its proposal and pooled_level, the level k that its features were
    # pooled from (PyramidROIHeads).
    cfg.MODEL.FPN_EXT.KEEP_LEVELS = False
    # True: train_net.py has PyTorch compute the same bits on every run, or say which operator
    # cannot; needs a SEED >= 0.
    cfg.MODEL.FPN_EXT.DETERMINISTIC = False
    # What SOLVER.AMP.ENABLED computes in: float16 (GPU only), as Detectron2, or bfloat16.
    cfg.MODEL.FPN_EXT.AMP_DTYPE = "float16"
    # Batches of SOLVER.IMS_PER_BATCH images per iteration: one step with the mean of their
    # gradients. SOLVER.BASE_LR stays as it is.
    cfg.MODEL.FPN_EXT.ACCUMULATE = 1
    # The score, e.g. "bbox/AP", by which evaluations find what goes to model_best.pth; "" for none.
    cfg.MODEL.FPN_EXT.BEST_METRIC = ""
    # What is better by BEST_METRIC: "max" or "min".
    cfg.MODEL.FPN_EXT.BEST_MODE = "max"
    # Evaluations in a row without a better BEST_METRIC after which training ends; 0 for never.
    cfg.MODEL.FPN_EXT.EARLY_STOP_PATIENCE = 0
    # Evaluations during training also compute the losses on DATASETS.TEST, validation_loss/...
    cfg.MODEL.FPN_EXT.VALIDATION_LOSS = False
    # Keep an exponential moving average of the weights, e.g. 0.999 of it per iteration; evaluations
    # during training are of the average. 0 for none.
    cfg.MODEL.FPN_EXT.EMA_DECAY = 0.0


add_fpn_ext_config(DEFAULTS)
DEFAULTS.freeze()


def get_cfg() -> CfgNode:
    """Detectron2's default config plus this project's keys."""
    cfg = get_detectron2_cfg()
    add_fpn_ext_config(cfg)
    return cfg


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a YAML file (and its ``_BASE_``) with ``KEY VALUE ...`` overrides, unfrozen.

    YAML is read by the safe loader: a config cannot run code. Where ``MODEL.FPN_EXT.LEVELS`` is
    set, what follows from it is, too (:func:`resolve_levels`); keys written in the same file, or in
    what comes after it, count as set by hand, and those of the files it is based on do not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: text that is not YAML, a key nobody defined (the nearest valid ones are named),
            a value of the wrong type, an override without a value, levels that do not fit together.
            All there are at once.
        TypeError: the file holds no mapping of keys.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(
            f"config file {config_file!r} does not exist (--config-file); the configs that come "
            "with this project are listed in configs/README.md"
        )
    cfg = get_cfg()
    try:
        _check_is_mapping(config_file)
        cfg.merge_from_file(config_file, allow_unsafe=False)
        _check_no_none(cfg)
    except yaml.YAMLError as error:
        raise ValueError(f"{config_file} is not valid YAML: {error}") from error
    except OSError as error:
        raise FileNotFoundError(
            f"{config_file}: _BASE_ names a file that cannot be read: {error.filename} "
            f"({error.strerror})"
        ) from error
    except (AttributeError, TypeError, RecursionError) as error:
        raise TypeError(
            f"{config_file}: a config must be a mapping of keys, and so must the file that its "
            f"_BASE_ names, which cannot be itself ({error})"
        ) from error
    except (KeyError, AssertionError, ValueError) as error:
        values = CfgNode.load_yaml_with_base(config_file, allow_unsafe=False)
        raise _mistakes(_leaves(values, get_cfg()), config_file, error) from error
    if len(opts) % 2:
        raise ValueError(
            f"overrides come in pairs KEY VALUE, got {len(opts)} words: {' '.join(opts)}"
        )
    _declare_levels(cfg, opts[::2])
    try:
        cfg.merge_from_list(list(opts))
        _check_no_none(cfg)
    except (KeyError, AssertionError, ValueError) as error:
        pairs = zip(opts[::2], opts[1::2], strict=True)
        raise _mistakes(pairs, "the command line", error) from error
    written = [*_written_in(config_file), set(opts[::2])]
    by_hand = _written_since(LEVELS, written) & set(flat(cfg))
    by_hand |= _written_since("MODEL.FPN_EXT.ANCHOR_SIZES", written) & {ANCHOR_SIZES_AS_LIST}
    resolve_levels(cfg, by_hand)
    return cfg


def _declare_levels(cfg: CfgNode, keys: Iterable[str]) -> None:
    """Give ANCHOR_SIZES the levels of overrides such as ``MODEL.FPN_EXT.ANCHOR_SIZES.p2``."""
    for key in keys:
        node, _, level = key.rpartition(".")
        if node == "MODEL.FPN_EXT.ANCHOR_SIZES":
            cfg.MODEL.FPN_EXT.ANCHOR_SIZES.setdefault(level, [])


def _written_in(config_file: str) -> list[set[str]]:
    """The keys that are written in each of the files behind a config, its bases first."""
    with open(config_file, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    bases = content.pop("_BASE_", [])
    written = []
    for base in [bases] if isinstance(bases, str) else bases:
        # Relative to the file that names it, as Detectron2 reads it.
        path = os.path.join(os.path.dirname(config_file), os.path.expanduser(base))
        written += _written_in(path)
    return [*written, set(flat(CfgNode(content)))]


def _written_since(key: str, written: Sequence[set[str]]) -> set[str]:
    """All keys in the last of these sets that has ``key``, or a key of that node, and after it."""
    having = [
        i
        for i, keys in enumerate(written)
        if any(other == key or other.startswith(f"{key}.") for other in keys)
    ]
    return set().union(*written[having[-1] :]) if having else set()


def _check_is_mapping(config_file: str) -> None:
    with open(config_file, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    if not isinstance(content, dict):
        raise TypeError(f"got {type(content).__name__}")


def _check_no_none(cfg: CfgNode) -> None:
    """yacs takes None for a value of any type. Few keys have it as their default."""
    defaults = flat(get_cfg())
    for key, value in flat(cfg).items():
        if value is None and defaults[key] is not None:
            raise ValueError(f"{key} is None")


def _mistakes(values: Iterable[tuple[str, Any]], source: str, error: Exception) -> ValueError:
    """All that is wrong with the values of a file or of the command line, as one error.

    yacs stops at the first: here each is merged alone. ``error`` is what yacs said of them all.
    """
    cfg = get_cfg()
    faults = [_fault(cfg, key, value, source) for key, value in values]
    found = [fault for fault in faults if fault]
    if not found:
        return ValueError(f"{source}: {error.args[0] if error.args else error}")
    if len(found) == 1:
        return ValueError(found[0])
    return ValueError(
        f"{len(found)} problem(s) in {source}:\n" + "\n".join(f"  - {fault}" for fault in found)
    )


def _fault(cfg: CfgNode, key: str, value: Any, source: str) -> str:
    """What is wrong with one value; it is merged into ``cfg`` if nothing is."""
    if source != "the command line":
        line = _line_of(key, source)
        source += f", line {line}" if line else ""
    if key not in (valid := set(_keys(cfg))) and not key.startswith(NAMED_BY_LEVEL):
        return f"{source}: no config key {key!r}; {_near_keys(key, valid)}"
    _declare_levels(cfg, [key])
    default = cfg
    for part in key.split("."):
        default = default[part]
    try:
        cfg.merge_from_list([key, value])
        _check_no_none(cfg)
    except (KeyError, AssertionError, ValueError):
        if isinstance(default, CfgNode):
            return f"{source}: {key} has keys of its own ({', '.join(default)}), got {value!r}"
        kind = type(default).__name__
        return f"{source}: {key} must be of type {kind}, as {default!r} is; got {value!r}"
    return ""


def _near_keys(key: str, valid: Iterable[str]) -> str:
    """The keys that may be meant; if none is near, those beside it in its node."""
    valid = list(valid)
    node = key.rpartition(".")[0]
    beside = [k for k in valid if k.rpartition(".")[0] == node]
    near = difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
    return did_you_mean(key, near or beside or [k for k in valid if "." not in k])


def _line_of(key: str, config_file: str) -> int:
    """The line of a file in which it gives a value to a key; 0 if it does not, but its base."""
    with open(config_file, encoding="utf-8") as file:
        node = yaml.compose(file, Loader=yaml.SafeLoader)
    line = 0
    for part in key.split("."):
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        found = [(name, value) for name, value in entries if name.value == part]
        if not found:
            return 0
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line


def _leaves(values: dict[str, Any], schema: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(key, value) of a file's values, down to what ``schema`` does not divide further."""
    for name, value in values.items():
        known = schema.get(name)
        if isinstance(value, dict) and isinstance(known, CfgNode):
            yield from _leaves(value, known, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _keys(node: CfgNode, prefix: str = "") -> Iterable[str]:
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")


def flat(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """A config as one flat dictionary, for comparing two of them.

    >>> flat(get_cfg())["MODEL.FPN_EXT.CANONICAL_LEVEL"]
    4
    """
    values: dict[str, Any] = {}
    for key, value in node.items():
        if not isinstance(value, CfgNode):
            values[prefix + key] = value
        elif value.is_new_allowed():  # a mapping of the user's, the value of one key
            values[prefix + key] = dict(value)
        else:
            values |= flat(value, f"{prefix}{key}.")
    return values


def resolve_device(cfg: CfgNode) -> str | None:
    """Set ``MODEL.DEVICE`` to "cpu" if it asks for CUDA and there is none; returns what to say.

    Detectron2's default is "cuda", and the configs here are meant for both kinds of machine.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        message = f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r} and no CUDA device is there: using 'cpu'"
        cfg.MODEL.DEVICE = "cpu"
        return message
    return None


def check_config(cfg: CfgNode, training: bool = False, also_defined: Sequence[str] = ()) -> None:
    """Check, before anything is built, that the names and shapes in a config fit together.

    Args:
        training: also require what only training needs.
        also_defined: keys of another project's, within the nodes that Detectron2 or this project
            define; nodes of their own need not be named.

    Raises:
        ValueError: lists every violation with the key, what it holds and what it needs.
    """
    problems = config_problems(cfg, training, also_defined)
    if problems:
        table = level_table(cfg) if list(_level_problems(cfg)) else ""
        raise ValueError(
            f"{len(problems)} problem(s) in the config:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + (f"\nThe levels as configured:\n{table}" if table else "")
        )


def config_problems(
    cfg: CfgNode, training: bool = False, also_defined: Sequence[str] = ()
) -> list[str]:
    """What :func:`check_config` raises, one violation each."""
    return [
        *_undefined_key_problems(cfg, also_defined),
        *_name_problems(cfg),
        *_operator_problems(cfg),
        *_resnet_problems(cfg),
        *_inference_problems(cfg),
        *_evaluation_problems(cfg),
        *_bottom_up_problems(cfg),
        *_determinism_problems(cfg),
        *_solver_problems(cfg),
        *_recipe_problems(cfg, training),
        *_level_problems(cfg),
        *_dataset_problems(cfg, training),
        *_proposal_problems(cfg, training),
    ]


def _undefined_key_problems(cfg: CfgNode, also_defined: Sequence[str]) -> Iterable[str]:
    """Values that Python code has set under names nobody reads: yacs takes any name there."""
    schema = get_cfg()
    valid = {*_keys(schema), *also_defined}
    for key, value in _leaves(cfg, schema):
        if (
            key not in valid
            and not isinstance(value, CfgNode)
            and not key.startswith(NAMED_BY_LEVEL)
        ):
            yield (
                f"{key} is set to {value!r}, and nothing defines or reads it; "
                f"{_near_keys(key, valid)}. If it is another project's: "
                f"check_config(cfg, also_defined=[{key!r}])"
            )


def check_weights(cfg: CfgNode, required: bool, from_the_start: bool = False) -> None:
    """Check that the weights a config names are there, before a model is built for them.

    Args:
        required: there must be a checkpoint of the whole model, ``MODEL.WEIGHTS``.
        from_the_start: a training starts from these weights, and does not go on with a checkpoint
            of its own.

    Raises:
        FileNotFoundError: a local file does not exist.
        ValueError: an http:// address; no checkpoint though one is ``required``: random weights
            detect nothing; or a training would freeze random weights.
    """
    weights, bottom_up_weights = cfg.MODEL.WEIGHTS, cfg.MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS
    if required and not weights:
        raise ValueError(
            "MODEL.WEIGHTS is empty: name the checkpoint, e.g. "
            "MODEL.WEIGHTS output/demo/model_final.pth"
        )
    check_address(weights)
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise FileNotFoundError(f"MODEL.WEIGHTS: no file {weights}")
    if not weights and bottom_up_weights and not os.path.isfile(bottom_up_weights):
        raise FileNotFoundError(f"MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS: no file {bottom_up_weights}")
    if from_the_start and not weights and not bottom_up_weights:
        # A ResNet of Detectron2's does not follow suit: there, this trains, as in Detectron2.
        frozen = [f"MODEL.FPN_EXT.FREEZE {cfg.MODEL.FPN_EXT.FREEZE}"] * bool(
            cfg.MODEL.FPN_EXT.FREEZE
        )
        if _from_a_library(cfg) and cfg.MODEL.BACKBONE.FREEZE_AT > 0:
            frozen.append(f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}")
        if frozen:
            raise ValueError(
                f"{' and '.join(frozen)} would freeze random weights: name the pretrained ones in "
                "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS (or MODEL.WEIGHTS), or freeze nothing "
                "(MODEL.BACKBONE.FREEZE_AT 0)"
            )


def _name_problems(cfg: CfgNode) -> Iterable[str]:
    model = cfg.MODEL
    named = [
        (META_ARCH_REGISTRY, model.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE"),
        (BACKBONE_REGISTRY, model.BACKBONE.NAME, "MODEL.BACKBONE.NAME"),
        (ANCHOR_GENERATOR_REGISTRY, model.ANCHOR_GENERATOR.NAME, "MODEL.ANCHOR_GENERATOR.NAME"),
        (ROI_HEADS_REGISTRY, model.ROI_HEADS.NAME, "MODEL.ROI_HEADS.NAME"),
        (RPN_HEAD_REGISTRY, model.RPN.HEAD_NAME, "MODEL.RPN.HEAD_NAME"),
    ]
    if is_pyramid(cfg):
        named.append((TOP_BLOCK_REGISTRY, model.FPN_EXT.TOP_BLOCK, "MODEL.FPN_EXT.TOP_BLOCK"))
        try:
            check_bottom_up_name(model.FPN_EXT.BOTTOM_UP)
        except ValueError as error:
            yield str(error)
    if model.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
        named.append(
            (
                PROPOSAL_GENERATOR_REGISTRY,
                model.PROPOSAL_GENERATOR.NAME,
                "MODEL.PROPOSAL_GENERATOR.NAME",
            )
        )
    # Empty in Detectron2's defaults, for models without such a head.
    if model.ROI_BOX_HEAD.NAME or has_pyramid_heads(cfg):
        named.append((ROI_BOX_HEAD_REGISTRY, model.ROI_BOX_HEAD.NAME, "MODEL.ROI_BOX_HEAD.NAME"))
    if model.MASK_ON:
        named.append((ROI_MASK_HEAD_REGISTRY, model.ROI_MASK_HEAD.NAME, "MODEL.ROI_MASK_HEAD.NAME"))
    if model.KEYPOINT_ON:
        named.append(
            (
                ROI_KEYPOINT_HEAD_REGISTRY,
                model.ROI_KEYPOINT_HEAD.NAME,
                "MODEL.ROI_KEYPOINT_HEAD.NAME",
            )
        )
    for registry, name, key in named:
        try:
            look_up(registry, name, key)
        except ValueError as error:
            yield str(error)


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
            "part, does not have; build Detectron2 from source (README, 'Your own Detectron2')"
        )


def _resnet_problems(cfg: CfgNode) -> Iterable[str]:
    """What Detectron2's ResNet builder answers with a bare KeyError or AssertionError."""
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
    if dtype and cfg.MODEL.META_ARCHITECTURE not in architectures:
        yield (
            f"MODEL.FPN_EXT.INFERENCE_DTYPE serves MODEL.META_ARCHITECTURE {architectures}, "
            f"got {cfg.MODEL.META_ARCHITECTURE}; leave it empty"
        )


def _evaluation_problems(cfg: CfgNode) -> Iterable[str]:
    model = cfg.MODEL
    if model.FPN_EXT.EVALUATE_PROPOSALS:
        key = "MODEL.FPN_EXT.EVALUATE_PROPOSALS"
        if _has_precomputed_proposals(cfg):
            yield f"{key} scores a model's own RPN; with precomputed proposals leave it False"
        elif not _is_architecture(cfg, GeneralizedRCNN, ProposalNetwork):
            yield (
                f"{key} needs a model with an RPN (MODEL.META_ARCHITECTURE GeneralizedRCNN or "
                f"ProposalNetwork), got {model.META_ARCHITECTURE}; leave it False"
            )
    if cfg.TEST.AUG.ENABLED:
        # What Detectron2's test-time augmentation answers with an AssertionError, after training.
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
    """Whether the model is one of them, or of a class that inherits from one."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        return True  # said elsewhere
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
    if _from_a_library(cfg) and "ImageNetPretrained" in cfg.MODEL.WEIGHTS:
        yield (
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} are those of a network of Detectron2's, not of "
            f"{own.BOTTOM_UP}: name a file of its own in MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS and leave "
            'MODEL.WEIGHTS ""; to train from scratch, leave both ""'
        )


def _from_a_library(cfg: CfgNode) -> bool:
    return is_pyramid(cfg) and "/" in cfg.MODEL.FPN_EXT.BOTTOM_UP


def _determinism_problems(cfg: CfgNode) -> Iterable[str]:
    if cfg.MODEL.FPN_EXT.DETERMINISTIC and cfg.SEED < 0:
        yield f"MODEL.FPN_EXT.DETERMINISTIC needs a fixed seed, got SEED {cfg.SEED}; set SEED 1"
    if cfg.MODEL.FPN_EXT.DETERMINISTIC and cfg.CUDNN_BENCHMARK:
        yield "MODEL.FPN_EXT.DETERMINISTIC: CUDNN_BENCHMARK chooses by time; set it to False"


def _solver_problems(cfg: CfgNode) -> Iterable[str]:
    solver = cfg.SOLVER
    world_size = solver.REFERENCE_WORLD_SIZE
    if solver.IMS_PER_BATCH < 1:
        yield f"SOLVER.IMS_PER_BATCH is the number of images of a step, got {solver.IMS_PER_BATCH}"
    elif world_size > 0 and solver.IMS_PER_BATCH % world_size:
        yield (
            f"SOLVER.REFERENCE_WORLD_SIZE {world_size} is the number of processes that "
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} was written for, among which it does not "
            "divide; set it to that number, or to 0 to scale nothing"
        )


def _recipe_problems(cfg: CfgNode, training: bool) -> Iterable[str]:
    """Mixed precision, accumulation, best checkpoint, early stopping, validation loss, EMA."""
    own = cfg.MODEL.FPN_EXT
    if own.AMP_DTYPE not in AMP_DTYPES:
        yield f"MODEL.FPN_EXT.AMP_DTYPE must be one of {AMP_DTYPES}, got {own.AMP_DTYPE!r}"
    if own.ACCUMULATE < 1:
        yield f"MODEL.FPN_EXT.ACCUMULATE must be at least 1, got {own.ACCUMULATE}"
    if own.BEST_MODE not in MODES:
        yield f"MODEL.FPN_EXT.BEST_MODE must be one of {MODES}, got {own.BEST_MODE!r}"
    if own.EARLY_STOP_PATIENCE < 0:
        yield (
            "MODEL.FPN_EXT.EARLY_STOP_PATIENCE must be 0 (never) or more, got "
            f"{own.EARLY_STOP_PATIENCE}"
        )
    if not 0 <= own.EMA_DECAY < 1:
        yield f"MODEL.FPN_EXT.EMA_DECAY must be 0 (none) or more, under 1, got {own.EMA_DECAY}"
    if own.EARLY_STOP_PATIENCE > 0 and not own.BEST_METRIC:
        yield (
            "MODEL.FPN_EXT.EARLY_STOP_PATIENCE needs the score to go by: set "
            'MODEL.FPN_EXT.BEST_METRIC, e.g. "bbox/AP"'
        )
    if own.BEST_METRIC.startswith("validation_loss/"):
        if not own.VALIDATION_LOSS:
            yield f"MODEL.FPN_EXT.BEST_METRIC {own.BEST_METRIC} needs VALIDATION_LOSS True"
        if own.BEST_MODE == "max":
            yield f"MODEL.FPN_EXT.BEST_METRIC {own.BEST_METRIC} is a loss: set BEST_MODE min"
    if not training:
        return
    if cfg.SOLVER.AMP.ENABLED and own.AMP_DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        yield (
            "SOLVER.AMP.ENABLED: float16 needs a GPU; on CPU set MODEL.FPN_EXT.AMP_DTYPE bfloat16, "
            "or SOLVER.AMP.ENABLED False"
        )
    for key in ("BEST_METRIC", "VALIDATION_LOSS"):
        if own[key] and cfg.TEST.EVAL_PERIOD <= 0:
            yield (
                f"MODEL.FPN_EXT.{key} needs evaluations during training: set TEST.EVAL_PERIOD, "
                f"got {cfg.TEST.EVAL_PERIOD}"
            )
        if own[key] and not cfg.DATASETS.TEST:
            yield f"MODEL.FPN_EXT.{key} needs a data set in DATASETS.TEST, which is empty"


def _level_problems(cfg: CfgNode) -> Iterable[str]:
    """The levels of pyramid, anchors and pooler, which have to fit together."""
    model = cfg.MODEL
    contradictions = level_problems(cfg)
    for problem in contradictions:
        yield f"{problem} (in Python, call fpn_ext.resolve_levels(cfg))"
    if is_pyramid(cfg) and not contradictions:
        if model.FPN_EXT.BOTTOM_UP == "build_resnet_backbone":
            yield from _resnet_pyramid_problems(cfg)
        elif _from_a_library(cfg):
            yield from _absent_map_problems(cfg)
        for key, maps in _asked_maps(cfg):
            strides = [stride_named(name) for name in maps]
            if None not in strides and strides != sorted(strides, key=lambda t: t or 0):
                yield f"{key} must go from fine to coarse, got {maps}"
    yield from _rule_problems(cfg)
    anchors = model.ANCHOR_GENERATOR
    if not inherits(PROPOSAL_GENERATOR_REGISTRY, model.PROPOSAL_GENERATOR.NAME, "RPN"):
        return
    per_map = []
    for key in ("SIZES", "ASPECT_RATIOS"):
        lists = anchors[key]
        if not lists or not isinstance(lists[0], list | tuple):
            continue  # one list for all levels, or what the generator itself refuses
        if len(lists) not in (1, len(model.RPN.IN_FEATURES)):
            yield (
                f"MODEL.ANCHOR_GENERATOR.{key} has {len(lists)} lists {lists} for the "
                f"{len(model.RPN.IN_FEATURES)} maps of MODEL.RPN.IN_FEATURES "
                f"{model.RPN.IN_FEATURES}; it needs one per map, or a single one"
            )
        elif len({len(level) for level in lists}) > 1:
            per_map.append(key)
    if per_map and model.RPN.HEAD_NAME == "StandardRPNHead":
        yield (
            f"MODEL.ANCHOR_GENERATOR.{' and '.join(per_map)}: StandardRPNHead serves all levels, "
            "so each needs the same number of anchors per location; MODEL.RPN.HEAD_NAME "
            "VariedAnchorsRPNHead takes any"
        )


def _rule_problems(cfg: CfgNode) -> Iterable[str]:
    own = cfg.MODEL.FPN_EXT
    if not has_pyramid_heads(cfg):
        return
    if own.LEVEL_FUSION not in FUSIONS:
        yield f"MODEL.FPN_EXT.LEVEL_FUSION must be one of {FUSIONS}, got {own.LEVEL_FUSION!r}"
    try:
        level_rule(cfg)
    except ValueError as error:
        if "fine to coarse" not in str(error):  # said of the key, for every component
            yield str(error)


def _asked_maps(cfg: CfgNode) -> Iterable[tuple[str, list[str]]]:
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
        yield "MODEL.RPN.IN_FEATURES", cfg.MODEL.RPN.IN_FEATURES
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        yield "MODEL.ROI_HEADS.IN_FEATURES", cfg.MODEL.ROI_HEADS.IN_FEATURES


def _resnet_pyramid_problems(cfg: CfgNode) -> Iterable[str]:
    resnets = cfg.MODEL.RESNETS
    in_features = cfg.MODEL.FPN_EXT.IN_FEATURES or cfg.MODEL.FPN.IN_FEATURES
    missing = [f for f in in_features if f not in resnets.OUT_FEATURES]
    if missing:
        yield (
            f"MODEL.FPN.IN_FEATURES asks for {missing}, which MODEL.RESNETS.OUT_FEATURES "
            f"{resnets.OUT_FEATURES} does not give; add them there"
        )
        return
    # A ResNet's res{k} has stride 2^k, unless its res5 is dilated: then the build will tell.
    if resnets.RES5_DILATION == 1:
        yield from _absent_map_problems(cfg)


def _absent_map_problems(cfg: CfgNode) -> Iterable[str]:
    given = levels_given(cfg)
    if given is None:
        return
    key = in_features_key(cfg)
    in_features = cfg.MODEL.FPN_EXT.IN_FEATURES or cfg.MODEL.FPN.IN_FEATURES
    for asking, asked in _asked_maps(cfg):
        absent = [f for f in asked if f not in given]
        if absent:
            yield f"{asking} asks for {absent}; the pyramid on {key} {in_features} gives {given}"


def _dataset_problems(cfg: CfgNode, training: bool) -> Iterable[str]:
    if training and not cfg.DATASETS.TRAIN:
        yield "DATASETS.TRAIN names no data set to train on"
    has_classes = (
        cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and cfg.MODEL.ROI_HEADS.NAME != ""
    )
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                yield (
                    f"DATASETS.{key}: {name!r} is not a registered data set; "
                    + did_you_mean(name, DatasetCatalog.keys())
                )
                continue
            # Data sets in COCO format may know their classes only once they are read.
            classes = MetadataCatalog.get(name).get("thing_classes")
            if has_classes and classes and len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
                yield (
                    f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, but "
                    f"DATASETS.{key} {name!r} has {len(classes)} classes"
                )


def _proposal_problems(cfg: CfgNode, training: bool) -> Iterable[str]:
    """Proposals made beforehand: the keys that go together, and a file for each data set."""
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
                f"DATASETS.PROPOSAL_FILES_{split} has {len(files)} files for the {len(names)} data "
                f"sets of DATASETS.{split}; MODEL.LOAD_PROPOSALS needs one for each, in their order"
            )
        for file in files:
            if "://" not in file and not os.path.isfile(file):
                yield (
                    f"DATASETS.PROPOSAL_FILES_{split}: no file {file}; "
                    "python -m fpn_ext.proposals makes them"
                )
        limit = cfg.DATASETS[f"PRECOMPUTED_PROPOSAL_TOPK_{split}"]
        if limit < 1:
            yield f"DATASETS.PRECOMPUTED_PROPOSAL_TOPK_{split} must be at least 1, got {limit}"
