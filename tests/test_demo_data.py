"""The synthetic dataset: guarantees on its content, and its creation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fpn_ext.__main__ import main
from fpn_ext.data import demo_data
from fpn_ext.data.demo_annotations import annotation_of, polygons, rle_counts
from fpn_ext.data.demo_scenes import make_family, make_scene, picture
from fpn_ext.data.demo_shapes import outlines, render
from PIL import Image
from pycocotools.coco import COCO

OPTIONS = {"seed": 3, "num_train": 150, "num_val": 100}
FEW = {"num_train": 3, "num_val": 2, "image_size": 160}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "set"
    demo_data.generate(folder, **OPTIONS)
    return folder


def _annotations(root: Path, split: str) -> dict[str, Any]:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def _single(root: Path, split: str) -> list[dict[str, Any]]:
    return [ann for ann in _annotations(root, split)["annotations"] if not ann["iscrowd"]]


def _pixels(root: Path, split: str, number: int) -> np.ndarray:
    with Image.open(root / split / f"{number:06d}.jpg") as image:
        return np.asarray(image.convert("RGB"))


def _files(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


# ----------------------------------------------------------------------------- determinism


def test_same_options_give_identical_files(tmp_path: Path) -> None:
    demo_data.generate(tmp_path / "a", **FEW)
    np.random.seed(5)  # global random state must not matter
    demo_data.generate(tmp_path / "b", **FEW)
    first, second = _files(tmp_path / "a"), _files(tmp_path / "b")
    assert len(first) == 3 + 2 + 3
    assert first == second


def test_the_first_image_is_what_it_always_was() -> None:
    """A changed box means a different dataset: GENERATOR_VERSION must be incremented."""
    assert demo_data.GENERATOR_VERSION == 2
    _, scene = make_scene(np.random.default_rng([0, 0, 0]), 224)
    made = [annotation_of(scene, number) for number in range(len(scene.items))]
    assert [(ann["category_id"], ann["bbox"]) for ann in made] == [
        (2, [45, 2, 169, 160]),
        (2, [120, 28, 90, 94]),
        (1, [58, 150, 75, 74]),
    ]


def test_image_does_not_depend_on_the_number_of_images(tmp_path: Path, root: Path) -> None:
    demo_data.generate(tmp_path / "few", seed=OPTIONS["seed"], num_train=4, num_val=1)
    for number in range(1, 5):
        few, many = _pixels(tmp_path / "few", "train", number), _pixels(root, "train", number)
        assert np.array_equal(few, many)
    few_annotations = _annotations(tmp_path / "few", "train")["annotations"]
    many_annotations = _annotations(root, "train")["annotations"]
    assert few_annotations
    assert few_annotations == many_annotations[: len(few_annotations)]


def test_seed_split_and_number_change_the_image(tmp_path: Path) -> None:
    demo_data.generate(tmp_path / "a", seed=0, **FEW)
    demo_data.generate(tmp_path / "b", seed=1, **FEW)
    images = [
        _pixels(tmp_path / "a", "train", 1),
        _pixels(tmp_path / "a", "train", 2),
        _pixels(tmp_path / "a", "val", 1),
        _pixels(tmp_path / "b", "train", 1),
    ]
    assert len({image.tobytes() for image in images}) == len(images)


# --------------------------------------------------------------------------------- content


@pytest.mark.parametrize("split", demo_data.SPLITS)
def test_every_area_bin_is_well_filled(root: Path, split: str) -> None:
    single = _single(root, split)
    by_mask = np.array([ann["area"] for ann in single])
    by_box = np.array([ann["bbox"][2] * ann["bbox"][3] for ann in single])
    for areas, least in ((by_mask, 0.20), (by_box, 0.22)):
        # COCO's bounds, in square pixels.
        counts, _ = np.histogram(areas, bins=[0, 32**2, 96**2, np.inf])
        assert counts.min() >= least * len(single), counts


@pytest.mark.parametrize("split", demo_data.SPLITS)
def test_objects_are_large_enough_to_recognise(root: Path, split: str) -> None:
    sides = np.array([ann["bbox"][2:] for ann in _single(root, split)])
    assert sides.min() >= 10
    assert np.percentile(sides, 99) <= 215
    per_image = np.bincount([ann["image_id"] for ann in _single(root, split)])
    assert 3 <= per_image[per_image > 0].mean() <= 6
    assert per_image.max() <= 7


@pytest.mark.parametrize("split", demo_data.SPLITS)
def test_pycocotools_reads_masks_that_agree_with_area_and_box(root: Path, split: str) -> None:
    coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
    assert [cat["name"] for cat in coco.loadCats(coco.getCatIds())] == list(demo_data.CLASS_NAMES)
    assert coco.anns
    for ann in coco.anns.values():
        mask = coco.annToMask(ann)
        image = coco.imgs[ann["image_id"]]
        assert mask.shape == (image["height"], image["width"])
        assert mask.sum() == ann["area"]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        tight = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert ann["bbox"] == tight


def test_masks_of_an_image_do_not_overlap_but_objects_occlude_each_other(root: Path) -> None:
    coco = COCO(str(root / "annotations" / "instances_train.json"))
    overlapping_boxes = 0
    for image_id in coco.imgs:
        anns = coco.imgToAnns[image_id]
        if not anns:
            continue
        assert sum(coco.annToMask(ann).astype(int) for ann in anns).max() == 1
        boxes = np.array([ann["bbox"] for ann in anns])
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
        overlapping_boxes += int((overlap > 0).all(axis=2).sum()) - len(anns)
    assert overlapping_boxes > len(coco.imgs)


def test_occlusion_leaves_half_of_every_object_visible() -> None:
    least, hidden = 1.0, 0
    for index in range(40):
        _, scene = make_scene(np.random.default_rng([9, index]), 224)
        for number, item in enumerate(scene.items):
            visible = int((scene.owner == number).sum())
            assert visible == item.visible_pixels
            least = min(least, visible / item.full_pixels)
            hidden += visible < 0.95 * item.full_pixels
    assert least >= 0.5
    assert hidden > 10


def test_distractors_are_drawn_and_not_annotated(tmp_path: Path) -> None:
    scenes = [make_scene(np.random.default_rng([9, i]), 224, 6)[1] for i in range(30)]
    categories = {item.category for scene in scenes for item in scene.items}
    assert categories == set(range(10))  # five classes, five that are none
    drawn = sum(not item.annotated for scene in scenes for item in scene.items)
    assert 30 < drawn < 30 * 6
    for scene in scenes:  # under distractors as under objects, enough of an object is left to see
        for number, item in enumerate(scene.items):
            assert (scene.owner == number).sum() >= 0.5 * item.full_pixels
    demo_data.generate(tmp_path / "data", num_train=20, num_val=1, distractors=6)
    content = json.loads((tmp_path / "data/annotations/instances_train.json").read_text())
    assert {a["category_id"] for a in content["annotations"]} <= {1, 2, 3, 4, 5}
    rng_of = lambda i: np.random.default_rng([0, 0, i])  # noqa: E731
    scenes = [make_scene(rng_of(i), 224, 6)[1] for i in range(20)]
    annotated = sum(item.annotated for scene in scenes for item in scene.items)
    assert len(content["annotations"]) == annotated


def test_the_class_of_a_companion_is_told_by_shapes_that_are_not_near() -> None:
    scenes = [make_family(np.random.default_rng([4, i]), 320, 6)[1] for i in range(60)]
    assert sum(not scene.items for scene in scenes) < 12
    assert {scene.items[0].category for scene in scenes if scene.items} == set(range(5))
    companions = 0
    for scene in scenes:
        assert len({item.category for item in scene.items}) <= 1
        numbers = np.arange(len(scene.items))
        of_discs = np.array([item.companion for item in scene.items], dtype=bool)
        shapes = np.argwhere(np.isin(scene.owner, numbers[~of_discs]))
        for number in numbers[of_discs]:
            disc = np.argwhere(scene.owner == number)
            assert len(disc) == scene.items[number].visible_pixels < 32**2  # none hidden
            assert np.ptp(disc, axis=0).max() < 38
            gaps = np.maximum(disc.min(axis=0) - shapes, shapes - disc.max(axis=0)).max(axis=1)
            assert gaps.min() >= 39  # rows or columns between; at a corner, along the farther axis
        companions += of_discs.sum()
    assert companions > 120


def test_companions_are_annotated_with_the_class(tmp_path: Path) -> None:
    options = {"num_train": 6, "num_val": 1, "image_size": 320, "companions": 4}
    demo_data.generate(tmp_path / "data", **options)
    content = json.loads((tmp_path / "data/annotations/instances_train.json").read_text())
    by_image = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].add(annotation["category_id"])
    assert max(map(len, by_image.values())) == 1
    assert any(a["area"] < 32**2 for a in content["annotations"])
    for wrong in ({"companions": 1}, {"companions": 4, "distractors": 2}):
        with pytest.raises(ValueError, match=r"needed 0 (or at least 2|in images with companions)"):
            demo_data.generate(tmp_path / "wrong", num_train=1, num_val=1, **wrong)


def test_a_dataset_from_before_there_were_distractors_has_none(tmp_path: Path) -> None:
    demo_data.generate(tmp_path / "data", num_train=1, num_val=1)
    file = tmp_path / "data" / "info.json"
    info = json.loads(file.read_text())
    del info["options"]["distractors"], info["options"]["companions"]
    file.write_text(json.dumps(info))
    assert demo_data.ensure(tmp_path / "data", num_train=1, num_val=1) == info["summary"]
    with pytest.raises(ValueError, match="distractors is 0, needed 3"):
        demo_data.ensure(tmp_path / "data", num_train=1, num_val=1, distractors=3)


@pytest.mark.parametrize("category", range(10))
def test_a_picture_of_one_shape(category: int) -> None:
    pictures = [picture(np.random.default_rng(s), category, 64) for s in (1, 1, 2)]
    assert all(image.size == (64, 64) and image.mode == "RGB" for image in pictures)
    first, same, other = (np.asarray(image) for image in pictures)
    assert (first == same).all() and (first != other).any()
    rng = np.random.default_rng(3)
    masks = [render(outlines(category, rng), 40, 60) for _ in range(3)]
    assert all(0.2 < (mask >= 0.5).mean() < 1 for mask in masks)


def test_polygons_keep_holes_and_separate_parts() -> None:
    mask = np.zeros((12, 16), dtype=bool)
    mask[1:9, 1:9] = True
    mask[3:6, 3:6] = False  # a hole
    mask[6, 6] = False  # another one, which touches the first at a corner
    mask[10, 2:5] = True  # a part of its own
    mask[9, 9] = True  # one that touches at a corner
    for shape in (mask, mask[9:]):
        annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0}
        annotation["segmentation"] = polygons(shape, left=2, top=1)
        coco = COCO()
        coco.dataset = {
            "images": [{"id": 1, "height": 20, "width": 20}],
            "annotations": [annotation],
            "categories": [{"id": 1, "name": "any"}],
        }
        coco.createIndex()
        expected = np.zeros((20, 20), dtype=bool)
        expected[1 : 1 + shape.shape[0], 2 : 2 + shape.shape[1]] = shape
        assert np.array_equal(coco.annToMask(annotation).astype(bool), expected)


def test_rle_starts_with_zeros_and_runs_down_the_columns() -> None:
    assert rle_counts(np.array([[0, 1], [1, 1]], dtype=bool)) == [1, 3]
    assert rle_counts(np.array([[1, 0], [1, 1]], dtype=bool)) == [0, 2, 1, 1]


def test_crowd_regions_are_rle_and_some_images_are_empty(root: Path) -> None:
    crowds = empty = 0
    for split in demo_data.SPLITS:
        data = _annotations(root, split)
        for ann in data["annotations"]:
            assert isinstance(ann["segmentation"], dict if ann["iscrowd"] else list)
            crowds += ann["iscrowd"]
        empty += len(data["images"]) - len({ann["image_id"] for ann in data["annotations"]})
    images = OPTIONS["num_train"] + OPTIONS["num_val"]
    assert 0.01 <= crowds / images <= 0.08
    assert 0.02 <= empty / images <= 0.12


def test_image_files_agree_with_the_annotations(root: Path) -> None:
    shapes = set()
    for split in demo_data.SPLITS:
        images = _annotations(root, split)["images"]
        assert sorted(path.name for path in (root / split).iterdir()) == sorted(
            image["file_name"] for image in images
        )
        for image in images:
            with Image.open(root / split / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"])
                assert file.mode == "RGB"
            shapes.add((image["width"], image["height"]))
    assert {max(shape) for shape in shapes} == {224}
    assert {shape[0] > shape[1] for shape in shapes} == {True, False}
    assert min(min(shape) for shape in shapes) >= 0.75 * 224


def _mean_colours(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each object's class, mean RGB colour, and median colour distance to its surroundings."""
    coco = COCO(str(root / "annotations" / "instances_train.json"))
    classes, colours, contrasts = [], [], []
    for ann in coco.anns.values():
        if ann["iscrowd"]:
            continue
        mask = coco.annToMask(ann).astype(bool)
        pixels = _pixels(root, "train", ann["image_id"]).astype(float)
        x, y, width, height = (int(value) for value in ann["bbox"])
        box = np.zeros_like(mask)
        box[max(y - 3, 0) : y + height + 3, max(x - 3, 0) : x + width + 3] = True
        colour = pixels[mask].mean(axis=0)
        around = pixels[box & ~mask]
        classes.append(ann["category_id"])
        colours.append(colour)
        contrasts.append(np.median(np.linalg.norm(around - colour, axis=1)))
    return np.array(classes), np.array(colours), np.array(contrasts)


