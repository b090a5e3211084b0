"""Every kind of fault in a dataset is detected and named; no file content causes a traceback."""

import io
import json
import logging
import os
import random

import fpn_ext
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from fpn_ext.__main__ import main
from fpn_ext.data import demo_data
from fpn_ext.data.annotation_files import read_coco, read_records, read_voc
from fpn_ext.data.box_formats import format_problems
from fpn_ext.data.check import check, read_registered
from fpn_ext.data.dataset_contents import KINDS, Box
from fpn_ext.data.datasets import register_voc_layout
from fpn_ext.proposals.loader import training_data
from fuzzing import corrupted, fuzz
from hypothesis import strategies as st
from PIL import Image
from voc import CLASSES, write_voc


def coco():
    """Two 80 x 60 images, each with a cat and a dog."""
    boxes = [[1, 2, 30, 40], [50, 20, 29, 39], [0, 0, 80, 60], [10, 30, 5, 6]]
    return {
        "images": [
            {"id": i, "file_name": f"{name}.jpg", "width": 80, "height": 60}
            for i, name in ((1, "a"), (2, "b"))
        ],
        "annotations": [
            {"id": i, "image_id": 1 + i // 2, "category_id": 1 + i % 2, "bbox": box, "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def write_coco(root, data):
    for name in ("a", "b"):
        Image.new("RGB", (80, 60)).save(root / f"{name}.jpg")
    (root / "coco.json").write_text(json.dumps(data))


def coco_report(root, cfg=None, workers=1):
    return check(read_coco(root / "coco.json", root), cfg, workers)


def found(report):
    return [
        (p.kind, p.image, p.annotation)
        for problems in report.problems_of.values()
        for p in problems
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_good_data_are_clean(tmp_path, workers):
    write_coco(tmp_path, coco())
    report = coco_report(tmp_path, workers=workers)
    assert found(report) == []
    assert report.boxes_per_class == {"cat": 2, "dog": 2}
    assert str(report) == (
        f"{tmp_path / 'coco.json'}: 2 images, 4 boxes (cat 2, dog 2)\n\n0 error(s), 0 warning(s)"
    )


def test_the_demo_data_are_clean(tmp_path):
    demo_data.generate(tmp_path / "demo", num_train=12, num_val=1)
    json_file = tmp_path / "demo" / "annotations" / "instances_train.json"
    cfg = fpn_ext.load_config("configs/demo/faster_rcnn_R_18_FPN.yaml")
    report = check(read_coco(json_file, tmp_path / "demo" / "train"), cfg)
    assert set(report.problems_of) <= {"image-without-boxes"}


# What is wrong in COCO JSON: (what is done to good data, what is found).
FAULTS = {
    "duplicate image id": (
        lambda d: d["images"].append({**d["images"][0], "file_name": "c.jpg"}),
        [("duplicate-image-id", "c.jpg", None)],
    ),
    "duplicate file": (
        lambda d: d["images"][1].update(file_name="./a.jpg"),
        [("duplicate-file-name", "./a.jpg", None)],
    ),
    "duplicate annotation id": (
        lambda d: d["annotations"][3].update(id=0),
        [("duplicate-annotation-id", "b.jpg", 0)],
    ),
    "duplicate class id": (
        lambda d: d["categories"].append({"id": 1, "name": "cow"}),
        [("duplicate-class", None, None)],
    ),
    "duplicate class name": (
        lambda d: d["categories"].append({"id": 3, "name": "cat"}),
        [("duplicate-class", None, None)],
    ),
    "unknown image": (
        lambda d: d["annotations"][1].update(image_id=7),
        [("unknown-image", "7", 1)],
    ),
    "unknown class": (
        lambda d: d["annotations"][1].update(category_id=3),
        [("unknown-class", "a.jpg", 1)],
    ),
    "class without boxes": (
        lambda d: d["categories"].append({"id": 3, "name": "cow"}),
        [("class-without-boxes", None, None)],
    ),
    "no width": (
        lambda d: d["images"][0].pop("width"),
        [("bad-field", "a.jpg", None)],
    ),
    "size as text": (
        lambda d: d["images"][0].update(width="80"),
        [("bad-field", "a.jpg", None)],
    ),
    "ignore": (
        lambda d: d["annotations"][0].update(ignore=1),
        [("bad-field", "a.jpg", 0)],
    ),
    "iscrowd": (
        lambda d: d["annotations"][0].update(iscrowd="no"),
        [("bad-field", "a.jpg", 0)],
    ),
    "id": (
        lambda d: d["annotations"][0].update(id=None),
        [("bad-field", "a.jpg", None)],
    ),
    "inverted": (
        lambda d: d["annotations"][0].update(bbox=[30, 30, -5, 5]),
        [("inverted-box", "a.jpg", 0)],
    ),
    "empty": (
        lambda d: d["annotations"][0].update(bbox=[30, 30, 0, 5]),
        [("empty-box", "a.jpg", 0)],
    ),
    "outside": (
        lambda d: d["annotations"][0].update(bbox=[80, 0, 5, 5]),
        [("outside-box", "a.jpg", 0)],
    ),
    "partly outside": (
        lambda d: d["annotations"][0].update(bbox=[70, 10, 11.5, 5]),
        [("partly-outside", "a.jpg", 0)],
    ),
    "a pixel beyond the edge is no fault": (
        lambda d: d["annotations"][0].update(bbox=[70, -1, 11, 5]),
        [],
    ),
    "duplicate box": (
        lambda d: d["annotations"][2].update(image_id=1, bbox=[1, 2, 30, 40]),
        [("duplicate-box", "a.jpg", 2)],
    ),
    "the same box of another class is no fault": (
        lambda d: d["annotations"][1].update(bbox=[1, 2, 30, 40]),
        [],
    ),
    "mask elsewhere": (
        lambda d: d["annotations"][0].update(segmentation=[[1, 2, 31, 2, 31, 45]]),
        [("mask-mismatch", "a.jpg", 0)],
    ),
    "mask in its box": (
        lambda d: d["annotations"][0].update(segmentation=[[1, 2, 31, 2, 31, 42], [3, 3, 4]]),
        [],
    ),
    "mask of two points": (
        lambda d: d["annotations"][0].update(segmentation=[[1, 2, 31, 42]]),
        [("bad-segmentation", "a.jpg", 0)],
    ),
    "mask of words": (
        lambda d: d["annotations"][0].update(segmentation=[["a", 2, 31, 2, 31, 42]]),
        [("bad-segmentation", "a.jpg", 0)],
    ),
    "run-length mask": (
        lambda d: d["annotations"][0].update(segmentation={"size": [60, 80], "counts": "x"}),
        [],
    ),
    "run-length mask of another size": (
        lambda d: d["annotations"][0].update(segmentation={"size": [80, 60], "counts": "x"}),
        [("bad-segmentation", "a.jpg", 0)],
    ),
    "no images": (
        lambda d: d.update(images=[], annotations=[], categories=[]),
        [("no-images", None, None)],
    ),
    "images are no list": (
        lambda d: d.update(images={}, annotations=[], categories=[]),
        [("bad-field", None, None), ("no-images", None, None)],
    ),
    "a crowd alone is no object": (
        lambda d: (d["annotations"].pop(1), d["annotations"][0].update(iscrowd=1)),
        [("image-without-boxes", "a.jpg", None)],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_json(tmp_path, fault):
    change, expected = FAULTS[fault]
    data = coco()
    change(data)
    write_coco(tmp_path, data)
    report = coco_report(tmp_path)
    assert found(report) == expected
    errors = [kind for kind, *_ in expected if KINDS[kind][0] == "error"]
    assert report.count("error") == len(errors)


@pytest.mark.parametrize(
    "box",
    [None, 5, "1234", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, "4"], [1, 2, 3, None],
     [1, 2, 3, True], [1, 2, 3, float("nan")], [float("inf"), 2, 3, 4], [1, 2, 3, 10**400],
     [[1], 2, 3, 4], {"0": 1}],
)  # fmt: skip
def test_what_is_no_box(tmp_path, box):
    data = coco()
    data["annotations"][0]["bbox"] = box
    write_coco(tmp_path, data)
    report = coco_report(tmp_path)
    assert found(report)[0] == ("bad-box", "a.jpg", 0)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"", "unreadable-annotations"),
        (b"{", "unreadable-annotations"),
        (b"\xff\xfe\x00", "unreadable-annotations"),
        (b"[" * 100_000, "unreadable-annotations"),
        (b'{"a":' * 100_000, "unreadable-annotations"),
        (b"9" * 5000, "unreadable-annotations"),
        (b"[]", "bad-field"),
        (b"null", "bad-field"),
        (b'{"images": [null, 3, []], "annotations": [], "categories": [[]]}', "bad-field"),
    ],
    ids=range(9),
)
def test_what_is_no_coco_file(tmp_path, text, kind):
    (tmp_path / "coco.json").write_bytes(text)
    kinds = [kind for kind, _, _ in found(coco_report(tmp_path))]
    assert kind in kinds and set(kinds) <= {kind, "no-images"}


# Pictures.


def picture_report(root, prepare):
    write_coco(root, coco())
    (root / "a.jpg").unlink()
    prepare(root / "a.jpg")
    report = coco_report(root)
    (problem,) = [p for problems in report.problems_of.values() for p in problems]
    assert problem.image == "a.jpg"
    return problem


def truncated(file):
    Image.effect_noise((80, 60), 50).save(file)
    file.write_bytes(file.read_bytes()[:-500])


def exif(orientation, size):
    def save(file):
        data = Image.Exif()
        data[0x0112] = orientation
        Image.new("RGB", size).save(file, exif=data)

    return save


@pytest.mark.parametrize(
    ("prepare", "kind", "detail"),
    [
        (lambda file: None, "missing-image", "no file"),
        (
            lambda file: Image.new("RGB", (80, 60)).save(file.with_suffix(".png")),
            "missing-image",
            "but one that ends in .png",
        ),
        (truncated, "unreadable-image", "truncated"),
        (lambda file: file.write_bytes(b"GIF89a"), "unreadable-image", ""),
        (lambda file: file.touch(), "unreadable-image", "cannot identify"),
        (lambda file: file.mkdir(), "unreadable-image", "is not a file"),
        (lambda file: os.mkfifo(file), "unreadable-image", "is not a file"),
        (
            lambda file: Image.new("RGB", (81, 60)).save(file),
            "wrong-size",
            "80x60 in the annotations, 81x60 in the picture",
        ),
        (lambda file: Image.new("RGB", (60, 80)).save(file), "swapped-size", "60x80"),
        (exif(6, (80, 60)), "exif-rotated", "80x60 in the annotations, 60x80 in the picture"),
        (exif(6, (60, 80)), None, None),
        (exif(3, (80, 60)), None, None),
        (lambda file: Image.new("I;16", (80, 60)).save(file, "png"), "colour-depth", "mode I"),
    ],
    ids=range(13),
)
def test_faults_of_pictures(tmp_path, prepare, kind, detail):
    if kind is None:
        with pytest.raises(ValueError, match="not enough values"):  # nothing is found
            picture_report(tmp_path, prepare)
        return
    problem = picture_report(tmp_path, prepare)
    assert problem.kind == kind and detail in problem.detail


def test_an_exif_turned_picture_is_what_detectron2_reads(tmp_path):
    from detectron2.data.detection_utils import read_image

    exif(6, (80, 60))(tmp_path / "a.jpg")
    assert read_image(str(tmp_path / "a.jpg")).shape[:2] == (80, 60)  # height, width


@pytest.mark.parametrize("name", ["a\0.jpg", "\ud800.jpg", "x" * 5000, "a.jpg/b.jpg", "/dev/zero"])
def test_hostile_file_names(tmp_path, name, capsys):
    data = coco()
    data["images"][0]["file_name"] = name
    write_coco(tmp_path, data)
    report = coco_report(tmp_path)
    assert found(report)[0][0] in ("missing-image", "unreadable-image")
    assert max(map(len, str(report).splitlines())) < 1000
    json.dumps(report.as_json()).encode("ascii")


def test_a_file_name_cannot_command_the_terminal(tmp_path):
    data = coco()
    data["images"][0]["file_name"] = "\x1b[2Jgone.jpg"
    data["categories"][0]["name"] = "\x1b]0;cat\a"
    write_coco(tmp_path, data)
    assert "\x1b" not in str(coco_report(tmp_path))


# Boxes in another format.


def boxes_of(form, count, spread):
    """Boxes of 10 to 200 pixels on 640 x 480, in the given format."""
    numbers = random.Random(count)
    made = []
    for i in range(count):
        w, h = numbers.uniform(10, 200), numbers.uniform(10, 200)
        x, y = numbers.uniform(0, (640 - w) * spread), numbers.uniform(0, (480 - h) * spread)
        written = (x, y, w, h) if form == "XYWH" else (x, y, x + w, y + h)
        made.append((i, written))
    return made


def formats(made, form):
    sized = [(Box(i, written, form, "cat"), (640, 480)) for i, written in made]
    return [p.kind for p in format_problems(sized)]


@pytest.mark.parametrize("count", [1, 3, 20, 300])
def test_right_boxes_raise_no_suspicion(count):
    for form in ("XYWH", "XYXY"):
        for spread in (1.0, 0.3):
            assert formats(boxes_of(form, count, spread), form) == []


def test_large_boxes_drawn_beyond_the_edge_raise_none():
    """All of them fit as XYXY too, and 4 only so: suspicious among 16, not among 24."""
    inside = [(i, (10.0, 10.0, 600.0, 400.0)) for i in range(20)]
    beyond = [(i, (10.0, 10.0, 635.0, 400.0)) for i in range(4)]
    assert formats(inside + beyond, "XYWH") == []
    assert formats(inside[:12] + beyond, "XYWH") == ["looks-like-xyxy"]
    small = [(0, (300.0, 200.0, 20.0, 20.0))]  # no XYXY at all
    assert formats(inside[:12] + beyond + small, "XYWH") == []


@pytest.mark.parametrize("count", [20, 300])
def test_boxes_in_the_other_format_are_recognised(count):
    assert formats(boxes_of("XYXY", count, 1.0), "XYWH") == ["looks-like-xyxy"]
    assert formats(boxes_of("XYWH", count, 1.0), "XYXY") == ["looks-like-xywh"]
    assert formats(boxes_of("XYWH", count, 1.0), "VOC") == ["looks-like-xywh"]
    relative = [(i, tuple(v / 640 for v in b)) for i, b in boxes_of("XYWH", count, 1.0)]
    assert formats(relative, "XYWH") == ["looks-relative"]


# Pascal VOC.


def voc_report(root, classes=CLASSES):
    return check(read_voc(root, "train", classes))


def test_good_voc_data_are_clean(tmp_path):
    write_voc(tmp_path, {"a": [("cat", 1, 1, 80, 60)], "b": [("dog", 5, 5, 6, 6)]})
    assert found(voc_report(tmp_path)) == []
    assert voc_report(tmp_path, None).boxes_per_class == {"cat": 1, "dog": 1}


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        (("cat", 5, 5, 5, 9), "empty-box"),
        (("cat", 5, 5, 4, 9), "inverted-box"),
        (("cat", 5, 5, "nan", 9), "bad-box"),
        (("cat", 5, 5, "inf", 9), "bad-box"),
        (("cat", 5, 5, "", 9), "bad-box"),
        (("cat", 0, 5, 9, 9), "zero-based"),
        (("cat", 5, 5, 82, 9), "partly-outside"),
        (("cat", -1, 5, 9, 9), "partly-outside"),  # the corner at -1 is 2 pixels outside
        (("cat", 81, 5, 90, 9), "outside-box"),
        (("Cat", 5, 5, 9, 9), "unknown-class"),
        (("", 5, 5, 9, 9), "bad-field"),
    ],
)
def test_faults_of_voc_objects(tmp_path, box, kind):
    write_voc(tmp_path, {"a": [("dog", 1, 1, 9, 9), box, ("cat", 1, 1, 9, 9)]})
    assert found(voc_report(tmp_path)) == [(kind, "a.jpg", 1)]


