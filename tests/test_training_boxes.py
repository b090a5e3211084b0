"""Boxes as seen in training: the same as from Detectron2's mapper."""

import json

import fpn_ext
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.data.detection_utils import filter_empty_instances
from fpn_ext.__main__ import main
from fpn_ext.data.training_boxes import read_boxes, resize
from fpn_ext.data.training_boxes import training_sides as sides_of
from pictures import box, registered


def config(sides=(64,), longest=90, style="choice"):
    cfg = fpn_ext.get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = sides
    cfg.INPUT.MAX_SIZE_TRAIN = longest
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = style
    cfg.INPUT.RANDOM_FLIP = "none"
    return cfg


@pytest.mark.parametrize("side", [31, 64, 200, 0])
def test_the_resize_is_detectron2s(tmp_path, side):
    """Upright, wide and square pictures; boxes within, across and beyond the border, reversed."""
    rng = np.random.default_rng(1)
    boxes = [box(*corners) for corners in rng.uniform(-20, 90, (40, 4)).tolist()]
    boxes += [box(3, 3, 3, 9), box(2, 2, 40, 40, iscrowd=1), box(500, 500, 600, 600)]
    images = {"a": ((80, 60), boxes), "b": ((45, 77), boxes), "c": ((50, 50), boxes)}
    cfg = config((side,))
    with registered("resized", tmp_path, images) as records:
        found = read_boxes(["resized"])
        resized = resize(found, cfg)
        for number, record in enumerate(records):
            mapped = DatasetMapper(cfg, is_train=True)(dict(record))
            instances = filter_empty_instances(mapped["instances"])
            rows = found.images[resized.index] == number
            own = resized.rows(rows)
            np.testing.assert_allclose(own.boxes, instances.gt_boxes.tensor.numpy(), atol=1e-4)
            assert set(map(tuple, own.image_sizes.tolist())) == {instances.image_size}
    assert found.crowds == 3 and resized.without_area() >= 6  # the thin and the far one of each


