"""Detect objects on pictures: boxes drawn on each, and all of them in one COCO-format JSON.

    python -m fpn_ext.predict --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
        --input photo.jpg folder/ --output out MODEL.WEIGHTS output/demo/model_final.pth
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances

from .config import check_config, load_config, resolve_device
from .data import register_datasets
from .drawing import draw_detections

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def load_inference_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """A config ready for Detectron2's DefaultPredictor, keeping the level of each detection.

    Raises:
        FileNotFoundError: no such config, or no such checkpoint (a local ``MODEL.WEIGHTS``).
        ValueError: what :func:`fpn_ext.load_config` and :func:`fpn_ext.check_config` find, or no
            ``MODEL.WEIGHTS``: random weights detect nothing.
    """
    cfg = load_config(config_file, opts)
    register_datasets()
    check_config(cfg)
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError(
            "MODEL.WEIGHTS is empty: name the checkpoint, e.g. "
            "MODEL.WEIGHTS output/demo/model_final.pth"
        )
    if "://" not in weights and not Path(weights).is_file():
        raise FileNotFoundError(f"MODEL.WEIGHTS: no file {weights}")
    note = resolve_device(cfg)
    if note:
        print(note)
    cfg.MODEL.FPN_EXT.KEEP_POOLED_LEVEL = True
    cfg.freeze()
    return cfg


def find_pictures(inputs: Iterable[str | Path]) -> list[Path]:
    """The picture files among files and folders (one level deep), in order of name per folder.

    Raises:
        FileNotFoundError: an input does not exist, or a folder holds no picture.
    """
    pictures = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(f for f in path.iterdir() if f.suffix.lower() in PICTURE_SUFFIXES)
            if not found:
                raise FileNotFoundError(
                    f"--input {path}: no picture in this folder ({', '.join(PICTURE_SUFFIXES)})"
                )
            pictures += found
        elif path.is_file():
            pictures.append(path)
        else:
            raise FileNotFoundError(f"--input {path}: no such file or folder")
    return pictures


def predict(
    cfg: CfgNode, pictures: Sequence[Path], output: Path, min_score: float = 0.5
) -> dict[str, Any]:
    """Detect on every picture; writes the drawings and ``detections.json`` into ``output``.

    Returns what the JSON holds: COCO's ``images``, ``categories`` and ``annotations``, the latter
    with ``score`` and (if the model keeps it) ``pooled_level``; boxes are XYWH in pixels of the
    picture file. COCO's tools read it as ground truth and, its annotations, as results.
    """
    dataset = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(dataset)
    if not metadata.get("thing_classes"):
        DatasetCatalog.get(dataset)  # COCO-format sets learn their class names from their JSON
    names = metadata.thing_classes
    # Class numbers are 0, 1, ...; the ids in a COCO file may be others.
    number_of = metadata.get("thing_dataset_id_to_contiguous_id") or {
        i + 1: i for i in range(len(names))
    }
    id_of = {number: category for category, number in number_of.items()}

    predictor = DefaultPredictor(cfg)
    output.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    drawings: set[Path] = set()
    for image_id, picture in enumerate(pictures, start=1):
        image = read_image(str(picture), "RGB")
        detections = predictor(image[:, :, ::-1])["instances"].to("cpu")  # it takes BGR
        detections = detections[detections.scores >= min_score]
        height, width = image.shape[:2]
        images.append({"id": image_id, "file_name": str(picture), "height": height, "width": width})
        for annotation in _annotations(detections):
            annotation["id"] = len(annotations) + 1
            annotation["image_id"] = image_id
            annotation["category_id"] = id_of[annotation["category_id"]]
            annotations.append(annotation)
        drawing = output / f"{picture.stem}.png"
        if drawing in drawings:  # two inputs of the same name
            drawing = output / f"{picture.stem}_{image_id}.png"
        drawings.add(drawing)
        draw_detections(image, detections, names).save(drawing)

    result = {
        "images": images,
        "categories": [{"id": id_of[i], "name": name} for i, name in enumerate(names)],
        "annotations": annotations,
    }
    (output / "detections.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _annotations(detections: Instances) -> Iterable[dict[str, Any]]:
    for i, (x0, y0, x1, y1) in enumerate(detections.pred_boxes.tensor.tolist()):
        annotation = {
            "category_id": int(detections.pred_classes[i]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "score": float(detections.scores[i]),
        }
        if detections.has("pooled_level"):
            annotation["pooled_level"] = int(detections.pooled_level[i])
        yield annotation


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--input", required=True, nargs="+", help="picture files and folders")
    parser.add_argument("--output", required=True, type=Path, help="folder for what is written")
    parser.add_argument("--min-score", type=float, default=0.5)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args(argv)
    pictures = find_pictures(args.input)
    cfg = load_inference_config(args.config_file, args.opts)
    result = predict(cfg, pictures, args.output, args.min_score)
    print(
        f"{len(result['annotations'])} detections on {len(pictures)} picture(s): "
        f"{args.output / 'detections.json'}, drawings beside it"
    )


if __name__ == "__main__":
    main()
