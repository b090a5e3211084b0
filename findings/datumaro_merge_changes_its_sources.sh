#!/bin/sh
# datumaro 1.13.12: merging two datasets changes the classes in the second of them.
#
# Input: two datasets of one image with one box each, with the classes screw, nut and nut, screw, in
# this order; the box of the first is a screw, that of the second a nut. HLOps.merge with the policy
# "union", or "intersect", which merge classes by their names, as the documentation says.
# Seen: the result is right. The second dataset, which was only read, now has a screw where it had a
# nut: the number of the class in the result was written into its box, and its own list of classes
# left as it was. What is exported from it afterwards has the wrong class, and merging the same two
# again gives a second result, in which the nut is a screw. Nothing is said.
# Expected: both datasets as before, and the same result again.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Python 3.10 to 3.13 with pip or uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
if command -v uv >/dev/null; then
    uv venv -q --python "$python" "$work/venv"
    uv pip install -q --python "$work/venv/bin/python" datumaro==1.13.12
else
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install -q datumaro==1.13.12
fi
cd "$work"
"$work/venv/bin/python" -W ignore - <<'END'
import json
from pathlib import Path

import numpy as np
from datumaro.components.annotation import AnnotationType, Bbox
from datumaro.components.dataset import Dataset
from datumaro.components.dataset_base import DatasetItem
from datumaro.components.hl_ops import HLOps
from datumaro.components.media import Image


def dataset(name, classes, of_box):
    """One image, ``name``, with one box of the class ``of_box``."""
    image = Image.from_numpy(data=np.zeros((50, 50, 3), np.uint8))
    box = Bbox(10, 10, 20, 20, label=classes.index(of_box))
    return Dataset.from_iterable(
        [DatasetItem(name, media=image, annotations=[box])], categories=classes
    )


def classes_of(dataset):
    """The class of the box of each image."""
    labels = dataset.categories()[AnnotationType.label]
    return {item.id: labels[item.annotations[0].label].name for item in dataset}


def exported(dataset, folder):
    """The class of the only box in the COCO file of ``dataset``."""
    dataset.export(folder, "coco_instances")
    content = json.loads(Path(folder, "annotations", "instances_default.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    return names[content["annotations"][0]["category_id"]]


described = True
for policy in ("union", "intersect"):
    first = dataset("a", ["screw", "nut"], "screw")
    second = dataset("b", ["nut", "screw"], "nut")
    before = classes_of(second)
    merged = classes_of(HLOps.merge(first, second, merge_policy=policy))
    after, in_coco = classes_of(second), exported(second, policy)
    again = classes_of(HLOps.merge(first, second, merge_policy=policy))
    print(f"{policy}: second before {before}, merged {merged}, second after {after}, exported "
          f"{in_coco}, merged again {again}")
    described = described and before == {"b": "nut"} and merged == {"a": "screw", "b": "nut"}
    described = described and after == {"b": "screw"} and in_coco == "screw"
    described = described and again == {"a": "screw", "b": "screw"}
if not described:
    raise SystemExit("datumaro 1.13.12 no longer behaves as described above")
END
echo "as described: the box of the second dataset has another class once it was merged"