def test_a_wrong_class_names_the_nearest(tmp_path):
    write_voc(tmp_path, {"a": [("dgo", 5, 5, 9, 9)]})
    (problem,) = voc_report(tmp_path).problems_of["unknown-class"]
    assert problem.detail == "'dgo'; nearest valid: 'dog'"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "unreadable-annotations"),
        ("<annotation>", "unreadable-annotations"),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', "unreadable-annotations"),
        ("<annotation/>", "bad-field"),
        ("<annotation><size><width>1e400</width><height>60</height></size></annotation>",
         "bad-field"),
        ("<annotation><size><width>81</width><height>60</height></size></annotation>",
         "wrong-size"),
        ("<a>" * 100_000 + "</a>" * 100_000, "bad-field"),
    ],
    ids=range(7),
)  # fmt: skip
def test_faults_of_voc_files(tmp_path, text, kind):
    write_voc(tmp_path, {"a": []})
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    assert found(voc_report(tmp_path, []))[0] == (kind, "a.jpg", None)


@pytest.mark.parametrize(
    ("declarations", "name"),
    [
        ("", "cat"),
        ('<!ENTITY a "cat">', "&a;"),
        ('<!ENTITY a "c"><!ENTITY b "&a;at">', "&b;"),  # which could go on to any length
        ('<!ENTITY secret SYSTEM "SECRET">', "&secret;"),
    ],
    ids=["no entity", "entity", "entity of entities", "external"],
)
def test_a_document_type_is_refused_with_what_it_declares(tmp_path, declarations, name):
    secret = tmp_path / "secret.txt"
    secret.write_text("cat")
    declarations = declarations.replace("SECRET", secret.as_uri())
    write_voc(tmp_path, {"a": [("NAME", 5, 5, 9, 9)]})
    file = tmp_path / "Annotations" / "a.xml"
    body = file.read_text().replace("NAME", name)
    file.write_text(f"<!DOCTYPE annotation [{declarations}]>{body}")
    report = voc_report(tmp_path)
    assert found(report)[0] == ("unreadable-annotations", "a.jpg", None)
    assert report.boxes_per_class == {"cat": 0, "dog": 0}


