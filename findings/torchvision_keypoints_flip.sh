#!/bin/sh
# torchvision 0.29.2: flips of KeyPoints are one pixel off every other transform of KeyPoints.
#
# Input: the corners of a box (20, 10, 50, 40) as tv_tensors.KeyPoints, whose documentation names
# polygons among what they are for, beside the box as tv_tensors.BoundingBoxes and its pixels as an
# Image, 100 x 60; functions of torchvision.transforms.v2.
# Seen: after rotate by 180 degrees the corners of the polygon are those of the box. After
# horizontal_flip the box is (50, 10, 80, 40), where the pixels are, and the polygon (49, 10, 79,
# 40): x of a point becomes width - 1 - x, of a box width - x. So both flips together are not
# rotate by 180 degrees, though the images are equal; flip and then resize to ten times the size is
# 9 pixels from resize and then flip; and a corner on the right border leaves the image, to x = -1.
# Nothing is said. The documentation does not tell whether a point counts pixels or measures from
# the border.
# Expected: one convention, and the polygon of a box on the box.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Python 3.11 to 3.14 with pip or uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
packages="torch==2.15.0 torchvision==0.29.2 numpy==2.4.6"
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
"$work/venv/bin/python" -W ignore - <<'END'
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

size = (60, 100)
pixels = torch.zeros(1, *size)
pixels[:, 10:40, 20:50] = 1
image = tv_tensors.Image(pixels)
box = tv_tensors.BoundingBoxes(torch.tensor([[20.0, 10, 50, 40]]), format="XYXY", canvas_size=size)
corners = torch.tensor([[20.0, 10], [50, 10], [50, 40], [20, 40]])
polygon = tv_tensors.KeyPoints(corners, canvas_size=size)


def around_pixels(image):
    rows, columns = (image[0] > 0.5).nonzero().unbind(1)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def around_points(points):
    return [int(side) for side in (*points.amin(0), *points.amax(0))]


ten_times = [600, 1000]
flip = transforms.horizontal_flip
cases = {
    "rotate by 180": lambda one: transforms.rotate(one, 180),
    "flip, vertical flip": lambda one: transforms.vertical_flip(flip(one)),
    "flip": flip,
    "flip, resize": lambda one: transforms.resize(flip(one), ten_times),
    "resize, flip": lambda one: flip(transforms.resize(one, ten_times)),
}
shifts = []
for name, change in cases.items():
    of_box = change(box)[0].int().tolist()
    of_polygon = around_points(change(polygon))
    print(f"{name}: pixels {around_pixels(change(image))}, box {of_box}, polygon {of_polygon}")
    if of_box != around_pixels(change(image)):
        raise SystemExit("torchvision 0.29.2: the box is no longer around the pixels")
    shifts.append([ours - theirs for ours, theirs in zip(of_polygon, of_box)])
border = flip(tv_tensors.KeyPoints(torch.tensor([[100.0, 30]]), canvas_size=size)).tolist()
print("flip of (100, 30):", border)
both, across = [-1, -1, -1, -1], [-1, 0, -1, 0]
if shifts != [[0, 0, 0, 0], both, across, [-10, 0, -10, 0], across] or border != [[-1, 30]]:
    raise SystemExit("torchvision 0.29.2 no longer behaves as described above")
END
echo "as described: a flipped polygon is a pixel off the flipped box"