def test_only_shape_tells_the_classes_apart(root: Path) -> None:
    classes, colours, _ = _mean_colours(root)
    counts = np.bincount(classes, minlength=6)[1:]
    assert counts.min() >= 0.14 * counts.sum()
    for channel in range(3):
        values = colours[:, channel]
        overall, spread = values.mean(), values.std()
        for category in range(1, 6):
            own = values[classes == category]
            # Four standard errors of a class's mean; the channels spread widely in every class.
            assert abs(own.mean() - overall) < 4 * spread / np.sqrt(own.size)
            assert own.std() > 35


def test_objects_stand_out_from_their_surroundings(root: Path) -> None:
    _, _, contrasts = _mean_colours(root)
    assert np.percentile(contrasts, 1) > 60  # on a scale to 441, the diagonal of the RGB cube


def test_categories_name_the_shapes(root: Path) -> None:
    shares: dict[int, list[float]] = {}
    for ann in _single(root, "train"):
        _, _, width, height = ann["bbox"]
        shares.setdefault(ann["category_id"], []).append(ann["area"] / (width * height))
    # The share of its box that a whole, upright shape fills puts the classes in order; a disc's is
    # pi / 4 and a square's comes near to 1.
    filled = {
        demo_data.CLASS_NAMES[key - 1]: np.percentile(value, 90) for key, value in shares.items()
    }
    assert sorted(filled, key=filled.get) == ["star", "triangle", "ring", "disc", "square"]
    assert min(np.diff(sorted(filled.values()))) > 0.02, filled


