"""COCO, VOC, YOLO and DeepPCB: found out, read to the same boxes, and converted."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import photographs
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from fpn_ext.__main__ import main
from fpn_ext.data.canonical import coco_json, complete
from fpn_ext.data.convert import convert
from fpn_ext.data.data_file import open_data
from fpn_ext.data.digest import data_digest
from fpn_ext.data.formats import deeppcb, read_dataset
from fpn_ext.data.layouts import load_layout
from fpn_ext.data.named import register_data
from fpn_ext.data.splits import divide
from photographs import OBJECTS, WRITERS, write_coco, write_pictures, write_voc_pngs, write_yolo
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from voc import write_voc


def read(path):
    data = open_data(path)
    return complete(read_dataset(data), data.classes)


def boxes_of(dataset):
    """{file name without suffix: [(class, x0, y0, x1, y1)]}, of all splits."""
    return {
        image.file.stem: [(i.category, *i.box) for i in image.instances] for image in dataset.images
    }


def names_of_splits(dataset):
    return {
        split: "".join(sorted(image.file.stem for image in images))
        for split, images in dataset.splits.items()
    }


@pytest.mark.parametrize("name", WRITERS)
def test_the_boxes_of_each_format(name, tmp_path):
    dataset = read(WRITERS[name](tmp_path / "photos"))
    assert (dataset.format, dataset.classes) == (name, ["cat", "dog"])
    assert boxes_of(dataset) == OBJECTS
    assert {(image.width, image.height) for image in dataset.images} == {(80, 60)}
    assert dataset.tally.lines() == []


def test_the_same_photographs_give_the_same_files(tmp_path):
    """What is trained on, to the last byte: order, split, ids, sizes, boxes, areas."""
    written, digests = {}, {}
    for name, write in WRITERS.items():
        write(tmp_path / name / "photos")
        if name == "coco":  # in another order, which is not that of the files
            file = tmp_path / name / "photos" / "all.json"
            content = json.loads(file.read_text())
            content["images"].reverse()
            file.write_text(json.dumps(content))
        named = register_data(tmp_path / name / "photos", tmp_path / name / "data")
        files = sorted((tmp_path / name / "data").glob("*.json"))
        written[name] = {file.name: file.read_bytes() for file in files}
        digests[name] = data_digest(DatasetCatalog.get(named.names["train"]), named.classes)
    assert set(written["coco"]) == {"photos_train.json", "photos_val.json", "photos_split.json"}
    assert written["coco"] == written["voc"] == written["yolo"]
    assert len(set(digests.values())) == 1


@pytest.mark.parametrize("first", WRITERS)
@pytest.mark.parametrize("second", WRITERS)
def test_from_one_format_to_another_and_back(first, second, tmp_path):
    convert(WRITERS[first](tmp_path / "a"), second, tmp_path / "b")
    convert(tmp_path / "b", first, tmp_path / "c")
    for folder in ("b", "c"):
        dataset = read(tmp_path / folder)
        assert boxes_of(dataset) == OBJECTS
        assert coco_json(dataset, next(iter(dataset.splits)))["categories"][1]["name"] == "dog"
        assert dataset.classes == ["cat", "dog"]


def test_the_order_of_classes_survives_voc(tmp_path):
    """VOC's XML has none; by the alphabet cat would come first."""
    write_yolo(tmp_path / "a")
    (tmp_path / "a" / "data.yaml").write_text("names: [dog, cat]\n")
    for to in ("voc", "coco", "yolo"):
        convert(tmp_path / "a", to, tmp_path / to)
        assert read(tmp_path / to).classes == ["dog", "cat"]


def test_what_a_format_cannot_hold_is_counted(tmp_path, capsys):
    triangle, square = [0, 0, 40, 0, 0, 30], [41, 7, 80, 7, 80, 60, 41, 60]

    def change(content):
        content["annotations"][0].update(segmentation=[triangle], area=600)
        content["annotations"][1].update(segmentation=[square, triangle])
        content["annotations"][2].update(iscrowd=1)

    write_coco(tmp_path / "a", change)
    for to in ("yolo", "voc"):
        assert main(["data", "convert", str(tmp_path / "a"), "--to", to, "--output",
                     str(tmp_path / to)]) == 0  # fmt: skip
    yolo, voc = capsys.readouterr().out.split(" to ")[1:3]
    assert "1 crowd regions left out: YOLO has none (first: b.png)" in yolo
    assert "1 masks are not one polygon: their boxes are written (first: a.png)" in yolo
    assert "2 masks or keypoints left out: VOC's XML has boxes" in voc
    assert "1 crowd regions left out: VOC has none" in voc
    (image,) = [i for i in read(tmp_path / "yolo").images if i.file.stem == "a"]
    masked, boxed = image.instances
    assert masked.segmentation == [triangle] and masked.area == 600  # 40 x 30 / 2
    assert boxed.segmentation is None and boxed.area == 39 * 53
    assert main(["data", "convert", str(tmp_path / "a"), "--to", "voc", "--output",
                 str(tmp_path / "voc")]) == 2  # fmt: skip
    assert "is not empty" in capsys.readouterr().err


def test_keypoints_go_through_yolo(tmp_path):
    points = [10, 20, 2, 30, 15, 1]

    def change(content):
        content["annotations"][0]["keypoints"] = points
        for category in content["categories"]:
            category["keypoints"] = ["left_eye", "right_eye"]

    write_coco(tmp_path / "a", change)
    named = register_data(tmp_path / "a", tmp_path / "data")
    metadata = MetadataCatalog.get(named.names["train"])
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]
    convert(tmp_path / "a", "yolo", tmp_path / "b")
    (image,) = [i for i in read(tmp_path / "b").images if i.file.stem == "a"]
    assert image.instances[0].keypoints == points


