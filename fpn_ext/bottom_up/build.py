"""The network under the pyramid, by name: ``MODEL.FPN_EXT.BOTTOM_UP``.

A name in Detectron2's registry (``"build_resnet_backbone"``), or ``"library/network"``: any
classification network of torchvision, any network of timm with feature maps, and Detectron2's
networks without a builder (:mod:`fpn_ext.bottom_up.libraries`). The feature maps of such a network
are measured (:mod:`fpn_ext.bottom_up.dry_run`), and only the parts the pyramid needs are built.
"""

import copy
import logging
import re
from collections.abc import Sequence
from typing import Final

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import fx, nn

from ..keys import declare, own_keys
from ..levels import LevelError, stride_named
from ..registries.lookup import look_up
from .configured_levels import in_features_key
from .convert_weights import conversion_hint, tensors_of_package
from .dry_run import DryRun, FoundMap, parameters_behind
from .libraries import Network, library_of, names_in_libraries
from .norms import BATCH_NORMS, replace_norms
from .pixels import check_pixels_resolved
from .pretrained import is_package
from .weights import TooFewTensorsError, load_pretrained

declare(
    "MODEL.FPN_EXT.BOTTOM_UP",
    "build_resnet_backbone",
    "The network under the pyramid: a name in Detectron2's BACKBONE_REGISTRY, or "
    '"torchvision/resnet50", "timm/convnext_tiny", "detectron2/regnetx_4gf". What of the '
    "latter the pyramid does not need is not built.",
    "FeaturePyramid",
    "Detectron2Pyramid",
)
declare(
    "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS",
    "",
    "Local file (.pth, .safetensors) with pretrained weights of the bottom-up, or a package "
    "of them that `fpn-ext weights list` shows, read unless MODEL.WEIGHTS names those of the "
    "whole model. To train from scratch, leave both empty.",
    "FeaturePyramid",
    "Detectron2Pyramid",
)
declare(
    "MODEL.FPN_EXT.BOTTOM_UP_NORM",
    "",
    'What the bottom-up\'s batch norms become: "" (they stay), "FrozenBN", "SyncBN", "GN".',
    "FeaturePyramid",
    "Detectron2Pyramid",
)
logger = logging.getLogger(__name__)


