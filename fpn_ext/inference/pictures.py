"""Detect objects on pictures: boxes drawn on each, and all of them in one COCO-format JSON.

    fpn-ext predict --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
        --input photo.jpg folder/ --output out MODEL.WEIGHTS output/demo/model_final.pth
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances

from ..config.level_table import level_table, level_table_in_errors
from ..config.prepare import prepare
from ..files.checkpoint import CompleteCheckpointer
from ..reporting.coco_json import annotations_of
from ..reporting.drawing import draw_detections
from ..reporting.json_files import write_json
from ..speed.optimize import model_for_inference

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def load_inference_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """A config ready for Detectron2's DefaultPredictor, keeping the levels of each detection.

    Raises:
        FileNotFoundError: no such config, or no such checkpoint (a local ``MODEL.WEIGHTS``).
        ValueError: what :func:`fpn_ext.prepare` finds wrong, no ``DATASETS.TEST`` to name the
        classes, or a model that needs
            proposals made beforehand.
    """
    cfg, notes = prepare(config_file, opts, weights="required")
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; its first dataset names the classes")
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS: this model needs proposals made beforehand for every picture; "
            "predict with a model that has its own RPN"
        )
    for note in filter(None, (*notes, level_table(cfg))):
        print(note)
    cfg.MODEL.FPN_EXT.KEEP_LEVELS = True
    cfg.freeze()
    return cfg


def build_predictor(cfg: CfgNode) -> DefaultPredictor:
    """Detectron2's DefaultPredictor, its weights read by :class:`CompleteCheckpointer`."""
    without_weights = cfg.clone()
    without_weights.defrost()
    without_weights.MODEL.WEIGHTS = ""  # DefaultPredictor would unpickle them
    without_weights.MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS = ""  # the checkpoint has the bottom-up's too
    without_weights.MODEL.FPN_EXT.KEEP_PIXELS = True  # they may be those of that file
    with level_table_in_errors(cfg):
        predictor = DefaultPredictor(without_weights)
    CompleteCheckpointer(predictor.model).load(cfg.MODEL.WEIGHTS)
    return predictor


def detections_of(output: dict[str, Any]) -> Instances:
    """The detections in a model's output for one image, on CPU; an RPN's proposals count as such.

    A proposal's class is 0 and its score the sigmoid of its objectness.
    """
    if "instances" in output:
        return output["instances"].to("cpu")
    proposals = output["proposals"].to("cpu")
    detections = Instances(proposals.image_size)
    detections.pred_boxes = proposals.proposal_boxes
    detections.scores = proposals.objectness_logits.sigmoid()
    detections.pred_classes = torch.zeros(len(proposals), dtype=torch.int64)
    if proposals.has("proposal_level"):
        detections.proposal_level = proposals.proposal_level
    return detections


def class_names(cfg: CfgNode) -> dict[int, str]:
    """COCO category id of each class number, in their order, and its name."""
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        return {1: "object"}
    dataset = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(dataset)
    if not metadata.get("thing_classes"):
        DatasetCatalog.get(dataset)  # COCO-format sets learn their class names from their JSON
    names = metadata.thing_classes
    number_of = metadata.get("thing_dataset_id_to_contiguous_id")
    if number_of is None:  # not a COCO-format set, or one not read yet
        return {number + 1: name for number, name in enumerate(names)}
    id_of = {number: category for category, number in number_of.items()}
    return {id_of[number]: name for number, name in enumerate(names)}


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
            raise FileNotFoundError(
                f"--input {path}: no such file or folder (KEY VALUE overrides go last, after "
                "another option)"
            )
    return pictures


def predict(
    cfg: CfgNode,
    pictures: Sequence[Path],
    output: Path,
    min_score: float = 0.5,
    label_levels: bool = False,
) -> dict[str, Any]:
    """Detect on every picture; writes the drawings and ``detections.json`` into ``output``.

    Returns what the JSON holds: COCO's ``images``, ``categories`` and ``annotations``, the latter
    as :func:`fpn_ext.reporting.coco_json.annotations_of` makes them, in pixels of the picture file.
    COCO's tools read it as ground truth and, its annotations, as results.

    Args:
        label_levels: write ``p3>p4`` on each box, proposed by P3 and pooled from P4.
    """
    categories = class_names(cfg)
    ids = list(categories)
    predictor = build_predictor(cfg)
    predictor.model = model_for_inference(cfg, predictor.model)
    output.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    drawings: set[Path] = set()
    for image_id, picture in enumerate(pictures, start=1):
        image = read_image(str(picture), "RGB")
        detections = detections_of(predictor(image[:, :, ::-1]))  # it takes BGR
        detections = detections[detections.scores >= min_score]
        height, width = image.shape[:2]
        images.append({"id": image_id, "file_name": str(picture), "height": height, "width": width})
        for annotation in annotations_of(detections, ids):
            annotation["id"] = len(annotations) + 1
            annotation["image_id"] = image_id
            annotations.append(annotation)
        drawing = output / f"{picture.stem}.png"
        if drawing in drawings:  # two inputs of the same name
            drawing = output / f"{picture.stem}_{image_id}.png"
        drawings.add(drawing)
        names = list(categories.values())
        draw_detections(image, detections, names, label_levels=label_levels).save(drawing)

    result = {
        "images": images,
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
        "annotations": annotations,
    }
    write_json(output / "detections.json", result)
    return result
