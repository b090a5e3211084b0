"""Samples of what annotation tools write otherwise, and the comparison of make exporters."""

import json
import shutil
import sys
from pathlib import Path

import photographs
import pytest
from fpn_ext.__main__ import main
from fpn_ext.data.canonical import complete
from fpn_ext.data.convert import convert
from fpn_ext.data.data_file import open_data
from fpn_ext.data.formats import read_dataset
from photographs import OBJECTS, write_coco, write_pictures, write_voc_pngs, write_yolo
from voc import write_voc

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "exporters"))
import run as exporters

LEFT_OUT = (
    "images that no annotation names: left out (`unannotated: empty` in the data file takes them "
    "as without objects)"
)
EMPTY = "images that no annotation names: taken as images without objects"


def read(path):
    data = open_data(path)
    return complete(read_dataset(data), data.classes)


def boxes_of(dataset):
    return {
        image.file.stem: [(i.category, *i.box) for i in image.instances] for image in dataset.images
    }


def said(dataset):
    return [line.partition(" (first")[0] for line in dataset.tally.lines()]


# COCO


def test_an_annotation_written_twice_is_taken_once(tmp_path):
    """As pylabel does in place of an image without objects."""
    dataset = read(write_coco(tmp_path, lambda c: c["annotations"].append(c["annotations"][-1])))
    assert boxes_of(dataset) == OBJECTS
    assert said(dataset) == ["1 annotations are written twice: taken once"]


def test_repeated_ids_of_other_boxes_are_numbered_anew(tmp_path):
    """As datumaro does from VOC and from YOLO: 1, 2, 1, 1, 2, 1."""

    def change(content):
        for annotation, number in zip(content["annotations"], (1, 2, 1, 1, 1, 2, 1), strict=True):
            annotation["id"] = number

    dataset = read(write_coco(tmp_path, change))
    assert boxes_of(dataset) == OBJECTS
    assert said(dataset) == ["5 annotations have the id of another one: numbered anew"]


def test_a_class_background_without_boxes_is_none(tmp_path):
    """datumaro's from VOC, id 1."""

    def change(content):
        for entry in content["categories"]:
            entry["id"] += 1
        for entry in content["annotations"]:
            entry["category_id"] += 1
        content["categories"].insert(0, {"id": 1, "name": "background", "supercategory": ""})

    dataset = read(write_coco(tmp_path, change))
    assert dataset.classes == ["cat", "dog"] and boxes_of(dataset) == OBJECTS
    assert said(dataset) == ["1 classes are the background and have no boxes: left out"]
    (tmp_path / "data.yaml").write_text("classes: [background, cat, dog]\n")
    assert read(tmp_path).classes == ["background", "cat", "dog"]


def test_a_class_background_with_boxes_is_a_class(tmp_path):
    dataset = read(write_coco(tmp_path, lambda c: c["categories"][0].update(name="background")))
    assert dataset.classes == ["background", "dog"]


# Images that no annotation names


def without_e_and_f(content):
    """e has an object, f has none; both are left out of the JSON."""
    content["images"] = [i for i in content["images"] if i["file_name"][0] not in "ef"]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]


FIRST_FOUR = {name: OBJECTS[name] for name in "abcd"}


def test_images_that_coco_does_not_name(tmp_path):
    write_coco(tmp_path, without_e_and_f)
    dataset = read(tmp_path)
    assert boxes_of(dataset) == FIRST_FOUR
    assert dataset.tally.lines() == [f"2 {LEFT_OUT} (first: e.png)"]
    (tmp_path / "data.yaml").write_text("unannotated: empty\n")
    dataset = read(tmp_path)
    assert boxes_of(dataset) == {**FIRST_FOUR, "e": [], "f": []}
    assert dataset.tally.lines() == [f"2 {EMPTY} (first: e.png)"]


def test_images_of_a_declared_folder(tmp_path):
    """Those of another folder are of another split."""
    write_coco(tmp_path / "photos", without_e_and_f)
    write_pictures(tmp_path / "others", "a")
    about = "train: {images: photos, annotations: photos/all.json}\n"
    (tmp_path / "data.yaml").write_text(about)
    assert said(read(tmp_path)) == [f"2 {LEFT_OUT}"]
    (tmp_path / "data.yaml").write_text(about + "unannotated: empty\n")
    assert boxes_of(read(tmp_path)) == {**FIRST_FOUR, "e": [], "f": []}


