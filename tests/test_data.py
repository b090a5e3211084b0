import logging
import os
import subprocess
import sys

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from fpn_ext.data.datasets import (
    datasets_root,
    load_voc_layout,
    register_datasets,
    register_voc_layout,
)
from PIL import Image
from voc import CLASSES, write_voc


def test_voc_records(tmp_path):
    write_voc(tmp_path, {"a": [("cat", 1, 1, 10, 20)], "b": []})
    first, second = load_voc_layout(tmp_path, "train", CLASSES)
    assert first["file_name"] == str(tmp_path / "JPEGImages" / "a.jpg")
    assert (first["image_id"], first["height"], first["width"]) == ("a", 60, 80)
    # VOC's corners are 1-based and inclusive: (1, 1) is the first pixel.
    assert first["annotations"] == [
        {"category_id": 0, "bbox": [0.0, 0.0, 10.0, 20.0], "bbox_mode": BoxMode.XYXY_ABS}
    ]
    assert second["annotations"] == []


def test_a_box_without_area_is_left_out_and_named(tmp_path, caplog):
    objects = [("cat", 5, 5, 9, 9), ("dog", 50, 33, 50, 33), ("dog", 7, 7, 9, 7)]
    write_voc(tmp_path, {"a": objects})
    with caplog.at_level(logging.WARNING, logger="fpn_ext"):
        (record,) = load_voc_layout(tmp_path, "train", CLASSES)
    assert len(record["annotations"]) == 1
    both, height = (r.getMessage() for r in caplog.records)
    file = str(tmp_path / "Annotations" / "a.xml")
    assert both == (
        f"{file}: object 1 (dog) has no width and no height, [50.0, 33.0, 50.0, 33.0]; "
        "it is left out"
    )
    assert "object 2 (dog) has no height" in height


def test_a_missing_dataset_says_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"DETECTRON2_DATASETS \(.*datasets/README\.md"):
        load_voc_layout(tmp_path / "BCCD", "train", CLASSES)


def test_missing_files_are_named(tmp_path):
    write_voc(tmp_path, {"a": []})
    (tmp_path / "Annotations" / "a.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.xml"):
        load_voc_layout(tmp_path, "train", CLASSES)
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        load_voc_layout(tmp_path, "train", CLASSES)


def test_an_unknown_class_is_named(tmp_path):
    write_voc(tmp_path, {"a": [("cow", 1, 1, 5, 5)]})
    with pytest.raises(ValueError, match=r"a\.xml: class 'cow' is not among .*'cat'"):
        load_voc_layout(tmp_path, "train", CLASSES)


def test_a_broken_file_is_named(tmp_path):
    write_voc(tmp_path, {"a": []})
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"a\.xml is not XML"):
        load_voc_layout(tmp_path, "train", CLASSES)
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation/>")
    with pytest.raises(ValueError, match=r"a\.xml: <size/height> must be a number, got ''"):
        load_voc_layout(tmp_path, "train", CLASSES)


def test_registering_reads_nothing_and_can_be_repeated():
    """The tests' dataset folder is empty, or holds what test_train generated."""
    register_datasets()  # conftest.py has done it already
    generated = ("demo_multiscale_train", "demo_multiscale_val")
    for name in (*generated, "bccd_trainval", "bccd_test", "deeppcb_trainval", "deeppcb_test"):
        assert name in DatasetCatalog
    assert MetadataCatalog.get("deeppcb_test").thing_classes[3] == "spur"
    assert MetadataCatalog.get("bccd_test").thing_classes == ["RBC", "WBC", "Platelets"]
    assert not (datasets_root() / "BCCD").exists()


def test_the_demo_data_are_made_when_they_are_first_used(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c",
         "from fpn_ext.data import datasets, demo_data\n"
         "demo_data.generate.__kwdefaults__.update(num_train=3, num_val=2)\n"
         "demo_data.ensure.__kwdefaults__.update(num_train=3, num_val=2)\n"
         "from detectron2.data import DatasetCatalog\n"
         "datasets.register_datasets()\n"
         "print([len(DatasetCatalog.get(f'demo_multiscale_{s}')) for s in ('train', 'val')])"],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[3, 2]", done.stderr


def test_the_year_chooses_the_ap():
    with pytest.raises(ValueError, match="2007 or 2012, got 2010"):
        register_voc_layout("test_data_year", "x", "train", CLASSES, year=2010)


def test_a_registered_voc_layout_is_an_ordinary_dataset(tmp_path):
    write_voc(tmp_path, {"a": [("dog", 1, 1, 5, 5)]})
    register_voc_layout("test_data_voc", tmp_path, "train", CLASSES, year=2007)
    register_voc_layout("test_data_voc", tmp_path / "elsewhere", "train", CLASSES)  # ignored
    (record,) = DatasetCatalog.get("test_data_voc")
    assert record["annotations"][0]["category_id"] == 1
    assert Image.open(record["file_name"]).size == (80, 60)
    metadata = MetadataCatalog.get("test_data_voc")
    assert (metadata.evaluator_type, metadata.year) == ("pascal_voc", 2007)
