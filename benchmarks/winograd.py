"""The 3x3 convolutions of an R-50-FPN on CPU: Winograd's against torch's direct sums.

    python benchmarks/winograd.py [--rounds 15]

Maps of 800x1333 and 480x640 inputs, channels_last, float32, both in turn within every round. Errors
are the largest against float64, with unit-variance inputs and outputs.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from fpn_ext.kernels.winograd import WinogradConv2d
from fpn_ext.reporting.measuring import markdown_table, measure, ratio, ratio_text
from fpn_ext.reporting.provenance import commit, hardware

MAPS = {
    "P2 of 800x1333": (256, 200, 336),
    "P3 of 800x1333": (256, 100, 168),
    "P4 of 800x1333": (256, 50, 84),
    "res5 of 800x1333": (512, 25, 42),
    "P2 of 480x640": (256, 120, 160),
    "P3 of 480x640": (256, 60, 80),
    "P4 of 480x640": (256, 30, 40),
    "res5 of 480x640": (512, 15, 20),
}


@torch.inference_mode()
def compare(channels: int, height: int, width: int, rounds: int) -> list[str]:
    x = torch.randn(1, channels, height, width).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(channels)
    winograd = WinogradConv2d(weight, bias)
    times, results = measure(
        {
            "direct": lambda: F.conv2d(x, weight, bias, padding=1),
            "Winograd": lambda: winograd(x),
        },
        rounds,
    )
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    errors = {name: (found - exact).abs().max().item() for name, found in results.items()}
    direct = statistics.median(times["direct"])
    gflops = 2 * 9 * channels**2 * height * width / 1e6 / direct
    return [
        f"{direct:.1f}",
        f"{gflops:.0f}",
        f"{statistics.median(times['Winograd']):.1f}",
        ratio_text(ratio(times, "Winograd", "direct")),
        f"{errors['direct']:.1e}",
        f"{errors['Winograd']:.1e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [[name, *compare(*size, options.rounds)] for name, size in MAPS.items()]
    print(f"{hardware()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {commit()}")
    header = ["map", "direct: ms", "GFLOP/s", "Winograd: ms", "times as fast (min to max)"]
    print(markdown_table([*header, "direct: error", "Winograd: error"], rows))


if __name__ == "__main__":
    main()
