"""Masks and keypoints, before a training reads them and before pycocotools scores them."""

import numpy as np
import pytest
from coco_files import CLASSES, OBJECTS, SIZE, Datasets, coco, config, found, records
from detectron2.data import MetadataCatalog
from fpn_ext.data.mask_area import mask_area, runs_of
from fpn_ext.evaluation.evaluators import build_evaluator
from fpn_ext.evaluation.rehearsal import check_evaluation, rehearse
from fpn_ext.proposals.loader import training_data
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask

WIDTH, HEIGHT = SIZE
MASKS = "MODEL.MASK_ON", True


@pytest.fixture
def data(tmp_path):
    datasets = Datasets(tmp_path)
    yield datasets
    datasets.forget()


def pixels(box):
    x, y, w, h = box
    picture = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    picture[y : y + h, x : x + w] = 1
    return picture


def compressed(box):
    encoded = mask.encode(np.asfortranarray(pixels(box)))
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


def uncompressed(box):
    column = pixels(box).T.ravel()
    edges = np.flatnonzero(np.diff(column)) + 1
    runs = np.diff([0, *edges, len(column)]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": [0, *runs] if column[0] else runs}


def polygon(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def masked(form, **spoilt):
    """The COCO file with a mask for each object; that of the first as given."""
    content = coco()
    for annotation in content["annotations"]:
        annotation["segmentation"] = form(annotation["bbox"])
    content["annotations"][0].update(spoilt)
    return content


# Run lengths


@given(
    arrays.arrays(
        np.uint8,
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        elements=st.sampled_from([0, 0, 0, 1]),
    )
)
def test_run_lengths_are_those_of_pycocotools(picture):
    encoded = mask.encode(np.asfortranarray(picture))
    assert mask_area(
        {"size": list(picture.shape), "counts": encoded["counts"]}, *picture.shape
    ) == (picture.sum())
    runs = runs_of(encoded["counts"].decode())
    values = np.repeat(np.arange(len(runs)) % 2, runs)
    assert (values == picture.T.ravel()).all()


@given(st.text(max_size=30) | st.binary(max_size=30) | st.lists(st.integers(-3, 2**33), max_size=5))
def test_anything_else_is_refused_and_ends(counts):
    try:
        runs = runs_of(counts)
    except ValueError:
        return
    assert len(runs) and runs.min() >= 0


@pytest.mark.parametrize(
    "counts", ["", "P", "0o", "\x7f", [], [-1], [1.5], [True], None, "oooooooo1"]
)
def test_no_run_lengths(counts):
    with pytest.raises(ValueError):
        runs_of(counts)


# Masks


@pytest.mark.parametrize("form", [polygon, compressed, uncompressed])
def test_masks_are_scored(form, data, tmp_path):
    name = data.write("val", masked(form))
    options = *MASKS, "INPUT.MASK_FORMAT", "bitmask"
    (rehearsed,) = rehearse(config(tmp_path, [], [name], *options))
    assert rehearsed.summary == "its 4 objects of 2 images score bbox/AP 100.0, segm/AP 100.0"
    assert len(training_data(config(tmp_path, [name], [], *options))["records"]) == 2


BAD_MASKS = {
    "none": ({"segmentation": []}, "needs a 'segmentation' for every object"),
    "of another size": (
        {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}},
        r"'size' \[160, 120\] is not the image's \[120, 160\]",
    ),
    "of too few pixels": (
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 5]}}, r"runs are of 10 pixels"
    ),
    "text that is none": (
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "run lengths"}},
        "not a string of COCO's run lengths|a run is negative|the runs are of|more than 32 bits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_masks_that_are_none_of_their_picture(kind, data, tmp_path):
    """Refused before pycocotools sees them: its evaluation does not end on some."""
    spoilt, message = BAD_MASKS[kind]
    if kind != "none":
        with pytest.raises(ValueError, match=message):  # first: if not refused, the rest hangs
            mask_area(spoilt["segmentation"], HEIGHT, WIDTH)
    name = data.write("bad_masks", masked(compressed, **spoilt))
    options = *MASKS, "INPUT.MASK_FORMAT", "bitmask"
    with pytest.raises(ValueError, match=message):
        check_evaluation(config(tmp_path, [], [name], *options))
    with pytest.raises(ValueError, match=message):
        training_data(config(tmp_path, [name], [], *options))
    assert not check_evaluation(config(tmp_path, test=[name]))  # boxes alone


def test_run_lengths_where_polygons_are_read(data, tmp_path):
    name = data.write("train", masked(compressed))
    with pytest.raises(ValueError, match=r"\(the first of 4\): .* INPUT\.MASK_FORMAT bitmask"):
        training_data(config(tmp_path, [name], [], *MASKS))
    check_evaluation(config(tmp_path, [], [name], *MASKS))  # only a training reads that key


def test_records_with_masks(data, tmp_path):
    def with_masks(form):
        given_records = records()
        for record in given_records:
            for annotation in record["annotations"]:
                annotation["segmentation"] = form(annotation["bbox"])
        return given_records

    name = data.give("function", lambda: with_masks(compressed), thing_classes=CLASSES)
    (rehearsed,) = rehearse(config(tmp_path, [], [name], *MASKS))
    assert "segm/AP 100.0" in rehearsed.summary
    bad = {"size": [HEIGHT, WIDTH], "counts": "no"}
    data.give("bad", lambda: with_masks(lambda box: bad), thing_classes=CLASSES)
    with pytest.raises(ValueError, match="a run-length mask must be one of its picture"):
        check_evaluation(config(tmp_path, [], ["bad"], *MASKS))


