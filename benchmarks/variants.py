"""What the pyramids of configs/variants/ cost: parameters and multiply-adds beside the plain one.

    python benchmarks/variants.py

Without the bottom-up (ResNet-50), with 256 channels, on an image of 800 x 1344 px (800 x 1333,
padded). Multiply-adds are those of all convolutions, counted by PyTorch on tensors without data.
"""

from pathlib import Path

import fpn_ext  # before detectron2, where that is not compiled
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from fpn_ext.reporting.measuring import markdown_table
from torch.utils.flop_counter import FlopCounterMode

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = CONFIGS / "detectron2" / "faster_rcnn_R_50_FPN_1x.yaml"
SIZE = (800, 1344)


def cost(cfg: CfgNode) -> tuple[int, int]:
    """Parameters and multiply-adds of a config's pyramid, those of the bottom-up left out."""
    with torch.device("meta"):
        pyramid = build_backbone(cfg).eval()
        image = torch.empty(1, 3, *SIZE)
    counts = []
    for network in (pyramid, pyramid.bottom_up):
        parameters = sum(p.numel() for p in network.parameters())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(image)
        counts.append((parameters, counter.get_total_flops() // 2))
    (all_parameters, all_sums), (parameters, sums) = counts
    return all_parameters - parameters, all_sums - sums


def table() -> str:
    """The costs of the plain pyramid, and what each variant adds to them."""
    configs = [BASE, *sorted((CONFIGS / "variants").glob("*.yaml"))]
    rows = []
    for file in configs:
        cfg = fpn_ext.load_config(str(file))
        parameters, sums = cost(cfg)
        if file == BASE:
            plain = parameters, sums
            texts = [f"{parameters / 1e6:.2f}", f"{sums / 1e9:.1f}"]
        else:
            texts = [
                f"{(parameters - plain[0]) / 1e6:+.2f}",
                f"{(sums - plain[1]) / 1e9:+.1f}",
            ]
        rows.append([f"`{cfg.MODEL.BACKBONE.NAME}`", *texts])
    return markdown_table(["pyramid", "parameters, M", "multiply-adds, G"], rows)


if __name__ == "__main__":
    print(table())
