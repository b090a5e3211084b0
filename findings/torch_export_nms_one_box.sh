#!/bin/sh
# torch 2.15.0, torchvision 0.29.2: a torch.export program with torchvision.ops.nms raises when one
# box is kept.
#
# Input: a module that calls torchvision.ops.nms, exported with a dynamic number of boxes, and run on
# three equal boxes, of which suppression keeps one; and on three that are far apart.
# Seen: torch.export.export succeeds; on boxes far apart the program gives what the module gives. On
# equal ones the module gives one index, and the program raises RuntimeError: "Runtime assertion
# failed for expression u0 >= 2": the number of kept boxes is taken to be at least 2. A detector that
# was exported so fails on a picture with one object of a class. Expected: one index.
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
import torchvision


class Suppression(torch.nn.Module):
    def forward(self, boxes, scores):
        return torchvision.ops.nms(boxes, scores, 0.5)


module = Suppression()
apart = torch.tensor([[0.0, 0, 9, 9], [50, 50, 60, 60], [90, 90, 99, 99]])
equal = apart[:1].repeat(3, 1)
scores = torch.tensor([0.9, 0.8, 0.7])
number = {0: torch.export.Dim("number")}
program = torch.export.export(module, (apart, scores), dynamic_shapes=(number, number)).module()
print("far apart: module", module(apart, scores).tolist(), "program", program(apart, scores).tolist())
print("equal: module", module(equal, scores).tolist())
try:
    found = program(equal, scores).tolist()
except RuntimeError as error:
    print("equal: program raises", str(error).splitlines()[0])
    described = "u0 >= 2" in str(error)
else:
    print("equal: program", found)
    described = False
if not described or program(apart, scores).tolist() != [0, 1, 2]:
    raise SystemExit("torch 2.15.0 and torchvision 0.29.2 no longer behave as described above")
END
echo "as described: the program raises where suppression keeps one box"
