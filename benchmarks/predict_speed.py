"""Images a second: `fpn-ext predict` on a folder of photographs, and its model alone.

    python benchmarks/predict_speed.py FOLDER --json results/speed-cpu/avx512/predict.json

Faster R-CNN R-50 FPN, optimised, with calibrated random weights (calibrated.py). Predicting reads a
photograph, resizes it, detects, draws and writes; the model alone gets the same images, resized and
in memory. The two take turns in every round. The rate of predicting is that from its first to its
last drawing, by their times in the file system: a model is built once for any number of images.
Every detection is drawn, up to 100 on an image.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fpn_ext  # noqa: F401  before detectron2, where that is not compiled
import numpy as np
import torch
from calibrated import calibrated_weights
from detectron2.config import CfgNode
from fpn_ext.inference.pictures import find_pictures, predict
from fpn_ext.inference.predictor import Predictor, build_predictor
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.provenance import command_line, commit, hardware, versions
from fpn_ext.speed.optimize import model_for_inference
from sides import builtin_config, config

CALIBRATED_AT = (800, 1333)


def prepared(opts: Sequence[str], folder: Path) -> CfgNode:
    """The config of a detector whose weights lie in a folder."""
    weights = folder / "model.pth"
    torch.save({"model": calibrated_weights(builtin_config("cpu", opts), CALIBRATED_AT)}, weights)
    more = ["MODEL.WEIGHTS", str(weights), "MODEL.FPN_EXT.INFERENCE_DTYPE", "float32"]
    return config("faster_rcnn_R_50_FPN_1x.yaml", "cpu", [*more, *opts])


def inputs_of(predictor: Predictor, files: Sequence[Path]) -> list[dict[str, Any]]:
    inputs = []
    for file in files:
        image = predictor.read(file)
        pixels = predictor.aug.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        inputs.append({"image": tensor, "height": image.shape[0], "width": image.shape[1]})
    return inputs


def model_alone(model: torch.nn.Module, inputs: Sequence[dict[str, Any]]) -> float:
    """Images a second, of all but the first, as for predicting."""
    with torch.inference_mode():
        model([inputs[0]])
        begin = time.perf_counter()
        for entry in inputs[1:]:
            model([entry])
    return (len(inputs) - 1) / (time.perf_counter() - begin)


def predicting(cfg: CfgNode, files: Sequence[Path]) -> float:
    """Images a second, from the first drawing to the last."""
    with tempfile.TemporaryDirectory() as folder:
        predict(cfg, files, Path(folder, "out"), min_score=0.0)
        written = sorted(f.stat().st_mtime_ns for f in Path(folder, "out").glob("*.png"))
    return 1e9 * (len(written) - 1) / (written[-1] - written[0])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of photographs")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    options = parser.parse_intermixed_args(argv)
    files = find_pictures([options.folder])[: options.images]
    if len(files) < 2:
        parser.error(f"{options.folder} has {len(files)} images: a rate needs two at least")
    sides: dict[str, list[float]] = {"model alone": [], "predict": []}
    with tempfile.TemporaryDirectory() as folder:
        cfg = prepared(options.opts, Path(folder))
        predictor = build_predictor(cfg)
        model = model_for_inference(cfg, predictor.model)
        inputs = inputs_of(predictor, files)
        for number in range(1 + options.rounds):
            rates = model_alone(model, inputs), predicting(cfg, files)
            if number:  # the first warms up
                for side, rate in zip(sides.values(), rates, strict=True):
                    side.append(rate)
    shares = [b / a for a, b in zip(*sides.values(), strict=True)]
    record = {
        "about": {
            "command": command_line(),
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "environment": {k: v for k, v in os.environ.items() if k in ("FPN_EXT_TUNE",)},
            "images": len(files),
            "size": sorted({f"{i['image'].shape[1]}x{i['image'].shape[2]}" for i in inputs}),
            "rounds": options.rounds,
        },
        "images_a_second": {name: statistics.median(rates) for name, rates in sides.items()},
        "share": statistics.median(shares),
        "share_range": [min(shares), max(shares)],
    }
    print(record["images_a_second"], f"share {record['share']:.2f}", record["share_range"])
    if options.json:
        write_json(options.json, record)


if __name__ == "__main__":
    main()
