"""CPU time and peak memory of what meets many images, boxes, objects, proposals or classes.

    python benchmarks/at_scale.py [--images 20000] [--parts data levels ...] [--json FILE]

Every part runs in a process of its own; its CPU time and peak memory are the operating system's, so
that a busy machine matters little. ``imports`` is the memory of a process that has only imported
the package: torch with CUDA is some 700 MB of it. Images of a dataset have ten boxes each, of 20
classes. ``data`` also decodes every picture, all of 64x48 px.

    matching, matching-detectron2    10 000 objects of 4x4 px and 40 029 anchors on 400x400 px
    data, levels, anchors            the verbs of fpn-ext, on --images images
    evaluation                       COCO's AP of ten detections an image, by hotcoco
    proposals                        100 000 proposals on one image
    classes                          1000 classes, 1000 proposals
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 20
BOXES = 10  # of an image
WIDTH, HEIGHT = 64, 48
LINKS = 50_000  # names of one file; ext4 allows 65 000
CONFIG = "configs/detectron2/faster_rcnn_R_50_FPN_1x.yaml"


def write_dataset(folder: Path, images: int, pictures: bool) -> None:
    """``annotations.json``, ``detections.json`` and ``images/``: one picture under many names."""
    from PIL import Image

    random = np.random.default_rng(0)
    names = [f"{number:07}.jpg" for number in range(images)]
    (folder / "images").mkdir(parents=True)
    if pictures:
        first = folder / "images" / names[0]
        Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(first)
        for number, name in enumerate(names[1:], start=1):
            if number % LINKS:
                os.link(first, folder / "images" / name)
            else:
                first = Path(shutil.copy(first, folder / "images" / name))
    sides = np.exp(random.uniform(np.log(3), np.log(40), (images * BOXES, 2)))
    corners = random.random(sides.shape) * ([WIDTH, HEIGHT] - sides)
    boxes = np.concatenate([corners, sides], axis=1).round(2).tolist()
    classes = random.integers(1, CLASSES + 1, len(boxes)).tolist()
    scores = random.random(len(boxes)).round(4).tolist()
    common = [
        {"image_id": number // BOXES + 1, "category_id": category, "bbox": box}
        for number, (category, box) in enumerate(zip(classes, boxes, strict=True))
    ]
    objects = [
        {"id": number + 1, **entry, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
        for number, entry in enumerate(common)
    ]
    dataset = {
        "images": [
            {"id": number + 1, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for number, name in enumerate(names)
        ],
        "annotations": objects,
        "categories": [{"id": c + 1, "name": f"class {c + 1}"} for c in range(CLASSES)],
    }
    (folder / "annotations.json").write_text(json.dumps(dataset))
    found = [{**entry, "score": score} for entry, score in zip(common, scores, strict=True)]
    (folder / "detections.json").write_text(json.dumps(found))


# Each part imports what it needs, so that its process holds nothing else.


def imports(folder: Path) -> None:
    import fpn_ext.api  # noqa: F401


def matching(folder: Path) -> None:
    import torch
    from fpn_ext.kernels.box_matching import match_boxes

    torch.save(match_boxes(*objects_and_anchors()), folder / "matching.pt")


def matching_detectron2(folder: Path) -> None:
    import fpn_ext  # noqa: F401  before detectron2, where that is not compiled
    import torch
    from detectron2.structures import pairwise_iou

    objects, anchors, matcher = objects_and_anchors()
    torch.save(matcher(pairwise_iou(objects, anchors)), folder / "matching-detectron2.pt")


def objects_and_anchors() -> tuple[Any, Any, Any]:
    import torch
    from fpn_ext import PyramidAnchorGenerator
    from detectron2.modeling.matcher import Matcher
    from detectron2.structures import Boxes

    strides = (4, 8, 16, 32, 64)
    generator = PyramidAnchorGenerator(
        sizes=[[8 * s] for s in strides], aspect_ratios=[[0.5, 1.0, 2.0]], strides=strides
    )
    sides = [math.ceil(400 / stride) for stride in strides]
    anchors = Boxes.cat(generator([torch.zeros(1, 1, side, side) for side in sides]))
    torch.manual_seed(0)
    corner = torch.rand(10_000, 2) * 396
    objects = Boxes(torch.cat([corner, corner + 4], dim=1))
    return objects, anchors, Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)


def data(folder: Path) -> None:
    files = ["--coco", str(folder / "annotations.json"), "--images", str(folder / "images")]
    command(["data", *files])


def levels(folder: Path) -> None:
    boxes_report("levels", folder)


def anchors(folder: Path) -> None:
    boxes_report("anchors", folder)


def boxes_report(verb: str, folder: Path) -> None:
    import fpn_ext  # noqa: F401  before detectron2, where that is not compiled
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances(
        "at_scale", {}, str(folder / "annotations.json"), str(folder / "images")
    )
    command([verb, "--config-file", CONFIG, "--dataset", "at_scale", "MODEL.WEIGHTS", ""])


def command(words: list[str]) -> None:
    from fpn_ext.__main__ import main

    if main(words) != 0:
        sys.exit(f"fpn-ext {' '.join(words)} failed")


def evaluation(folder: Path) -> None:
    import fpn_ext  # noqa: F401
    from fpn_ext.data.coco_file import coco_lists
    from fpn_ext.evaluation.coco import evaluate_coco
    from fpn_ext.files.json_lists import ListInFile

    found = ListInFile(folder / "detections.json")
    print(evaluate_coco(coco_lists(folder / "annotations.json"), found, "bbox").stats)


def proposals(folder: Path) -> None:
    detect(100_000, 20, ("MODEL.ROI_HEADS.NAME", "ChunkedROIHeads"))


def classes(folder: Path) -> None:
    detect(1000, 1000, ())


def detect(count: int, num_classes: int, overrides: tuple[str, ...]) -> None:
    """RoI heads of R-50 FPN on one image of 800x800 px."""
    import fpn_ext
    import torch
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_roi_heads
    from detectron2.structures import Boxes, ImageList, Instances

    cfg = fpn_ext.load_config(CONFIG, list(overrides))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    shapes = {f"p{k}": ShapeSpec(channels=256, stride=2**k) for k in range(2, 7)}
    heads = build_roi_heads(cfg, shapes).eval()
    maps = {f"p{k}": torch.randn(1, 256, 800 // 2**k, 800 // 2**k) for k in range(2, 7)}
    corner = torch.rand(count, 2) * 600
    proposed = Instances((800, 800))
    proposed.proposal_boxes = Boxes(torch.cat([corner, corner + 8 + 190 * torch.rand(count, 2)], 1))
    proposed.objectness_logits = torch.zeros(count)
    with torch.no_grad():
        (found,), _ = heads(ImageList(torch.zeros(1, 3, 800, 800), [(800, 800)]), maps, [proposed])
    print(len(found), "detections")


PARTS = {
    part.__name__.replace("_", "-"): part
    for part in (
        *(imports, matching, matching_detectron2, data, levels, anchors),
        *(evaluation, proposals, classes),
    )
}
OF_A_DATASET = ("data", "levels", "anchors", "evaluation")


def measured(part: str, folder: Path) -> dict[str, Any]:
    """A part in a process of its own, with one thread."""
    words = [sys.executable, __file__, "--worker", part, "--folder", str(folder)]
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = usage.ru_utime + usage.ru_stime
    return {
        "part": part,
        "failed": process.returncode != 0,
        "cpu_s": round(seconds, 2),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        PARTS[options.worker](options.folder)
        return
    with tempfile.TemporaryDirectory(prefix="at_scale_") as name:
        folder = Path(name)
        if any(part in OF_A_DATASET for part in options.parts):
            # In a process of its own: what this one has held counts in the peak of those it starts.
            arguments = (folder, options.images, "data" in options.parts)
            writer = multiprocessing.get_context("spawn").Process(
                target=write_dataset, args=arguments
            )
            writer.start()
            writer.join()
            if writer.exitcode:
                sys.exit(f"the dataset could not be written: exit status {writer.exitcode}")
        results = [measured(part, folder) for part in options.parts]
        equal = same_matches(folder)
    report(results, equal, options)


def same_matches(folder: Path) -> bool | None:
    """Whether both ways of matching gave the same; None if they were not both run."""
    files = [folder / "matching.pt", folder / "matching-detectron2.pt"]
    if not all(file.exists() for file in files):
        return None
    import torch

    pairs = zip(*(torch.load(file, weights_only=True) for file in files), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def report(results: list[dict[str, Any]], equal: bool | None, options: argparse.Namespace) -> None:
    from fpn_ext.reporting.json_files import write_json
    from fpn_ext.reporting.measuring import markdown_table
    from fpn_ext.reporting.provenance import command_line, commit, hardware, versions

    rows = [
        [r["part"] + (" FAILED" if r["failed"] else ""), f"{r['cpu_s']:.1f}", str(r["peak_mb"])]
        for r in results
    ]
    print(markdown_table(["", "CPU s", "peak MB"], rows))
    if options.json:
        about = {
            "command": command_line(),
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(),
            "images": options.images,
            "boxes_of_an_image": BOXES,
        }
        write_json(
            options.json, {"about": about, "parts": results, "matches_are_detectron2s": equal}
        )


if __name__ == "__main__":
    main()