SMALL_MASKS = {
    "a triangle": [[30, 30, 70, 30, 70, 70]],
    "run lengths": compressed([30, 30, 40, 20]),
    "uncompressed": uncompressed([30, 30, 40, 20]),
}


@pytest.mark.parametrize("form", SMALL_MASKS)
def test_the_area_of_an_object_without_one_is_that_of_its_mask(form, data, tmp_path):
    """800 pixels, under 32 x 32, of a box of 40 x 40 = 1600: a small object."""
    content = masked(polygon)
    for annotation in content["annotations"]:
        del annotation["area"]
    content["annotations"][1].update(bbox=[30, 30, 40, 40], segmentation=SMALL_MASKS[form])
    name = data.write("val", content)
    evaluator = build_evaluator(config(tmp_path, [], [name], *MASKS), name, None)
    assert evaluator.notes == [
        "ground truth of 'val': 4 object(s) without 'area', or with one of 0: that of mask or box"
    ]
    evaluator.reset()
    for image in (1, 2):
        boxes = [(c, [30, 30, 40, 40] if c == 1 else b) for i, c, b in OBJECTS if i == image]
        evaluator.process([{"image_id": image}], [found(boxes)])
    scores = evaluator.evaluate()["bbox"]
    assert np.isnan(scores["APm"])
    assert scores["APs"] == pytest.approx(100)


# Keypoints

POINTS = ["nose", "left eye", "right eye"]
KEYPOINTS = (
    *("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3),
    *("TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1, 0.1], "MODEL.ROI_HEADS.NUM_CLASSES", 3),
)


def pointed(change=lambda annotation: None):
    content = coco()
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        middle = x + w // 2, y + h // 2
        annotation["keypoints"] = [x, y, 2, *middle, 2, x + w - 1, y, 1]
        annotation["num_keypoints"] = 3
    change(content["annotations"][0])
    return content


def named(name, names=POINTS, flips=(("left eye", "right eye"),)):
    MetadataCatalog.get(name).set(keypoint_names=names, keypoint_flip_map=flips)
    return name


def test_keypoints_are_scored(data, tmp_path):
    name = named(data.write("val", pointed()))
    (rehearsed,) = rehearse(config(tmp_path, [], [name], *KEYPOINTS))
    assert rehearsed.summary == "its 4 objects of 2 images score bbox/AP 100.0, keypoints/AP 100.0"
    assert not rehearsed.notes
    assert len(training_data(config(tmp_path, [name], [], *KEYPOINTS))["records"]) == 2


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda a: a.pop("num_keypoints"), "1 object(s) without 'num_keypoints': counted"),
        (lambda a: a.pop("keypoints"), "1 object(s) without 'keypoints': scored by the box alone"),
        (lambda a: a.update(keypoints=[0] * 9, num_keypoints=0), None),
        (lambda a: a.update(keypoints=[0] * 9, num_keypoints=0, bbox=[120, 90, 10, 10]), None),
    ],
)
def test_keypoints_are_scored_in_spite_of(change, note, data, tmp_path):
    name = named(data.write("val", pointed(change)))
    (rehearsed,) = rehearse(config(tmp_path, [], [name], *KEYPOINTS))
    assert "bbox/AP 100.0, keypoints/AP 100.0" in rehearsed.summary
    assert [note in said for said in rehearsed.notes] == ([True] if note else [])


@pytest.mark.parametrize(
    ("names", "flips", "change", "message"),
    [
        (POINTS, (), lambda a: a.update(keypoints=[1, 1, 2]), "needs 'keypoints' of 9 numbers"),
        (POINTS, (), lambda a: a.pop("keypoints"), "write zeros for one without"),
        (POINTS[:2], (), None, r"2 names: .*names of the 3 keypoints"),
        (POINTS, (("left eye", "right ear"),), None, "flip map: right ear"),
    ],
)
def test_keypoints_that_a_training_cannot_read(names, flips, change, message, data, tmp_path):
    name = named(data.write("train", pointed(change or (lambda a: None))), names, flips)
    with pytest.raises(ValueError, match=message):
        training_data(config(tmp_path, [name], [], *KEYPOINTS))


def test_keypoints_without_names(data, tmp_path):
    name = data.write("train", pointed())
    with pytest.raises(ValueError, match=r"(?s)keypoint_names.*keypoint_flip_map"):
        training_data(config(tmp_path, [name], [], *KEYPOINTS))


def test_keypoints_of_another_number_are_not_scored(data, tmp_path):
    name = named(data.write("val", pointed(lambda a: a.update(keypoints=[1, 1, 2]))))
    with pytest.raises(ValueError, match=r"'keypoints' must be 9 numbers.*NUM_KEYPOINTS 3"):
        check_evaluation(config(tmp_path, [], [name], *KEYPOINTS))


def test_a_function_that_gives_its_list_again(data, tmp_path):
    """Detectron2's conversion moves the keypoints of what it is given by half a pixel."""
    given_records = records()
    for record in given_records:
        for annotation in record["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["keypoints"] = [x + 0.5, y + 0.5, 2, x + w / 2, y + h / 2, 2, x + w, y, 1]
    before = str(given_records)
    name = named(data.give("function", lambda: given_records, thing_classes=CLASSES))
    for _ in range(2):
        (rehearsed,) = rehearse(config(tmp_path, [], [name], *KEYPOINTS))
        assert "keypoints/AP 100.0" in rehearsed.summary
    assert str(given_records) == before
