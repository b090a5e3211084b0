"""Tables of speed on CPUs, from results/speed-cpu: written into pages by generate.py.

A folder for each kind of processor, with deployment.json (benchmarks/deployment.py: inference, its
memory), whole_model.json (benchmarks/whole_model.py: training steps), networks.json
(benchmarks/networks.py: other networks) and, of one kind, predict.json
(benchmarks/predict_speed.py).
"""

import json
from pathlib import Path
from typing import Any

from fpn_ext.reporting.measuring import ratio_text

KINDS = {"avx512": "AVX-512", "avx2-emulated": "AVX2 (emulated)"}
SIZES = ("480x640", "800x1333")
PEER = "torchvision, OpenVINO"
FAST = "this project, channels_last, fold_norms, Winograd"  # as NUMERICS fast sets it
# Kind of processor -> figure -> what was aimed at.
TARGETS: dict[str, dict[str, float]] = {
    "avx2-emulated": {
        "inference at 480x640, times OpenVINO": 1.25,
        "inference at 800x1333, times OpenVINO": 1.25,
        "inference at 480x640, times Detectron2": 2.1,
        "inference at 800x1333, times Detectron2": 2.7,
        "training step, times Detectron2": 1.9,
    },
    "avx512": {
        "inference at 480x640, times OpenVINO": 1.25,
        "inference at 800x1333, times OpenVINO": 1.25,
        "inference at 480x640, times Detectron2": 2.3,
        "inference at 800x1333, times Detectron2": 2.8,
        "training step, times Detectron2": 2.1,
    },
}
MEMORY = {"optimised": "optimised", "exported, ONNX Runtime": "exported to ONNX Runtime"}
LEAST_SHARE = 0.9  # of the model's images a second
MOST_MEMORY = 0.75  # of the process's peak in Detectron2


class Figures:
    """The files of a kind of processor, in a folder of results/speed-cpu."""

    def __init__(self, results: Path, kind: str):
        self.name, self.folder = KINDS[kind], results / kind
        self.deployment, self.whole = (
            json.loads((results / kind / file).read_text())
            for file in ("deployment.json", "whole_model.json")
        )

    def inference(self, size: str, side: str = "optimised") -> dict[str, Any]:
        return only(self.deployment["rows"], size=size, side=side)

    def training(self, side: str = "") -> dict[str, Any]:
        return only(self.whole["training"], side=side or FAST)

    def memory(self, size: str, side: str = "optimised") -> tuple[float, float] | None:
        """MiB at the peak of the process: of a side, of Detectron2; None if not measured."""
        rows = self.deployment.get("memory", [])
        if not any(row["size"] == size for row in rows):
            return None
        own, other = (only(rows, size=size, side=s)["peak"] for s in (side, "Detectron2"))
        return own, other

    def predict_share(self) -> float | None:
        """Images a second of predicting on a folder, of the model alone; None if not measured."""
        file = self.folder / "predict.json"
        return float(json.loads(file.read_text())["share"]) if file.is_file() else None

    def reached(self) -> dict[str, float]:
        """The figures of :data:`TARGETS`."""
        found = {"training step, times Detectron2": self.training()["ratio"]}
        for size in SIZES:
            row = self.inference(size)
            found[f"inference at {size}, times OpenVINO"] = row["peer_ratio"]
            found[f"inference at {size}, times Detectron2"] = row["ratio"]
        return found


