"""Every family of networks under the pyramid: built, trained for two steps, evaluated, measured.

    python benchmarks/backbones.py
    python benchmarks/backbones.py --only timm/convnext_atto --again

Each is put under the demo's Faster R-CNN by its name alone (MODEL.FPN_EXT.BOTTOM_UP), with random
weights, on a few generated images. What was found is kept in one JSON file per network, so that the
script goes on where it stopped; docs/generate.py makes docs/evidence/backbones.md of them.

- parameters: of the bottom-up alone, without the parts that the pyramid does not need
- multiply-adds: fvcore's count for bottom-up and pyramid on one image of 480 x 640
- seconds per image: the whole detector on one image of 480 x 640, float32, after one that warms up;
  the median of --rounds (0: no timing)
"""

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]

import fpn_ext  # noqa: E402
import torch  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from fpn_ext.data import demo_data  # noqa: E402
from fpn_ext.data.datasets import register_datasets  # noqa: E402
from fpn_ext.engine.trainer import Trainer  # noqa: E402
from fpn_ext.reporting.json_files import write_json  # noqa: E402
from fpn_ext.reporting.measuring import markdown_table  # noqa: E402
from fpn_ext.reporting.provenance import commit, hardware  # noqa: E402
from fvcore.nn import FlopCountAnalysis  # noqa: E402
from fvcore.nn.jit_handles import get_shape  # noqa: E402

# The smallest network of each family, by the name that a user types.
FAMILIES = {
    "torchvision/resnet18": "ResNet",
    "torchvision/resnext50_32x4d": "ResNeXt",
    "torchvision/wide_resnet50_2": "Wide ResNet",
    "torchvision/regnet_x_400mf": "RegNet",
    "torchvision/mobilenet_v2": "MobileNetV2",
    "torchvision/mobilenet_v3_small": "MobileNetV3",
    "torchvision/efficientnet_b0": "EfficientNet",
    "torchvision/efficientnet_v2_s": "EfficientNetV2",
    "torchvision/convnext_tiny": "ConvNeXt",
    "torchvision/swin_t": "Swin",
    "torchvision/swin_v2_t": "SwinV2",
    "torchvision/maxvit_t": "MaxViT",
    "torchvision/vit_b_32": "ViT",
    "torchvision/densenet121": "DenseNet",
    "torchvision/vgg11_bn": "VGG",
    "torchvision/alexnet": "AlexNet",
    "torchvision/mnasnet0_5": "MNASNet",
    "torchvision/shufflenet_v2_x0_5": "ShuffleNetV2",
    "torchvision/googlenet": "GoogLeNet",
    "torchvision/inception_v3": "Inception v3",
    "torchvision/squeezenet1_1": "SqueezeNet",
    "detectron2/regnetx_400mf": "RegNet",
    "timm/resnet10t": "ResNet",
    "timm/test_convnext": "ConvNeXt",
    "timm/convnext_atto": "ConvNeXt",
    "timm/swin_tiny_patch4_window7_224": "Swin",
    "timm/swinv2_tiny_window8_256": "SwinV2",
    "timm/maxvit_nano_rw_256": "MaxViT",
    "timm/hrnet_w18_small": "HRNet",
    "timm/dla46x_c": "DLA",
    "timm/cs3darknet_focus_s": "CSPDarknet",
    "timm/ese_vovnet19b_slim_dw": "VoVNet",
    "timm/res2net50_26w_4s": "Res2Net",
    "timm/resnest14d": "ResNeSt",
    "timm/legacy_seresnet18": "SENet",
    "timm/skresnet18": "SKNet",
    "timm/nf_regnet_b0": "NFNet",
    "timm/ghostnet_050": "GhostNet",
    "timm/repvgg_a0": "RepVGG",
    "timm/fastvit_t8": "FastViT",
    "timm/efficientvit_b0": "EfficientViT",
    "timm/pvt_v2_b0": "PVTv2",
    "timm/poolformerv2_s12": "PoolFormer",
    "timm/focalnet_tiny_srf": "FocalNet",
    "timm/mambaout_femto": "MambaOut",
    "timm/twins_svt_small": "Twins",
    "timm/xception41": "Xception",
    "timm/test_vit": "ViT",
}
# Known not to serve; the table says why.
REFUSED = ("torchvision/maxvit_t", "torchvision/vit_b_32", "timm/test_vit")
# What a network needs beyond its name: SqueezeNet has no map of stride 32.
THREE_MAPS = {
    "MODEL.FPN.IN_FEATURES": ["c2", "c3", "c4"],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128]],
}
OPTIONS = {"torchvision/squeezenet1_1": THREE_MAPS}

TIMED = ("seconds", "hardware", "threads", "timed_commit")  # kept by --again without --rounds
DEMO = PROJECT / "configs/demo/faster_rcnn_R_18_FPN.yaml"
SIZE = (480, 640)


def config_of(name: str, folder: Path) -> Any:
    """The demo's config on another network, for two steps and an evaluation."""
    opts = {
        "MODEL.FPN_EXT.BOTTOM_UP": name,
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],  # Detectron2's default: it follows the network
        "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": (),
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 0.001,
        "TEST.EVAL_PERIOD": 0,
        "OUTPUT_DIR": str(folder),
        **OPTIONS.get(name, {}),
    }
    words = [str(word) for pair in opts.items() for word in pair]
    return fpn_ext.prepare(str(DEMO), words, training=True).cfg