def test_a_listed_image_without_an_xml_file(tmp_path):
    """As many tools leave an image without objects."""
    write_voc(tmp_path, {"a": [("cat", 1, 1, 9, 9), ("dog", 1, 1, 9, 9)], "b": []})
    (tmp_path / "Annotations" / "b.xml").unlink()
    report = voc_report(tmp_path)
    assert found(report)[0] == ("missing-annotations", "b.jpg", None)
    assert "take it off the list, or name the folder by --data" in str(report)


def test_a_list_that_names_an_image_twice(tmp_path):
    write_voc(tmp_path, {"a": [("cat", 1, 1, 9, 9), ("dog", 1, 1, 9, 9)]})
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\na\n")
    assert found(voc_report(tmp_path)) == [("duplicate-image-id", "a", None)]


# Registered datasets, and configs.


def test_a_registered_coco_set_is_read_from_its_files(tmp_path):
    data = coco()
    data["annotations"][3]["id"] = 0  # DatasetCatalog.get would end in an AssertionError
    write_coco(tmp_path, data)
    register_coco_instances("test_check_coco", {}, str(tmp_path / "coco.json"), str(tmp_path))
    report = check(read_registered("test_check_coco"))
    assert found(report) == [("duplicate-annotation-id", "b.jpg", 0)]