# VOC's corners


def write_corners(folder, *objects, about=""):
    write_voc(folder, {"a": objects})
    if about:
        (folder / "data.yaml").write_text(about)
    return folder


def test_vocs_corners_count_from_one_unless_declared(tmp_path):
    one = write_corners(tmp_path / "one", ("cat", 1, 1, 5, 6))
    assert boxes_of(read(one)) == {"a": [("cat", 0, 0, 5, 6)]}
    zero = write_corners(tmp_path / "zero", ("cat", 0, 1.5, 5, 6), about="corners: 0\n")
    assert boxes_of(read(zero)) == {"a": [("cat", 0, 1.5, 5, 6)]}


@pytest.mark.parametrize("box", [(0, 2, 5, 6), (2, 0, 5, 6), (2, 2, 5.5, 6)])
def test_corners_that_voc_never_writes_are_to_be_declared(tmp_path, box):
    with pytest.raises(ValueError, match=r"1 boxes have a corner at 0 or between .* `corners: 0`"):
        read(write_corners(tmp_path, ("cat", *box)))


# Layouts


def layouts(root):
    """{name of an exporter's layout: (what writes it, splits that are found)}."""
    by_split = {"train": "abc", "val": "de", "test": "f"}

    def roboflow_coco():
        for folder, names in (("train", "abc"), ("valid", "de"), ("test", "f")):
            write_pictures(root / folder, names)
            content = json.dumps(photographs.coco_content(names))
            (root / folder / "_annotations.coco.json").write_text(content)

    def coco_2017():
        for split, names in by_split.items():
            write_pictures(root / f"{split}2017", names)
            (root / "annotations").mkdir(exist_ok=True)
            content = photographs.coco_content(names)
            name = root / "annotations" / f"instances_{split}2017.json"
            name.write_text(json.dumps(content), encoding="utf-8-sig")
            name.with_name(f"captions_{split}2017.json").write_text('{"images": []}')

    def voc_with_lists():
        write_voc_pngs(root)
        for split, names in (*by_split.items(), ("trainval", "abcde"), ("cat_train", "ab")):
            text = "".join(f"{name}\n" for name in names)
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text(text)

    def voc_beside():
        write_voc_pngs(root / "source")
        for split, names in by_split.items():
            (root / split).mkdir()
            for name in names:
                for file in (f"JPEGImages/{name}.png", f"Annotations/{name}.xml"):
                    shutil.copy(root / "source" / file, root / split)
        shutil.rmtree(root / "source")

    def yolo_by_split(layout, yaml):
        for split, names in by_split.items():
            write_pictures(root / layout.format("images", split), names)
            labels = root / layout.format("labels", split)
            labels.mkdir(parents=True)
            for name in names:
                (labels / f"{name}.txt").write_text("\n".join(photographs.yolo_lines(name)))
        (root / "data.yaml").write_text(yaml)

    return {
        "roboflow's COCO": roboflow_coco,
        "COCO 2017": coco_2017,
        "VOC with lists": voc_with_lists,
        "VOC beside the images": voc_beside,
        "YOLO": lambda: yolo_by_split(
            "{0}/{1}", "path: .\ntrain: images/train\nval: images/val\ntest: images/test\n"
            "nc: 2\nnames: [cat, dog]\n"
        ),
        "roboflow's YOLO": lambda: yolo_by_split(
            "{1}/{0}", "train: ../train/images\nval: ../val/images\ntest: ../test/images\n"
            "nc: 2\nnames: ['cat', 'dog']\nroboflow: {license: MIT}\n"
        ),
        "YOLO under ultralytics' folder": lambda: yolo_by_split(
            "{0}/{1}", "path: ../datasets/mine\ntrain: images/train\nval: images/val\n"
            "test: images/test\nnames: {0: cat, 1: dog}\ndownload: import os\n"
        ),
        "YOLO without splits in data.yaml": lambda: yolo_by_split("{0}/{1}", "names: [cat, dog]\n"),
    }  # fmt: skip


@pytest.mark.parametrize("layout", layouts(None))
def test_exporters_layouts(layout, tmp_path):
    layouts(tmp_path)[layout]()
    dataset = read(tmp_path)
    assert names_of_splits(dataset) == {"train": "abc", "val": "de", "test": "f"}
    assert boxes_of(dataset) == OBJECTS


