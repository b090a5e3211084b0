"""Average recall of proposals: hand-computed, against plain pycocotools, and independently."""

import contextlib
import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.structures import Boxes, Instances
from fpn_ext.data.datasets import register_voc_layout
from fpn_ext.evaluation import recall
from fpn_ext.evaluation.ground_truth import ground_truth_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from voc import CLASSES, write_voc

THRESHOLDS = np.linspace(0.5, 0.95, 10)


def coco_of(images, classes=("thing",)):
    """``images``: {image id: [(x0, y0, x1, y1), or with (..., class number, crowd), ...]}."""
    annotations = []
    for image_id, objects in images.items():
        for x0, y0, x1, y1, *others in objects:
            category, crowd = others or (0, 0)
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category,
                 "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            )  # fmt: skip
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id, "width": 400, "height": 400} for image_id in images],
        "categories": [{"id": n, "name": name} for n, name in enumerate(classes)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def in_order(proposals):
    """Scores that keep the given order of each image's boxes: 0, -1, -2, ..."""
    boxes = {i: np.asarray(b, dtype=float).reshape(-1, 4) for i, b in proposals.items()}
    return boxes, {i: -np.arange(len(b)) for i, b in boxes.items()}


def plain_pycocotools(ground_truth, boxes, scores, limits):
    """All proposals, all limits at once, through loadRes, as its documentation shows."""
    results = [
        {"image_id": i, "category_id": ground_truth.getCatIds()[0], "score": float(score),
         "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for i in boxes
        for (x0, y0, x1, y1), score in zip(boxes[i].tolist(), scores[i], strict=True)
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
    values = evaluation.eval["recall"][:, 0].mean(axis=0)
    return [math.nan if v < 0 else 100 * v for v in values.T.flatten()]  # by limit, then area


def independent(ground_truth, boxes, scores, limits):
    """By COCO's definition: at each threshold, the best box takes the best free object."""
    areas = [(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)]
    values = []
    for limit, (low, high) in itertools.product(limits, areas):
        found, total = np.zeros(10), 0
        for image_id in ground_truth.imgs:
            objects = [
                a for a in sorted(ground_truth.imgToAnns[image_id], key=lambda a: a["category_id"])
                if not a["iscrowd"] and low <= a["area"] <= high
            ]  # fmt: skip
            total += len(objects)
            order = sorted(range(len(boxes[image_id])), key=lambda r: -scores[image_id][r])
            for t, threshold in enumerate(THRESHOLDS):
                free = list(objects)
                for row in order[:limit]:
                    overlaps = [iou(boxes[image_id][row], a["bbox"]) for a in free]
                    if overlaps and max(overlaps) >= threshold:
                        # Of equal overlaps pycocotools takes the last.
                        free.pop(len(free) - 1 - overlaps[::-1].index(max(overlaps)))
                found[t] += len(objects) - len(free)
        values.append(100 * (found / total).mean() if total else math.nan)
    return values


def iou(corners, xywh):
    x0, y0, x1, y1 = corners
    x, y, w, h = xywh
    width, height = min(x1, x + w) - max(x0, x), min(y1, y + h) - max(y0, y)
    if width <= 0 or height <= 0:
        return 0
    return width * height / ((x1 - x0) * (y1 - y0) + w * h - width * height)


def random_case(seed, images=6, objects=5, proposals=40):
    """Objects of all sizes, some crowds; proposals around the objects and anywhere."""
    random = np.random.default_rng(seed)

    def anywhere(count):
        low = random.uniform(0, 250, (count, 2))
        return np.concatenate([low, low + 10 ** random.uniform(0.7, 2.2, (count, 2))], axis=1)

    truth, boxes = {}, {}
    for image_id in range(1, images + 1):
        shapes = anywhere(objects)
        truth[image_id] = [
            (*map(float, s), int(random.integers(2)), int(random.random() < 0.15)) for s in shapes
        ]
        near = shapes[random.integers(objects, size=proposals)]
        sides = np.tile(near[:, 2:] - near[:, :2], 2)
        near = near + random.normal(0, 0.12, near.shape) * sides
        together = np.concatenate([near, anywhere(proposals)])
        together[:, 2:] = np.maximum(together[:, 2:], together[:, :2] + 1)
        boxes[image_id] = together
    scores = {i: random.permutation(len(b)).astype(float) for i, b in boxes.items()}
    return coco_of(truth, classes=("a", "b")), boxes, scores


# By hand

HAND = coco_of({7: [(0, 0, 10, 10), (20, 20, 70, 70), (0, 80, 100, 100, 0, 1)]})
HAND_PROPOSALS = in_order(
    {
        7: [
            (10, 85, 30, 95),  # inside the crowd: counts towards the limit, finds nothing
            (20, 20, 70, 56),  # IoU 0.72 with the second object: found at 5 thresholds
            (0, 0, 10, 8.2),  # IoU 0.82 with the first: found at 7
            (20, 20, 70, 70),  # the second itself: found at the other 5, too
        ]
    }
)


def test_by_hand():
    """Two objects at ten thresholds make 20 matches; the third, a crowd, does not count."""
    found = recall.average_recall(HAND, *HAND_PROPOSALS, limits=(1, 2, 3, 4))
    assert found == pytest.approx(
        {
            "AR@1": 0,
            "AR@2": 100 * 5 / 20,
            "AR@3": 100 * 12 / 20,
            "AR@4": 100 * 17 / 20,
            "ARs@1": 0,  # 10 x 10
            "ARs@2": 0,
            "ARs@3": 70,
            "ARs@4": 70,
            "ARm@1": 0,  # 50 x 50
            "ARm@2": 50,
            "ARm@3": 50,
            "ARm@4": 100,
            **{f"ARl@{limit}": math.nan for limit in (1, 2, 3, 4)},  # there is none
        },
        nan_ok=True,
    )


def test_a_proposal_takes_its_best_object_whatever_comes_after():
    """0.833 and 0.857; 0.769 and 0.929: the second cannot get the object matched by the first."""
    truth = coco_of({1: [(0, 0, 10, 10), (0, 0, 10, 14)]})
    boxes, scores = in_order({1: [(0, 0, 10, 12), (0, 0, 10, 13)]})
    # Both up to 0.75, one each at 0.80, 0.85 (the first takes the second object) and 0.90.
    assert recall.average_recall(truth, boxes, scores)["AR@10"] == pytest.approx(100 * 15 / 20)
    # Detectron2's routine: both up to 0.80, one at 0.85 and 0.90 (docs/evidence/average_recall.md).
    proposals = Instances((20, 20))
    proposals.proposal_boxes = Boxes(torch.from_numpy(boxes[1]))
    proposals.objectness_logits = torch.from_numpy(scores[1])
    theirs = _evaluate_box_proposals([{"image_id": 1, "proposals": proposals}], truth)
    assert 100 * theirs["ar"].item() == pytest.approx(100 * 16 / 20)


def test_half_an_object_is_found_at_the_first_threshold():
    truth = coco_of({1: [(0, 0, 10, 10)]})
    assert recall.average_recall(truth, *in_order({1: [(0, 0, 10, 5)]}))["AR@10"] == 10


def test_of_equal_scores_the_first_come_first():
    truth = coco_of({1: [(0, 0, 10, 10)]})
    boxes = {1: np.array([[50.0, 50, 60, 60], [0, 0, 10, 10], [70, 70, 80, 80]])}
    for limit, expected in ((1, 0), (2, 100)):
        found = recall.average_recall(truth, boxes, {1: np.ones(3)}, limits=(limit,))
        assert found[f"AR@{limit}"] == pytest.approx(expected)


def test_the_class_of_an_object_does_not_matter_but_in_ar_by_class():
    truth = coco_of({1: [(0, 0, 20, 20, 0, 0), (50, 50, 90, 90, 1, 0)]}, classes=("cat", "dog"))
    proposals = in_order({1: [(0, 0, 20, 20), (50, 50, 90, 80)]})
    assert recall.average_recall(truth, *proposals)["AR@10"] == pytest.approx(100 * 16 / 20)
    assert recall.average_recall_by_class(truth, *proposals, limit=2) == pytest.approx(
        {"AR@2-cat": 100, "AR@2-dog": 60}
    )
    # The other class's proposal fills the limit.
    assert recall.average_recall_by_class(truth, *proposals, limit=1)["AR@1-dog"] == 0


def test_a_class_without_objects_has_no_recall():
    truth = coco_of({1: [(0, 0, 20, 20)]}, classes=("cat", "dog"))
    by_class = recall.average_recall_by_class(truth, *in_order({1: [(0, 0, 20, 20)]}))
    assert by_class == pytest.approx({"AR@1000-cat": 100, "AR@1000-dog": math.nan}, nan_ok=True)


# Against others


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [(4, 10, 60), (10, 100, 1000)])
def test_equal_to_pycocotools_and_to_the_definition(seed, limits):
    case = random_case(seed)
    values = list(recall.average_recall(*case, limits=limits).values())
    assert 0 < values[0] < values[8] < 100  # of all objects, at the lowest and highest limit
    assert values == pytest.approx(plain_pycocotools(*case, limits), nan_ok=True, abs=1e-9)
    assert values == pytest.approx(independent(*case, limits), nan_ok=True, abs=1e-9)


# Corners on a coarse grid: many overlaps are equal, or exactly a threshold.
corners = st.tuples(*[st.integers(0, 1)] * 2, *[st.integers(2, 4)] * 2).map(
    lambda b: (30.0 * b[0], 30.0 * b[1], 30.0 * (b[0] + b[2]), 30.0 * (b[1] + b[3]))
)
objects = st.tuples(corners, st.integers(0, 1), st.integers(0, 1)).map(lambda o: (*o[0], *o[1:]))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.lists(objects, max_size=4), st.lists(corners, max_size=6)),
                min_size=1, max_size=3), st.randoms())  # fmt: skip