def test_a_registered_voc_set_is_read_from_its_files(tmp_path):
    write_voc(tmp_path, {"a": [("cow", 1, 1, 9, 9)]})
    register_voc_layout("test_check_voc", tmp_path, "train", CLASSES)
    assert found(check(read_registered("test_check_voc")))[0] == ("unknown-class", "a.jpg", 0)


def test_any_other_registered_set_is_read_as_records(tmp_path):
    file = str(tmp_path / "a.jpg")
    Image.new("RGB", (80, 60)).save(file)
    boxes = [
        {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0},
        {"bbox": [9, 9, 3, 4], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1},
        {"bbox": [9, 9, 3, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2},
        {"bbox": [9, 9, 3, 4], "bbox_mode": BoxMode.XYWH_REL, "category_id": 1},
    ]
    record = {"file_name": file, "image_id": 0, "width": 80, "height": 61, "annotations": boxes}
    DatasetCatalog.register("test_check_records", lambda: [record, record])
    MetadataCatalog.get("test_check_records").set(thing_classes=CLASSES)
    expected = {
        ("wrong-size", file, None),
        ("duplicate-file-name", file, None),
        ("duplicate-image-id", file, None),
        ("inverted-box", file, 1),
        ("unknown-class", file, 2),
        ("other-box-mode", file, 3),
    }
    assert set(found(check(read_registered("test_check_records")))) == expected


def test_records_of_any_kind():
    wrong = [{}, 3, {"file_name": 3}, {"file_name": "x", "height": "60"}]
    assert [p.kind for p in read_records(wrong, CLASSES, "test").problems] == ["bad-field"] * 4


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"'bccd_tran' is not a registered .* 'bccd_train'"):
        read_registered("bccd_tran")