def test_labelimgs_yolo_beside_the_pictures(tmp_path):
    write_pictures(tmp_path)
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text("\n".join(photographs.yolo_lines(name)))
    with pytest.raises(ValueError, match=r"nothing names them: write `names: \[first, second\]`"):
        read(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    dataset = read(tmp_path)
    assert boxes_of(dataset) == OBJECTS
    assert dataset.tally.lines() == [
        "1 images have no label file: taken as images without objects (first: f.png)"
    ]


def test_a_listed_picture_without_xml_has_no_objects(tmp_path):
    write_voc(tmp_path, {"a": [("cat", 1, 1, 5, 5)], "b": [("dog", 1, 1, 5, 5)], "c": []})
    (tmp_path / "Annotations" / "c.xml").unlink()
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nc\n")
    dataset = read(tmp_path)
    assert boxes_of(dataset) == {"a": [("cat", 0, 0, 5, 5)], "c": []}
    assert dataset.tally.lines() == [
        "1 images have no XML file: taken as images without objects (first: c)",
        "1 images that no annotation names: left out (first: b.jpg)",
    ]


def test_pictures_of_one_name_in_two_folders(tmp_path):
    """That in the folder of the same name as the annotation's is meant."""
    for split, category in (("train", "cat"), ("val", "dog")):
        write_voc(tmp_path / "x", {"a": [(category, 1, 1, 5, 5)]})
        for kind, file in (("Annotations", "a.xml"), ("photos", "a.jpg")):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
            source = tmp_path / "x" / ("Annotations" if kind == "Annotations" else "JPEGImages")
            shutil.copy(source / file, tmp_path / "data" / kind / split)
    dataset = read(tmp_path / "data")
    for split, category in (("train", "cat"), ("val", "dog")):
        (image,) = dataset.splits[split]
        assert image.file == tmp_path / "data" / "photos" / split / "a.jpg"
        assert image.instances[0].category == category


# What exporters write otherwise: mended, and said


MENDED = {
    "no area": (lambda a: a.pop("area"), "1 annotations had no area: taken from their boxes"),
    "area 0": (lambda a: a.update(area=0), "1 annotations had no area: taken from their boxes"),
    "no iscrowd": (lambda a: a.pop("iscrowd"), "1 annotations had no iscrowd: taken as 0"),
    "a mask without area": (
        lambda a: (a.pop("area"), a.update(segmentation=[[0, 0, 40, 0, 40, 30, 0, 30]])),
        "1 annotations had no area: taken from their masks",
    ),
    "no box": (
        lambda a: (a.pop("bbox"), a.update(segmentation=[[0, 0, 40, 0, 40, 30, 0, 30]])),
        "1 annotations had no box: taken from their polygons",
    ),
    "beyond the edge": (
        lambda a: a.update(bbox=[-5, 0, 45, 30]),
        "1 boxes reach beyond their images: clipped (first: a.png, cat)",
    ),
    "text for image_id": (
        lambda a: a.update(image_id="1"),
        "1 annotations have an image_id of another type than the image's id",
    ),
    "id 0": (
        lambda a: a.update(id=0),
        "1 annotations have the id 0, COCO's sign for no match: numbered anew",
    ),
    "a text as id": (lambda a: a.update(id="first"), None),
    "id of another": (
        lambda a: a.update(id=2),
        "1 annotations have the id of another one: numbered anew",
    ),
    "iscrowd a boolean": (lambda a: a.update(iscrowd=False), None),
    "iscrowd a float": (lambda a: a.update(iscrowd=0.0), None),
}


@pytest.mark.parametrize("fault", MENDED)
def test_what_is_mended_gives_the_same_records(fault, tmp_path):
    change, said = MENDED[fault]
    dataset = read(write_coco(tmp_path / "a", lambda content: change(content["annotations"][0])))
    for annotation in coco_json(dataset, "all")["annotations"]:
        annotation.pop("segmentation", None)
        assert annotation == photographs.coco_content()["annotations"][annotation["id"] - 1]
        assert type(annotation["iscrowd"]) is int
    lines = dataset.tally.lines()
    assert lines == [] if said is None else (len(lines) == 1 and said in lines[0])


def test_perfect_detections_score_100_whatever_the_exporter_left_out(tmp_path):
    """With an annotation id 0, as globox and Label Studio write it, pycocotools counts a miss."""

    def change(content):
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = number
            del annotation["area"], annotation["iscrowd"]

    named = register_data(write_coco(tmp_path / "photos", change), tmp_path / "data")
    truth = COCO(MetadataCatalog.get(named.names["train"]).json_file)
    detections = [{**a, "score": 1.0} for a in truth.dataset["annotations"]]
    evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_boxes_of_no_size_are_left_out_and_said(tmp_path):
    def change(content):
        content["annotations"][0]["bbox"] = [5, 5, 0, 7]
        content["annotations"][1]["bbox"] = [90, 5, 10, 7]

    dataset = read(write_coco(tmp_path / "a", change))
    assert boxes_of(dataset) == {**OBJECTS, "a": []}
    assert [line.partition(" (")[0] for line in dataset.tally.lines()] == [
        "1 boxes have no width or no height: left out",
        "1 boxes lie outside their images: left out",
    ]


def test_classes_of_other_numbers_in_another_split_are_matched_by_name(tmp_path):
    for split, names in (("train", "abc"), ("val", "def")):
        write_pictures(tmp_path / split, names)
        content = photographs.coco_content(names)
        if split == "val":
            for entry in (*content["categories"], *content["annotations"]):
                key = "id" if "name" in entry else "category_id"
                entry[key] = {1: 7, 2: 0}[entry[key]]
        (tmp_path / split / "annotations.json").write_text(json.dumps(content))
    dataset = read(tmp_path)
    assert boxes_of(dataset) == OBJECTS
    assert coco_json(dataset, "val")["categories"] == coco_json(dataset, "train")["categories"]
    assert dataset.tally.lines() == [
        "2 classes have another number in another split: matched by name (first: dog)"
    ]


def test_roboflows_parent_of_all_classes_is_no_class(tmp_path):
    def change(content):
        for category in content["categories"]:
            category["supercategory"] = "animals"
        content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})

    write_coco(tmp_path / "a", change)
    assert read(tmp_path / "a").classes == ["cat", "dog"]
    (tmp_path / "a" / "data.yaml").write_text("classes: [animals, cat, dog]\n")
    assert read(tmp_path / "a").classes == ["animals", "cat", "dog"]


