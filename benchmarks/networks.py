"""What MODEL.FPN_EXT.NUMERICS fast gains over exact, network by network, on a CPU.

    python benchmarks/networks.py --json results/speed-cpu/avx512/networks.json
    python benchmarks/networks.py --networks torchvision/resnet18 --rounds 3

Faster R-CNN of configs/gain/pyramid.yaml over each network, with random weights: a training step on
4 images of 256x256, and the detection of one image of 480x640. `exact` is Detectron2's arithmetic,
bit by bit. Both sides run in one process, in turn within every round after two that warm up; ratios
are taken round by round. The file is written after each network.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fpn_ext  # noqa: F401  before detectron2, where that is not compiled
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fpn_ext.config.prepare import prepare
from fpn_ext.engine.trainer import Trainer
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.measuring import measure, ratio, ratio_text
from fpn_ext.reporting.provenance import command_line, commit, hardware, versions
from fpn_ext.speed.optimize import model_for_inference

CONFIG = Path(__file__).parents[1] / "configs" / "gain" / "pyramid.yaml"
NETWORKS = (
    "build_resnet_backbone",  # Detectron2's ResNet-50, a quarter as wide
    *("torchvision/resnet18", "torchvision/regnet_x_400mf", "torchvision/mobilenet_v3_small"),
    *("torchvision/shufflenet_v2_x0_5", "torchvision/densenet121", "torchvision/vgg11_bn"),
    *("torchvision/convnext_tiny", "torchvision/swin_t", "timm/tf_efficientnet_lite0"),
    *("timm/convnext_atto", "timm/efficientvit_b0", "timm/ghostnet_050", "timm/pvt_v2_b0"),
)
KINDS = ("exact", "fast")
VARIABLES = ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "FPN_EXT_COMPILED")
BATCH, OBJECTS = 4, 10
TRAINED_ON, DETECTED_ON = (256, 256), (480, 640)


def labelled(size: tuple[int, int], numbers: torch.Generator) -> dict[str, Any]:
    """Noise with objects of 16 to 64 px anywhere."""
    height, width = size
    corners = torch.rand(OBJECTS, 2, generator=numbers) * (min(size) - 64)
    sides = 16 + 48 * torch.rand(OBJECTS, 2, generator=numbers)
    objects = Instances(size)
    objects.gt_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
    objects.gt_classes = torch.randint(0, 6, (OBJECTS,), generator=numbers)
    image = (torch.rand(3, *size, generator=numbers) * 255).to(torch.uint8)
    return {"image": image, "instances": objects, "height": height, "width": width}


def sides_of(network: str, numbers: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """Functions of no arguments by kind of numerics: a training step, and a detection."""
    batch = [labelled(TRAINED_ON, numbers) for _ in range(BATCH)]
    image = [labelled(DETECTED_ON, numbers)]
    image[0].pop("instances")
    steps, detections = {}, {}
    for kind in KINDS:
        options = ["MODEL.DEVICE", "cpu", "MODEL.FPN_EXT.BOTTOM_UP", network]
        cfg, _ = prepare(str(CONFIG), [*options, "MODEL.FPN_EXT.NUMERICS", kind])
        torch.manual_seed(0)
        model = Trainer.build_model(cfg)
        steps[kind] = a_step(model, Trainer.build_optimizer(cfg, model), batch)
        # Untrained biases are 0: the masked attention of a Swin then gives denormal numbers, with
        # which a matrix product takes ten times as long. One step makes them others.
        steps[kind]()
        detections[kind] = a_detection(model_for_inference(cfg, model.eval()), image)
    return steps, detections


def a_step(model: Any, optimizer: torch.optim.Optimizer, batch: Any) -> Callable[[], None]:
    for group in optimizer.param_groups:
        group["lr"] = 1e-6  # so small that the sides stay alike

    def step() -> None:
        model.train()
        with EventStorage():
            losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


def a_detection(model: Any, image: Any) -> Callable[[], None]:
    def detect() -> None:
        model.eval()
        with torch.inference_mode():
            model(image)

    return detect


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="networks that it has stay")
    options = parser.parse_args(argv)
    record: dict[str, Any] = {"networks": {}}
    if options.json and options.json.is_file():
        record = json.loads(options.json.read_text())
    for network in options.networks:
        if network in record["networks"]:
            continue
        steps, detections = sides_of(network, torch.Generator().manual_seed(0))
        row: dict[str, Any] = {}
        for name, sides in (("training", steps), ("inference", detections)):
            times, _ = measure(sides, options.rounds)
            row[name] = {"ms": times, **ratio(times, "fast", "exact")}
        record["networks"][network] = row | {
            "command": command_line(),
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "environment": {k: v for k, v in os.environ.items() if k in VARIABLES},
        }
        print(network, *(f"{name} {ratio_text(row[name])}" for name in ("training", "inference")))
        if options.json:
            write_json(options.json, record)


if __name__ == "__main__":
    main()
