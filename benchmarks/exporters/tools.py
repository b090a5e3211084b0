"""What each annotation tool writes for the same pictures; run by run.py in the tool's environment.

    python tools.py TOOL TRUTH OUTPUT

TRUTH has ``annotations/instances_train.json`` and ``images/train/``. A tool that reads COCO is
given the JSON, the others their own objects. Each form goes to ``OUTPUT/FORMAT, as it is called``.
"""

import json
import os
import sys
from pathlib import Path


class Truth:
    """The pictures and their objects."""

    def __init__(self, folder):
        self.folder = folder
        self.json = folder / "annotations" / "instances_train.json"
        self.pictures = folder / "images" / "train"
        self.coco = json.loads(self.json.read_text())
        self.names = {c["id"]: c["name"] for c in self.coco["categories"]}
        self.classes = list(self.names.values())

    def images(self):
        """(entry, file, [(class, x0, y0, x1, y1, crowd)]) of each picture."""
        for image in self.coco["images"]:
            objects = []
            for a in self.coco["annotations"]:
                if a["image_id"] == image["id"]:
                    x, y, w, h = a["bbox"]
                    name = self.names[a["category_id"]]
                    objects.append((name, x, y, x + w, y + h, bool(a["iscrowd"])))
            yield image, self.pictures / image["file_name"], objects