def test_equal_to_the_definition_on_a_grid(images, random):
    truth = coco_of({i: o for i, (o, _) in enumerate(images)}, classes=("a", "b"))
    boxes, scores = in_order({i: p for i, (_, p) in enumerate(images)})
    scores = {i: np.array([random.choice([0.1, 0.5, 0.9]) for _ in s]) for i, s in scores.items()}
    limits = (1, 2, 4)
    values = list(recall.average_recall(truth, boxes, scores, limits).values())
    assert values == pytest.approx(independent(truth, boxes, scores, limits), nan_ok=True)


def test_the_order_of_images_and_of_limits_does_not_matter():
    truth, boxes, scores = random_case(5)
    expected = recall.average_recall(truth, boxes, scores)
    backwards = {i: boxes[i] for i in reversed(boxes)}
    assert recall.average_recall(truth, backwards, scores, (1000, 10, 100)) == expected


# Nothing there


def test_no_proposals():
    for proposals in ({}, {7: []}):
        found = recall.average_recall(HAND, *in_order(proposals))
        assert found["AR@10"] == found["AR@1000"] == found["ARs@1000"] == found["ARm@1000"] == 0
        assert math.isnan(found["ARl@1000"])


def test_the_objects_of_an_image_without_proposals_are_missed():
    truth = coco_of({1: [(0, 0, 20, 20)], 2: [(0, 0, 20, 20)]})
    for proposals in ({1: [(0, 0, 20, 20)]}, {1: [(0, 0, 20, 20)], 2: []}):
        assert recall.average_recall(truth, *in_order(proposals))["AR@10"] == pytest.approx(50)