def test_images_of_two_splits_go_by_their_folders(tmp_path):
    for split, names in (("train", "ab"), ("val", "cd")):
        write_pictures(tmp_path / split, [*names, "f"])
        content = json.dumps(photographs.coco_content(names))
        (tmp_path / split / "annotations.json").write_text(content)
    write_pictures(tmp_path / "unsorted", "e")
    (tmp_path / "data.yaml").write_text("unannotated: empty\n")
    dataset = read(tmp_path)
    assert [len(dataset.splits[split]) for split in ("train", "val")] == [3, 3]
    assert said(dataset) == [f"2 {EMPTY}", "1 images that no annotation names: left out"]


def test_images_without_xml(tmp_path):
    """Label Studio and pylabel write no XML for an image without objects, and no list."""
    write_voc_pngs(tmp_path)
    (tmp_path / "Annotations" / "f.xml").unlink()
    assert said(read(tmp_path)) == [f"1 {LEFT_OUT}"]
    (tmp_path / "data.yaml").write_text("unannotated: empty\ncorners: 1\n")
    assert boxes_of(read(tmp_path)) == OBJECTS


def test_images_that_vocs_lists_leave_out_stay_out(tmp_path):
    write_voc_pngs(tmp_path)
    (tmp_path / "Annotations" / "f.xml").unlink()
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    (tmp_path / "data.yaml").write_text("unannotated: empty\n")
    assert list(boxes_of(read(tmp_path))) == ["a", "b"]


def test_images_whose_xml_is_of_another_split_are_not_empty(tmp_path):
    """In a folder of images that the declared split shares with one that is not declared."""
    write_voc_pngs(tmp_path)
    (tmp_path / "others").mkdir()
    shutil.move(tmp_path / "Annotations" / "e.xml", tmp_path / "others")
    (tmp_path / "Annotations" / "f.xml").unlink()
    about = "unannotated: empty\ntrain: {images: JPEGImages, annotations: Annotations}\n"
    (tmp_path / "data.yaml").write_text(about)
    assert boxes_of(read(tmp_path)) == {**FIRST_FOUR, "f": []}


def test_unannotated_is_one_of_two(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "data.yaml").write_text("unannotated: emtpy\n")
    with pytest.raises(ValueError, match=r"unannotated 'emtpy'; .*empty"):
        read(tmp_path)


# XML


def test_labelimgs_corners_are_to_be_declared(tmp_path, tmp_path_factory, capsys):
    """It writes 1 for 0, so the boxes themselves do not show it."""
    write_voc(tmp_path, {"a": [("cat", 1, 1, 5, 6)]})
    (xml,) = (tmp_path / "Annotations").glob("*.xml")
    assert read(tmp_path).tally.lines() == []
    source = "<source><database>Unknown</database></source>"
    xml.write_text(xml.read_text().replace("</annotation>", f"{source}</annotation>"))
    (line,) = read(tmp_path).tally.lines()
    assert line.startswith("1 XML files are as labelImg writes them") and "`corners: 0`" in line
    assert "are read as `corners: 1`" in line and "up to 1 pixel too far up and left" in line
    assert main(["data", "--data", str(tmp_path)]) == 0
    assert line in capsys.readouterr().out
    converted = tmp_path_factory.mktemp("converted")
    assert "`corners: 1` was assumed" in convert(tmp_path, "coco", converted)
    assert read(converted).tally.lines() == []
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for corners, box in ((0, (1, 1, 5, 6)), (1, (0, 0, 5, 6))):
        (elsewhere / "own.yaml").write_text(f"path: ..\nformat: voc\ncorners: {corners}\n")
        dataset = read(elsewhere / "own.yaml")
        assert (boxes_of(dataset)["a"], dataset.tally.lines()) == ([("cat", *box)], [])
    for corners in (0, 1):
        (tmp_path / "data.yaml").write_text(f"corners: {corners}\n")
        assert read(tmp_path).tally.lines() == []


@pytest.mark.parametrize("declared", ["", "format: voc\n"])
def test_cvats_xml_is_named(declared, tmp_path):
    write_pictures(tmp_path)
    box = '<box label="cat" xtl="0" ytl="0" xbr="40" ybr="30"/>'
    text = f'<annotations><image name="a.png" width="80" height="60">{box}</image></annotations>'
    (tmp_path / "annotations.xml").write_text(text)
    if declared:
        (tmp_path / "data.yaml").write_text(declared)
    with pytest.raises(ValueError, match=r"The XML \(<annotations>\) is CVAT's own: export .*COCO"):
        read(tmp_path)