def test_what_a_config_adds(tmp_path):
    """640 pixels for the shorter side: 60 pixels become 640, a box of 0.3 pixels 3.2."""
    data = coco()
    data["annotations"][0]["bbox"] = [1, 1, 0.3, 20]
    data["annotations"][1]["bbox"] = [1, 1, 0.4, 20]
    write_coco(tmp_path, data)
    cfg = fpn_ext.load_config("configs/Base-FPN.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", "3"])
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 640, 2000
    report = coco_report(tmp_path, cfg)
    assert found(report) == [("class-count", None, None), ("tiny-after-resize", "a.jpg", 0)]
    (tiny,) = report.problems_of["tiny-after-resize"]
    assert tiny.detail == "3.2x213.3 pixels, and the finest map has stride 4"
    cfg.MODEL.RPN.IN_FEATURES = ["p3", "p4"]
    assert len(coco_report(tmp_path, cfg).problems_of["tiny-after-resize"]) == 2
    cfg.INPUT.MIN_SIZE_TEST = 0  # no resize
    tiny = coco_report(tmp_path, cfg).problems_of["tiny-after-resize"]
    assert [p.annotation for p in tiny] == [0, 1, 3]


@pytest.mark.parametrize(("drop", "verb"), [("True", "dropped"), ("False", "kept")])
def test_the_fate_of_images_without_boxes(tmp_path, drop, verb):
    write_coco(tmp_path, {**coco(), "annotations": [], "categories": []})
    cfg = fpn_ext.load_config(
        "configs/Base-FPN.yaml", ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", drop]
    )
    notes = coco_report(tmp_path, cfg).problems_of["image-without-boxes"]
    assert [n.image for n in notes] == ["a.jpg", "b.jpg"]
    expected = f"{verb} in training: DATALOADER.FILTER_EMPTY_ANNOTATIONS is {drop}"
    assert notes[0].detail == expected


