#!/bin/sh
# torch 2.15.0: torch.compile with freezing turns NaN into 0 where a ReLU follows a convolution (CPU).
#
# Input: a convolution and a ReLU in eval mode, on an image in which one number is NaN; run as they
# are, compiled, and compiled with torch._inductor.config.freezing, an option for inference.
# Seen: as they are and compiled, the outputs that NaN reaches are NaN. With freezing, oneDNN
# computes the convolution and the ReLU in one pass, and they are 0. A convolution alone, and a
# linear layer with a ReLU, keep NaN there too. A network whose training diverged so returns numbers
# that look right, and a detector returns boxes where it returned none.
# Expected: NaN, as the same model gives otherwise.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Python 3.11 to 3.14 with pip or uv, a
# C++ compiler, and a CPU with AVX2.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
packages="torch==2.15.0 numpy==2.4.6"
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
TORCHINDUCTOR_CACHE_DIR="$work/cache" "$work/venv/bin/python" -W ignore - <<'END'
import torch
import torch._inductor.config
from torch import nn

torch.manual_seed(0)
NAN = float("nan")
pixels, row = torch.randn(1, 16, 8, 8), torch.randn(4, 16)
pixels[0, 0, 0, 0], row[1, 2] = NAN, NAN
layers = {
    "convolution": (nn.Conv2d(16, 16, 3, padding=1), pixels, 4 * 16),  # pixels x channels
    "linear layer": (nn.Linear(16, 8), row, 8),
}


def numbers(model, x):
    """How many outputs are NaN: as it is, compiled, compiled with freezing."""
    found = [int(model(x).isnan().sum())]
    for freezing in (False, True):
        torch._dynamo.reset()
        torch._inductor.config.freezing = freezing
        found.append(int(torch.compile(model)(x).isnan().sum()))
    return found


with torch.no_grad():
    for name, (layer, x, reached) in layers.items():
        alone = numbers(layer.eval(), x)
        with_relu = numbers(nn.Sequential(layer, nn.ReLU()).eval(), x)
        print(f"{name}: NaN {alone}, with a ReLU {with_relu} (as it is, compiled, with freezing)")
        assert alone == [reached] * 3, alone
        kept = 0 if name == "convolution" else reached
        assert with_relu == [reached, reached, kept], with_relu
END
