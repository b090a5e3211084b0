r"""Faster R-CNN R-50 FPN, whole and by stages: Detectron2, this project, torchvision.

    python benchmarks/whole_model.py --rounds 9 --output results
    python benchmarks/whole_model.py --parts inference stages --dtype float32 bfloat16
    python benchmarks/whole_model.py --sizes 96x128 --rounds 1 --calibrated-at 192x256 \
        MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64

Sides, all with the same calibrated random weights (calibrated.py) and the stride in the 3x3
convolution, as torchvision has it:

- Detectron2: configs/detectron2/faster_rcnn_R_50_FPN_1x_builtin.yaml
- this project: configs/detectron2/faster_rcnn_R_50_FPN_1x.yaml, as built
- optimised: the same after fpn_ext.optimize_for_inference
- torchvision: fasterrcnn_resnet50_fpn, its own defaults, on the same pixels. It rounds its anchors
  and samples RoIs otherwise (2 x 2 points, no half-pixel shift), and so finds other boxes

All run in one process, in turn within every round after two that warm up; ratios are taken round by
round. Peak memory is measured in a process of its own for each side. Words KEY VALUE at the end
override the config of all sides but torchvision's, which is left out where they make another
network.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from calibrated import calibrated_weights  # imports fpn_ext, which comes before detectron2
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.measuring import markdown_table, measure, peak_memory, ratio, ratio_text
from fpn_ext.reporting.provenance import commit, hardware
from sides import (
    Side,
    build_side,
    build_sides,
    builtin_config,
    found_again,
    inputs_of,
    names_of_sides,
)
from stages import STAGES, stages_of

PARTS = ("inference", "stages", "training", "memory")
TRAINING_SIDES = [
    "Detectron2",
    "this project",
    "this project, channels_last",
    "this project, channels_last, fold_norms",
    "this project, channels_last, fold_norms, Winograd",
]
TRAINING_BATCH = 2
LARGE_BATCH_PIXELS = 480 * 640  # batch 8 by default up to here
# A stage of microseconds is called so often in a round, on all sides alike.
CALLS_IN_A_ROW = {"anchors": 100}

# Wanted of batch 1: in words, bound, and which figure of which row; "" for whatever size was run.
TARGETS: tuple[tuple[str, str, float, str, str, str, str], ...] = (
    ("times Detectron2", ">=", 1.65, "inference", "480x640", "optimised", "ratio"),
    ("times Detectron2", ">=", 1.65, "inference", "800x1333", "optimised", "ratio"),
    ("times torchvision", ">=", 1.4, "inference", "480x640", "optimised", "ratio_torchvision"),
    ("times torchvision", ">=", 1.4, "inference", "800x1333", "optimised", "ratio_torchvision"),
    ("times Detectron2", ">=", 5.0, "inference", "480x640", "optimised, bfloat16", "ratio"),
    ("times Detectron2", ">=", 5.0, "inference", "800x1333", "optimised, bfloat16", "ratio"),
    ("times Detectron2", ">=", 1.6, "training", "", "this project", "ratio"),
    ("times Detectron2", ">=", 1.8, "training", "", "this project, channels_last", "ratio"),
    ("times Detectron2", ">=", 1.8, "training", "", TRAINING_SIDES[-1], "ratio"),
    ("peak memory, of Detectron2's", "<=", 0.65, "memory", "480x640", "optimised", "ratio"),
    ("peak memory, of Detectron2's", "<=", 0.65, "memory", "800x1333", "optimised", "ratio"),
    ("anchors, times Detectron2", ">=", 100.0, "stages", "800x1333", "this project", "ratio"),
)
OF_ROWS = {
    "inference": {"batch": 1},
    "training": {},
    "memory": {"task": "inference"},
    "stages": {"stage": "anchors"},
}


def inference(sides: dict[str, Side], size: str, batch: int, rounds: int) -> list[dict]:
    inputs = inputs_of(batch, pixels(size))
    device = sides["Detectron2"].device
    calls = {name: (lambda side=side: side.infer(inputs)) for name, side in sides.items()}
    times, results = measure(calls, rounds, device)
    rows = []
    for name in sides:
        row = {"size": size, "batch": batch, "side": name, "ms": statistics.median(times[name])}
        row |= ratio(times, name, "Detectron2")
        if "torchvision" in sides:
            to_torchvision = ratio(times, name, "torchvision")
            row |= {f"ratio_torchvision{k[5:]}": v for k, v in to_torchvision.items()}
        rows.append(row | found_again(results[name], results["Detectron2"]))
    return rows


def stages(sides: dict[str, Side], size: str, rounds: int) -> list[dict]:
    inputs = inputs_of(1, pixels(size))
    detectron2 = stages_of(sides["Detectron2"], inputs, None)
    all_stages = {"Detectron2": detectron2} | {
        name: stages_of(side, inputs, detectron2.returned)
        for name, side in sides.items()
        if name != "Detectron2"
    }
    rows = []
    for stage in STAGES:
        calls = {name: s.calls[stage] for name, s in all_stages.items()}
        in_a_row = CALLS_IN_A_ROW.get(stage, 1)
        times, _ = measure(calls, rounds, sides["Detectron2"].device, in_a_row)
        for name, of_side in all_stages.items():
            row = {"size": size, "stage": stage, "side": name}
            row |= {"ms": statistics.median(times[name]), **ratio(times, name, "Detectron2")}
            if stage in of_side.differences:
                # Where shapes differ, the next stage's output tells.
                row |= of_side.differences[stage] or {"difference": None}
            rows.append(row)
    return rows


def training_step(side: Side, size: str) -> Callable[[], dict[str, torch.Tensor]]:
    """A step of SGD with learning rate 0, which moves no weight: every step is the same."""
    height, width = pixels(size)
    inputs = inputs_of(TRAINING_BATCH, (height, width))
    generator = torch.Generator().manual_seed(0)
    for x in inputs:
        corner = torch.rand(6, 2, generator=generator) * 0.6
        extent = torch.rand(6, 2, generator=generator) * 0.3 + 0.1
        boxes = torch.cat([corner, corner + extent], dim=1)
        boxes *= torch.tensor([width, height, width, height])
        classes = torch.arange(6) % side.model.roi_heads.num_classes
        x["instances"] = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=classes)
    side.model.train()
    parameters = [p for p in side.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # the same samples of anchors and proposals
        losses = side.model(inputs)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: loss.detach() for name, loss in losses.items()}

    return step


def training(sides: dict[str, Side], size: str, rounds: int) -> list[dict]:
    steps = {name: training_step(side, size) for name, side in sides.items()}
    with EventStorage():
        times, losses = measure(steps, rounds, sides["Detectron2"].device)
    rows = []
    for name in sides:
        difference = {
            key: abs(losses[name][key] - loss).item() / max(abs(loss).item(), 1e-12)
            for key, loss in losses["Detectron2"].items()
        }
        row = {"size": size, "batch": TRAINING_BATCH, "side": name}
        row |= {"ms": statistics.median(times[name]), **ratio(times, name, "Detectron2")}
        rows.append(row | {"relative_difference_of_losses": difference})
    return rows


def memory_of_one(side_name: str, task: str, size: str, file: str, options: Any) -> dict | None:
    """MiB before and at the peak of inference or training of one side, with weights from a file."""
    weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    side = build_side(side_name, weights, options.device, options.opts)
    del weights

    def call_at(size: str) -> Callable[[], Any]:
        if task == "training":
            return training_step(side, size)
        inputs = inputs_of(1, pixels(size))
        return lambda: side.infer(inputs)

    with EventStorage():
        call_at("96x128")()  # what is set up once is not counted
        call = call_at(size)
        return peak_memory(lambda: [call() for _ in range(2)], options.device)


def in_a_fresh_process(
    side_name: str, task: str, size: str, file: str, options: Any
) -> dict | None:
    """:func:`memory_of_one`, where nothing else has run before."""
    command = [sys.executable, __file__, "--device", options.device]
    command += ["--threads", str(torch.get_num_threads())]
    command += ["--memory-of", side_name, task, size, file, *options.opts]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {side_name}, {task} {size}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(
    weights: dict, task: str, size: str, names: list[str], options: argparse.Namespace
) -> list[dict]:
    """Peaks over the model itself; empty where the system does not tell."""
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "weights.pth")
        torch.save({k: v.cpu() for k, v in weights.items()}, file)
        for name in names:
            figures = in_a_fresh_process(name, task, size, file, options)
            if figures is None:
                print("peak memory is not measured: this system has no /proc/self/clear_refs")
                return []
            rows.append({"task": task, "size": size, "side": name, **figures})
    for row in rows:
        row["over_model"] = row["peak"] - row["before"]
        row["ratio"] = row["over_model"] / max(rows[0]["over_model"], 1e-3)
    return rows


def pixels(size: str) -> tuple[int, int]:
    height, _, width = size.partition("x")
    return int(height), int(width)


def size_argument(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"a size is HEIGHTxWIDTH, e.g. 480x640, got {text!r}")
    return text


def inference_table(rows: list[dict]) -> str:
    header = ["size", "batch", "side", "ms", "times Detectron2 (min to max)"]
    header += ["times torchvision (min to max)", "detections found again", "their scores differ by"]
    cells = [
        [
            *(r["size"], str(r["batch"]), r["side"], f"{r['ms']:.1f}"),
            *(ratio_text(r), ratio_text(r, "ratio_torchvision")),
            *(f"{r['found_again']} of {r['detections']}", f"{r['score_difference']:.1e}"),
        ]
        for r in rows
    ]
    return markdown_table(header, cells)


def stages_table(rows: list[dict]) -> str:
    """Times of all sides, and below them differences; one table each."""
    sides = list(dict.fromkeys(r["side"] for r in rows))
    cell = {(r["stage"], r["side"]): r for r in rows}
    times = []
    for stage in STAGES:
        texts = [
            f"{cell[stage, s]['ms']:.2f}"
            + ("" if s == "Detectron2" else f", {ratio_text(cell[stage, s])}")
            for s in sides
        ]
        times.append([stage, *texts])
    sums = {s: sum(cell[stage, s]["ms"] for stage in STAGES) for s in sides}
    times.append(["sum", *(f"{v:.2f}, {sums['Detectron2'] / v:.2f}" for v in sums.values())])
    compared = [s for s in sides if any("difference" in r for r in rows if r["side"] == s)]
    differences = [
        [stage, *(_difference_text(cell[stage, s]) for s in compared)] for stage in STAGES
    ]
    header = [f"{s}: ms" + ("" if s == "Detectron2" else ", times Detectron2") for s in sides]
    return "\n\n".join(
        [
            markdown_table(["stage", *header], times),
            "Largest absolute difference from Detectron2 on the same inputs, and largest value:",
            markdown_table(["stage", *compared], differences),
        ]
    )


def _difference_text(row: dict) -> str:
    if "difference" not in row:
        return ""
    if row["difference"] is None:
        return "another shape"
    text = f"{row['difference']:.1e} of {row['largest']:.3g}"
    if "count" in row:
        text = f"boxes {text}; scores {row['scores_difference']:.1e}; "
        text += f"{row['count']} of {row['count_reference']}"
    return text


def training_table(rows: list[dict]) -> str:
    losses = list(rows[0]["relative_difference_of_losses"])
    header = ["size", "batch", "side", "ms", "times Detectron2 (min to max)"]
    header += [f"{loss}, relative difference" for loss in losses]
    cells = [
        [
            *(r["size"], str(r["batch"]), r["side"], f"{r['ms']:.1f}", ratio_text(r)),
            *(f"{r['relative_difference_of_losses'][loss]:.1e}" for loss in losses),
        ]
        for r in rows
    ]
    return markdown_table(header, cells)


def memory_table(rows: list[dict]) -> str:
    header = ["task", "size", "side", "MiB with the model", "MiB at the peak", "over the model"]
    cells = [
        [
            *(r["task"], r["size"], r["side"], f"{r['before']:.0f}", f"{r['peak']:.0f}"),
            *(f"{r['over_model']:.0f}", f"{r['ratio']:.2f}"),
        ]
        for r in rows
    ]
    return markdown_table([*header, "of Detectron2's"], cells)


def targets(results: dict[str, Any]) -> list[dict]:
    rows = []
    for words, sign, bound, part, size, side, key in TARGETS:
        wanted = OF_ROWS[part] | {"side": side} | ({"size": size} if size else {})
        found = [row for row in results.get(part, []) if wanted.items() <= row.items()]
        measured = found[0].get(key) if found else None
        met = None
        if measured is not None:
            met = measured >= bound if sign == ">=" else measured <= bound
        row = {"part": part, "size": size, "side": side, "target": words}
        rows.append(row | {"wanted": f"{sign} {bound:g}", "measured": measured, "met": met})
    return rows


def targets_table(rows: list[dict]) -> str:
    verdict = {True: "met", False: "not met", None: "not measured"}
    header = ["part", "size", "side", "target", "wanted", "measured", ""]
    cells = [
        [
            *(r[key] for key in header[:5]),
            *("" if r["measured"] is None else f"{r['measured']:.2f}", verdict[r["met"]]),
        ]
        for r in rows
    ]
    return markdown_table(header, cells)


def draw_stages(rows: list[dict], file: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys(r["size"] for r in rows))
    sides = list(dict.fromkeys(r["side"] for r in rows))
    height = 0.9 + len(sizes) * (0.7 + 0.42 * len(sides))
    figure, axes = plt.subplots(len(sizes), 1, figsize=(10, height), squeeze=False)
    for axis, size in zip(axes[:, 0], sizes, strict=True):
        ms = {(r["side"], r["stage"]): r["ms"] for r in rows if r["size"] == size}
        left = dict.fromkeys(sides, 0.0)
        for colour, stage in zip(plt.get_cmap("tab10").colors, STAGES, strict=True):
            widths = [ms[side, stage] for side in sides]
            axis.barh(sides, widths, 0.7, left=list(left.values()), color=colour, label=stage)
            left = {side: left[side] + ms[side, stage] for side in sides}
        for row, total in enumerate(left.values()):
            axis.text(total, row, f" {total:.0f} ms", va="center", fontsize=9)
        axis.set_title(f"{size}, batch 1", loc="left", fontsize=10)
        axis.set_xlim(0, 1.12 * max(left.values()))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("ms")
    figure.suptitle(title, fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 0.85, 1))
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--sizes", nargs="+", type=size_argument, default=["480x640", "800x1333"], metavar="HxW")
    help_on_batch = "images per call in inference; default 1 and 2, and 8 for sizes up to 480x640"
    add("--batch", nargs="+", type=int, metavar="N", help=help_on_batch)
    add("--train-size", type=size_argument, default="320x533", metavar="HxW")
    add("--calibrated-at", type=size_argument, default="800x1333", metavar="HxW")
    add("--rounds", type=int, default=9)
    add("--device", default="cpu", help="cpu or cuda")
    dtypes = ("float32", "bfloat16")
    help_on_dtype = "bfloat16: the optimised model in it, on CUDA also autocast of the others"
    add("--dtype", nargs="+", choices=dtypes, default=["float32"], help=help_on_dtype)
    add("--threads", type=int, help="default: what PyTorch takes")
    add("--output", type=Path, help="folder for whole_model.json, whole_model.md, whole_model.png")
    add("--memory-of", nargs=4, help=argparse.SUPPRESS)  # in_a_fresh_process
    overrides = next(
        (i for i, word in enumerate(arguments) if re.match(r"[A-Z]+\.[A-Z]", word)), len(arguments)
    )
    options = parser.parse_args(arguments[:overrides])
    options.opts = arguments[overrides:]
    return options


def about(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    words = list(arguments)
    if options.output:
        at = next(i for i, word in enumerate(words) if word.startswith("--output"))
        del words[at : at + (1 if "=" in words[at] else 2)]
    return {
        "command": " ".join(["python benchmarks/whole_model.py", *words]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": hardware(options.device),
        "rounds": options.rounds,
    }


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory_of_one(*options.memory_of, options)))
        return

    results: dict[str, Any] = {"about": about(options, arguments), "left_out": {}}
    report = ["# Whole model", "\n".join(f"- {k}: {v}" for k, v in results["about"].items())]

    def say(*paragraphs: str) -> None:
        report.extend(paragraphs)
        print("\n".join(paragraphs), "\n", flush=True)

    print(report[-1], "\n", flush=True)
    cfg = builtin_config(options.device, options.opts)
    weights = calibrated_weights(cfg, pixels(options.calibrated_at))
    common = (weights, options.device, options.opts, results["left_out"])

    if {"inference", "stages", "memory"} & {*options.parts}:
        sides = build_sides(names_of_sides(options.dtype, options.device), *common)
    if "inference" in options.parts:
        results["inference"] = []
        for size in options.sizes:
            height, width = pixels(size)
            default = [1, 2, 8] if height * width <= LARGE_BATCH_PIXELS else [1, 2]
            for batch in options.batch or default:
                results["inference"] += inference(sides, size, batch, options.rounds)
        say("## Inference", inference_table(results["inference"]))
    if "stages" in options.parts:
        results["stages"] = []
        for size in options.sizes:
            rows = stages(sides, size, options.rounds)
            results["stages"] += rows
            in_a_row = [f"{stage}: the mean of {n} calls" for stage, n in CALLS_IN_A_ROW.items()]
            say(f"## Stages, {size}, batch 1", "; ".join(in_a_row), stages_table(rows))
    if {"training", "memory"} & {*options.parts}:
        on_cpu = options.device == "cpu"  # where alone Winograd's convolution serves
        names = [name for name in TRAINING_SIDES if on_cpu or "Winograd" not in name]
        trained = build_sides(names, *common)
    if "training" in options.parts:
        results["training"] = training(trained, options.train_size, options.rounds)
        heading = "## Training: a step of SGD (momentum 0.9; learning rate 0, no weight moves)"
        say(heading, training_table(results["training"]))
    if "memory" in options.parts:
        results["memory"] = []
        for size in options.sizes:
            results["memory"] += memory(weights, "inference", size, list(sides), options)
        size = options.train_size
        results["memory"] += memory(weights, "training", size, list(trained), options)
        say("## Peak memory", memory_table(results["memory"]))

    results["targets"] = targets(results)
    say("## Targets", targets_table(results["targets"]))
    if results["left_out"]:
        say("Left out:", *(f"- {side}: {why}" for side, why in results["left_out"].items()))
    if options.output:
        write_json(options.output / "whole_model.json", results)
        (options.output / "whole_model.md").write_text("\n\n".join(report) + "\n")
        if results.get("stages"):
            title = "Faster R-CNN by stages: {processor}, threads {threads}, commit {commit}"
            file = options.output / "whole_model.png"
            draw_stages(results["stages"], file, title.format(**results["about"]))


if __name__ == "__main__":
    main(sys.argv[1:])
