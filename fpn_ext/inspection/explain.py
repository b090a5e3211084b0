"""What an image of a given size becomes in a config's model: the worked example of an FPN.

    fpn-ext explain --size 512
    fpn-ext explain --size 800x1333 --config-file configs/demo/faster_rcnn_R_18_FPN.yaml

The model is built and run on tensors without data (PyTorch's device "meta"): every size, number of
channels, anchor and parameter is that of its components. Reported are the bottom-up's maps C_k, the
merged maps M_k (lateral connection plus the coarser map, upsampled), the levels P_k, the anchors of
each level, the level that boxes of given sizes are pooled from, and what has weights of its own.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..config.check import check_config
from ..config.level_table import level_rule, level_table_in_errors
from ..levels import stride_named
from ..modeling.level_rules import PaperRule, RoundedRule, assign_levels
from ..names import aligned
from ..registries.lookup import is_pyramid
from .best_anchors import levels_of, padded_size, without_weights
from .pyramid_maps import FeatureMap, maps_of
from .shared_weights import DenseHead, Weights, dense_head, run_head, weights_of_roi_heads

BOXES = (16, 32, 64, 112, 224, 448)  # sides in pixels
NO_LIMIT = 99  # beyond every level of Eq. 1


@dataclass(frozen=True)
class LevelAnchors:
    """The anchors of one level, and what its share of the head costs.

    Attributes:
        level: name of its map.
        height, width: of the map, in cells.
        sizes: square roots of the anchors' areas, in pixels of the network input.
        aspect_ratios: height / width.
        per_location: anchors of a cell.
        anchors: of the whole map.
        multiply_adds: of the head (RPN or RetinaNet) on this map.
    """

    level: str
    height: int
    width: int
    sizes: list[float]
    aspect_ratios: list[float]
    per_location: int
    anchors: int
    multiply_adds: int


@dataclass(frozen=True)
class PooledBox:
    """Where a box is pooled.

    Attributes:
        height, width: of the box, in pixels of the network input.
        k: the level by Eq. 1, before it is clamped to those that exist; None for other rules.
        level: name of the map; "" if from all.
        stride: of that map, in pixels; 0 if from all.
    """

    height: float
    width: float
    k: int | None
    level: str
    stride: int

    @property
    def cells(self) -> str:
        """The box on its map, in cells: height x width."""
        if not self.stride:
            return "-"
        return " x ".join(f"{side / self.stride:.4g}" for side in (self.height, self.width))


class Table(NamedTuple):
    """A part of an explanation.

    Attributes:
        title: one line.
        rows: the header and the rows.
    """

    title: str
    rows: list[list[str]]


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`.

    Attributes:
        model: ``MODEL.META_ARCHITECTURE``.
        pyramid: class of the backbone.
        network: ``MODEL.FPN_EXT.BOTTOM_UP``.
        size: (H, W) of the image as asked for.
        padded: (H, W) as the network gets it.
        divisibility: sides are padded to multiples of it.
        bottom_up: the C_k, fine to coarse.
        merged: the M_k, coarse to fine, in the order they are computed.
        levels: the P_k, fine to coarse.
        head: the dense head, ``"RPN head"``; "" if there is none.
        anchors: per level of that head, fine to coarse; empty without one.
        rule: how boxes are assigned to levels, in words; "" without RoI heads.
        boxes: where the boxes that were asked for are pooled; empty without RoI heads.
        weights: which levels share the layers of the heads.
        parameters: number of parameters of each part; all add up to the model's.
    """

    model: str
    pyramid: str
    network: str
    size: tuple[int, int]
    padded: tuple[int, int]
    divisibility: int
    bottom_up: list[FeatureMap]
    merged: list[FeatureMap]
    levels: list[FeatureMap]
    head: str
    anchors: list[LevelAnchors]
    rule: str
    boxes: list[PooledBox]
    weights: list[Weights]
    parameters: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)

    def tables(self) -> dict[str, Table]:
        """Its parts by name, in the order of the computation; those that there are."""
        tables = {
            "bottom_up": Table(
                f"Bottom-up network, {self.network}: C_k", _maps(self.bottom_up, "in the network")
            ),
            "merged": Table(
                f"Lateral connections and top-down pathway of {self.pyramid}: M_k",
                _maps(self.merged),
            ),
            "levels": Table("Levels of the pyramid: P_k", _maps(self.levels)),
        }
        if self.anchors:
            tables["anchors"] = self._anchors()
        if self.boxes:
            rows = [["box, px", "k", "pooled from", "stride", "box in cells"]]
            rows += [
                [
                    f"{box.height:g} x {box.width:g}",
                    "-" if box.k is None else str(box.k),
                    box.level or "every level",
                    str(box.stride or "-"),
                    box.cells,
                ]
                for box in self.boxes
            ]
            tables["boxes"] = Table(f"Boxes, height x width: {self.rule}", rows)
        if self.weights:
            rows = [["part", "one set of weights", "for"]]
            rows += [[w.part, ", ".join(w.layers), ", ".join(w.levels)] for w in self.weights]
            tables["weights"] = Table("Shared weights", rows)
        rows = [["part", "parameters"]]
        rows += [[part, f"{count:,}"] for part, count in self.parameters.items()]
        rows += [["all", f"{sum(self.parameters.values()):,}"]]
        tables["parameters"] = Table("Parameters", rows)
        return tables

    def _anchors(self) -> Table:
        header = ["level", "map", "sizes, px", "height / width", "per cell", "anchors"]
        rows = [[*header, f"multiply-adds of the {self.head}, M"]]
        for row in self.anchors:
            rows.append(
                [
                    *(row.level, f"{row.height} x {row.width}"),
                    ", ".join(f"{size:g}" for size in row.sizes),
                    ", ".join(f"{ratio:g}" for ratio in row.aspect_ratios),
                    *(str(row.per_location), f"{row.anchors:,}"),
                    f"{row.multiply_adds / 1e6:,.1f}",
                ]
            )
        anchors = sum(row.anchors for row in self.anchors)
        multiply_adds = sum(row.multiply_adds for row in self.anchors)
        rows.append(["all", "", "", "", "", f"{anchors:,}", f"{multiply_adds / 1e6:,.1f}"])
        return Table("Anchors", rows)

    def padding(self) -> str:
        """A sentence on how the image is padded."""
        (height, width), (padded_height, padded_width) = self.size, self.padded
        if self.size == self.padded:
            return f"An image of {height} x {width} px (height x width), not padded."
        return (
            f"An image of {height} x {width} px (height x width) is padded to {padded_height} x "
            f"{padded_width} for {self.pyramid}, whose size_divisibility is {self.divisibility}."
        )

    def __str__(self) -> str:
        parts = [f"{self.model} on {self.pyramid} over {self.network}. {self.padding()}"]
        for table in self.tables().values():
            parts.append(f"{table.title}\n{aligned(table.rows)}")
        return "\n\n".join(parts)