def test_backslashes_and_moved_pictures_are_found(tmp_path):
    def change(content):
        content["images"][0]["file_name"] = "photos\\a.png"
        content["images"][1]["file_name"] = "/home/somebody/b.png"

    write_coco(tmp_path / "a", change)
    (tmp_path / "a" / "photos").mkdir()
    (tmp_path / "a" / "a.png").rename(tmp_path / "a" / "photos" / "a.png")
    dataset = read(tmp_path / "a")
    assert boxes_of(dataset) == OBJECTS
    assert [line.partition(" (")[0] for line in dataset.tally.lines()] == [
        "1 file names have backslashes: read as /",
        "1 images were found by their names, in another folder",
    ]


# What is refused before anything is trained


REFUSED = {
    "image gone": (
        lambda c: c["images"][0].update(file_name="z.png"), "1 images are missing"),
    "image of another size": (
        lambda c: c["images"][0].update(width=60, height=80),
        r"another size than annotated .*a\.png: 80x60, annotated 60x80"),
    "no box": (lambda c: c["annotations"][0].pop("bbox"), "no bbox of four finite numbers"),
    "NaN": (
        lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 3]), "four finite numbers"),
    "no such class": (
        lambda c: c["annotations"][0].update(category_id=9), "not in all.json's categories"),
    "two classes of a name": (
        lambda c: c["categories"][1].update(name="cat"), "the id or the name of another one"),
    "two images of an id": (lambda c: c["images"][1].update(id=1), "have the id of another one"),
    "an annotation repeated": (
        lambda c: c["annotations"].append({**c["annotations"][0], "image_id": 6}),
        "repeat the id and the box of another one"),
    "corners for width and height": (
        lambda c: [a.update(bbox=[x, y, x + w, y + h])
                   for a in c["annotations"] for x, y, w, h in [a["bbox"]]],
        "1 formats of boxes: the boxes look like corners .* COCO has"),
    "fractions": (
        lambda c: [a.update(bbox=[v / 80 for v in a["bbox"]]) for a in c["annotations"]],
        "1 formats of boxes: the boxes look like fractions"),
    "a run-length mask of another size": (
        lambda c: c["annotations"][0].update(segmentation={"size": [80, 60], "counts": [9]}),
        "1 run-length masks do not cover their image"),
    "everything a crowd": (
        lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
        "6 images and no object on any of them"),
    "nothing annotated": (lambda c: c.update(annotations=[]), "no object on any of them"),
    "no list": (lambda c: c.update(annotations={}), "annotations must be lists of objects"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused(fault, tmp_path):
    change, said = REFUSED[fault]
    write_coco(tmp_path, change)
    with pytest.raises(ValueError, match=said):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0 0.5 0.5 0.5", "lines have 4 numbers: a class and 4, or 3 and more points"),
        ("0 0.5 0.5 0.5 0.5 0.9", "lines have 6 numbers"),
        ("2 0.5 0.5 0.5 0.5", "lines have a class that is none of 0 to 1"),
        ("0.5 0.5 0.5 0.5 0.5", "lines have a class that is none of 0 to 1"),
        ("0 40 30 20 20", "lines have numbers beyond 0 to 1"),
        ("0 nan 0.5 0.5 0.5", "lines have numbers beyond 0 to 1"),
        ("cat 0.5 0.5 0.5 0.5", "lines are no numbers"),
    ],
)
def test_label_lines_that_are_refused(line, said, tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "labels" / "f.txt").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(said) + r".*f\.txt, line 2"):
        read(tmp_path)


def test_nothing_to_read_says_what_lies_there(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "a.json").write_text('{"shapes": [], "imagePath": "a.png"}')
    with pytest.raises(ValueError) as error:
        read(tmp_path)
    said = str(error.value)
    assert "no annotations in a known format (6 images, 1 .json, 0 .xml, 0 .txt)" in said
    assert "labelme's: convert them with labelme2coco" in said


def test_two_formats_in_one_folder_are_to_be_chosen_from(tmp_path):
    write_coco(tmp_path)
    write_voc(tmp_path / "voc", {"a": [("cat", 2, 2, 5, 5)]})
    with pytest.raises(ValueError, match=r"several formats, coco and voc .* `format: coco`"):
        read(tmp_path)
    (tmp_path / "data.yaml").write_text("format: coco\n")
    assert boxes_of(read(tmp_path)) == OBJECTS


def test_two_coco_files_of_no_split_are_to_be_chosen_from(tmp_path):
    write_coco(tmp_path)
    shutil.copy(tmp_path / "all.json", tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"2 COCO files may be all: all\.json, other\.json"):
        read(tmp_path)
    shutil.move(tmp_path / "other.json", tmp_path / "val.json")
    with pytest.raises(ValueError, match=r"1 are of no split .* and others are \(val\)"):
        read(tmp_path)


def test_a_picture_turned_by_exif_has_the_turned_size(tmp_path):
    write_yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(tmp_path / "images" / "a.png", exif=exif)
    (image,) = [i for i in read(tmp_path).images if i.file.stem == "a"]
    assert (image.width, image.height) == (60, 80)
    assert image.instances[0].box == (0, 0, 30, 40)


