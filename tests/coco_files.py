"""A COCO file of two pictures and four objects, to be spoilt by a test."""

import copy
import json

import fpn_ext
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from fpn_ext.evaluation.evaluators import build_evaluator
from PIL import Image

CLASSES = ["cat", "dog", "owl"]
# Picture, class, XYWH: two small ones, one of 50 x 50, one of 100 x 100.
OBJECTS = [(1, 0, [5, 5, 10, 20]), (1, 1, [30, 30, 50, 50]), (2, 2, [0, 0, 9, 9]),
           (2, 0, [20, 10, 100, 100])]  # fmt: skip
SIZE = 160, 120


def coco(names=CLASSES, ids=(1, 2, 3)):
    return {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": SIZE[0], "height": SIZE[1]} for i in (1, 2)
        ],
        "categories": [{"id": i, "name": n} for i, n in zip(ids, names, strict=True)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": ids[names.index(CLASSES[c])],
             "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for number, (image, c, box) in enumerate(OBJECTS, start=1)
            if CLASSES[c] in names
        ],
    }  # fmt: skip


def records():
    """The same as a registered function gives it."""
    return [
        {
            "file_name": f"{i}.jpg",
            "image_id": i,
            "width": SIZE[0],
            "height": SIZE[1],
            "annotations": [
                {"category_id": c, "bbox": list(box), "bbox_mode": 1}
                for image, c, box in OBJECTS
                if image == i
            ],
        }
        for i in (1, 2)
    ]


class Datasets:
    """Registers datasets for one test, in files of its folder."""

    def __init__(self, folder):
        self.folder, self.names = folder, []
        for i in (1, 2):
            Image.new("RGB", SIZE).save(folder / f"{i}.jpg")

    def write(self, name, data):
        """``data``: what the JSON holds, or its text or bytes."""
        file = self.folder / f"{name}.json"
        if isinstance(data, dict):
            data = json.dumps(data)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
        register_coco_instances(name, {}, str(file), str(self.folder))
        self.names.append(name)
        return name

    def give(self, name, function, **metadata):
        DatasetCatalog.register(name, function)
        MetadataCatalog.get(name).set(**metadata)
        self.names.append(name)
        return name

    def forget(self):
        for name in self.names:
            DatasetCatalog.remove(name)
            if name in MetadataCatalog.list():
                MetadataCatalog.remove(name)


def config(folder, train=(), test=(), *opts):
    words = [
        *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "OUTPUT_DIR", folder / "out"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 3, "DATASETS.TRAIN", tuple(train)),
        *("DATASETS.TEST", tuple(test)),
    ]
    return fpn_ext.load_config("configs/Base-FPN.yaml", [str(w) for w in (*words, *opts)])


def found(objects, **fields):
    """Detections of (class number, XYWH), with score 1."""
    instances = Instances((SIZE[1], SIZE[0]))
    rows = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h) in objects])
    instances.pred_boxes = Boxes(rows.float().reshape(-1, 4))
    instances.scores = torch.ones(len(objects))
    instances.pred_classes = torch.tensor([c for c, _ in objects])
    for name, value in fields.items():
        instances.set(name, value)
    return {"instances": instances}


def score(cfg, name, objects=OBJECTS):
    """What the evaluator of a config gives for these detections."""
    evaluator = build_evaluator(cfg, name, None)
    evaluator.reset()
    for image in (1, 2):
        of_image = found([(c, box) for i, c, box in copy.deepcopy(objects) if i == image])
        evaluator.process([{"image_id": image}], [of_image])
    return evaluator.evaluate()["bbox"]