@pytest.mark.parametrize("objects", [[], [(0, 0, 50, 50, 0, 1)]], ids=["none", "crowd"])
def test_no_objects(objects):
    found = recall.average_recall(coco_of({7: objects}), *in_order({7: [(0, 0, 50, 50)]}))
    assert all(math.isnan(value) for value in found.values()), found


# What pycocotools would stumble over


@pytest.mark.parametrize("ids", [(0, 1), (5, 5)], ids=["zero", "twice the same"])
def test_ids_of_annotations_do_not_matter(ids):
    truth = coco_of({1: [(0, 0, 20, 20)], 2: [(0, 0, 20, 20)]})
    for annotation, new in zip(truth.dataset["annotations"], ids, strict=True):
        annotation["id"] = new
    proposals = in_order({1: [(0, 0, 20, 20)], 2: [(0, 0, 20, 20)]})
    assert recall.average_recall(truth, *proposals)["AR@10"] == pytest.approx(100)


def test_the_ground_truth_stays_as_it_was():
    truth, *proposals = random_case(0)
    before = json.dumps(truth.dataset)
    recall.average_recall(truth, *proposals)
    recall.average_recall_by_class(truth, *proposals)
    assert json.dumps(truth.dataset) == before


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        ({7: [[0, 0, 1, 1]]}, {}, r"not of the same images: 7"),
        ({i: [[0, 0, 1, 1]] for i in range(9)}, {i: [1] for i in range(9)},
         r"no image of the ground truth has the id 0, 1, 2, 3, 4, \.\.\."),
        ({7: [[0, 0, 1, 1]]}, {7: [1, 2]}, r"image 7 needs \(R, 4\) .* got \(1, 4\) and \(2,\)"),
        ({7: [[0, 0, 1, 1, 0]]}, {7: [1]}, r"got \(1, 5\)"),
        ({7: [[0, 0, 1, math.inf]]}, {7: [1]}, r"image 7 has boxes or scores that are NaN"),
        ({7: [[0, 0, 1, 1]]}, {7: [math.nan]}, r"image 7 has boxes or scores that are NaN"),
    ],
)  # fmt: skip
def test_proposals_that_cannot_be_scored(boxes, scores, message):
    with pytest.raises(ValueError, match=message):
        recall.average_recall(HAND, boxes, scores)