def coco_of_everything():
    """Images and annotations in no order, ids with gaps, crowds, polygons of two points."""
    rng = np.random.default_rng(2)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 40 + i, "height": 50} for i in (9, 2, 5)]
    annotations = [
        {
            "id": 100 - number,
            "image_id": int(rng.choice([2, 5, 9, 77])),
            "category_id": int(rng.choice([3, 8])),
            "bbox": rng.uniform(0, 40, 4).tolist(),
            "iscrowd": int(rng.random() < 0.2),
            **([{}, {"segmentation": [[1, 1, 2, 2]]}, {"segmentation": [[1, 1, 5, 1, 5, 5]]}][k]),
        }
        for number, k in enumerate(rng.integers(0, 3, 60))
    ]
    categories = [{"id": 8, "name": "b"}, {"id": 3, "name": "a"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def test_boxes_read_from_a_coco_file_are_those_of_its_records(tmp_path):
    """Of a function that gives Detectron2's records of the same file, the records are read."""
    file = tmp_path / "everything.json"
    file.write_text(json.dumps(coco_of_everything()))
    register_coco_instances("of_file", {}, str(file), str(tmp_path))
    DatasetCatalog.register("of_records", lambda: load_coco_json(file, tmp_path, "of_records"))
    try:
        own, theirs = read_boxes(["of_file"]), read_boxes(["of_records"])
        joined = read_boxes(["of_records", "of_file"])
        metadata = [MetadataCatalog.get(name) for name in ("of_file", "of_records")]
        for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
            assert metadata[0].get(key) == metadata[1].get(key)
    finally:
        for name in ("of_file", "of_records"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    for field in ("corners", "classes", "images", "image_ids", "image_sizes"):
        np.testing.assert_array_equal(getattr(own, field), getattr(theirs, field), field)
    assert own.class_names == theirs.class_names == ["a", "b"]
    assert own.crowds == theirs.crowds > 0
    assert joined.image_ids == [2, 5, 9, 2, 5, 9] and joined.images.max() == 5
    assert len(joined.corners) == 2 * len(own.corners)


def test_a_fault_in_a_coco_file_is_said(tmp_path):
    content = coco_of_everything()
    content["annotations"][7] |= {"image_id": 2, "bbox": [1, 2, 3]}
    file = tmp_path / "faulty.json"
    file.write_text(json.dumps(content))
    register_coco_instances("faulty", {}, str(file), str(tmp_path))
    try:
        with pytest.raises(ValueError, match=r"annotations\[7\], id 93: .*four finite numbers"):
            read_boxes(["faulty"])
    finally:
        DatasetCatalog.remove("faulty")
        MetadataCatalog.remove("faulty")


def test_every_side_counts_as_often_as_it_is_drawn(tmp_path):
    with registered("sides", tmp_path, {1: ((64, 32), [box(0, 0, 16, 16)])}):
        resized = resize(read_boxes(["sides"]), config((32, 64, 64, 16), longest=100))
    right = resized.rows(slice(None)).boxes[:, 2]
    assert right.tolist() == [8, 16, 25]  # 64 would make 128 px: 100 are allowed
    assert resized.weights.tolist() == [0.25, 0.25, 0.5]
    assert resized.index.tolist() == [0, 0, 0]


def test_the_sides_of_a_range_are_spread_over_it():
    sides = sides_of(config((100, 500), style="range"))
    assert list(sides) == [100, 150, 200, 250, 300, 350, 400, 450, 500]
    assert set(sides.values()) == {1 / 9}
    assert sides_of(config((7, 8), style="range")) == {7: 0.5, 8: 0.5}
    for wrong in ((9, 8), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"MIN_SIZE_TRAIN needs \(least, most\)"):
            sides_of(config(wrong, style="range"))


def test_groups_are_cocos(tmp_path):
    boxes = [box(0, 0, 32, 32), box(0, 0, 32, 33), box(0, 0, 96, 96), box(0, 0, 96, 97)]
    with registered("groups", tmp_path, {1: ((100, 100), boxes)}):
        groups = read_boxes(["groups"]).groups()
    assert {name: mask.tolist() for name, mask in groups.items()} == {
        "all": [True] * 4,
        "small": [True, False, False, False],
        "medium": [False, True, True, False],
        "large": [False, False, False, True],
        "class thing": [True] * 4,
    }


def test_data_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'bccd_trainvall' is not .* 'bccd_trainval'"):
        read_boxes(["bccd_trainvall"])
    with pytest.raises(ValueError, match="name one there or with --dataset"):
        read_boxes([])
    with (
        registered("empty", tmp_path, {1: ((8, 8), [box(0, 0, 4, 4, iscrowd=1)])}),
        pytest.raises(ValueError, match=r"\['empty'\] has no boxes on 1 images"),
    ):
        read_boxes(["empty"])
    with (
        registered("nan", tmp_path, {7: ((8, 8), [box(0, 0, 4, float("nan"))])}),
        pytest.raises(ValueError, match=r"1 boxes have a coordinate that is NaN .*\(image 7"),
    ):
        read_boxes(["nan"])
    with registered("unsized", tmp_path, {7: ((8, 8), [box(0, 0, 4, 4)])}) as records:
        del records[0]["width"]
        with pytest.raises(ValueError, match="1 images have no height and width"):
            read_boxes(["unsized"])


@pytest.mark.parametrize("verb", ["anchors", "levels"])
def test_a_report_never_overwrites_the_annotations(tmp_path, capsys, verb):
    with registered("kept", tmp_path, {1: ((8, 8), [box(0, 0, 4, 4)])}):
        annotations = tmp_path / "kept.json"
        annotations.write_text('{"images": [], "annotations": []}')
        MetadataCatalog.get("kept").json_file = str(annotations)
        words = ["--config-file", "configs/Base-FPN.yaml", "--dataset", "kept"]
        assert main([verb, *words, "--json", str(annotations)]) == 2
    assert "annotations or detections, which the report would replace" in capsys.readouterr().err
    assert annotations.read_text() == '{"images": [], "annotations": []}'