def training_cfg(root, drop):
    name = f"test_check_{root.name}"
    register_coco_instances(name, {}, str(root / "coco.json"), str(root))
    return fpn_ext.load_config(
        "configs/Base-FPN.yaml",
        [
            *("DATASETS.TRAIN", f"('{name}',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"),
            *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", str(drop)),
        ],
    )


@pytest.mark.parametrize(("drop", "left", "verb"), [(True, 1, "dropped"), (False, 2, "kept")])
def test_training_says_what_becomes_of_them(tmp_path, caplog, drop, left, verb):
    data = coco()
    data["annotations"].pop()
    data["annotations"][2]["iscrowd"] = 1  # all that is left on the second picture
    write_coco(tmp_path, data)
    with caplog.at_level(logging.INFO, logger="fpn_ext"):
        records = training_data(training_cfg(tmp_path, drop))["records"]
    assert len(records) == left
    assert (
        f"1 of 2 training images have no boxes: {verb} "
        f"(DATALOADER.FILTER_EMPTY_ANNOTATIONS: {drop})"
    ) in caplog.text


def test_training_on_nothing(tmp_path):
    write_coco(tmp_path, {**coco(), "annotations": []})
    with pytest.raises(ValueError, match=r"no object to train on in its 2 images"):
        training_data(training_cfg(tmp_path, True))


