"""COCO evaluation of generated detections: hotcoco against pycocotools, the same twelve numbers.

    python benchmarks/evaluation.py [--rounds 3] [--images 5000] [--json FILE]

Both sides count the same 100 detections an image of 80 classes through
``fpn_ext.evaluation.coco.evaluate_coco``, reading of the detections included, and take turns within
every round. Objects and errors are random: about seven objects an image, 2 % of them crowd regions,
boxes shifted by a few pixels, a fifth of the detections of another class.
"""

import argparse
import os
import statistics
import time
from importlib.metadata import version
from typing import Any

import fpn_ext  # noqa: F401  before detectron2, where that is not compiled
import numpy as np
from fpn_ext.evaluation.coco import CocoSettings, evaluate_coco, has_hotcoco
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.measuring import markdown_table, ratio, ratio_text
from fpn_ext.reporting.provenance import command_line, commit, hardware, versions
from pycocotools.coco import COCO

CLASSES = 80
SIDES = ("pycocotools", "hotcoco")


def generated(
    images: int, detections: int, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO dataset of 640x480 px images, and detections in COCO's result format."""
    random = np.random.default_rng(seed)
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        count = int(random.integers(1, 14))
        boxes = np.column_stack(
            [random.uniform(0, 500, count), random.uniform(0, 400, count)]
            + [np.exp(random.uniform(1.5, 5.3, count)) for _ in range(2)]
        )
        classes = random.integers(1, CLASSES + 1, count)
        for box, category in zip(boxes.tolist(), classes.tolist(), strict=True):
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(random.random() < 0.02),
                }
            )
        near = random.integers(0, count, detections)
        found = boxes[near] + random.normal(0, 4, (detections, 4))
        found[:, 2:] = np.abs(found[:, 2:]) + 1
        guessed = random.integers(1, CLASSES + 1, detections)
        named = np.where(random.random(detections) < 0.8, classes[near], guessed)
        scores = random.random(detections)
        for box, category, score in zip(
            found.tolist(), named.tolist(), scores.tolist(), strict=True
        ):
            results.append(
                {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            )
    dataset = {
        "images": [
            {"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": c, "name": f"class {c}"} for c in range(1, CLASSES + 1)],
        "annotations": objects,
    }
    return dataset, results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="of an image")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    if not has_hotcoco():
        parser.error("hotcoco is not installed: pip install hotcoco")
    dataset, detections = generated(options.images, options.detections)
    truth = COCO()
    truth.dataset = dataset
    truth.createIndex()
    load = os.getloadavg()[0]
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    numbers = {}
    for _ in range(options.rounds):
        for side in SIDES:
            settings = CocoSettings("auto" if side == "hotcoco" else side)
            begin = time.perf_counter()
            numbers[side] = evaluate_coco(truth, detections, "bbox", settings).stats
            times[side].append(time.perf_counter() - begin)
    difference = float(np.abs(numbers["hotcoco"] - numbers["pycocotools"]).max())
    rows = [
        {"side": side, "seconds": statistics.median(times[side])}
        | ratio(times, side, "pycocotools")
        for side in SIDES
    ]
    table = [[row["side"], f"{row['seconds']:.2f}", ratio_text(row)] for row in rows]
    print(markdown_table(["", "s", "times pycocotools"], table))
    print(f"\nlargest difference of the 12 numbers: {difference:g}")
    if options.json:
        facts = {
            "command": command_line(),
            "commit": commit(),
            "hardware": hardware(),
            "load_average_before": load,
            "load_average_after": os.getloadavg()[0],
            "versions": versions() | {"hotcoco": version("hotcoco")},
            "images": options.images,
            "detections_of_an_image": options.detections,
            "classes": CLASSES,
            "objects": len(dataset["annotations"]),
            "rounds": options.rounds,
        }
        numbers_of_both = {side: numbers[side].tolist() for side in SIDES}
        write_json(
            options.json,
            {"about": facts, "sides": rows, "difference": difference, "stats": numbers_of_both},
        )


if __name__ == "__main__":
    main()