def only(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = (row for row in rows if wanted.items() <= row.items())
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(results: Path) -> str:
    """For the README: inference and training on each kind, memory."""
    kinds = [Figures(results, kind) for kind in KINDS]
    rows = [
        [f"inference, {kind.name}", size, ratio_text(row), ratio_text(row, "peer_ratio")]
        for kind in kinds
        for size in SIZES
        for row in [kind.inference(size)]
    ]
    for kind in kinds:
        row = kind.training()
        rows.append([f"training step, batch 2, {kind.name}", row["size"], ratio_text(row), ""])
    for size in SIZES:
        for side, name in MEMORY.items():
            memory = kinds[0].memory(size, side)
            if memory:
                what = f"{memory[0]:.0f} MiB, Detectron2 {memory[1]:.0f} MiB"
                rows.append([f"peak memory of the process, {name}", size, what, ""])
    header = ["", "size", "times Detectron2", "times torchvision in OpenVINO"]
    above = f"{conditions(kinds[0])}; median (min to max):"
    return "\n\n".join([above, table(header, rows), networks_in_words(results)])


def conditions(figures: Figures) -> str:
    record, about = figures.deployment, figures.whole["about"]
    versions = record["versions"]
    commits = " and ".join(dict.fromkeys([record["commit"], about["commit"]]))
    return (
        f"{record['hardware']}, {record['threads']} threads, torch {versions['torch']}, OpenVINO "
        f"{versions['openvino']}, commits {commits}"
    )


def inference_table(results: Path, kind: str) -> str:
    """Every side of inference on a kind of processor."""
    figures = Figures(results, kind)
    record = figures.deployment
    rows = [
        [
            *(row["size"], row["side"], f"{row['ms']:.0f}", ratio_text(row)),
            *(ratio_text(row, "peer_ratio"), f"{row['found_again']} of {row['detections']}"),
        ]
        for row in record["rows"]
    ]
    header = ["size", "side", "ms", "times Detectron2", f"times {PEER}", "same detections"]
    held = "".join(f", `{name}={value}`" for name, value in record["environment"].items())
    return f"{conditions(figures)}{held}, {record['rounds']} rounds:\n\n{table(header, rows)}"


def training_table(results: Path, kind: str) -> str:
    """Every side of a training step on a kind of processor."""
    figures = Figures(results, kind)
    about = figures.whole["about"]
    rows = [
        [
            *(row["side"], f"{row['ms']:.0f}", ratio_text(row)),
            f"{max(row['relative_difference_of_losses'].values()):.0e}",
        ]
        for row in figures.whole["training"]
    ]
    size = figures.training()["size"]
    header = ["side", "ms", "times Detectron2", "losses differ by, of their value"]
    what = f"{figures.name}, batch 2 of {size}, commit {about['commit']}, {about['rounds']} rounds"
    return f"{what}:\n\n{table(header, rows)}"


def networks_in_words(results: Path) -> str:
    """The least and most that NUMERICS fast gains, over all networks, on each kind."""
    words = []
    for kind in KINDS:
        networks = json.loads((results / kind / "networks.json").read_text())["networks"].values()
        for name in ("training", "inference"):
            ratios = [row[name]["ratio"] for row in networks]
            words.append(f"{name} {min(ratios):.2f} to {max(ratios):.2f} times ({KINDS[kind]})")
    return (
        f"Over {len(networks)} networks of Detectron2, torchvision and timm, fast numerics, the "
        f"default, gain on exact ones: {', '.join(words)}."
    )


def networks_table(results: Path) -> str:
    """What NUMERICS fast gains over exact, network by network, on each kind of processor."""
    measured = {}
    for kind in KINDS:
        file = results / kind / "networks.json"
        measured[kind] = json.loads(file.read_text())["networks"] if file.is_file() else {}
    header, where = ["network"], []
    for kind, networks in measured.items():
        header += [f"training, {KINDS[kind]}", f"inference, {KINDS[kind]}"]
        for commit in dict.fromkeys(row["commit"] for row in networks.values()):
            first = next(row for row in networks.values() if row["commit"] == commit)
            where.append(f"{KINDS[kind]}: {first['threads']} threads, commit {commit}")
    rows = []
    for network in next(iter(measured.values())):
        row = [f"`{network}`"]
        for networks in measured.values():
            found = networks.get(network, {})
            row += [ratio_text(found.get(name, {})) for name in ("training", "inference")]
        rows.append(row)
    return f"{'; '.join(where)}:\n\n{table(header, rows)}"


def memory_table(results: Path) -> str:
    """Peak memory of a process that infers, of AVX-512."""
    record = Figures(results, "avx512").deployment
    rows = [
        [
            *(row["size"], row["side"]),
            *(f"{row[key]:.0f}" for key in ("before", "peak", "over_model")),
            f"{row['ratio']:.2f}",
        ]
        for row in record["memory"]
    ]
    header = ["size", "side", "MiB with the model", "MiB at the peak", "over the model"]
    header += ["peak, of Detectron2's"]
    return f"Commit {record['commit']}:\n\n{table(header, rows)}"


def targets_table(results: Path) -> str:
    """What was wanted, and what was reached."""
    rows = []
    for kind, wanted in TARGETS.items():
        figures = Figures(results, kind)
        reached = figures.reached()
        for what, bound in wanted.items():
            met = "met" if reached[what] >= bound else "not met"
            rows.append([figures.name, what, f">= {bound:g}", f"{reached[what]:.2f}", met])
        for size in SIZES:
            for side in MEMORY:
                memory = figures.memory(size, side)
                if memory:
                    share = memory[0] / memory[1]
                    what = f"peak memory of the process at {size}, of Detectron2's: {side}"
                    met = "met" if share <= MOST_MEMORY else "not met"
                    rows.append([figures.name, what, f"<= {MOST_MEMORY:g}", f"{share:.2f}", met])
        if share := figures.predict_share():
            met = "met" if share >= LEAST_SHARE else "not met"
            what = "`predict` on a folder, of the model's images a second"
            rows.append([figures.name, what, f">= {LEAST_SHARE:g}", f"{share:.2f}", met])
    return table(["processor", "figure", "wanted", "reached", ""], rows)


def predict_words(results: Path) -> str:
    """How fast predicting on a folder is, beside its model alone."""
    record = json.loads((results / "avx512" / "predict.json").read_text())
    about, rate = record["about"], record["images_a_second"]
    low, high = record["share_range"]
    return (
        f"AVX-512, {about['images']} photographs, resized to {' and '.join(about['size'])}, "
        f"{about['threads']} threads, commit {about['commit']}, {about['rounds']} rounds: "
        f"{rate['predict']:.2f} images a second, the model alone {rate['model alone']:.2f}; "
        f"{record['share']:.2f} ({low:.2f} to {high:.2f}) of it."
    )
