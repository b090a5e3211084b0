"""What a model computes on an image: its anchors, proposals by level, feature maps.

    fpn-ext look --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
        --output out MODEL.WEIGHTS output/demo_R_18/model_final.pth
    fpn-ext look --config-file ... --input photo.jpg --output out --tensorboard \\
        MODEL.WEIGHTS output/demo_R_18/model_final.pth

For each image, in pixels of the network input, enlarged if that is small:

NAME_best_anchors.png   every ground-truth box (thin, white) and its best anchor with their IoU,
                        coloured by level; not with --input, which has no ground truth
NAME_cell_anchors.png   the anchors of the central location of every level, and the location's cell
                        (thin)
NAME_proposals.png      the RPN's top-scoring proposals, coloured by the level of their anchors (not
                        the one that the RoI heads pool from)
NAME_feature_maps.png   the mean absolute activation of each of the RPN's input maps, one square per
                        cell, from 0 (dark) to the map's max

--tensorboard writes the same to event files in the folder, under the tags best_anchors/NAME,
cell_anchors/NAME, proposals/NAME and feature_maps/NAME. Exit code: 0, or 2 for invalid arguments,
config, weights or data.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode, ImageList, Instances
from PIL import Image, ImageDraw
from torch import nn

from ..data.datasets import first_test_dataset
from ..data.reading import as_rgb
from ..data.training_boxes import ResizedBoxes
from ..inference.pictures import Picture, check_harmless, find_pictures, names_of, pages_of
from ..inference.predictor import Predictor, build_predictor, load_inference_config
from ..levels import nearest_level
from ..names import did_you_mean
from ..reporting.drawing import LEVEL_COLORS, NO_LEVEL_COLOR, draw_boxes, draw_legend
from ..reporting.drawn import write_picture
from .best_anchors import AnchorGrid, AnchorLevel, levels_of

LONGER_SIDE = 640  # of a drawing, about, if the network input is smaller
TAGS = ("best_anchors", "cell_anchors", "proposals", "feature_maps")
GAP, BAND = 6, 28  # pixels between panels, and of the strip with the legend
MAP_SIDE = 240  # of a feature map's panel


@dataclass(frozen=True)
class Inside:
    """What a model computed for one image.

    Attributes:
        image: (H, W, 3) uint8 RGB, as resized for the network, without padding.
        names: of the RPN's input maps, fine to coarse.
        maps: (C, H_i, W_i) float32 of each level.
        proposals: of each level, on CPU, best first, with ``proposal_boxes`` in pixels of ``image``
            and ``objectness_logits``; all levels together are those that the RPN returns.
        levels: the anchors.
    """

    image: np.ndarray
    names: list[str]
    maps: list[torch.Tensor]
    proposals: list[Instances]
    levels: list[AnchorLevel]

    @property
    def numbers(self) -> list[int]:
        """The pyramid level of each map, from its stride."""
        return [nearest_level(level.stride) for level in self.levels]

    @property
    def legend(self) -> dict[int, str]:
        return dict(zip(self.numbers, self.names, strict=True))


def look_inside(predictor: Predictor, image: np.ndarray) -> Inside:
    """Run a model on an (H, W, C) image, as the model takes it; keep its intermediate results.

    Raises:
        ValueError: the model has no RPN.
    """
    rpn: Any = getattr(predictor.model, "proposal_generator", None)
    if not (hasattr(rpn, "rpn_head") and hasattr(rpn, "anchor_generator")):
        raise ValueError(
            f"{type(predictor.model).__name__} has no RPN (MODEL.META_ARCHITECTURE GeneralizedRCNN "
            "or ProposalNetwork, MODEL.PROPOSAL_GENERATOR.NAME RPN or PyramidRPN)"
        )
    seen: list[tuple[ImageList, dict[str, torch.Tensor]]] = []

    def keep(module: nn.Module, inputs: Any, outputs: Any) -> None:
        seen.append(inputs[:2])

    hook = rpn.register_forward_hook(keep)
    try:
        predictor(image)
    finally:
        hook.remove()
    images, features = seen[0]
    names = list(rpn.in_features)
    height, width = images.image_sizes[0]
    resized = predictor.aug.get_transform(image).apply_image(image)
    assert resized.shape[:2] == (height, width)
    return Inside(
        image=as_rgb(resized, predictor.pixel_format),
        names=names,
        maps=[features[name][0].float().cpu() for name in names],
        proposals=proposals_by_level(rpn, images, features),
        levels=levels_of(rpn.anchor_generator, names),
    )


@torch.no_grad()
def proposals_by_level(
    rpn: Any, images: ImageList, features: dict[str, torch.Tensor]
) -> list[Instances]:
    """An RPN's proposals for the first image, separated by the level of their anchors.

    NMS works per level anyway, so the RPN runs on each level separately; the top-scoring proposals
    over all levels are kept, as many as the RPN keeps.
    """
    maps = [features[name] for name in rpn.in_features]
    anchors = rpn.anchor_generator(maps)
    logits, deltas = rpn.rpn_head(maps)
    found = []
    for level_anchors, level_logits, level_deltas in zip(anchors, logits, deltas, strict=True):
        count, _, height, width = level_deltas.shape
        # In the order of the anchors: row, column, anchor.
        scores = level_logits.permute(0, 2, 3, 1).flatten(1)
        boxes = level_deltas.view(count, -1, level_anchors.tensor.shape[1], height, width)
        boxes = boxes.permute(0, 3, 4, 1, 2).flatten(1, -2)
        of_level = rpn.predict_proposals([level_anchors], [scores], [boxes], images.image_sizes)
        found.append(of_level[0].to("cpu"))
    scores = torch.cat([f.objectness_logits for f in found])
    wanted = min(rpn.post_nms_topk[rpn.training], len(scores))
    best = torch.zeros(len(scores), dtype=torch.bool)
    best[scores.topk(wanted).indices] = True
    return [f[mask] for f, mask in zip(found, best.split([len(f) for f in found]), strict=True)]


# Pictures


def draw_best_anchors(inside: Inside, boxes: np.ndarray, boundary_thresh: float) -> Image.Image:
    """(R, 4) ground-truth boxes, XYXY in pixels of ``inside.image``, and their best anchors."""
    sizes = [(level_map.shape[1], level_map.shape[2]) for level_map in inside.maps]
    grid = AnchorGrid(inside.levels, lambda height, width: sizes, boundary_thresh)
    count = len(boxes)
    rows = ResizedBoxes(
        boxes, np.arange(count), np.tile(inside.image.shape[:2], (count, 1)), np.ones(count)
    )
    best = grid.best(rows)
    there = best.iou > 0
    labels = [f"{overlap:.2f}" for overlap in best.iou[there]]
    levels = [inside.numbers[number] for number in best.level[there]]
    image, scale = _enlarged(inside.image)
    picture = draw_boxes(image, grid.anchors_of(best, rows)[there] * scale, labels, levels)
    pen = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in boxes * scale:
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline="white")
    title = f"{there.sum()} of {count} boxes (white) and their best anchors, IoU, level:"
    return _with_legend(picture, title, inside.legend)


def draw_cell_anchors(inside: Inside) -> Image.Image:
    """The anchors of the location nearest to the middle of the image, for each level."""
    height, width = inside.image.shape[:2]
    middle = np.array([[width / 2, height / 2] * 2])
    boxes, levels, cells = [], [], []
    for level, number, level_map in zip(inside.levels, inside.numbers, inside.maps, strict=True):
        size = np.array([level_map.shape[-2:]])
        at = level.nearest(middle, size, np.array([[height, width]]))[0] - level.shapes
        boxes.append(at + level.shapes)
        levels += [number] * len(level.shapes)
        # The location's cell in the image; with an offset of 0.5 its anchors are centred in it.
        corner = at[0, :2] - level.offset * level.stride
        cells.append(np.concatenate([corner, corner + level.stride]))
    anchors = np.concatenate(boxes)
    low = np.minimum(np.floor(anchors[:, :2].min(axis=0)), 0).astype(int)
    high = np.maximum(np.ceil(anchors[:, 2:].max(axis=0)), [width, height]).astype(int)
    canvas = np.full((*(high - low)[::-1], 3), 255, dtype=np.uint8)
    canvas[-low[1] : height - low[1], -low[0] : width - low[0]] = inside.image
    canvas, scale = _enlarged(canvas)
    shift = np.tile(low, 2)
    picture = draw_boxes(canvas, (anchors - shift) * scale, [""] * len(levels), levels)
    pen = ImageDraw.Draw(picture)
    for cell, number in zip(cells, inside.numbers, strict=True):
        x0, y0, x1, y1 = (cell - shift) * scale
        color = LEVEL_COLORS.get(number, NO_LEVEL_COLOR)
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=color)
    title = "cells in the middle (thin lines) and their anchors, level:"
    return _with_legend(picture, title, inside.legend)


def draw_proposals(inside: Inside, most: int) -> Image.Image:
    """The ``most`` proposals with the highest scores; the highest are drawn last."""
    boxes = np.concatenate([p.proposal_boxes.tensor.numpy() for p in inside.proposals])
    scores = np.concatenate([p.objectness_logits.numpy() for p in inside.proposals])
    levels = np.repeat(inside.numbers, [len(p) for p in inside.proposals])
    chosen = np.argsort(-scores, kind="stable")[:most][::-1]
    counts = [int((levels[chosen] == number).sum()) for number in inside.numbers]
    image, scale = _enlarged(inside.image)
    labels = [""] * len(chosen)
    picture = draw_boxes(image, boxes[chosen] * scale, labels, levels[chosen].tolist())
    names = [f"{name} {count}" for name, count in zip(inside.names, counts, strict=True)]
    title = f"{len(chosen)} best of {len(scores)} proposals, by the level of their anchor:"
    return _with_legend(picture, title, dict(zip(inside.numbers, names, strict=True)))


def draw_feature_maps(inside: Inside) -> Image.Image:
    """The image, and beside it the mean of |activation| over the channels of each map."""
    sides = [(inside.image.shape[1], inside.image.shape[0])]
    for level, level_map in zip(inside.levels, inside.maps, strict=True):
        rows, columns = level_map.shape[1:]
        sides.append((round(level.stride * columns), round(level.stride * rows)))  # with padding
    scale = MAP_SIDE / max(sides[1])
    panels = [("image", Image.fromarray(inside.image))]
    for name, level_map in zip(inside.names, inside.maps, strict=True):
        strength = level_map.abs().mean(dim=0).numpy()
        largest = float(strength.max())
        colors = matplotlib.colormaps["viridis"](strength / (largest or 1.0), bytes=True)
        label = f"{name}: {strength.shape[0]}x{strength.shape[1]}, up to {largest:.3g}"
        panels.append((label, Image.fromarray(np.ascontiguousarray(colors[:, :, :3]))))
    width, height = (round(scale * max(side)) for side in zip(*sides, strict=True))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + BAND) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, ((label, panel), (its_width, its_height)) in enumerate(zip(panels, sides, strict=True)):
        x, y = GAP + (i % columns) * (width + GAP), (i // columns) * (height + BAND)
        size = (round(scale * its_width), round(scale * its_height))
        sheet.paste(panel.resize(size, Image.Resampling.NEAREST), (x, y + BAND))
        pen.text((x, y + 10), label, fill="black")
    return sheet


def _enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """An image, enlarged by an integer factor if small, and the factor."""
    factor = max(1, round(LONGER_SIDE / max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1), factor


def _with_legend(picture: Image.Image, title: str, legend: dict[int, str]) -> Image.Image:
    width = max(picture.width, 2 * GAP + round(ImageDraw.Draw(picture).textlength(title)))
    sheet = Image.new("RGB", (width, picture.height + 2 * BAND), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, picture.height + 8), title, fill="black")
    draw_legend(pen, GAP, picture.height + BAND + 6, legend)
    return sheet


# The command


def pictures_of_dataset(
    name: str, count: int, ids: Sequence[str] = ()
) -> Iterable[tuple[Picture, np.ndarray]]:
    """Pictures of a registered dataset, each with its (R, 4) boxes, XYXY in pixels of the file.

    Args:
        name: of the dataset.
        count: number of files, spaced evenly over the dataset.
        ids: image ids to use instead of ``count``.

    Raises:
        ValueError: nothing is registered under the name, or no image has the id.
    """
    if name not in DatasetCatalog:
        known = did_you_mean(name, DatasetCatalog.keys())
        raise ValueError(f"--dataset: {name!r} is not a registered dataset; {known}")
    records = DatasetCatalog.get(name)
    if ids:
        by_id = {str(record["image_id"]): record for record in records}
        unknown = [image_id for image_id in ids if image_id not in by_id]
        if unknown:
            near = did_you_mean(unknown[0], list(by_id)[:1000])
            raise ValueError(f"--image-id: {name} has no image {unknown[0]!r}; {near[:300]}")
        chosen = [by_id[image_id] for image_id in ids]
    else:
        spread = np.linspace(0, len(records) - 1, min(count, len(records))).astype(int)
        chosen = [records[i] for i in spread]
    for record in chosen:
        annotations = [a for a in record.get("annotations", ()) if not a.get("iscrowd")]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        picture = Picture(Path(record["file_name"]), record.get("page"))
        yield picture, np.array(boxes, dtype=np.float64).reshape(-1, 4)


def draw_all(
    cfg: CfgNode,
    predictor: Predictor,
    image: np.ndarray,
    boxes: np.ndarray | None,
    most_proposals: int,
) -> dict[str, Image.Image]:
    """All drawings for an image, by tag.

    Args:
        image: (H, W, C) in the channels of ``INPUT.FORMAT``.
        boxes: ground truth, (R, 4) XYXY in pixels of ``image``; None if not available.
    """
    inside = look_inside(predictor, image)
    drawn = {}
    if boxes is not None:
        height, width = np.array(inside.image.shape[:2]) / image.shape[:2]
        resized = boxes * np.array([width, height, width, height])
        drawn["best_anchors"] = draw_best_anchors(inside, resized, cfg.MODEL.RPN.BOUNDARY_THRESH)
    drawn["cell_anchors"] = draw_cell_anchors(inside)
    drawn["proposals"] = draw_proposals(inside, most_proposals)
    drawn["feature_maps"] = draw_feature_maps(inside)
    return drawn


def look(args: argparse.Namespace) -> None:
    """Implements ``fpn-ext look``: draws, and prints what was written.

    Raises:
        FileNotFoundError, TypeError, ValueError: invalid arguments.
    """
    if args.num_images < 1 or args.proposals < 1:
        raise ValueError("--num-images and --proposals must be at least 1")
    cfg = load_inference_config(args.config_file, args.opts, of_run=bool(args.run and args.input))
    pictures: list[tuple[Picture, np.ndarray | None]]
    if args.input:
        pictures = [(picture, None) for picture in pages_of(find_pictures(args.input))]
    else:
        dataset = args.dataset or first_test_dataset(cfg, "--dataset")
        pictures = list(pictures_of_dataset(dataset, args.num_images, args.image_id))
    names = names_of([picture for picture, _ in pictures])
    written = [args.output / f"{name}_{tag}.png" for name in names for tag in TAGS]
    check_harmless([picture.file for picture, _ in pictures], written)
    predictor = build_predictor(cfg)
    for name, (picture, boxes) in zip(names, pictures, strict=True):
        image = predictor.read(picture.file, picture.page)
        drawn = draw_all(cfg, predictor, image, boxes, args.proposals)
        _write(drawn, name, args.output, args.tensorboard)
    print(f"wrote the pictures of {len(pictures)} image(s) into {args.output}")


def _write(drawn: dict[str, Image.Image], name: str, folder: Path, tensorboard: bool) -> None:
    for tag, picture in drawn.items():
        write_picture(picture, folder / f"{name}_{tag}.png", optimize=True)
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        with SummaryWriter(str(folder)) as writer:
            for tag, picture in drawn.items():
                writer.add_image(f"{tag}/{name}", np.asarray(picture), dataformats="HWC")