def test_an_array_has_a_size_as_well(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    np.save(tmp_path / "images" / "a.npy", np.zeros((60, 80, 3), np.uint8))
    assert boxes_of(read(tmp_path)) == OBJECTS
    (tmp_path / "images" / "a.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 images are missing or cannot be read .*a\.npy"):
        read(tmp_path)


# DeepPCB


def write_deeppcb(root):
    folder = root / "PCBData" / "group1"
    (folder / "1_not").mkdir(parents=True)
    (folder / "1").mkdir()
    for number in (1, 2):
        Image.new("L", (64, 64)).save(folder / "1" / f"{number}_test.jpg")
        Image.new("L", (64, 64)).save(folder / "1" / f"{number}_temp.jpg")
    (folder / "1_not" / "1.txt").write_text("0 0 9 19 1\n10,10,63,63,6\n")
    (folder / "1_not" / "2.txt").write_text("5 5 6 6 3\n")
    for split, number in (("trainval", 1), ("test", 2)):
        text = f"group1/1/{number}.jpg group1/1_not/{number}.txt\n"
        (root / "PCBData" / f"{split}.txt").write_text(text)
    return root


def test_deeppcbs_corners_are_pixels_counted_from_0(tmp_path):
    dataset = read(write_deeppcb(tmp_path))
    assert dataset.format == "deeppcb" and len(dataset.classes) == 6
    assert names_of_splits(dataset) == {"train": "1_test", "test": "2_test"}
    assert boxes_of(dataset) == {
        "1_test": [("open", 0, 0, 10, 20), ("pin-hole", 10, 10, 64, 64)],
        "2_test": [("mousebite", 5, 5, 7, 7)],
    }


def test_deeppcb_by_its_name(tmp_path):
    records = load_layout(write_deeppcb(tmp_path), "test", "deeppcb", deeppcb.CLASSES)
    (record,) = records
    assert Path(record["file_name"]).name == "2_test.jpg"
    assert (record["image_id"], record["height"], record["width"]) == (1, 64, 64)
    (mousebite,) = record["annotations"]
    assert mousebite["bbox"] == [5, 5, 2, 2] and mousebite["bbox_mode"] == BoxMode.XYWH_ABS
    assert deeppcb.CLASSES[mousebite["category_id"]] == "mousebite"
    with pytest.raises(FileNotFoundError, match=r"no folder .*DETECTRON2_DATASETS"):
        load_layout(tmp_path / "not_there", "test", "deeppcb", deeppcb.CLASSES)


def test_deeppcb_by_its_name_is_that_of_data(tmp_path):
    """Scored by name and by --data alike: the same images, boxes and ids."""
    named = register_data(write_deeppcb(tmp_path / "DeepPCB"), tmp_path)
    for split in ("train", "test"):
        by_data = DatasetCatalog.get(named.names[split])
        by_name = load_layout(tmp_path / "DeepPCB", split, "deeppcb", deeppcb.CLASSES)
        for one, other in zip(by_data, by_name, strict=True):
            for key in ("file_name", "image_id", "height", "width"):
                assert one[key] == other[key], key
            for a, b in zip(one["annotations"], other["annotations"], strict=True):
                assert {k: a[k] for k in b} == b


def test_deeppcb_itself(real_datasets):
    dataset = read(real_datasets("DeepPCB"))
    assert {split: len(images) for split, images in dataset.splits.items()} == {
        "train": 1000,
        "test": 500,
    }
    assert sum(len(image.instances) for image in dataset.images) == 10013


def test_bccd_itself(real_datasets):
    dataset = read(real_datasets("BCCD"))
    counts = {split: len(images) for split, images in dataset.splits.items()}
    assert counts == {"train": 205, "val": 87, "test": 72}
    assert sum(len(image.instances) for image in dataset.images) == 4886
    assert dataset.classes == ["Platelets", "RBC", "WBC"]
    labelimg, no_size = sorted(dataset.tally.lines(), reverse=True)
    assert no_size.startswith("2 boxes have no width or no height: left out")
    assert labelimg.startswith("364 XML files are as labelImg writes them")


def spelt(folder, way):
    """A folder's path, written in other ways."""
    link = folder.parent / "links" / "photos"
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to(folder)
    (folder.parent / "elsewhere").mkdir(exist_ok=True)
    return {
        "dots": f"{folder.parent}/elsewhere/.././{folder.name}",
        "link": str(link),
        "link and dots": f"{link}/../{folder.name}",  # the parent of the link's target
    }[way]


DATA_FILES = {
    "coco": ["", "format: coco, train: {annotations: all.json, images: .}"],
    "voc": ["", "format: voc, train: {annotations: Annotations, images: ./JPEGImages}"],
    "yolo": ["", "train: images/../images"],
}


@pytest.mark.parametrize("way", ["dots", "link", "link and dots"])
@pytest.mark.parametrize("name", WRITERS)
def test_another_spelling_of_the_same_path_changes_nothing(name, way, tmp_path):
    folder = WRITERS[name](tmp_path / "real" / "photos")
    assert read(spelt(folder, way)).tally.lines() == []
    names = ", names: [cat, dog]" if name == "yolo" else ""
    for n, more in enumerate(DATA_FILES[name]):
        about = tmp_path / f"{n}.yaml"
        path = spelt(folder, way)
        keys = f"path: {path}, unannotated: empty{names}" + (f", {more}" if more else "")
        about.write_text(f"{{{keys}}}")
        dataset = read(about)
        assert (boxes_of(dataset), len(dataset.images)) == (OBJECTS, 6), keys
        assert dataset.tally.lines() == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_below_the_one_we_are_in(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path / "photos")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in ("../photos", "./../here/../photos/."):
        dataset = read(path)
        assert (boxes_of(dataset), dataset.tally.lines()) == (OBJECTS, [])
    monkeypatch.chdir(tmp_path / "photos")
    assert open_data(".").name == open_data("../photos").name == "photos"


def test_an_image_that_is_named_through_a_link_is_named(tmp_path):
    photos = write_coco(tmp_path / "photos", lambda c: [
        i.update(file_name=f"{tmp_path}/store/{i['file_name']}") for i in c["images"]
    ])  # fmt: skip
    write_pictures(tmp_path / "store")
    for picture in photos.glob("*.png"):
        picture.unlink()
    (photos / "images").symlink_to(tmp_path / "store")
    (photos / "data.yaml").write_text("unannotated: empty")
    dataset = read(photos)
    assert (boxes_of(dataset), len(dataset.images)) == (OBJECTS, 6)
    assert dataset.tally.lines() == []


def test_deeppcb_by_another_spelling(tmp_path):
    write_deeppcb(tmp_path / "PCB")
    (tmp_path / "mine.yaml").write_text("path: PCB/../PCB")
    plain, spelt_so = read(tmp_path / "PCB"), read(tmp_path / "mine.yaml")
    assert [image.file for image in spelt_so.images] == [image.file for image in plain.images]


# What is easily overlooked


def test_links_are_followed_and_a_loop_is_not(tmp_path):
    photos = write_coco(tmp_path / "all" / "photos")
    (photos / "itself").symlink_to(".")
    (photos / "parent").symlink_to("..")
    assert boxes_of(read(photos)) == OBJECTS


def test_images_in_a_linked_folder_are_of_its_split(tmp_path):
    for name in ("here", "there"):
        write_yolo(tmp_path / name)
    for kind in ("images", "labels"):
        (tmp_path / "here" / kind / "more").symlink_to(tmp_path / "there" / kind)
    (tmp_path / "here" / "data.yaml").write_text("train: images\nnames: [cat, dog]\n")
    assert names_of_splits(read(tmp_path / "here")) == {"train": "aabbccddeeff"}


@pytest.mark.parametrize("name", ["voc", "yolo"])
def test_hidden_files_are_no_part_of_a_split(name, tmp_path):
    """As macOS writes them on other file systems, ``._a.png`` for ``a.png``."""
    folder = WRITERS[name](tmp_path)
    for file in [f for f in folder.rglob("*.*") if f.parent != folder]:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")
    said = {
        "voc": "train: {images: JPEGImages, annotations: Annotations}",
        "yolo": "{train: images, names: [cat, dog]}",
    }
    (folder / "data.yaml").write_text(said[name])
    assert boxes_of(read(folder)) == OBJECTS


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("voc", "Annotations"), ("yolo", "labels")])
def test_suffixes_of_annotations_in_upper_case(name, folder, described, tmp_path):
    WRITERS[name](tmp_path)
    for file in (tmp_path / folder).iterdir():
        file.rename(file.with_suffix(file.suffix.upper()))
    if described and name == "voc":
        text = "train: {images: JPEGImages, annotations: Annotations}"
        (tmp_path / "data.yaml").write_text(text)
    assert boxes_of(read(tmp_path)) == OBJECTS