# The command.


def state(root):
    return {f: (f.stat().st_mtime_ns, f.is_file() and f.read_bytes()) for f in root.rglob("*")}


def test_nothing_but_the_report_is_written(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    data = coco()
    data["annotations"][0]["bbox"] = [30, 30, 0, 5]
    write_coco(tmp_path / "data", data)
    before = state(tmp_path / "data")
    report_file = tmp_path / "out" / "report.json"
    arguments = ["data", "--coco", f"{tmp_path}/data/coco.json", "--images", f"{tmp_path}/data"]
    assert main([*arguments, "--json", str(report_file)]) == 0
    assert state(tmp_path / "data") == before
    printed = capsys.readouterr().out
    assert "WARNING empty-box: 1\n" in printed
    assert "a.jpg, annotation 0: [30, 30, 0, 5] (x, y, width, height)" in printed
    report = json.loads(report_file.read_text())
    assert (report["images"], report["errors"], report["warnings"]) == (2, 0, 1)
    assert report["kinds"]["empty-box"]["count"] == 1
    assert report["problems"] == [
        {
            "kind": "empty-box",
            "severity": "warning",
            "image": "a.jpg",
            "annotation": 0,
            "detail": "[30, 30, 0, 5] (x, y, width, height)",
            "count": 1,
        }
    ]


def test_warnings_do_not_fail_the_command(tmp_path, capsys):
    write_voc(tmp_path, {"a": [("cat", 0, 1, 9, 9)]})
    assert main(["data", "--voc", str(tmp_path), "--split", "train", "--classes", "cat"]) == 0
    assert "0 error(s), 1 warning(s)" in capsys.readouterr().out


def test_only_a_few_of_many_problems_are_printed(tmp_path, capsys):
    write_voc(tmp_path, {"a": [("cat", 5, 5, 5, 9 + i) for i in range(9)]})
    assert main(["data", "--voc", str(tmp_path), "--split", "train"]) == 1
    printed = capsys.readouterr().out
    assert "WARNING empty-box: 9\n" in printed and "and 6 more (--json lists all)" in printed
    assert printed.count("a.jpg, annotation ") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --data --dataset --coco --voc is required"),
        (["--coco", "x.json"], "--coco and --images go together"),
        (["--voc", "x"], "--voc and --split go together"),
        (["--coco", "no.json", "--images", "."], "no annotation file no.json"),
        (["--voc", "no", "--split", "train"], "no list of images"),
        (["--dataset", "bccd_tran"], "nearest valid: 'bccd_train'"),
        (["--dataset", "bccd_train"], "no list of images"),
        (["--dataset", "bccd_train", "--classes", "a"], "--classes goes with --voc"),
        (["--dataset", "bccd_train", "--config-file", "no.yaml"], "'no.yaml' does not exist"),
    ],
)
def test_wrong_calls(arguments, message, capsys):
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_report_does_not_overwrite_the_annotations(tmp_path, capsys):
    write_coco(tmp_path, coco())
    file = str(tmp_path / "coco.json")
    assert main(["data", "--coco", file, "--images", str(tmp_path), "--json", file]) == 2
    assert "annotations or detections, which the report would replace" in capsys.readouterr().err
    assert json.loads((tmp_path / "coco.json").read_text()) == coco()


