#!/bin/sh
# ensemble-boxes 1.0.9: soft_nms lowers no score that it returns.
#
# Input: one model's boxes of one class: an object found twice, 0.9 and 0.8, overlapping by nine
# tenths, and another object, 0.6; soft_nms, Gaussian with sigma 0.5 and linear.
# Seen: 0.9, 0.6, 0.8: each score as it came in. Soft-NMS (Bodla et al. 2017) gives each box the
# score that the better ones have left it: 0.9, 0.6 and, for the second box of the first object,
# 0.8 exp(-0.9^2 / 0.5) = 0.16, or 0.8 (1 - 0.9) = 0.08 if linear. Here the lowered score only
# decides whether a box is kept, above `thresh`. At its default of 0.001 nothing is left out, every
# duplicate ranks as high as before, and COCO's AP of the three is 0.835, which is 1.0 with the
# lowered scores.
# Expected: the lowered scores.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Python 3.10 to 3.13 with pip or uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
packages="ensemble-boxes==1.0.9 numpy==2.2.6"
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
import math

from ensemble_boxes import soft_nms

boxes = [[0.1, 0.1, 0.3, 0.3], [0.1, 0.1, 0.3, 0.28], [0.6, 0.6, 0.8, 0.8]]
scores = [0.9, 0.8, 0.6]
overlap = 0.9  # of the first two, which differ in height
lowered = {1: 0.8 * (1 - overlap), 2: 0.8 * math.exp(-(overlap**2) / 0.5)}
described = True
for method, name in ((1, "linear"), (2, "Gaussian")):
    _, given, _ = soft_nms([boxes], [scores], [[0, 0, 0]], method=method, iou_thr=0.5, sigma=0.5)
    given = [round(float(score), 3) for score in given]
    # With a threshold above it, the second box is left out: its score is lowered, inside.
    cut = lowered[method] + 0.01
    kept = soft_nms([boxes], [scores], [[0, 0, 0]], method=method, sigma=0.5, thresh=cut)[1]
    kept = [round(float(score), 3) for score in kept]
    print(f"{name}: {given}; with thresh {cut:.2f}: {kept}; lowered: {lowered[method]:.2f}")
    described = described and sorted(given) == sorted(scores) and sorted(kept) == [0.6, 0.9]
if not described:
    raise SystemExit("ensemble-boxes 1.0.9 no longer behaves as described above")
END
echo "as described: soft_nms returns the scores that it was given"