def test_names_in_another_case_are_refused_with_the_cause(tmp_path):
    write_coco(tmp_path)
    for picture in tmp_path.glob("*.png"):
        picture.rename(picture.with_suffix(".PNG"))
    said = r"6 images are missing; others differ in upper and lower case alone .*a\.PNG is there"
    with pytest.raises(ValueError, match=said):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("coco", "train: {images: elsewhere, annotations: all.json}"),
        ("yolo", "{train: {images: images, annotations: elsewhere}, names: [cat, dog]}"),
    ],
)
def test_a_folder_that_is_named_must_be_there(name, text, tmp_path):
    WRITERS[name](tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(FileNotFoundError, match="elsewhere, and there is no such folder"):
        read(tmp_path)


def write_lists(folder, **lists):
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for split, lines in lists.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(lines))


def test_vocs_lists_count_wherever_in_a_folder_they_are(tmp_path):
    voc = write_voc_pngs(tmp_path / "VOCdevkit" / "VOC2012")
    write_lists(voc, train="abc", val="def")
    assert names_of_splits(read(tmp_path)) == {"train": "abc", "val": "def"}
    shutil.copytree(voc, tmp_path / "VOCdevkit" / "VOC2007")
    with pytest.raises(ValueError, match=r"in several folders.*VOC2007 and .*2012"):
        read(tmp_path)


