"""How far around an object a detector looks: recognised with all but its surroundings taken away.

    RUN=output/reproduce/small/table2_c_seed1      # after fpn-ext reproduce --table 2 --rows c
    python benchmarks/context.py --config-file $RUN/reproduce.yaml \
        --weights $RUN/model_final.pth --json results/context/table2_c_seed1.json

Each object of the test set is classified by the RoI heads with its annotated box as the proposal,
once on the whole image and once for each margin: pixels farther than that from the box have the
config's mean, which the network sees as 0. What a margin takes away is what coarse maps could have
told of an object; where nothing is lost, a map of a small receptive field knows as much. C2 of a
ResNet-50 sees 17 pixels beyond its cell, C3 49, C4 145 (fpn_ext.paper: Tables 1 to 3, row d).
Margins are in pixels of the network's input, sizes COCO's, by the area of the box.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fpn_ext
import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode
from fpn_ext.data.datasets import register_datasets
from fpn_ext.data.mapper import PictureMapper
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.provenance import commit, hardware, versions

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
MARGINS = (0, 8, 16, 32, 64)


def only_around(
    image: torch.Tensor, box: Sequence[float], margin: float, fill: torch.Tensor
) -> Any:
    """A copy of an image in which all pixels farther than ``margin`` from a box are ``fill``.

    Args:
        image: (channels, height, width).
        box: x0, y0, x1, y1 in pixels of the image.
        fill: (channels,).

    >>> image = torch.arange(5.0).expand(1, 1, 5)
    >>> only_around(image, (2, 0, 3, 1), 1, torch.tensor([9.0]))
    tensor([[[9., 1., 2., 3., 9.]]])
    """
    x0, y0 = (max(math.floor(low - margin), 0) for low in box[:2])
    x1, y1 = (math.ceil(high + margin) for high in box[2:])  # slices end with the image
    kept = fill.to(image.dtype).view(-1, 1, 1).expand_as(image).clone()
    kept[:, y0:y1, x0:x1] = image[:, y0:y1, x0:x1]
    return kept


def objects(cfg: CfgNode, dataset: str) -> Iterator[tuple[torch.Tensor, list[float], int, str]]:
    """(input image, box on it, class, size) of every object that is no crowd."""
    mapper = PictureMapper(cfg, False)
    for record in get_detection_dataset_dicts(dataset, filter_empty=True):
        image = mapper(record)["image"]
        scale_x = image.shape[2] / record["width"]
        scale_y = image.shape[1] / record["height"]
        for annotation in record["annotations"]:
            if annotation.get("iscrowd"):
                continue
            x0, y0, x1, y1 = BoxMode.convert(
                annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
            area = (x1 - x0) * (y1 - y0)
            size = next(name for name, (low, high) in SIZES.items() if low <= area < high)
            box = [x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y]
            yield image, box, annotation["category_id"], size


@torch.no_grad()
def recognised(model: Any, image: torch.Tensor, box: Sequence[float], category: int) -> bool:
    """Whether the class of highest score for the box, background among them, is the object's."""
    images = model.preprocess_image([{"image": image}])
    maps = model.backbone(images.tensor)
    heads = model.roi_heads
    pooled = heads.box_pooler([maps[name] for name in heads.box_in_features], [Boxes([box])])
    scores, _ = heads.box_predictor(heads.box_head(pooled))
    return int(scores.argmax(dim=1)) == category


def measured(
    model: Any, cfg: CfgNode, dataset: str, limit: int | None = None
) -> list[dict[str, Any]]:
    """A row for each size: its objects, and the share recognised with each margin, in percent.

    Args:
        limit: objects of each size; None for all.
    """
    fill = torch.tensor(cfg.MODEL.PIXEL_MEAN)
    found: dict[str, list[list[bool]]] = {size: [] for size in SIZES}
    for image, box, category, size in objects(cfg, dataset):
        if limit is not None and len(found[size]) >= limit:
            continue
        shown = [only_around(image, box, margin, fill) for margin in MARGINS]
        found[size].append([recognised(model, i, box, category) for i in (*shown, image)])
    rows = []
    for size, of_size in found.items():
        if of_size:
            shares = [100 * sum(column) / len(of_size) for column in zip(*of_size, strict=True)]
            by_margin = dict(zip((*map(str, MARGINS), "all"), shares, strict=True))
            rows.append({"size": size, "objects": len(of_size), "recognised": by_margin})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", required=True, metavar="FILE")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="objects of each size; unless given, all"
    )
    parser.add_argument("--json", required=True, type=Path, metavar="FILE")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE")
    options = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)
    register_datasets()
    words = [*options.opts, "MODEL.DEVICE", "cpu"]
    cfg = fpn_ext.prepare(options.config_file, words, training=False).cfg
    (dataset,) = cfg.DATASETS.TEST
    model = build_model(cfg).eval()
    SafeCheckpointer(model).load(options.weights)
    rows = measured(model, cfg, dataset, options.limit)
    content = {
        "name": options.json.stem,
        "dataset": dataset,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "rows": rows,
    }
    write_json(options.json, content)
    for row in rows:
        shares = ", ".join(f"{m} px {share:.1f}" for m, share in row["recognised"].items())
        print(f"{row['size']}: {row['objects']} objects, recognised with {shares} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
