"""The same six photographs with their boxes, written by hand in COCO, in VOC and in YOLO."""

import json

import numpy as np
from PIL import Image
from voc import write_voc

WIDTH, HEIGHT = 80, 60
CLASSES = ["cat", "dog"]
# {name: [(class, x0, y0, x1, y1)]}, in pixels from 0; the last has no object on it.
OBJECTS = {
    "a": [("cat", 0, 0, 40, 30), ("dog", 41, 7, 80, 60)],
    "b": [("dog", 10, 20, 35, 51)],
    "c": [("cat", 3, 4, 60, 50)],
    "d": [("cat", 20, 10, 47, 33), ("cat", 50, 30, 79, 59)],
    "e": [("dog", 1, 1, 33, 47)],
    "f": [],
}


def write_pictures(folder, names=OBJECTS, suffix=".png"):
    """Grey noise with each object in the colour of its class."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(ord(name)).integers(90, 110, (HEIGHT, WIDTH, 3), np.uint8)
        for category, x0, y0, x1, y1 in OBJECTS[name]:
            pixels[y0:y1, x0:x1, CLASSES.index(category)] += 100
        Image.fromarray(pixels).save(folder / f"{name}{suffix}")


def coco_content(names=OBJECTS, suffix=".png"):
    """As an exporter should write it; ids from 1."""
    images, annotations = [], []
    for name in names:
        size = {"width": WIDTH, "height": HEIGHT}
        images.append({"id": len(images) + 1, "file_name": f"{name}{suffix}", **size})
        for category, x0, y0, x1, y1 in OBJECTS[name]:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": CLASSES.index(category) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(folder, change=lambda content: None):
    """One JSON beside the images."""
    write_pictures(folder)
    content = coco_content()
    change(content)
    (folder / "all.json").write_text(json.dumps(content))
    return folder


def write_voc_pngs(folder):
    """Annotations and images, PNG, without ImageSets."""
    from_one = {
        name: [(c, x0 + 1, y0 + 1, x1, y1) for c, x0, y0, x1, y1 in objects]
        for name, objects in OBJECTS.items()
    }
    write_voc(folder, from_one)
    (folder / "ImageSets" / "Main" / "train.txt").unlink()
    for picture in (folder / "JPEGImages").iterdir():
        picture.unlink()
    write_pictures(folder / "JPEGImages")
    return folder


def yolo_lines(name):
    for category, x0, y0, x1, y1 in OBJECTS[name]:
        values = ((x0 + x1) / 2 / WIDTH, (y0 + y1) / 2 / HEIGHT)
        values += ((x1 - x0) / WIDTH, (y1 - y0) / HEIGHT)
        yield f"{CLASSES.index(category)} " + " ".join(f"{value:.6f}" for value in values)


def write_yolo(folder):
    """images/, labels/ and data.yaml, with six digits as most tools write them."""
    write_pictures(folder / "images")
    (folder / "labels").mkdir()
    for name in OBJECTS:
        (folder / "labels" / f"{name}.txt").write_text("\n".join(yolo_lines(name)))
    (folder / "data.yaml").write_text("names: {0: cat, 1: dog}\n")
    return folder


WRITERS = {"coco": write_coco, "voc": write_voc_pngs, "yolo": write_yolo}
