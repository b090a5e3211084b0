"""RoI pooling: this project's implementations against Detectron2's ROIPooler, in one process.

    python benchmarks/roi_pooling.py --rounds 11 --json results/speed-cpu/avx512/roi_pooling.json
    python benchmarks/roi_pooling.py --device cuda [--dtype float16]

The boxes are spread over P2..P5 as a trained RPN's are (450, 357, 160, 33 of 1000 on an 800x1333
input). All sides run in turn within every round, and ratios are taken round by round, so that what
else the machine does falls on all alike. Each line compares results as well, pooled features or the
gradient of P2, with Detectron2's; those of half-precision maps with per_level's, since Detectron2
rounds their boxes to the maps' dtype. On CUDA, a call is timed until the GPU has finished.
"""

import argparse
import platform
import statistics
from collections.abc import Callable

import torch
from fpn_ext import LevelMappedROIPooler  # before detectron2, where that is not compiled
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.measuring import markdown_table, measure, ratio, ratio_text
from fpn_ext.reporting.provenance import commit, hardware

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
SHARES = {2: 0.450, 3: 0.357, 4: 0.160, 5: 0.033}
SIDES = {2: (16, 110), 3: (113, 222), 4: (226, 445), 5: (450, 790)}  # pixels, by level


def feature_maps(
    size: tuple[int, int], memory_format: torch.memory_format, options: argparse.Namespace
) -> list[torch.Tensor]:
    height, width = (-(-side // 32) * 32 for side in size)
    maps = [torch.randn(1, options.channels, height // s, width // s) for s in (4, 8, 16, 32)]
    dtype = getattr(torch, options.dtype)
    return [m.to(options.device, dtype).contiguous(memory_format=memory_format) for m in maps]


def boxes_over_the_levels(count: int, size: tuple[int, int]) -> Boxes:
    boxes = []
    for level, share in SHARES.items():
        number = round(share * count)
        low, high = SIDES[level]
        side = low * (high / low) ** torch.rand(number, 1)
        ratio = torch.exp(0.35 * torch.randn(number, 1))
        extent = torch.cat([side * ratio.sqrt(), side / ratio.sqrt()], dim=1)
        corner = torch.rand(number, 2) * (torch.tensor([size[1], size[0]]) - extent).clamp(min=0)
        boxes.append(torch.cat([corner, corner + extent], dim=1))
    together = torch.cat(boxes)
    return Boxes(together[torch.randperm(len(together))])


def compare(
    case: str, maps: list[torch.Tensor], boxes: Boxes, backward: bool, options: argparse.Namespace
) -> list[dict]:
    shape = (options.bins, SCALES, options.sampling_ratio, "ROIAlignV2")
    fast = "fused" if options.device == "cuda" else "weighted_rows"
    poolers = {
        "Detectron2": ROIPooler(*shape),
        "per_level": LevelMappedROIPooler(*shape, implementation="per_level").to(options.device),
        fast: LevelMappedROIPooler(*shape, implementation=fast).to(options.device),
    }

    def side(pool: torch.nn.Module) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            with torch.no_grad():
                return pool(maps, [boxes])

        def forward_and_backward() -> torch.Tensor:
            leaves = [m.detach().requires_grad_() for m in maps]
            pooled = pool(leaves, [boxes])
            pooled.backward(torch.ones_like(pooled))
            return leaves[0].grad

        return forward_and_backward if backward else forward

    sides = {name: side(p) for name, p in poolers.items()}
    times, results = measure(sides, options.rounds, options.device)
    truth = results["Detectron2" if options.dtype == "float32" else "per_level"]
    rows = []
    for name in poolers:
        error = (results[name] - truth).abs().max().item()
        reference = truth.abs().max().item()
        rows.append(
            {
                "case": case,
                "side": name,
                "ms": statistics.median(times[name]),
                **ratio(times, name, "Detectron2"),
                "largest_error": error,
                "largest_error_relative": error / max(reference, 1e-12),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--boxes", type=int, default=1000)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--bins", type=int, default=7)
    parser.add_argument("--sampling-ratio", type=int, default=0, help="0: adaptive")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="on CUDA"
    )
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    if options.device == "cpu" and options.dtype != "float32":
        parser.error("--dtype: weighted_rows, the side to compare on CPU, is for float32")

    torch.manual_seed(0)
    size = tuple(options.size)
    boxes = boxes_over_the_levels(options.boxes, size).to(options.device)
    rows = []
    for layout, memory_format in (
        ("NCHW", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        maps = feature_maps(size, memory_format, options)
        for backward, what in ((False, "forward"), (True, "forward + backward")):
            rows += compare(f"{what}, {layout} maps", maps, boxes, backward, options)

    about = {
        "commit": commit(),
        "hardware": hardware(options.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        **{k: v for k, v in vars(options).items() if k not in ("json", "device", "dtype")},
    }
    if options.device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "dtype": options.dtype}
    digits = 3 if options.device == "cuda" else 1
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    header = ["case", "implementation", "ms", "times Detectron2 (min to max)", "largest error"]
    cells = [
        [
            r["case"],
            r["side"],
            f"{r['ms']:.{digits}f}",
            ratio_text(r),
            f"{r['largest_error']:.1e}",
        ]
        for r in rows
    ]
    print(markdown_table(header, cells))
    if options.json:
        write_json(options.json, {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
