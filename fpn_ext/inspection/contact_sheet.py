"""Figures of a trained model: ground truth beside detections, and its training curves.

    fpn-ext contact-sheet --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
        --output output/demo_R_18 MODEL.WEIGHTS output/demo_R_18/model_final.pth
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image, ImageDraw

from ..data.datasets import first_test_dataset
from ..data.reading import as_rgb
from ..inference.predictor import build_predictor, detections_of
from ..levels import name_of
from ..reporting.drawing import coloring_field, draw_boxes, draw_detections, draw_legend
from ..reporting.drawn import write_figure


def contact_sheet(
    cfg: CfgNode, num_images: int = 12, min_score: float = 0.5, label_levels: bool = False
) -> Image.Image:
    """Images of ``DATASETS.TEST[0]`` in pairs: ground truth left, the model's detections right.

    The images are spaced evenly over the dataset. A legend below gives the levels' colours. With
    ``label_levels``, each box is labelled ``p3>p4``: proposed by P3, pooled from P4.

    Raises:
        ValueError: ``num_images`` is less than 1; ``DATASETS.TEST`` is empty.
    """
    if num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {num_images}")
    dataset = first_test_dataset(cfg)
    records = DatasetCatalog.get(dataset)
    names = MetadataCatalog.get(dataset).thing_classes
    predictor = build_predictor(cfg)
    drawn_names = list(predictor.classes.values())
    pairs = []
    levels: set[int] = set()
    field = None
    for i in np.linspace(0, len(records) - 1, min(num_images, len(records))).astype(int):
        record = records[i]
        pixels = predictor.read(record["file_name"], record.get("page"))
        image = as_rgb(pixels, predictor.pixel_format)
        truth = [a for a in record["annotations"] if not a.get("iscrowd")]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in truth]
        scale = 320 / max(image.shape[:2])
        left = draw_boxes(
            image,
            np.array(boxes, dtype=np.float32).reshape(-1, 4),
            [names[a["category_id"]] for a in truth],
            [None] * len(truth),
            scale,
        )
        detections = detections_of(predictor(pixels))
        found = detections[detections.scores >= min_score]
        field = coloring_field(found)
        if field:
            levels |= set(found.get(field).tolist())
        right = draw_detections(image, found, drawn_names, scale, label_levels, "level")
        pairs.append((left, right))
    title = f"ground truth | detections with score >= {min_score:g}, {dataset}"
    which = "that proposed them" if field == "proposal_level" else "they were pooled from"
    return _paste(pairs, title, f"detections are coloured by the level {which}:", sorted(levels))


def _paste(
    pairs: list[tuple[Image.Image, Image.Image]], title: str, legend: str, levels: Sequence[int]
) -> Image.Image:
    cell, gap, columns, band = 320, 6, 2, 28
    rows = -(-len(pairs) // columns)
    pair_width = 2 * cell + 3 * gap
    sheet = Image.new("RGB", (columns * pair_width, 2 * band + rows * (cell + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 8), title, fill="black")
    for i, pair in enumerate(pairs):
        x = (i % columns) * pair_width + gap
        y = band + (i // columns) * (cell + gap)
        for j, picture in enumerate(pair):
            sheet.paste(picture, (x + j * (cell + gap), y))
    x, y = gap, sheet.height - band + 8
    pen.text((x, y), legend, fill="black")
    draw_legend(pen, x + 360, y, {level: name_of(level).upper() for level in levels})
    return sheet


def draw_curves(metrics_file: Path, file: Path) -> None:
    """Losses and box AP over iterations, from the last run in Detectron2's ``metrics.json``.

    Training appends to that file. A line cut short, as a full disk leaves it, is named and left
    out.

    Raises:
        FileNotFoundError: no such file; training writes it into OUTPUT_DIR.
    """
    if not metrics_file.is_file():
        raise FileNotFoundError(f"no {metrics_file}: training writes it into its OUTPUT_DIR")
    lines: list[dict[str, float]] = []
    for number, line in enumerate(metrics_file.read_text().splitlines(), start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            print(f"{metrics_file}, line {number}: cut short, left out", file=sys.stderr)
            continue
        # Detectron2 appends. Where the iteration decreases, a new run starts, or one resumes from a
        # checkpoint and repeats some iterations.
        if lines and entry["iteration"] < lines[-1]["iteration"]:
            lines = [done for done in lines if done["iteration"] < entry["iteration"]]
        lines.append(entry)
    figure, (loss_axes, ap_axes) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for key in sorted({k for line in lines for k in line if "loss" in k}):
        points = [(line["iteration"], line[key]) for line in lines if key in line]
        loss_axes.plot(*zip(*points, strict=True), label=key)
    for key in ("bbox/AP", "bbox/AP50"):
        points = [(line["iteration"], line[key]) for line in lines if key in line]
        if points:
            ap_axes.plot(*zip(*points, strict=True), marker="o", label=key)
    for axes, title in ((loss_axes, "training loss"), (ap_axes, "AP, percent")):
        axes.set(title=title, xlabel="iteration", ylim=(0, None))
        if axes.lines:
            axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    write_figure(figure, file)
    plt.close(figure)