def explain(cfg: CfgNode, size: tuple[int, int], boxes: Sequence[Any] = BOXES) -> Explanation:
    """What an image becomes in a config's model; no weights are read, nothing is computed.

    Args:
        cfg: a config; its weights and datasets are not looked for.
        size: (H, W) of the image in pixels, after resizing and before padding.
        boxes: sides of square boxes, or (height, width), in pixels of the network input.

    Raises:
        ValueError: the backbone is no :class:`fpn_ext.FeaturePyramid`; a size below 1; a box
            without area; the config is inconsistent.
    """
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"an image has a height and a width of at least 1 px, got {size}")
    sides = [box if isinstance(box, tuple) else (box, box) for box in boxes]
    if any(not min(box) > 0 for box in sides):
        raise ValueError(f"a box has a height and a width above 0 px, got {list(boxes)}")
    cfg = _of_the_model(cfg)
    check_config(cfg)
    if not is_pyramid(cfg):
        raise ValueError(
            "what is explained is a pyramid of this project: MODEL.BACKBONE.NAME must be "
            f"FeaturePyramid or one of its variants, got {cfg.MODEL.BACKBONE.NAME}"
        )
    with level_table_in_errors(cfg):
        model: Any = build_model(cfg).eval()
    dense = dense_head(model)
    shapes = levels_of(dense.generator, dense.levels) if dense else []
    model.to("meta")
    padded = padded_size(model.backbone, *size)
    image = torch.zeros(1, len(cfg.MODEL.PIXEL_MEAN), *padded, device="meta")
    pyramid = maps_of(model.backbone, image)

    anchors: list[LevelAnchors] = []
    weights: list[Weights] = []
    if dense:
        maps = [pyramid.outputs[name] for name in dense.levels]
        with torch.no_grad():
            boxes_of_levels = dense.generator(maps)
        multiply_adds, weights = run_head(dense, maps)
        for shape, level_map, own, cost in zip(
            shapes, maps, boxes_of_levels, multiply_adds, strict=True
        ):
            height, width = level_map.shape[-2:]
            anchors.append(
                LevelAnchors(
                    *(shape.name, height, width, shape.sizes, shape.aspect_ratios),
                    per_location=len(shape.shapes),
                    anchors=len(own.tensor),
                    multiply_adds=cost,
                )
            )
    rule = ""
    pooled: list[PooledBox] = []
    heads = getattr(model, "roi_heads", None)
    if heads is not None:
        rule, pooled = _pooled(cfg, sides)
        weights = [*weights, *weights_of_roi_heads(heads, list(cfg.MODEL.ROI_HEADS.IN_FEATURES))]
    return Explanation(
        model=cfg.MODEL.META_ARCHITECTURE,
        pyramid=type(model.backbone).__name__,
        network=cfg.MODEL.FPN_EXT.BOTTOM_UP,
        size=(size[0], size[1]),
        padded=padded,
        divisibility=model.backbone.size_divisibility,
        bottom_up=pyramid.bottom_up,
        merged=pyramid.merged,
        levels=pyramid.levels,
        head=dense.name if dense else "",
        anchors=anchors,
        rule=rule,
        boxes=pooled,
        weights=weights,
        parameters=_parameters(model, dense),
    )


