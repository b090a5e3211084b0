#!/bin/sh
# AlbumentationsX 2.5.1: RandomResizedCrop stretches an oriented box along its own sides.
#
# Input: an image of 200 x 200 px with a bar in it, and the bar's oriented box, 100 x 20 px at 30
# degrees (bbox_type "obb"); Resize to 200 x 50, and RandomResizedCrop and RandomSizedCrop of the
# whole image to 200 x 50, so that all three give the same pixels.
# Seen: the three images are equal to the last bit, and the bar in them lies at 8 degrees. Resize
# gives a box at 8 degrees, which has an IoU of 0.81 with the bar. The crops leave the angle at 30
# degrees, and scale the width as x and the height as y, though these sides lie along neither: an
# IoU of 0.10. Both list "obb" under "Supported bboxes", and nothing is said. Only where the crop
# has the shape of the output is nothing stretched; by default each crop's shape is drawn.
# Expected: the box of Resize.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Python 3.11 to 3.14 with pip or uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
packages="albumentationsx==2.5.1 torch==2.15.0 opencv-python-headless==5.0.0.93 numpy==2.4.6"
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
NO_ALBUMENTATIONS_UPDATE=1 "$work/venv/bin/python" - <<'END'
import albumentations as A
import cv2
import numpy as np

box = (100.0, 100.0, 100.0, 20.0, 30.0)  # centre, width, height in pixels, degrees


def filled(box, height, width):
    """(height, width) uint8: 255 inside the oriented box."""
    corners = cv2.boxPoints((box[:2], box[2:4], box[4]))
    return cv2.fillPoly(np.zeros((height, width), np.uint8), [np.rint(corners).astype(int)], 255)


bar = filled(box, 200, 200)
half = (50, 200)  # height, width
transforms = (
    A.Resize(*half, p=1),
    A.RandomResizedCrop(half, scale=(1, 1), ratio=(1, 1), p=1),
    A.RandomSizedCrop((200, 200), half, w2h_ratio=1, p=1),
)
images, angles, covered = [], [], []
for transform in transforms:
    boxes = A.BboxParams(coord_format="cxcywh", bbox_type="obb", label_fields=["names"],
                         clip_after_transform=False)
    result = A.Compose([transform], bbox_params=boxes, seed=0)(
        image=bar, bboxes=np.array([box], np.float32), names=["bar"]
    )
    found = [float(number) for number in result["bboxes"][0]]
    inside, on_bar = filled(found, *half) > 127, result["image"] > 127
    images.append(result["image"])
    angles.append(round(found[4]))
    covered.append((inside & on_bar).sum() / (inside | on_bar).sum())
    print(f"{type(transform).__name__}: box {[round(number, 1) for number in found]}, "
          f"IoU with the bar {covered[-1]:.2f}")
same = all(np.array_equal(image, images[0]) for image in images)
print(f"the same pixels: {same}, angles: {angles}")
if not same or angles != [8, 30, 30] or covered[0] < 0.75 or max(covered[1:]) > 0.15:
    raise SystemExit("AlbumentationsX 2.5.1 no longer behaves as described above")
END
echo "as described: after a resized crop the box has the angle of before"
