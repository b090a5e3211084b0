"""Memory for each box of large datasets: what data, levels, anchors and evaluation hold at once.

Between a dataset and one of twice as many boxes, so that what any dataset needs does not count.
``make at-scale`` measures whole processes on two million boxes.
"""

import contextlib
import functools
import sys
import tracemalloc
from pathlib import Path

import fpn_ext
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from fpn_ext.data import training_boxes
from fpn_ext.data.annotation_files import read_coco
from fpn_ext.data.check import check
from fpn_ext.data.coco_file import coco_lists
from fpn_ext.data.training_boxes import read_boxes
from fpn_ext.evaluation import columns
from fpn_ext.evaluation.coco import evaluate_coco, has_hotcoco
from fpn_ext.files import json_lists
from fpn_ext.files.json_lists import ListInFile
from fpn_ext.inspection import anchor_fit
from fpn_ext.inspection.anchor_report import report_anchors
from fpn_ext.inspection.best_anchors import AnchorGrid
from fpn_ext.inspection.level_report import report_levels

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from at_scale import BOXES, write_dataset

IMAGES = 250


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Datasets of IMAGES and twice as many images."""
    folders = [tmp_path_factory.mktemp("memory") / name for name in ("one", "two")]
    for folder, images in zip(folders, (IMAGES, 2 * IMAGES), strict=True):
        write_dataset(folder, images, pictures=True)
    return folders


@contextlib.contextmanager
def registered_as_coco(folder):
    register_coco_instances("memory", {}, str(folder / "annotations.json"), str(folder / "images"))
    try:
        yield read_boxes(["memory"])
    finally:
        DatasetCatalog.remove("memory")
        MetadataCatalog.remove("memory")


def config():
    cfg = fpn_ext.load_config("configs/demo/faster_rcnn_R_18_FPN.yaml")
    cfg.INPUT.MIN_SIZE_TRAIN = (96, 112, 128, 144, 160, 176)  # as many as Detectron2's
    return cfg


def data(folder):
    assert not check(read_coco(folder / "annotations.json", folder / "images")).count("error")


def levels(folder):
    with registered_as_coco(folder) as boxes:
        assert len(str(report_levels(config(), boxes)))


def anchors(folder):
    own_grid = grid()
    with registered_as_coco(folder) as boxes, pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnchorGrid, "from_config", lambda cfg: own_grid)  # which builds the model
        assert len(str(report_anchors(config(), boxes)))


@functools.cache
def grid():
    return AnchorGrid.from_config(config())


def evaluation(folder):
    found = ListInFile(folder / "detections.json")
    assert evaluate_coco(coco_lists(folder / "annotations.json"), found, "bbox").ap() == 1


def peak_of(part, folder):
    tracemalloc.start()
    try:
        part(folder)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("part", "most"), [(data, 700), (levels, 600), (anchors, 800), (evaluation, 400)]
)
def test_bytes_for_each_box(folders, monkeypatch, part, most):
    if part is evaluation and not has_hotcoco():
        pytest.skip("pycocotools holds everything: pip install hotcoco")
    # What is held of any dataset is made as small as these are.
    monkeypatch.setattr(json_lists, "PIECE", 1 << 13)
    monkeypatch.setattr(training_boxes, "ROWS_AT_ONCE", 500)
    monkeypatch.setattr(columns, "BOXES_AT_ONCE", 100)
    monkeypatch.setattr(anchor_fit, "MOST_BOXES", 10)
    monkeypatch.setattr(anchor_fit, "MOST_SWEEPS", 1)
    part(folders[0])  # what is made once is made
    one, two = (peak_of(part, folder) for folder in folders)
    assert (two - one) / (IMAGES * BOXES) < most, part.__name__