def _of_the_model(cfg: CfgNode) -> CfgNode:
    """A copy without weights, data and files of proposals, of which none need be here."""
    cfg = without_weights(cfg)
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    for key in ("TRAIN", "TEST", "PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"):
        cfg.DATASETS[key] = ()
    return cfg


def _pooled(cfg: CfgNode, sides: Sequence[tuple[float, float]]) -> tuple[str, list[PooledBox]]:
    """The level rule in words, and where boxes of (height, width) are pooled."""
    rule = level_rule(cfg)
    names = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    if rule is None:
        heads = cfg.MODEL.ROI_HEADS.NAME
        return f"{heads} pool from {', '.join(names)}", [
            PooledBox(height, width, None, "", 0) for height, width in sides
        ]
    boxes = torch.tensor([[0.0, 0.0, width, height] for height, width in sides])
    chosen: list[int] = rule(boxes).tolist()
    is_equation_1 = type(rule) in (PaperRule, RoundedRule)
    levels: list[int | None] = [None] * len(sides)
    text = f"{type(rule).__name__}, by the {rule.measure} of a box"
    if is_equation_1:
        canonical, k0 = rule.canonical_box_size, rule.canonical_level
        levels = assign_levels(boxes, -NO_LIMIT, NO_LIMIT, canonical, k0).tolist()
        text = f"k = floor({k0} + log2(sqrt(w h) / {canonical:.4g}))"
        text += f", clamped to {names[0]}..{names[-1]}" if len(names) > 1 else f", only {names[0]}"
    starts = zip(names[1:], rule.bounds(), strict=True)
    text += "".join(f", {name} from {bound:.4g} px" for name, bound in starts)
    strides = [stride_named(name) or 0 for name in names]
    return text, [
        PooledBox(*box, k, names[i], strides[i])
        for box, k, i in zip(sides, levels, chosen, strict=True)
    ]


def _parameters(model: Any, dense: DenseHead | None) -> dict[str, int]:
    """Number of parameters of each part, without those counted before it; empty parts left out."""
    backbone, heads = model.backbone, getattr(model, "roi_heads", None)
    parts: dict[str, Sequence[nn.Module | None]] = {
        "bottom-up network": [backbone.bottom_up],
        "lateral connections": getattr(backbone, "laterals", []),
        "output convolutions": getattr(backbone, "outputs", []),
        "top block": [backbone.top_block],
        f"rest of {type(backbone).__name__}": [backbone],
        dense.name if dense else "": [dense.module if dense else None],
        **{
            f"{name} {part}": [getattr(heads, f"{name}_{part}", None)]
            for name in ("box", "mask", "keypoint")
            for part in ("head", "predictor")
        },
        "rest of the model": [model],
    }
    counts: dict[str, int] = {}
    counted: set[int] = set()
    for part, modules in parts.items():
        found = {id(p): p for m in modules if m is not None for p in m.parameters()}
        new = [p.numel() for key, p in found.items() if key not in counted]
        counted |= found.keys()
        if new:
            counts[part] = sum(new)
    return counts


def _maps(maps: Sequence[FeatureMap], made_from: str = "made from") -> list[list[str]]:
    rows = [["map", made_from, "height x width", "stride", "channels"]]
    for m in maps:
        rows.append(
            [m.name, m.made_from, f"{m.height} x {m.width}", str(m.stride), str(m.channels)]
        )
    return rows