def test_other_mistakes():
    for limits in ((), (0, 10)):
        with pytest.raises(ValueError, match=r"limits .* at least 1"):
            recall.average_recall(HAND, *HAND_PROPOSALS, limits=limits)
    truth = coco_of({7: [(0, 0, 1, 1)]})
    del truth.dataset["annotations"][0]["area"]
    with pytest.raises(ValueError, match=r"1 annotation\(s\) without 'area'.* id 1"):
        recall.average_recall(truth, *HAND_PROPOSALS)


# The ground truth of a dataset


def test_ground_truth_of_a_voc_layout(tmp_path, request):
    write_voc(tmp_path, {"a": [("dog", 1, 1, 10, 20), ("cat", 5, 5, 5, 9)], "b": []})
    register_voc_layout(request.node.name, tmp_path, "train", CLASSES)
    truth = ground_truth_of(request.node.name)
    assert set(truth.imgs) == {"a", "b"}
    assert [c["name"] for c in truth.dataset["categories"]] == CLASSES
    (dog,) = truth.dataset["annotations"]  # a box without width is left out, as in training
    assert (dog["bbox"], dog["area"], dog["iscrowd"]) == ([0, 0, 10, 20], 200, 0)
    found = recall.average_recall(truth, *in_order({"a": [(0, 0, 10, 20)], "b": []}))
    assert found["AR@10"] == pytest.approx(100)


def test_ground_truth_of_records_keeps_crowds(request):
    from detectron2.data import DatasetCatalog
    from detectron2.structures import BoxMode

    def records():
        objects = [
            {"bbox": [5, 5, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 1},
            {"bbox": [5, 5, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},
        ]
        image = {"file_name": "x.jpg", "image_id": 3, "height": 20, "width": 20}
        return [{**image, "annotations": objects}]

    DatasetCatalog.register(request.node.name, records)
    MetadataCatalog.get(request.node.name).thing_classes = ["thing"]
    crowd, thing = ground_truth_of(request.node.name).dataset["annotations"]
    assert (crowd["bbox"], crowd["iscrowd"]) == ([5, 5, 4, 4], 1)
    assert (thing["bbox"], thing["iscrowd"]) == ([5, 5, 9, 9], 0)


def test_ground_truth_of_a_json_file(tmp_path, request):
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(HAND.dataset))
    MetadataCatalog.get(request.node.name).json_file = str(file)
    assert ground_truth_of(request.node.name).dataset == HAND.dataset


def test_ground_truth_of_nothing():
    with pytest.raises(ValueError, match=r"'demo_multiscale_vel' is not .*'demo_multiscale_val'"):
        ground_truth_of("demo_multiscale_vel")