# YOLO


def test_darknets_names(tmp_path):
    """datumaro's and CVAT's YOLO: obj.names, and images and labels in obj_train_data."""
    write_yolo(tmp_path / "x")
    shutil.copytree(tmp_path / "x" / "images", tmp_path / "y" / "obj_train_data")
    for label in (tmp_path / "x" / "labels").iterdir():
        shutil.copy(label, tmp_path / "y" / "obj_train_data")
    (tmp_path / "y" / "obj.names").write_text("cat\ndog\n")
    (tmp_path / "y" / "train.txt").write_text("data/obj_train_data/a.png\n")
    dataset = read(tmp_path / "y")
    assert list(dataset.splits) == ["train"] and boxes_of(dataset) == OBJECTS
    assert dataset.tally.lines() == []


def test_absolute_paths_of_another_machine(tmp_path):
    """sahi and pylabel write them into data.yaml."""
    write_yolo(tmp_path)
    about = "train: /home/somebody/parts/images\nnames: [cat, dog]\n"
    (tmp_path / "data.yaml").write_text(about)
    dataset = read(tmp_path)
    assert boxes_of(dataset) == OBJECTS
    assert said(dataset) == ["1 paths are of another machine: their last folders are here"]
    (tmp_path / "data.yaml").write_text(about.replace("images", "pictures"))
    with pytest.raises(FileNotFoundError, match="/home/somebody/parts/pictures"):
        read(tmp_path)


def test_classes_counted_from_1_are_named(tmp_path):
    """sahi and pylabel write COCO's ids."""
    write_yolo(tmp_path)
    for label in (tmp_path / "labels").iterdir():
        lines = [line.split(maxsplit=1) for line in label.read_text().splitlines()]
        label.write_text("".join(f"{int(number) + 1} {rest}\n" for number, rest in lines))
    with pytest.raises(ValueError, match=r"3 lines have a class that is none of 0 to 1, as where"):
        read(tmp_path)


def test_labels_of_no_image_are_counted(tmp_path):
    write_yolo(tmp_path)
    shutil.copytree(tmp_path / "labels", tmp_path / "old", dirs_exist_ok=True)
    (tmp_path / "old" / "f.txt").unlink()
    (line,) = read(tmp_path).tally.lines()
    assert line.startswith("5 label files are of no image")
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(ValueError, match=r"no object on any of them .*5 label files are of no im"):
        read(tmp_path)


# The comparison


def truth(tmp_path):
    exporters.write_truth(tmp_path)
    return read(tmp_path)


def test_what_was_given_to_the_tools_is_equal(tmp_path):
    assert exporters.compared(truth(tmp_path)) == {
        "verdict": "equal",
        "max_difference": 0,
        "mean_difference": 0,
        "crowd": "kept",
        "wrong": [],
    }


def shifted(dataset):
    for image in dataset.images:
        for instance in image.instances:
            x0, y0, x1, y1 = instance.box
            instance.box = (x0 - 1, y0 - 1, x1, y1)


def rounded_down(dataset):
    for image in dataset.images:
        for instance in image.instances:
            instance.box = tuple(float(int(value)) for value in instance.box)


@pytest.mark.parametrize(
    ("change", "verdict", "wrong"),
    [
        (shifted, "different", "boxes up to 1 pixels off, first corners by -1 on average"),
        (rounded_down, "rounded", ""),
        (lambda d: d.splits["train"].pop(), "different", "1 images missing"),
        (lambda d: d.images[0].instances.pop(), "different", "a screw of part_01 missing"),
        (lambda d: d.classes.append("bolt"), "different", "classes screw, nut, washer, bolt"),
        (
            lambda d: d.images[3].instances.append(d.images[0].instances[0]),
            "different",
            "1 objects too many on part_04",
        ),
    ],
)
def test_what_differs_is_said(change, verdict, wrong, tmp_path):
    dataset = truth(tmp_path)
    change(dataset)
    compared = exporters.compared(dataset)
    assert (compared["verdict"], "; ".join(compared["wrong"])) == (verdict, wrong)


def test_the_crowd_region_as_an_object_is_said(tmp_path):
    dataset = truth(tmp_path)
    dataset.images[-1].instances[-1].iscrowd = False
    assert exporters.compared(dataset)["crowd"] == "object"
    dataset.images[-1].instances.pop()
    assert exporters.compared(dataset)["crowd"] == "left out"
