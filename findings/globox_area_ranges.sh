#!/bin/sh
# globox 2.9.0: COCOEvaluator counts a found object of another size as a false positive.
#
# Input: one image of one class with two objects, 97 x 97, large to COCO, and far from it 50 x 50,
# medium. Both are found, the large one by a box of 97 x 94, which is medium: an overlap of 0.97.
# COCOEvaluator, and pycocotools 2.0.11 on the same boxes.
# Seen: ap_medium is 0.5, pycocotools' is 1.0. In the range "medium" the large object is to be
# ignored, and with it the box that finds it. globox takes the medium object for the one that this
# box overlaps most, by nothing, does not look at the large one, and counts a false positive.
# ap() is 1.0, and so is ap_medium() with a box of 97 x 97 for the large object: only boxes on the
# other side of a border between two ranges are counted so. Nothing is said; the documentation calls
# this COCO evaluation.
# Expected: 1.0.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Python 3.10 to 3.13 with pip or uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
packages="globox==2.9.0 pycocotools==2.0.11 numpy==2.2.6"
if command -v uv >/dev/null; then
    uv venv -q --python "$python" "$work/venv"
    # shellcheck disable=SC2086
    uv pip install -q --python "$work/venv/bin/python" $packages
else
    "$python" -m venv "$work/venv"
    # shellcheck disable=SC2086
    "$work/venv/bin/python" -m pip install -q $packages
fi
cd "$work"
"$work/venv/bin/python" - <<'END'
import contextlib
import io

from globox import Annotation, AnnotationSet, BoundingBox, COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

large, medium = (100, 100, 197, 197), (300, 300, 350, 350)
smaller = (100, 100, 197, 194)  # 9118 square pixels, under 96 x 96


def of_globox(objects, found):
    def one_image(boxes, **confidence):
        return AnnotationSet([Annotation("image", (500, 500), [
            BoundingBox(label="screw", xmin=box[0], ymin=box[1], xmax=box[2], ymax=box[3],
                        **({"confidence": confidence["scores"][number]} if confidence else {}))
            for number, box in enumerate(boxes)
        ])])

    evaluator = COCOEvaluator(
        ground_truths=one_image(objects), predictions=one_image(found, scores=[0.9, 0.8])
    )
    return float(evaluator.ap()), float(evaluator.ap_medium())


def of_pycocotools(objects, found):
    def as_coco(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "width": 500, "height": 500}],
        "categories": [{"id": 1, "name": "screw"}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": 1, "bbox": as_coco(box), "iscrowd": 0,
             "area": as_coco(box)[2] * as_coco(box)[3]}
            for number, box in enumerate(objects, 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results = truth.loadRes([
            {"image_id": 1, "category_id": 1, "bbox": as_coco(box), "score": score}
            for box, score in zip(found, [0.9, 0.8])
        ])
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[4])


scores = {}
for name, found in (("97 x 94", (smaller, medium)), ("97 x 97", (large, medium))):
    for evaluate in (of_globox, of_pycocotools):
        scores[name, evaluate] = [round(score, 3) for score in evaluate((large, medium), found)]
        print(f"{name}, {evaluate.__name__}: AP, AP medium: {scores[name, evaluate]}")
wrong = scores.pop(("97 x 94", of_globox))
if wrong != [1.0, 0.5] or any(right != [1.0, 1.0] for right in scores.values()):
    raise SystemExit("globox 2.9.0 no longer behaves as described above")
END
echo "as described: what finds a large object is a false positive of the medium ones"
