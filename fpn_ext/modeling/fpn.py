"""The Feature Pyramid Network of Lin et al., CVPR 2017 (arXiv 1612.03144), Sec. 3 and Fig. 3.

For choices the paper leaves open and differences from Detectron2's FPN,
see docs/paper/differences.md.
"""

import copy
import math
from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from ..bottom_up.build import build_bottom_up
from ..bottom_up.configured_levels import names_added
from ..bottom_up.strided_pointwise import subsample_first
from ..exporting import records_a_graph
from ..keys import declare, own_keys
from ..levels import LevelError, check_fine_to_coarse, map_name, names_above, stride_named
from ..registries.lookup import check_norm, look_up
from .top_blocks import TOP_BLOCK_REGISTRY, Top

declare(
    "MODEL.FPN_EXT.CHANNELS_LAST",
    False,
    "Bottom-up and pyramid in channels_last memory. NUMERICS fast sets it where it is quicker.",
    "FeaturePyramid",
)


class TopDownSum(nn.Module):
    """One top-down step: the coarser map upsampled to the lateral's size, plus the lateral.

    Nearest neighbour, exactly x2 if the sizes divide. If not (input sides that are not multiples
    of the coarsest stride, or strides whose ratio is not 2), the result still has the lateral's
    size.
    """

    def forward(self, lateral: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        """(N, d, H, W) and (N, d, ceil(H/2), ceil(W/2)) -> (N, d, H, W).

        If no gradient is recorded, the sum may overwrite ``lateral``.
        """
        return _add_upsampled(lateral, coarser)


class TopDownMean(nn.Module):
    """:class:`TopDownSum` halved: Detectron2's ``FUSE_TYPE: avg``. Not in the paper."""

    def forward(self, lateral: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        """(N, d, H, W) and (N, d, ceil(H/2), ceil(W/2)) -> (N, d, H, W).

        If no gradient is recorded, the mean may overwrite ``lateral``.
        """
        return _add_upsampled(lateral, coarser).div_(2)


def _add_upsampled(lateral: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
    if not torch.jit.is_scripting() and _may_overwrite(lateral, coarser):
        # Adds every coarser cell to its 2 x 2 lateral cells without materialising the upsampled
        # map: at 800 px P2's alone is 70 MB, and allocating it takes longer than the sum.
        n, d, height, width = coarser.shape
        cells = lateral.view(n, d, height, 2, width, 2)
        cells.add_(coarser[:, :, :, None, :, None])
        return lateral
    return F.interpolate(coarser, size=lateral.shape[-2:], mode="nearest").add_(lateral)


@torch.jit.unused
def _may_overwrite(lateral: torch.Tensor, coarser: torch.Tensor) -> bool:
    return (
        not records_a_graph()  # an exporter would lose what is written through a view
        and not torch.is_grad_enabled()
        and lateral.shape[2] == 2 * coarser.shape[2]
        and lateral.shape[3] == 2 * coarser.shape[3]
    )


TOP_DOWN = {"sum": TopDownSum, "avg": TopDownMean}


@BACKBONE_REGISTRY.register()
class FeaturePyramid(Backbone):
    """Bottom-up network, lateral connections and top-down pathway: C2..C5 in, P2..P6 out.

    Every P_k has ``out_channels`` channels (the paper's d), stride 2^k and the name ``"p{k}"``.
    Levels may be skipped; a level of any other stride t is named ``"ps{t}"``. The layers added
    here have no non-linearity (paper, Sec. 3).

    Parameters are named as in Detectron2's FPN (``bottom_up.*``, ``fpn_lateral{k}``,
    ``fpn_output{k}``): model-zoo checkpoints load without missing or unexpected keys.

    Args:
        bottom_up: backbone that outputs the C_k.
        in_features: names of the C_k to build on, fine to coarse, e.g.
            ``["res2", "res3", "res4", "res5"]``.
        out_channels: d, channels of every P_k.
        norm: normalisation after each of the pyramid's convolutions, a name known to
            :func:`detectron2.layers.get_norm`; ``""`` for none, with biases instead.
        fuse_type: how a top-down step merges, ``"sum"`` (the paper) or ``"avg"``.
        top_block: module with ``in_feature`` (a feature of the bottom-up or a P_k),
            ``num_levels`` and ``forward(map) -> list``, which adds coarser levels, each with twice
            the stride, such as :class:`fpn_ext.Subsample`; ``None`` for none.
        channels_last: run bottom-up and pyramid in channels_last memory format, faster for
            training on CPU; outputs have it, too. Results differ by rounding.

    Raises:
        ValueError: a feature the bottom-up does not have, levels not from fine to coarse, an
            invalid ``fuse_type``, ``out_channels`` or ``top_block``.
        TypeError: ``bottom_up`` is not a Backbone.
    """

    _padding_constraints: dict[str, int]

    @configurable
    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "",
        fuse_type: str = "sum",
        top_block: nn.Module | None = None,
        channels_last: bool = False,
    ):
        super().__init__()
        shapes = _bottom_up_shapes(bottom_up, in_features)
        strides = [int(shape.stride) for shape in shapes]
        try:
            check_fine_to_coarse(strides)
        except ValueError as error:
            raise LevelError(f"MODEL.FPN.IN_FEATURES {list(in_features)}: {error}") from None
        if out_channels < 1:
            raise ValueError(f"MODEL.FPN.OUT_CHANNELS must be at least 1, got {out_channels}")
        if fuse_type not in TOP_DOWN:
            raise ValueError(
                f"MODEL.FPN.FUSE_TYPE must be one of {sorted(TOP_DOWN)}, got {fuse_type!r}"
            )

        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        self.top_down = TOP_DOWN[fuse_type]()

        # Plain lists beside add_module: parameters keep Detectron2's names, and forward iterates
        # by level, coarsest first.
        laterals, outputs = [], []
        use_bias = norm == ""
        check_norm(norm, "MODEL.FPN.NORM")
        names = [map_name(stride) for stride in strides]
        for name, shape in zip(names, shapes, strict=True):
            lateral = Conv2d(
                shape.channels,
                out_channels,
                kernel_size=1,
                bias=use_bias,
                norm=get_norm(norm, out_channels),
            )
            output = Conv2d(
                out_channels,
                out_channels,
                kernel_size=3,
                padding=1,
                bias=use_bias,
                norm=get_norm(norm, out_channels),
            )
            for convolution in (lateral, output):
                weight_init.c2_xavier_fill(convolution)
            self.add_module(f"fpn_lateral{name[1:]}", lateral)
            self.add_module(f"fpn_output{name[1:]}", output)
            laterals.append(lateral)
            outputs.append(output)
        self.laterals = laterals[::-1]
        self.outputs = outputs[::-1]

        self.top_block = top_block
        self.top_block_source, self.top_block_level = "", -1  # name; index among the P_k
        if top_block is not None:
            _check_top_block(top_block, names, bottom_up)
            self.top_block_source = str(top_block.in_feature)
            if self.top_block_source in names:
                self.top_block_level = names.index(self.top_block_source)
            names = names + names_above(names[-1], _num_levels(top_block))

        self._out_features = names
        self._out_feature_strides = {name: stride_named(name) for name in names}
        self._out_feature_channels = dict.fromkeys(names, out_channels)
        # With sides that are multiples of this, all upsampling is exact.
        self._size_divisibility = math.lcm(*strides, max(bottom_up.size_divisibility, 1))
        self._padding_constraints = dict(getattr(bottom_up, "padding_constraints", {}))
        if channels_last:
            # A convolution with channels_last weights outputs channels_last for any input.
            self.to(memory_format=torch.channels_last)
            subsample_first(self)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        own = own_keys(cfg)
        if cls.__name__ == own.BOTTOM_UP:
            raise ValueError(
                f"MODEL.FPN_EXT.BOTTOM_UP must name the network under {cls.__name__}, "
                "not itself; e.g. build_resnet_backbone"
            )
        bottom_up, in_features = build_bottom_up(cfg, input_shape)
        shapes = _bottom_up_shapes(bottom_up, in_features)
        levels = [map_name(shape.stride) for shape in shapes]
        added = names_added(cfg, levels)
        channels = shapes[-1].channels
        top = Top(levels[-1], in_features[-1], channels, cfg.MODEL.FPN.OUT_CHANNELS, added)
        top_block = look_up(TOP_BLOCK_REGISTRY, own.TOP_BLOCK, "MODEL.FPN_EXT.TOP_BLOCK")
        return {
            "bottom_up": bottom_up,
            "in_features": in_features,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
            "top_block": top_block.on(top) if added else None,
            "channels_last": own.CHANNELS_LAST,
        }

    @property
    def size_divisibility(self) -> int:
        """Detectron2 pads the sides of a batch to multiples of this many pixels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The bottom-up's padding constraints beyond :attr:`size_divisibility`.

        Read by Detectron2's main branch only; v0.6 has no such property.
        """
        return self._padding_constraints

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the bottom-up network and build the pyramid on it.

        Args:
            image: (N, C, H, W) batch of normalised images. Any H and W the bottom-up accepts;
                with multiples of :attr:`size_divisibility` all upsampling is exactly x2.

        Returns:
            ``{"p2": (N, d, H/4, W/4), ..., "p6": (N, d, H/64, W/64)}``, sides rounded up, fine to
            coarse, in the dtype of the bottom-up's maps.

        Raises:
            ValueError: a subclass makes more or fewer levels than it has names.
        """
        # 1. Bottom-up: image -> C_k.
        features = self.bottom_up(image)
        maps = [features[name] for name in self.in_features]
        top_map: torch.Tensor | None = None
        if self.top_block_source in features:
            top_map = features[self.top_block_source]
        features = {}  # from here on a C_k lives until its lateral connection has read it
        # 2. Lateral connections, top-down pathway, 3x3 convolutions: C_k -> P_k.
        levels = self.levels_on_maps(maps)
        # 3. Top block: P_k or C_k -> coarser levels.
        levels = self.with_top_block(levels, top_map)
        if len(levels) != len(self._out_features):
            raise ValueError(f"the pyramid made {len(levels)} levels of {self._out_features}")
        pyramid: dict[str, torch.Tensor] = {}
        for name, level in zip(self._out_features, levels):  # noqa: B905 (TorchScript)
            pyramid[name] = level
        return pyramid

    def levels_on_maps(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """The levels built on the bottom-up's maps; runs without the bottom-up.

        Args:
            maps: C_k, (N, C_k channels, H_k, W_k), one for each of ``in_features``, fine to coarse.
                The list is emptied: memory peaks here, and a C_k can be freed once its lateral
                connection has read it.

        Returns:
            P_k, (N, d, H_k, W_k), fine to coarse, in the dtype of the maps.
        """
        levels: list[torch.Tensor] = []
        coarser: torch.Tensor | None = None
        for lateral, output in zip(self.laterals, self.outputs):  # noqa: B905 (TorchScript)
            # A 1x1 convolution on C_k, merged with the coarser level before its 3x3 convolution.
            merged = lateral(maps.pop())
            if coarser is not None:
                merged = self.top_down(merged, coarser)
            # A 3x3 convolution on each merged map, the coarsest included, gives P_k.
            levels.insert(0, output(merged))
            coarser = merged
        return levels

    def with_top_block(
        self, levels: list[torch.Tensor], top_map: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The whole pyramid: ``levels``, then those of the top block.

        Args:
            levels: P_k, (N, d, H_k, W_k), fine to coarse.
            top_map: the C_k read by the top block, if it does not read a P_k.

        Returns:
            (N, d, H_k, W_k) per level, fine to coarse.
        """
        return levels + self.levels_above(levels, top_map)

    def levels_above(
        self, levels: list[torch.Tensor], top_map: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The top block's levels; arguments as for :meth:`with_top_block`.

        Returns:
            (N, d, H/2, W/2), ..., sides rounded up, each half the last; none without a top block.

        Raises:
            ValueError: the top block reads a C_k, and ``top_map`` is None.
        """
        added: list[torch.Tensor] = []
        if self.top_block is not None:
            if self.top_block_level >= 0:
                top_map = levels[self.top_block_level]
            if top_map is None:
                raise ValueError(f"top_map is missing: the top block reads {self.top_block_source}")
            added = self.top_block(top_map)
        return added

    def __prepare_scriptable__(self) -> "FeaturePyramid":
        # torch.jit.script calls this first, and replaces this module in a scripted parent by the
        # copy: to train a model further, script a copy of it.
        scriptable = copy.deepcopy(self)
        for module in list(scriptable.modules()):
            # torch.jit calls other modules' own __prepare_scriptable__ later.
            if module is scriptable or not hasattr(module, "__prepare_scriptable__"):
                _lists_to_module_lists(module)
        return scriptable


def _lists_to_module_lists(module: nn.Module) -> None:
    """Register modules kept in plain lists as ModuleLists, only under the list's name.

    TorchScript cannot iterate over the plain lists of modules in this pyramid and Detectron2's
    ResNet. This renames parameters; only for scripting.
    """
    for name, value in list(vars(module).items()):
        is_list = isinstance(value, list) and value
        if is_list and all(isinstance(item, nn.Module) for item in value):
            for child in [n for n, m in module.named_children() if m in value]:
                delattr(module, child)
            delattr(module, name)
            setattr(module, name, nn.ModuleList(value))


def _bottom_up_shapes(bottom_up: Backbone, in_features: Sequence[str]) -> list[ShapeSpec]:
    if not isinstance(bottom_up, Backbone):
        raise TypeError(
            f"bottom_up must be a detectron2.modeling.Backbone, got {type(bottom_up).__name__}"
        )
    if isinstance(in_features, str) or not in_features:
        raise LevelError(
            "MODEL.FPN.IN_FEATURES must list at least one map of the bottom-up network, "
            f"got {in_features!r}; it gives {list(bottom_up.output_shape())}"
        )
    available = bottom_up.output_shape()
    missing = [name for name in in_features if name not in available]
    if missing:
        given = ", ".join(f"{name} (stride {s.stride})" for name, s in available.items())
        raise LevelError(
            f"MODEL.FPN.IN_FEATURES asks for {missing}, which the bottom-up network "
            f"{type(bottom_up).__name__} does not give; it gives {given}. Change "
            "MODEL.FPN.IN_FEATURES, or make the bottom-up return the map "
            "(for a ResNet: MODEL.RESNETS.OUT_FEATURES)."
        )
    for name in in_features:
        if not (available[name].stride and available[name].channels):
            raise LevelError(
                f"output_shape() of {type(bottom_up).__name__} must give stride and channels of "
                f"{name!r}, got {available[name]}"
            )
    return [available[name] for name in in_features]


def _check_top_block(top_block: nn.Module, pyramid: list[str], bottom_up: Backbone) -> None:
    readable = [*pyramid, *bottom_up.output_shape()]
    if getattr(top_block, "in_feature", None) not in readable:
        raise ValueError(
            f"top_block.in_feature must be one of {readable}, "
            f"got {getattr(top_block, 'in_feature', None)!r}"
        )
    if _num_levels(top_block) < 1:
        raise ValueError(
            "top_block.num_levels must say how many levels it adds, at least 1; "
            f"got {getattr(top_block, 'num_levels', None)!r}"
        )


def _num_levels(top_block: nn.Module) -> int:
    num_levels = getattr(top_block, "num_levels", 0)
    return num_levels if isinstance(num_levels, int) else 0