# -------------------------------------------------------------------------------- creation


def test_ensure_generates_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "below" / "set"
    first = demo_data.ensure(target, **FEW)
    assert first["train"]["images"] == 3
    assert first == json.loads((target / "info.json").read_text())["summary"]

    def fail(*args: object) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr(demo_data, "make_scene", fail)
    assert demo_data.ensure(str(target), **FEW) == first
    assert [path.name for path in target.parent.iterdir()] == ["set"]


def test_summary_counts_the_annotations(root: Path) -> None:
    summary = json.loads((root / "info.json").read_text())["summary"]
    for split in demo_data.SPLITS:
        part, single = summary[split], _single(root, split)
        assert part["images"] == OPTIONS[f"num_{split}"]
        assert part["boxes"] == len(single)
        for key in ("boxes_per_class", "boxes_per_area", "boxes_per_box_area"):
            assert sum(part[key].values()) == len(single)
        assert part["boxes_per_area"]["small"] == sum(ann["area"] < 1024 for ann in single)
        assert part["boxes_per_class"]["ring"] == sum(ann["category_id"] == 5 for ann in single)


@pytest.mark.parametrize(
    ("option", "value"), [("seed", 1), ("num_train", 4), ("num_val", 3), ("image_size", 200)]
)
def test_ensure_refuses_other_options(tmp_path: Path, option: str, value: int) -> None:
    target = tmp_path / "set"
    demo_data.ensure(target, **FEW)
    before = _files(target)
    with pytest.raises(ValueError, match=f"{option} is .*, needed {value}.*delete .*set"):
        demo_data.ensure(target, **(FEW | {option: value}))
    assert _files(target) == before


