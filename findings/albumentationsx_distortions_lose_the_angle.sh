#!/bin/sh
# AlbumentationsX 2.5.1: distortions take an oriented box for an upright one.
#
# Input: an image and an oriented box of 100 x 20 px at 30 degrees in it (bbox_type "obb");
# GridDistortion, OpticalDistortion, ThinPlateSpline, PiecewiseAffine and ElasticTransform, which
# list "obb" under "Supported bboxes", with no distortion (0; a millionth for ElasticTransform) and
# with the strength that each has by default.
# Seen: with no distortion the image comes back as it was, to the last bit, and the box with its
# centre and sides at an angle of 0: an IoU of 0.25 with the box before. By default it comes back
# within 5 degrees of 0. The angle is not read: the upright rectangle of these sides is distorted,
# and a rectangle fitted to the result. Nothing is said.
# Rotate by 1 degree, beside them, gives an angle of 29 degrees, as it should.
# Expected: the box as it was where the image is, and near 30 degrees otherwise.
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
import numpy as np

image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
box = (100.0, 100.0, 100.0, 20.0, 30.0)  # centre, width, height in pixels, degrees


def changed(transform):
    """The largest change of a pixel, and the new box."""
    boxes = A.BboxParams(coord_format="cxcywh", bbox_type="obb", label_fields=["names"])
    pipeline = A.Compose([transform], bbox_params=boxes, seed=0)
    result = pipeline(image=image, bboxes=np.array([box], np.float32), names=["ship"])
    of_image = int(np.abs(result["image"].astype(int) - image).max())
    return of_image, [round(float(number), 1) for number in result["bboxes"][0]]


none = (0, 0)
distortions = {
    A.GridDistortion: {"distort_range": none},
    A.OpticalDistortion: {"distort_range": none},
    A.ThinPlateSpline: {"scale_range": none},
    A.PiecewiseAffine: {"scale_range": none},
    A.ElasticTransform: {"displacement_range": (1e-6, 1e-6)},  # of zero it does nothing at all
}
described = True
for distortion, least in distortions.items():
    of_image, found = changed(distortion(**least, p=1))
    angle = changed(distortion(p=1))[1][4]
    print(f"{distortion.__name__}: image changed by {of_image}, box {found}; by default {angle}")
    described = described and (of_image, found) == (0, [100, 100, 100, 20, 0]) and abs(angle) < 5
rotated = changed(A.Rotate((1, 1), p=1))[1]
print("Rotate by 1 degree: box", rotated)
if not described or rotated != [100, 100, 100, 20, 29]:
    raise SystemExit("AlbumentationsX 2.5.1 no longer behaves as described above")
END
echo "as described: distortions turn an oriented box upright, and leave the image"