# Whatever stands in a file: a report, never an exception.

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, -1, 10**400, 1e308, "a.jpg", "\ud800", "../a.jpg", "a\0"]),
    lambda inner: st.lists(inner, max_size=6)
    | st.dictionaries(st.sampled_from(["id", "size", "counts", "x"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
image_entry = st.fixed_dictionaries(
    {}, optional={key: anything for key in ("id", "file_name", "width", "height")}
)
annotation_entry = st.fixed_dictionaries(
    {},
    optional={
        **{k: anything for k in ("id", "iscrowd", "ignore", "segmentation")},
        "image_id": st.sampled_from([1, 2]) | anything,
        "category_id": st.sampled_from([1, 2]) | anything,
        "bbox": st.lists(st.floats() | st.integers(), min_size=4, max_size=4) | anything,
    },
)
like_coco = st.fixed_dictionaries(
    {
        "images": st.lists(image_entry | st.sampled_from(coco()["images"]) | anything, max_size=4)
        | anything,
        "annotations": st.lists(annotation_entry | anything, max_size=8) | anything,
        "categories": st.lists(st.sampled_from(coco()["categories"]) | anything, max_size=3)
        | anything,
    }
)


@fuzz(data=anything | like_coco)
def test_fuzz_json(tmp_path, data):
    write_coco(tmp_path, data)
    report = coco_report(tmp_path, fpn_ext.get_cfg())
    str(report).encode("utf-8")
    json.dumps(report.as_json()).encode("ascii")


VOC_TEXT = (
    b"<annotation><size><width>80</width><height>60</height></size>"
    b"<object><name>cat</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>9</xmax><ymax>9</ymax>"
    b"</bndbox></object></annotation>"
)


@fuzz(text=corrupted(VOC_TEXT) | st.binary(max_size=200), numbers=st.lists(st.text(), max_size=4))
def test_fuzz_xml(tmp_path, text, numbers):
    write_voc(tmp_path, {"a": [], "b": []})
    (tmp_path / "Annotations" / "a.xml").write_bytes(text)
    fields = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax"), numbers))  # noqa: B905
    (tmp_path / "Annotations" / "b.xml").write_text(
        f"<annotation><object><name>cat</name><bndbox>{fields}</bndbox></object></annotation>",
        encoding="utf-8",
        errors="replace",
    )
    str(voc_report(tmp_path)).encode("utf-8")


@fuzz(text=st.binary(max_size=60))
def test_fuzz_list_of_images(tmp_path, text):
    write_voc(tmp_path, {"a": []})
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(text)
    try:
        str(voc_report(tmp_path)).encode("utf-8")
    except ValueError as error:
        assert "is not a list of images in UTF-8" in str(error)


def picture_bytes(form, **options):
    buffer = io.BytesIO()
    Image.effect_noise((24, 16), 60).save(buffer, form, **options)
    return buffer.getvalue()


PICTURES = [picture_bytes(f) for f in ("jpeg", "png", "gif", "bmp", "tiff", "webp", "ppm")]


@fuzz(content=st.one_of(*map(corrupted, PICTURES)) | st.binary(max_size=100))
def test_fuzz_pictures(tmp_path, content):
    write_coco(tmp_path, coco())
    (tmp_path / "a.jpg").write_bytes(content)
    assert found(coco_report(tmp_path))[0][1] == "a.jpg"  # never the 80 x 60 it should be