def folder(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_datumaro(truth, out):
    import datumaro

    dataset = datumaro.Dataset.import_from(str(truth.folder), "coco_instances")
    dataset.export(str(out / "COCO"), "coco_instances", save_media=True)
    dataset.export(str(out / "VOC"), "voc_detection", save_media=True)
    dataset.export(str(out / "YOLO"), "yolo", save_media=True)
    dataset.export(str(out / "CVAT"), "cvat", save_media=True)
    for kind, importer in (("VOC", "voc_detection"), ("YOLO", "yolo")):
        again = datumaro.Dataset.import_from(str(out / kind), importer)
        again.export(str(out / f"COCO, from its {kind}"), "coco_instances", save_media=True)
    dataset.transform(
        "random_split", splits=[("train", 0.5), ("val", 0.5)], seed=1
    )  # it wants both
    dataset.export(str(out / "YOLO, ultralytics"), "yolo_ultralytics", save_media=True)


def write_supervision(truth, out):
    import supervision

    dataset = supervision.DetectionDataset.from_coco(str(truth.pictures), str(truth.json))
    coco, voc, yolo = (folder(out / kind) for kind in ("COCO", "VOC", "YOLO"))
    dataset.as_coco(str(coco / "images"), str(coco / "annotations.json"))
    dataset.as_pascal_voc(str(voc / "JPEGImages"), str(voc / "Annotations"))
    dataset.as_yolo(str(yolo / "images"), str(yolo / "labels"), str(yolo / "data.yaml"))
    again = supervision.DetectionDataset.from_pascal_voc(
        str(voc / "JPEGImages"), str(voc / "Annotations")
    )
    coco = folder(out / "COCO, from its VOC")
    again.as_coco(str(coco / "images"), str(coco / "annotations.json"))


def write_sahi(truth, out):
    from sahi.utils.coco import Coco
    from sahi.utils.file import save_json

    coco = Coco.from_coco_dict_or_path(str(truth.json))
    save_json(coco.json, str(folder(out / "COCO") / "coco.json"))
    coco.image_dir = str(truth.pictures)
    coco.export_as_yolo(str(out / "YOLO"), disable_symlink=True)


def write_globox(truth, out):
    from globox import Annotation, AnnotationSet, BoundingBox

    dataset = AnnotationSet()
    for image, file, objects in truth.images():
        boxes = [
            BoundingBox(label=name, xmin=x0, ymin=y0, xmax=x1, ymax=y1)
            for name, x0, y0, x1, y1, _ in objects
        ]
        dataset.add(Annotation(file.name, (image["width"], image["height"]), boxes))
    dataset.save_coco(folder(out / "COCO") / "coco.json", auto_ids=True)
    dataset.save_pascal_voc(folder(out / "VOC") / "Annotations")
    numbers = {name: number for number, name in enumerate(truth.classes)}
    yolo = folder(out / "YOLO")
    dataset.save_yolo_v5(folder(yolo / "labels"), label_to_id=numbers)
    (yolo / "classes.txt").write_text("\n".join(truth.classes))  # which it leaves to the caller
    dataset.save_cvat(folder(out / "CVAT") / "annotations.xml")


def write_label_studio_sdk(truth, out):
    from label_studio_sdk.converter import Converter

    tasks = []
    for number, (image, file, objects) in enumerate(truth.images(), 1):
        width, height = image["width"], image["height"]
        results = []
        for name, x0, y0, x1, y1, _ in objects:
            value = {
                "x": 100 * x0 / width,
                "y": 100 * y0 / height,
                "width": 100 * (x1 - x0) / width,
                "height": 100 * (y1 - y0) / height,
                "rotation": 0,
                "rectanglelabels": [name],
            }
            results.append(
                {
                    "id": f"{number}-{len(results)}",
                    "type": "rectanglelabels",
                    "from_name": "label",
                    "to_name": "image",
                    "original_width": width,
                    "original_height": height,
                    "image_rotation": 0,
                    "value": value,
                }
            )
        annotations = [{"id": number, "result": results, "completed_by": {"id": 1}}]
        task = {"id": number, "data": {"image": str(file)}, "annotations": annotations}
        tasks.append(task)
    labels = "".join(f'<Label value="{name}"/>' for name in truth.classes)
    config = (
        f'<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image">{labels}</RectangleLabels></View>'
    )
    exported = out / "tasks.json"
    exported.write_text(json.dumps(tasks))
    converter = Converter(config, str(out), download_resources=False)
    converter.convert_to_coco(str(exported), str(out / "COCO"), is_dir=False)
    converter.convert_to_voc(str(exported), str(out / "VOC"), is_dir=False)
    converter.convert_to_yolo(str(exported), str(out / "YOLO"), is_dir=False)
    exported.unlink()


def write_kwcoco(truth, out):
    import kwcoco

    def dataset():
        made = kwcoco.CocoDataset()
        for name in truth.classes:
            made.add_category(name)
        for _, file, objects in truth.images():
            image = made.add_image(file_name=file.name)
            for name, x0, y0, x1, y1, crowd in objects:
                given = {"iscrowd": 1} if crowd else {}
                box = [x0, y0, x1 - x0, y1 - y0]
                made.add_annotation(image, made.name_to_cat[name]["id"], bbox=box, **given)
        return made

    made = dataset()
    made.dump(str(folder(out / "COCO") / "data.kwcoco.json"))
    made = dataset()
    made.fpath = str(truth.pictures / "data.kwcoco.json")  # it looks for pictures beside it
    made.conform(legacy=True)
    made.dump(str(folder(out / "COCO, conform") / "data.kwcoco.json"))


def write_labelme(truth, out):
    import shutil

    from labelme._label_file import write_label_file
    from labelme2coco import convert

    def annotate(images, to):
        for image, file, objects in images:
            shutil.copy(file, folder(to))
            shapes = [
                {
                    "label": name,
                    "points": [[x0, y0], [x1, y1]],
                    "group_id": None,
                    "description": "",
                    "shape_type": "rectangle",
                    "flags": {},
                    "mask": None,
                }
                for name, x0, y0, x1, y1, _ in objects
            ]
            write_label_file(
                str(to / f"{file.stem}.json"),
                shapes=shapes,
                image_path=file.name,
                image_height=image["height"],
                image_width=image["width"],
            )

    images = list(truth.images())
    annotate(images, out / "its own JSON")
    convert(str(out / "its own JSON"), str(out / "COCO"))
    apart = out / "COCO, train and val apart"
    for split, part in (("train", images[:3]), ("val", images[3:])):
        annotate(part, out / "parts" / split)
        convert(str(out / "parts" / split), str(apart / split))


def write_pylabel(truth, out):
    from pylabel import importer

    def dataset():
        made = importer.ImportCoco(str(truth.json), path_to_images="../images/train/", name="made")
        return made

    dataset().export.ExportToCoco(output_path=str(folder(out / "COCO") / "coco.json"))
    dataset().export.ExportToVoc(output_path=str(folder(out / "VOC" / "Annotations")))
    dataset().export.ExportToYoloV5(output_path=str(folder(out / "YOLO") / "labels"))
    again = importer.ImportVOC(str(out / "VOC" / "Annotations"))
    again.export.ExportToCoco(output_path=str(folder(out / "COCO, from its VOC") / "coco.json"))


def write_pascal_voc_writer(truth, out):
    from pascal_voc_writer import Writer

    to = folder(out / "VOC" / "Annotations")
    for image, file, objects in truth.images():
        writer = Writer(str(file), image["width"], image["height"])
        for name, *corners, _ in objects:
            writer.addObject(name, *corners)
        writer.save(str(to / f"{file.stem}.xml"))


def write_labelImg(truth, out):
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    from libs.labelFile import LabelFile

    voc, yolo = folder(out / "VOC"), folder(out / "YOLO")
    classes = list(truth.classes)
    for _, file, objects in truth.images():
        shapes = [
            {
                "label": name,
                "points": [(x0, y0), (x1, y0), (x1, y1), (x0, y1)],
                "difficult": False,
            }
            for name, x0, y0, x1, y1, _ in objects
        ]
        LabelFile().save_pascal_voc_format(str(voc / f"{file.stem}.xml"), shapes, str(file), None)
        LabelFile().save_yolo_format(
            str(yolo / f"{file.stem}.txt"), shapes, str(file), None, classes
        )


def write_imantics(truth, out):
    from imantics import BBox, Category, Dataset, Image

    categories = {name: Category(name, id=number) for number, name in truth.names.items()}
    dataset = Dataset("made")
    for number, (_, file, objects) in enumerate(truth.images(), 1):
        image = Image.from_path(str(file))
        image.id = number
        for name, *corners, _ in objects:
            image.add(BBox(corners), category=categories[name])
        dataset.add(image)
        (folder(out / "VOC") / f"{file.stem}.xml").write_text(image.voc(pretty=True))
    (folder(out / "COCO") / "coco.json").write_text(json.dumps(dataset.coco()))


def write_fiftyone(truth, out):
    """Its exporters alone: a dataset of its own would start its database."""
    import fiftyone as fo
    from fiftyone.utils.coco import COCODetectionDatasetExporter
    from fiftyone.utils.cvat import CVATImageDatasetExporter
    from fiftyone.utils.voc import VOCDetectionDatasetExporter
    from fiftyone.utils.yolo import YOLOv5DatasetExporter

    classes = truth.classes
    exporters = {
        "COCO": COCODetectionDatasetExporter(str(out / "COCO"), classes=classes),
        "VOC": VOCDetectionDatasetExporter(str(out / "VOC")),
        "YOLO": YOLOv5DatasetExporter(str(out / "YOLO"), classes=classes),
        "CVAT": CVATImageDatasetExporter(str(out / "CVAT")),
    }
    for exporter in exporters.values():
        with exporter:
            for image, file, objects in truth.images():
                width, height = image["width"], image["height"]
                detections = [
                    fo.Detection(
                        label=name,
                        bounding_box=[
                            x0 / width,
                            y0 / height,
                            (x1 - x0) / width,
                            (y1 - y0) / height,
                        ],
                        iscrowd=int(crowd),
                    )
                    for name, x0, y0, x1, y1, crowd in objects
                ]
                metadata = fo.ImageMetadata(width=width, height=height, num_channels=3)
                label = fo.Detections(detections=detections)
                exporter.export_sample(str(file), label, metadata=metadata)


def write_ultralytics(truth, out):
    os.environ["YOLO_CONFIG_DIR"] = str(out.parent)
    from ultralytics.data.converter import convert_coco

    convert_coco(str(truth.json.parent), str(out / "YOLO"), cls91to80=False)
    (out / "YOLO" / "classes.txt").write_text("\n".join(truth.classes))  # which it does not write


if __name__ == "__main__":
    tool, truth, out = sys.argv[1:]
    globals()[f"write_{tool.replace('-', '_')}"](Truth(Path(truth)), folder(Path(out)))
