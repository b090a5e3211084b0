#!/bin/sh
# hotcoco 1.3.0: of two equal area ranges the first is left empty, and with it its AP.
#
# Input: one image with one object of 20 x 20, found by a box of its own. params.areaRng has
# COCO's four ranges and a fifth for objects of up to 32 x 32 under a name of its own, the bounds of
# "small". COCOeval, and pycocotools 2.0.11 on the same boxes.
# Seen: precision and recall of "small" are -1 throughout, as where there is no object, so that AP
# small is "none"; those of the fifth range are 1.0. A fifth range with the bounds of "all" takes
# them from "all" in the same way: AP itself is gone. pycocotools fills both. Nothing is said.
# Expected: 1.0 for both.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Python 3.10 to 3.13 with pip or uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
packages="hotcoco==1.3.0 pycocotools==2.0.11 numpy==2.2.6"
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
import json

import hotcoco
import numpy as np
from pycocotools import coco, cocoeval

BOX = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]}
RANGES = {"all": [0, 1e10], "small": [0, 32**2], "medium": [32**2, 96**2], "large": [96**2, 1e10]}
with open("objects.json", "w") as file:
    json.dump({
        "images": [{"id": 1, "width": 200, "height": 200}],
        "categories": [{"id": 1, "name": "screw"}],
        "annotations": [{**BOX, "id": 1, "area": 400, "iscrowd": 0}],
    }, file)
with open("found.json", "w") as file:
    json.dump([{**BOX, "score": 0.9}], file)


def best_precision(library, evaluations, ranges):
    """The highest precision of each range, -1 where there is none."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = library.COCO("objects.json")
        evaluation = evaluations.COCOeval(truth, truth.loadRes("found.json"), "bbox")
        evaluation.params.areaRng = list(ranges.values())
        evaluation.params.areaRngLbl = list(ranges)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.array(evaluation.eval["precision"])  # threshold, recall, class, range, limit
    return {name: float(precision[..., n, -1].max().round(3)) for n, name in enumerate(ranges)}


seen = {}
for like in ("small", "all"):
    ranges = {**RANGES, "own": RANGES[like]}
    seen[like] = best_precision(hotcoco, hotcoco, ranges)
    print(f"hotcoco, a fifth range like {like!r}: {seen[like]}")
    right = best_precision(coco, cocoeval, ranges)
    print(f"pycocotools, the same: {right}")
    if right[like] != 1 or right["own"] != 1:
        raise SystemExit("pycocotools 2.0.11 no longer behaves as described above")
    if seen[like][like] != -1 or seen[like]["own"] != 1:
        raise SystemExit("hotcoco 1.3.0 no longer behaves as described above")
END
echo "as described: of two equal ranges the first is empty"
