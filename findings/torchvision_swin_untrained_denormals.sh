#!/bin/sh
# torchvision 0.29.2: an untrained Swin computes with denormal numbers on images it has to pad.
#
# Input: swin_t with random weights (biases 0, as it is built), in eval mode, on one image of random
# pixels; 224x224, which its windows of 7x7 divide, and 240x320, which is padded.
# Seen: on 240x320 the projection after the attention of every shifted window reads denormal
# numbers, 1 % to 44 % of its input, and takes up to 50 times as long (denormals cost a CPU a
# hundred cycles each); the whole network takes more than twice as long. The mask adds -100 to a
# logit, which gives a weight of e^-100 = 3.8e-44 instead of 0; times values of padding, which are
# exactly 0 while biases are, and of the image, the sums are denormal. Once biases are not 0, as
# after a step of training, there are none. A benchmark of networks with random weights shows a Swin
# so much slower than it is.
# Expected: no denormal numbers, or the same time for a model before and after its first step.
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
"$work/venv/bin/python" - <<'END'
import time

import torch
from torchvision.models import swin_t

torch.set_num_threads(1)
torch.manual_seed(0)
model = swin_t(weights=None).eval()
smallest = torch.finfo(torch.float32).tiny
linear = torch.nn.functional.linear


def projections(height, width):
    """Of each projection after attention: the share of denormal inputs, and its milliseconds."""
    seen = []

    def recorded(x, weight, bias=None):
        begin = time.perf_counter()
        result = linear(x, weight, bias)
        if weight.shape[0] == weight.shape[1]:
            denormal = ((x != 0) & (x.abs() < smallest)).float().mean().item()
            seen.append((denormal, 1e3 * (time.perf_counter() - begin)))
        return result

    image = torch.randn(1, 3, height, width)
    with torch.inference_mode():
        model.features(image)
        torch.nn.functional.linear = recorded
        begin = time.perf_counter()
        model.features(image)
        total = 1e3 * (time.perf_counter() - begin)
        torch.nn.functional.linear = linear
    return [share for share, _ in seen], [ms for _, ms in seen], total


divided, _, _ = projections(224, 224)
padded, slow, before = projections(240, 320)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            parameter.fill_(0.01)
biased, quick, after = projections(240, 320)
for share, ms, then in zip(padded, slow, quick, strict=True):
    print(f"denormal {share:4.0%}: {ms:6.1f} ms, with biases {then:5.1f} ms")
print(f"the network: {before:.0f} ms, with biases {after:.0f} ms")
assert max(divided) == 0 and max(biased) == 0, (divided, biased)
assert max(padded[0::2]) == 0 and min(padded[1::2]) > 0.005, padded
END