def tried(name: str, folder: Path) -> dict[str, Any]:
    """Build, train and evaluate one network; ``outcome`` is "pass", or what went wrong."""
    row: dict[str, Any] = {"name": name}
    try:
        trainer = Trainer(config_of(name, folder))
        backbone = trainer.model.backbone
        shapes = backbone.bottom_up.output_shape()
        row["maps"] = [[shapes[c].stride, shapes[c].channels] for c in backbone.in_features]
        row["multiple_of"] = backbone.bottom_up.size_divisibility or 1
        row["parameters"] = sum(p.numel() for p in backbone.bottom_up.parameters())
        row["multiply_adds"] = multiply_adds(backbone)
        trainer.resume_or_load(resume=False)
        trainer.train()
        scores = json.loads((folder / "inference/demo_multiscale_val/results.json").read_text())
        row["outcome"] = "pass" if "AP" in scores["bbox"] else f"no AP in {scores}"
    except Exception as error:  # whatever went wrong is what the table is to show
        logging.getLogger(__name__).info("%s failed", name, exc_info=True)
        row["outcome"] = f"{type(error).__name__}: {error}"
    return row


def multiply_adds(backbone: Any) -> float:
    """fvcore's count for one image of SIZE, padded as the network needs it."""
    multiple = backbone.size_divisibility
    height, width = (-(-side // multiple) * multiple for side in SIZE)
    count = FlopCountAnalysis(backbone.eval(), torch.zeros(1, 3, height, width))
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    count.tracer_warnings("none")
    count.set_op_handle("aten::scaled_dot_product_attention", _attention)
    with torch.no_grad():
        total = float(count.total())
    backbone.train()
    return total


def _attention(inputs: list, outputs: list) -> int:
    """Multiply-adds of queries by keys, and of what comes of it by values."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def seconds_per_image(name: str, rounds: int, folder: Path) -> float:
    """Median of the whole detector on one image of SIZE, after one that warms up."""
    model = build_model(config_of(name, folder)).eval()
    image = [{"image": torch.randint(0, 256, (3, *SIZE)).float()}]
    times = []
    with torch.no_grad():
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def recorded(results: Path) -> list[dict[str, Any]]:
    """What was found of every network, by name."""
    return [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]


def in_words(rows: Sequence[dict[str, Any]]) -> str:
    """How many passed, and where and by which commits they were measured."""
    passed = sum(row["outcome"] == "pass" for row in rows)
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    timed = {
        f"{row['hardware']}, {row['threads']} threads, commit {row['timed_commit']}"
        for row in rows
        if "seconds" in row
    }
    where = "; ".join(sorted(timed)).replace("-dirty", ", with changes that were not committed")
    return (
        f"{passed} passed, {len(rows) - passed} did not, commit {commits}; timed on "
        f"{where or 'nothing yet'}."
    )


def tables(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The networks that passed, and those that did not with the error."""
    passed = [
        [
            f"`{row['name']}`",
            FAMILIES[row["name"]],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['multiply_adds'] / 1e9:.1f}",
            f"{row['seconds']:.2f}" if "seconds" in row else "",
            ", ".join(f"{stride}: {channels}" for stride, channels in row["maps"]),
            str(row["multiple_of"]) if row["multiple_of"] > 1 else "any",
        ]
        for row in rows
        if row["outcome"] == "pass"
    ]
    header = ["network", "family", "parameters, M", "multiply-adds, G", "s per image",
              "maps, stride: channels", "sides, multiples of"]  # fmt: skip
    why = [
        [f"`{row['name']}`", FAMILIES[row["name"]], row["outcome"].partition("\n")[0]]
        for row in rows
        if row["outcome"] != "pass"
    ]
    return markdown_table(header, passed), markdown_table(["network", "family", "error"], why)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--again", action="store_true", help="what was tried before, too")
    parser.add_argument("--images", type=int, default=4, help="of the demo, for each split")
    parser.add_argument("--rounds", type=int, default=0, help="timed images; 0: no timing")
    parser.add_argument("--results", type=Path, default=PROJECT / "results/backbones")
    args = parser.parse_args(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    begun_at = commit()  # before a result is written, which changes the checkout
    with tempfile.TemporaryDirectory(prefix="backbones_") as temporary:
        os.environ["DETECTRON2_DATASETS"] = temporary
        data = Path(temporary, "demo_multiscale")
        demo_data.generate(data, num_train=args.images, num_val=args.images)
        register_datasets()
        for name in args.only:
            file = args.results / (name.replace("/", "__") + ".json")
            before = json.loads(file.read_text()) if file.exists() else {}
            row, folder = before, Path(temporary, "output")
            if args.again or not row:
                timed = {key: before[key] for key in TIMED if key in before}
                row = {"commit": begun_at, **tried(name, folder), **timed}
            if args.rounds and row["outcome"] == "pass" and ("seconds" not in row or args.again):
                row["seconds"] = seconds_per_image(name, args.rounds, folder)
                row["hardware"], row["threads"] = hardware(), torch.get_num_threads()
                row["timed_commit"] = begun_at
            write_json(file, row)
            print(f"{name}: {row['outcome'].partition(chr(10))[0]}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
