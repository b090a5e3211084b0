#!/bin/sh
# sahi 0.12.8: Coco.export_as_yolo writes COCO's category ids as YOLO's class numbers.
#
# Input: a valid COCO file whose category ids are 1, 2 and 3, as COCO's own count from 1, read with
# Coco.from_coco_dict_or_path and written with export_as_yolo, as sahi's documentation shows.
# Seen: labels of class 1 and 2 for the first and the second category, 3 for the third, beside a
# data.yml with nc: 3 and three names, whose numbers are 0, 1 and 2. Every box has the name of the
# next class; class 3 has no name; nothing is said. Expected: class numbers 0, 1 and 2.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Python 3.10 to 3.12 with pip or uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
if command -v uv >/dev/null; then
    uv venv -q --python "$python" "$work/venv"
    uv pip install -q --python "$work/venv/bin/python" sahi==0.12.8
else
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install -q sahi==0.12.8
fi
cd "$work"
"$work/venv/bin/python" - <<'END'
import json
from pathlib import Path

import yaml
from PIL import Image
from sahi.utils.coco import Coco

names = ["screw", "nut", "washer"]
Path("images").mkdir()
Image.new("RGB", (100, 100)).save("images/a.jpg")
content = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 100}],
    "annotations": [
        {"id": n, "image_id": 1, "category_id": n, "bbox": [10 * n, 10, 20, 20], "area": 400,
         "iscrowd": 0}
        for n in (1, 2, 3)
    ],
    "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)],
}
Path("coco.json").write_text(json.dumps(content))
coco = Coco.from_coco_dict_or_path("coco.json", image_dir="images")
coco.export_as_yolo("yolo", disable_symlink=True)
about = yaml.safe_load(Path("yolo/data.yml").read_text())
classes = [int(line.split()[0]) for line in Path("yolo/train/a.txt").read_text().splitlines()]
print("names in data.yml:", about["names"], "nc:", about["nc"])
print("class numbers of the labels of screw, nut, washer:", classes)
if classes != [1, 2, 3] or about["names"] != names or about["nc"] != 3:
    raise SystemExit("sahi 0.12.8 no longer behaves as described above")
END
echo "as described: COCO's ids 1, 2, 3 stand for YOLO's classes 0, 1, 2"