class MeasuredBottomUp(Backbone):
    """A network of another library as a Detectron2 backbone with feature maps ``"c{k}"``.

    Args:
        body: image (N, C, H, W) -> list or dictionary of feature maps.
        maps: measured properties of each feature map by name, fine to coarse.
        places: index of each of these in the output of ``body``.
        divisor: image sides must be multiples of it.
    """

    returns_dictionary: Final[bool]

    def __init__(
        self, body: nn.Module, maps: dict[str, FoundMap], places: Sequence[int], divisor: int
    ):
        super().__init__()
        self.body = body
        self.places = list(places)
        # torchvision's feature extractors are traced, and return a dictionary.
        self.returns_dictionary = isinstance(body, fx.GraphModule)
        self.channels_last = [found.channels_last for found in maps.values()]
        self._out_features = list(maps)
        self._out_feature_strides = {name: found.stride for name, found in maps.items()}
        self._out_feature_channels = {name: found.channels for name, found in maps.items()}
        self._size_divisibility = divisor if divisor > 1 else 0

    @property
    def size_divisibility(self) -> int:
        """Image sides must be multiples of it; 0 for any sides."""
        return self._size_divisibility

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, C, H, W) -> ``{"c2": (N, C_2, H/4, W/4), ...}``, from fine to coarse."""
        if self.returns_dictionary:
            maps = list(self.body(image).values())
        else:
            maps = list(self.body(image))
        named: dict[str, torch.Tensor] = {}
        for i, name in enumerate(self._out_features):
            found = maps[self.places[i]]
            named[name] = found.permute(0, 3, 1, 2) if self.channels_last[i] else found
        return named

    def __deepcopy__(self, memo: dict) -> "MeasuredBottomUp":
        # A copy of a torchvision feature extractor is always in training mode.
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        result.body.train(self.body.training)
        for ours, theirs in zip(self.body.modules(), result.body.modules(), strict=True):
            theirs.training = ours.training
        return result


def build_bottom_up(cfg: CfgNode, input_shape: ShapeSpec) -> tuple[Backbone, list[str]]:
    """The network named by ``MODEL.FPN_EXT.BOTTOM_UP``, and the names of its maps to build on.

    The maps are those in ``MODEL.FPN_EXT.IN_FEATURES`` or ``MODEL.FPN.IN_FEATURES``. For a library
    network, or any network without a map of that name, ``"res3"`` and ``"c3"`` both mean the map of
    stride 2^3.

    Args:
        cfg: a config with this project's keys.
        input_shape: only ``channels``, of the image, is read.

    Raises:
        ValueError: an unknown network; maps it does not have (the message has a table of those it
            has); a ``MODEL.BACKBONE.FREEZE_AT``, ``MODEL.FPN_EXT.BOTTOM_UP_NORM`` or
            ``BOTTOM_UP_WEIGHTS`` that cannot be applied to it; pixel normalisation other than it
            was trained with.
        FileNotFoundError: ``MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS`` does not exist.
    """
    own = own_keys(cfg)
    asked = list(own.IN_FEATURES or cfg.MODEL.FPN.IN_FEATURES)
    if "/" not in own.BOTTOM_UP:
        check_bottom_up_name(own.BOTTOM_UP)
        bottom_up = BACKBONE_REGISTRY.get(own.BOTTOM_UP)(cfg, input_shape)
        _load_and_convert(bottom_up, cfg)
        return bottom_up, [_own_name(name, bottom_up) for name in asked]

    library, name = library_of(own.BOTTOM_UP)
    check_pixels_resolved(cfg)
    channels = input_shape.channels
    try:
        network = library.build(name, channels)
    except ValueError as error:
        raise ValueError(f"MODEL.FPN_EXT.BOTTOM_UP {own.BOTTOM_UP}: {error}") from error
    maps = _maps_asked_for(asked, in_features_key(cfg), network.found, own.BOTTOM_UP)
    logger.info("MODEL.FPN_EXT.BOTTOM_UP %s gives\n%s", own.BOTTOM_UP, network.found.table())

    chosen = [found.key for found in network.found.maps if found in maps.values()]
    frozen = _frozen_up_to(cfg.MODEL.BACKBONE.FREEZE_AT, network, channels)
    body = network.only(chosen)
    _freeze_unread(body, chosen, network, channels)
    _load_and_convert(body, cfg)
    _freeze(body, frozen)
    if isinstance(body, Backbone):  # Detectron2's keep the names that checkpoints use
        return body, [found.key for found in maps.values()]
    places = [chosen.index(found.key) for found in maps.values()]
    return MeasuredBottomUp(body, maps, places, network.found.divisor), list(maps)


def check_bottom_up_name(name: str) -> None:
    """Raise ValueError, with the nearest valid names, for an unknown bottom-up."""
    if "/" in name:
        library_of(name)
        return
    try:
        look_up(BACKBONE_REGISTRY, name, "MODEL.FPN_EXT.BOTTOM_UP")
    except ValueError as error:
        elsewhere = names_in_libraries(name)
        hint = f" Or did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else ""
        raise ValueError(f"{error}{hint}") from None


def _own_name(name: str, bottom_up: Backbone) -> str:
    """The network's name for the map; unchanged if it has no such map."""
    shapes = bottom_up.output_shape() if isinstance(bottom_up, Backbone) else {}
    if name in shapes:
        return name
    same = [own for own, shape in shapes.items() if shape.stride == stride_named(name)]
    return same[-1] if same else name


def _maps_asked_for(
    asked: Sequence[str], key: str, found: DryRun, bottom_up: str
) -> dict[str, FoundMap]:
    available = found.by_name()
    names = [re.sub(r"^res(\d+)$", r"c\1", name) for name in asked]
    missing = [name for name in names if name not in available]
    if missing or not names:
        raise LevelError(
            f"{key} {list(asked)} asks for {missing}, which {bottom_up} does not give. It gives "
            f"{list(available)}:\n{found.table()}\n"
            f"Change {key} or MODEL.FPN_EXT.LEVELS, or choose another MODEL.FPN_EXT.BOTTOM_UP"
        )
    return {name: available[name] for name in names}