def test_two_years_of_voc_with_the_same_names(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        write_voc_pngs(tmp_path / year)
    for name in ("a", "b", "c", "d", "e", "f"):
        pixels = np.zeros((60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "VOC2012" / "JPEGImages" / f"{name}.png")
    files = [image.file for image in read(tmp_path).images]
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        f"{year}/JPEGImages/{name}.png" for year in ("VOC2007", "VOC2012") for name in "abcdef"
    ]


def test_a_list_that_may_mean_two_xml_files_is_refused(tmp_path):
    voc = write_voc_pngs(tmp_path)
    for kind in ("Annotations", "JPEGImages"):
        files = list((voc / kind).iterdir())
        for part in ("left", "right"):
            (voc / kind / part).mkdir()
            for file in files:
                shutil.copy(file, voc / kind / part)
        for file in files:
            file.unlink()
    write_lists(voc, train=["left/a", "right/b"], val="c")
    with pytest.raises(ValueError, match=r"val\.txt names 'c', and 2 XML files may be meant"):
        read(voc)
    write_lists(voc, val=["left/c"])
    assert names_of_splits(read(voc)) == {"train": "ab", "val": "c"}


@pytest.mark.parametrize("line", ["{}", "{}.png", "JPEGImages/{}.png", "{}  1", "{}  -1"])
@pytest.mark.parametrize("name", ["photo", "photo 3.5 m", "my photo 1"])
def test_lines_of_vocs_lists(line, name, tmp_path):
    voc = write_voc_pngs(tmp_path)
    for kind, suffix in (("Annotations", "xml"), ("JPEGImages", "png")):
        (voc / kind / f"a.{suffix}").rename(voc / kind / f"{name}.{suffix}")
    write_lists(voc, train=[line.format(name), "b"])
    assert boxes_of(read(voc)) == {name: OBJECTS["a"], "b": OBJECTS["b"]}


def test_an_xml_file_of_nothing_is_said(tmp_path):
    write_voc_pngs(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text("")
    assert read(tmp_path).tally.lines() == [
        "1 XML files hold no <annotation>: not read (first: a.xml)",
        "1 images that no annotation names: left out (first: a.png)",
    ]


def write_splits(folder, **names):
    """COCO files of these splits, all of the same six images."""
    write_pictures(folder / "images")
    for split, chosen in names.items():
        (folder / f"{split}.json").write_text(json.dumps(photographs.coco_content(chosen)))
    return folder


def test_what_is_trained_on_and_scored_is_said(tmp_path, capsys):
    photos = write_splits(tmp_path / "photos", train="abcd", val="def")
    said = "images are in two splits: a score on what was trained on is worth nothing"
    assert read(photos).tally.lines() == [f"1 {said} (first: d.png, in train and val)"]
    assert main(["data", "--data", str(photos)]) == 0
    assert said in capsys.readouterr().out


def test_classes_that_are_scored_and_not_trained_on_are_said(tmp_path, capsys):
    """Dogs are on e alone of these: in val as the files divide them, or as a draw does."""
    said = "classes have boxes to be scored on and none to train on: their AP will be 0"
    photos = write_splits(tmp_path / "photos", train="cd", val="ef")
    assert main(["data", "--data", str(photos)]) == 0
    assert f"1 {said} (first: dog, in val)" in capsys.readouterr().out
    (tmp_path / "split.json").write_text(json.dumps({"train": ["c.png", "d.png"], "val": VAL}))
    (tmp_path / "scored.yaml").write_text("{path: all, split_file: split.json}")
    write_splits(tmp_path / "all", all="cdef")
    for path in (photos, tmp_path / "scored.yaml"):
        named = register_data(path, tmp_path / "run")
        assert f"1 {said} (first: dog, in val)" in named.warnings
    complete_split = write_splits(tmp_path / "complete", train="ac", val="ef")
    assert not any(said in line for line in register_data(complete_split, tmp_path).warnings)


VAL = ["e.png", "f.png"]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_one_file_under_two_names_is_one_image(link, tmp_path, capsys):
    photos = write_splits(tmp_path / "photos", train="abc", val="def")
    images = photos / "images"
    (images / "e.png").unlink()
    link(images / "a.png", images / "e.png")
    said = "images are in two splits: a score on what was trained on is worth nothing"
    where = f"{images / 'e.png'} is {images / 'a.png'}, in train and val"
    assert read(photos).tally.lines() == [f"1 {said} (first: {where})"]
    assert main(["data", "--data", str(photos)]) == 0
    assert said in capsys.readouterr().out


def test_names_of_one_file_are_held_out_together(tmp_path):
    """Whatever is drawn: the two cats of a file are both trained on, or both scored."""
    write_coco(tmp_path / "photos")
    (tmp_path / "photos" / "d.png").unlink()
    os.link(tmp_path / "photos" / "c.png", tmp_path / "photos" / "d.png")
    for seed in range(8):
        dataset = read(tmp_path / "photos")
        assert any("in a split under two names" in line for line in dataset.tally.lines())
        divide(dataset, 0.4, seed, tmp_path / f"{seed}.json")
        sides = names_of_splits(dataset)
        assert any({"c", "d"} <= set(side) for side in sides.values()), sides


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": "abc", "val": ""}, "1 splits have no images"),
        ({"train": "aab", "val": "c"}, "1 images are twice in a split"),
        ({"train": "f", "val": "abc"}, "1 images to train on and no object on any of them"),
        ({"train": "", "val": ""}, "1 splits have no images"),
    ],
)
def test_splits_that_are_refused_by_every_verb(splits, said, tmp_path, capsys):
    photos = write_splits(tmp_path / "photos", **splits)
    with pytest.raises(ValueError, match=said):
        read(photos)
    assert main(["data", "--data", str(photos)]) == 1
    assert said in capsys.readouterr().out


def test_an_empty_test_split_is_left_out_and_one_without_objects_is_not(tmp_path):
    photos = write_splits(tmp_path / "photos", train="abc", val="de", test="")
    dataset = read(photos)
    assert names_of_splits(dataset) == {"train": "abc", "val": "de"}
    assert "1 splits have no images: left out (first: test)" in dataset.tally.lines()
    only_negatives = write_splits(tmp_path / "negatives", test="f")
    assert boxes_of(read(only_negatives)) == {"f": []}


def test_classes_that_differ_in_case_alone_are_said(tmp_path):
    write_coco(tmp_path, lambda c: c["categories"][0].update(name="Dog "))
    said = "1 classes differ from another one in upper and lower case or in spaces alone"
    assert read(tmp_path).tally.lines() == [f"{said} (first: 'Dog ' and 'dog')"]


