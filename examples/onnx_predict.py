"""Run a detector that `fpn-ext export --format onnx` wrote, without PyTorch and without fpn_ext.

    pip install onnxruntime numpy Pillow
    python examples/onnx_predict.py model.onnx photo.jpg

Prints a line for each detection: score, class, and the box in pixels of the photograph.
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def resized(picture, shortest, longest):
    """The picture with its shorter side `shortest`, or its longer one `longest` if that is less.

    Of a model that takes pictures as they are, `shortest` is 0.
    """
    if shortest == 0:
        return picture
    # Step by step as in training: a side that ends in .5 would else be rounded otherwise.
    scale = shortest / min(picture.size)
    sides = [shortest if side == min(picture.size) else side * scale for side in picture.size]
    if max(sides) > longest:
        scale = longest / max(sides)
        sides = [side * scale for side in sides]
    size = [int(side + 0.5) for side in sides]
    if 0 in size:
        raise ValueError(f"a picture of {picture.size} is too thin to be resized to {size}")
    return picture.resize(size, Image.Resampling.BILINEAR)


def upright(picture):
    """The picture in RGB, turned as its EXIF says."""
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"this example takes pictures of 8 bits a channel, got {picture.mode}")
    return ImageOps.exif_transpose(picture).convert("RGB")


def detect(session, picture, min_score=0.5):
    """Boxes (D, 4) in pixels of an RGB picture, scores (D,) and names of the classes."""
    about = json.loads(session.get_modelmeta().custom_metadata_map["fpn_ext"])
    if about["inputs"] != ["images"] or about["pixel_format"] not in ("RGB", "BGR"):
        raise ValueError("this example runs detectors of colour pictures that need no proposals")
    rule = about["resize"]
    small = resized(picture, rule["shortest_side"], rule["longest_side_at_most"])
    pixels = np.asarray(small, dtype=np.float32)
    if about["pixel_format"] == "BGR":
        pixels = pixels[:, :, ::-1]
    images = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])

    found = dict(zip(about["outputs"], session.run(None, {"images": images}), strict=True))
    sure = found["scores"] >= min_score
    scale = np.array(picture.size, dtype=np.float32) / np.array(small.size, dtype=np.float32)
    boxes = found["boxes"][sure] * np.tile(scale, 2)
    names = [about["class_names"][number] for number in found["classes"][sure]]
    return boxes, found["scores"][sure], names


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="an .onnx file")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--min-score", type=float, default=0.5)
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    for file in args.pictures:
        with Image.open(file) as picture:
            boxes, scores, names = detect(session, upright(picture), args.min_score)
        for box, score, name in zip(boxes, scores, names, strict=True):
            corners = " ".join(f"{value:.1f}" for value in box)
            print(f"{file} {score:.3f} {name} {corners}")


if __name__ == "__main__":
    main()