def _load_and_convert(network: nn.Module, cfg: CfgNode) -> None:
    own = own_keys(cfg)
    file, kind = own.BOTTOM_UP_WEIGHTS, own.BOTTOM_UP_NORM
    if file and cfg.MODEL.WEIGHTS:
        logger.info(
            "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS %s is not read: MODEL.WEIGHTS %s has the whole model",
            file,
            cfg.MODEL.WEIGHTS,
        )
    elif is_package(file):
        load_pretrained(network, file, tensors_of_package(file, own.BOTTOM_UP))
    elif file:
        try:
            load_pretrained(network, file)
        except TooFewTensorsError as error:
            hint = conversion_hint(file, own.BOTTOM_UP)
            raise ValueError(f"{error}. {hint}" if hint else str(error)) from error
    if kind:
        count = replace_norms(network, kind)
        if not count:
            raise ValueError(
                f"MODEL.FPN_EXT.BOTTOM_UP_NORM {kind}: {cfg.MODEL.FPN_EXT.BOTTOM_UP} has no batch "
                'norm to replace; leave it "" (Detectron2\'s ResNets have MODEL.RESNETS.NORM)'
            )
        logger.info("MODEL.FPN_EXT.BOTTOM_UP_NORM: %d batch norms became %s", count, kind)


def _freeze_unread(body: nn.Module, chosen: Sequence[str], network: Network, channels: int) -> None:
    """Freeze parameters that no map depends on: distributed training would wait for them."""
    behind = parameters_behind(body, channels, network.found.sizes[0])
    read: set[str] = set()
    for key, names in behind.items():
        if key in chosen or not isinstance(body, Backbone):
            read |= names
    unread = [(n, p) for n, p in body.named_parameters() if n not in read and p.requires_grad]
    for _, parameter in unread:
        parameter.requires_grad_(False)
    if unread:
        logger.info(
            "%d parameters run, but no map that is asked for depends on them: %s ...; frozen",
            len(unread),
            ", ".join(name for name, _ in unread[:3]),
        )


def _frozen_up_to(stage: int, network: Network, channels: int) -> set[str]:
    """Parameters that ``MODEL.BACKBONE.FREEZE_AT`` freezes: as in Detectron2, 1 for the stem, 2
    for everything C2 depends on.

    Stage names differ between networks; the dependencies of a feature map do not.
    """
    if stage < 1:
        return set()
    maps = network.found.by_name()
    key = f"MODEL.BACKBONE.FREEZE_AT {stage}"
    remedy = "set it to 0, and name modules to freeze in MODEL.FPN_EXT.FREEZE"
    if f"c{stage}" not in maps:
        raise ValueError(
            f"{key} freezes what the map c{stage}, of stride {2**stage}, is made of; the bottom-up "
            f"gives {list(maps)}. Choose one of these, or {remedy}"
        )
    behind = parameters_behind(network.body, channels, network.found.sizes[0])
    frozen = behind[maps[f"c{stage}"].key]
    coarser = [found.key for found in maps.values() if found.stride > 2**stage]
    # A map may have a norm of its own; all else must feed the coarser maps, too.
    weights = {name for name, p in network.body.named_parameters() if p.dim() > 1}
    if coarser and not frozen & weights <= behind[coarser[0]]:
        raise ValueError(
            f"{key} freezes what comes before the map c{stage}; this bottom-up makes c{stage} "
            f"beside the coarser maps, not before them. Instead {remedy}"
        )
    return frozen


def _freeze(body: nn.Module, frozen: set[str]) -> None:
    if not frozen:
        return
    values = 0
    for name, parameter in body.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            values += parameter.numel()
    norms = sum(
        replace_norms(body, "FrozenBN", path)
        for path, module in list(body.named_modules())
        if isinstance(module, BATCH_NORMS) and f"{path}.weight" in frozen
    )
    logger.info("MODEL.BACKBONE.FREEZE_AT: %d values and %d batch norms frozen", values, norms)