def test_a_count_of_classes_that_is_not_that_of_the_names_is_refused(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("{train: images, nc: 3, names: [cat, dog]}")
    with pytest.raises(ValueError, match="nc is 3, and names has 2 of them"):
        read(tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_checking_a_dataset_of_which_no_image_is_there(name, tmp_path, capsys):
    WRITERS[name](tmp_path)
    for picture in tmp_path.rglob("*.png"):
        picture.unlink()
    if name == "yolo":
        (tmp_path / "labels" / "a.txt").unlink()
        (tmp_path / "data.yaml").write_text("{train: images, names: [cat, dog]}")
    status = main(["data", "--data", str(tmp_path)])
    captured = capsys.readouterr()
    said = {"coco": "images are missing", "voc": "images are missing", "yolo": "no object"}
    assert status == 1 and said[name] in captured.out


# What 'fpn-ext data' says of a folder


def report_of(path, tmp_path):
    """(exit status, the report as JSON)."""
    status = main(["data", "--data", str(path), "--json", str(tmp_path / "report.json")])
    return status, json.loads((tmp_path / "report.json").read_text())


def test_counts_are_of_things_and_not_of_messages(tmp_path, capsys):
    write_yolo(tmp_path / "photos")
    (tmp_path / "photos" / "labels" / "a.txt").write_text("7 0.5 0.5 0.1 0.1\nno line\n9 1 1 1 1\n")
    (tmp_path / "photos" / "labels" / "b.txt").write_text("0 0.5 5 0.1 0.1\n")
    for name in "def":
        (tmp_path / "photos" / "labels" / f"{name}.txt").unlink()
    status, report = report_of(tmp_path / "photos", tmp_path)
    printed = capsys.readouterr().out
    assert (status, report["errors"]) == (1, 4)
    assert (report["kinds"]["bad-field"]["count"], report["kinds"]["bad-field"]["images"]) == (
        4,
        None,
    )
    assert "ERROR   bad-field: 4\n" in printed and "NOTE    read-otherwise: 3\n" in printed
    assert "2 lines have a class that is none of 0 to 1 (first: a.txt, line 1)" in printed
    assert "4 error(s)" in printed


def test_the_objects_of_an_image_that_is_missing_are_not_of_no_image(tmp_path, capsys):
    def change(content):
        content["annotations"][-1]["image_id"] = 999

    photos = write_coco(tmp_path / "photos", change)
    (photos / "a.png").unlink()
    assert report_of(photos, tmp_path)[0] == 1
    printed = capsys.readouterr().out
    assert "1 images are missing (first: a.png, of all.json)" in printed
    assert "1 annotations are of images that are not in the file: left out (first: 999)" in printed
    write_coco(tmp_path / "photos", change)
    status, report = report_of(photos, tmp_path)
    assert (status, report["kinds"]["left-out"]["severity"]) == (0, "warning")


@pytest.mark.parametrize(
    ("name", "box"),
    [
        *((name, (5, 5, 5, 40)) for name in WRITERS),
        *((name, (90, 5, 95, 9)) for name in ("coco", "voc")),  # YOLO's is refused
    ],
)
def test_a_box_left_out_is_a_warning_of_every_verb(name, box, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(OBJECTS, "b", [("dog", *box), ("dog", 10, 20, 35, 51)])
    photos = WRITERS[name](tmp_path / "photos")
    if name == "voc":  # the writer counts from 1, where this one is one pixel wide
        xml = photos / "Annotations" / "b.xml"
        xml.write_text(xml.read_text().replace("<xmin>6<", "<xmin>5<"))
    status, report = report_of(photos, tmp_path)
    assert (status, report["errors"], report["warnings"]) == (0, 0, 1)
    assert len(read(photos).tally.warned()) == 1
    words = ["--config-file", "configs/start/faster_rcnn_fast_cpu.yaml", "--data", str(photos)]
    capsys.readouterr()
    main(["check", *words, "OUTPUT_DIR", str(tmp_path / "out")])
    (line,) = (li for li in capsys.readouterr().out.splitlines() if "1 boxes" in li)
    assert line.startswith("warning") and "left out" in line


def test_all_that_is_said_of_training_is_said_by_the_command_it_names(tmp_path, capsys):
    def change(content):
        for kind in ("images", "annotations"):
            for entry in content[kind]:
                entry["id"] -= 1
        for number, entry in enumerate(content["annotations"]):
            entry["image_id"] -= 1
            del entry["area"], entry["iscrowd"]
            entry["bbox"][2] += 30 * (number == 1)
        content["annotations"][5]["id"] = 4
        content["images"][0].pop("width")

    photos = write_coco(tmp_path / "my photos", change)
    said = read(photos).tally.lines()
    assert any("have the id 0" in line for line in said) and len(said) > 4
    assert report_of(photos, tmp_path)[0] == 0
    printed = capsys.readouterr().out
    assert [line for line in said if line not in printed] == []
    words = ["--config-file", "configs/start/faster_rcnn_fast_cpu.yaml", "--data", str(photos)]
    main(["check", *words, "OUTPUT_DIR", str(tmp_path / "out")])
    assert f"more such notes: fpn-ext data --data '{photos}'" in capsys.readouterr().out


def test_data_are_not_converted_into_themselves(tmp_path):
    """They would have each image twice, and annotations in two formats."""
    photos = write_coco(tmp_path / "photos")
    before = sorted(photos.rglob("*"))
    with pytest.raises(ValueError, match=r"--output .*/photos/yolo is in .*/photos, whose images"):
        convert(photos, "yolo", photos / "yolo")
    assert sorted(photos.rglob("*")) == before
    convert(photos, "yolo", tmp_path / "photos_yolo")