def test_ensure_refuses_another_generator_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo_data.ensure(tmp_path / "set", **FEW)
    monkeypatch.setattr(demo_data, "GENERATOR_VERSION", demo_data.GENERATOR_VERSION + 1)
    with pytest.raises(ValueError, match="generator_version"):
        demo_data.ensure(tmp_path / "set", **FEW)


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="no dataset of this kind"):
        demo_data.ensure(tmp_path, **FEW)
    with pytest.raises(FileExistsError, match="not empty"):
        demo_data.generate(tmp_path, **FEW)
    assert _files(tmp_path) == {"mine.txt": b"keep"}


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, value: object, indent: int | None) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(demo_data, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_data.generate(tmp_path / "set", **FEW)
    assert list(tmp_path.iterdir()) == []


def test_result_of_a_faster_process_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, other = tmp_path / "set", tmp_path / "other"
    demo_data.generate(other, **FEW)
    marker = other / "made_by_the_other"
    marker.touch()
    replace = os.replace

    def lose_the_race(source: Path, destination: Path) -> None:
        if destination == target and not target.exists():
            other.rename(target)
        replace(source, destination)

    monkeypatch.setattr(os, "replace", lose_the_race)
    summary = demo_data.ensure(target, **FEW)
    assert summary["val"]["images"] == 2
    assert (target / marker.name).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("seed", -1, 0),
        ("num_train", -2, 1),
        ("num_train", True, 1),
        ("num_val", 0, 1),
        ("num_val", 2.5, 1),
        ("image_size", 127, 128),
    ],
)
def test_bad_options(tmp_path: Path, option: str, value: Any, least: int) -> None:
    for function in (demo_data.generate, demo_data.ensure):
        with pytest.raises(ValueError, match=f"{option}: got {value}, needed .* {least}$"):
            function(tmp_path / "set", **{option: value})
    assert list(tmp_path.iterdir()) == []


def test_smallest_image_size(tmp_path: Path) -> None:
    summary = demo_data.generate(
        tmp_path / "set", num_train=30, num_val=1, image_size=demo_data.MIN_IMAGE_SIZE
    )
    assert summary["train"]["boxes"] > 60


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    arguments = ["--seed", "2", "--num-train", "2", "--num-val", "1", "--image-size", "130"]
    assert main(["demo-data", *arguments]) == 0
    info = json.loads((tmp_path / "demo_multiscale" / "info.json").read_text())
    options = {"seed": 2, "num_train": 2, "num_val": 1, "image_size": 130}
    options |= {"distractors": 0, "companions": 0}
    assert info["options"] == options
    output = capsys.readouterr().out
    for word in ("train", "val", "crowd regions", *demo_data.CLASS_NAMES):
        assert word in output
    assert main(["demo-data", "--seed", "3"]) == 2
    assert "seed is 2, needed 3" in capsys.readouterr().err
