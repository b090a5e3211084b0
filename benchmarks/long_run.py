"""Memory over a long training and many predictions: resident MB, which must stay flat.

    python benchmarks/long_run.py [--iterations 2000] [--predictions 5000] [--output FOLDER]

A small detector is trained on pictures of random sizes, 32 to 160 px a side, and then predicts on
others, of up to 320 px. Every twentieth iteration or picture the
process's resident memory is recorded. ``growth`` is the difference of the medians of the last and
the second fifth: the first fills caches. Writes long_run.json and long_run.png.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import fpn_ext
import matplotlib.pyplot as plt
import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fpn_ext.files.atomic import replacing
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.provenance import command_line, commit, hardware, versions

EVERY = 20


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def detector() -> torch.nn.Module:
    cfg = fpn_ext.load_config("configs/demo/faster_rcnn_R_18_FPN.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS = ""
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    return build_model(cfg)


def picture(random: np.random.Generator, most: int) -> dict:
    height, width = random.integers(32, most + 1, 2).tolist()
    pixels = torch.from_numpy(random.integers(0, 256, (3, height, width), dtype=np.uint8))
    return {"image": pixels.float(), "height": height, "width": width}


def labelled(random: np.random.Generator) -> dict:
    entry = picture(random, 160)
    height, width = entry["height"], entry["width"]
    count = int(random.integers(0, 20))
    corner = random.random((count, 2)) * [width - 16, height - 16]
    boxes = np.concatenate([corner, corner + 4 + 12 * random.random((count, 2))], axis=1)
    entry["instances"] = Instances(
        (height, width),
        gt_boxes=Boxes(torch.from_numpy(boxes).float()),
        gt_classes=torch.from_numpy(random.integers(0, 5, count)),
    )
    return entry


def train(model: torch.nn.Module, iterations: int) -> list[float]:
    random = np.random.default_rng(0)
    batches = ([labelled(random), labelled(random)] for _ in range(iterations))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    trainer = SimpleTrainer(model.train(), batches, optimizer)
    memory = []
    with EventStorage() as trainer.storage:
        for iteration in range(iterations):
            trainer.iter = iteration
            trainer.run_step()
            trainer.storage.step()
            if iteration % EVERY == 0:
                memory.append(resident_mb())
    return memory


def predict(model: torch.nn.Module, pictures: int) -> list[float]:
    random = np.random.default_rng(1)
    model.eval()
    memory = []
    with torch.no_grad():
        for number in range(pictures):
            model([picture(random, 320)])
            if number % EVERY == 0:
                memory.append(resident_mb())
    return memory


def growth(memory: list[float]) -> float:
    """MB from the second fifth to the last."""
    fifth = max(len(memory) // 5, 1)
    return statistics.median(memory[-fifth:]) - statistics.median(memory[fifth : 2 * fifth])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--predictions", type=int, default=5000)
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir(), "long_run"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model = detector()
    series = {
        "training": train(model, options.iterations),
        "prediction": predict(model, options.predictions),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, memory in series.items():
        grown = growth(memory)
        print(f"{name}: {memory[0]:.0f} MB at first, {memory[-1]:.0f} at last, growth {grown:+.1f}")
        axes.plot(np.arange(len(memory)) * EVERY, memory, label=name)
    axes.set(xlabel="iterations, pictures", ylabel="resident memory, MB", ylim=(0, None))
    axes.legend()
    with replacing(options.output / "long_run.png") as stream:
        figure.savefig(stream, dpi=120, format="png")
    about = {
        "command": command_line(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "recorded_every": EVERY,
    }
    results = {
        name: {"growth_mb": round(growth(memory), 1), "resident_mb": [round(m) for m in memory]}
        for name, memory in series.items()
    }
    write_json(options.output / "long_run.json", {"about": about, **results})


if __name__ == "__main__":
    main()
