"""Tables of speed on CPUs, from results/speed-cpu: written into pages by generate.py.

A folder for each kind of processor, with deployment.json (benchmarks/deployment.py: inference, its
memory), whole_model.json (benchmarks/whole_model.py: training steps) and, of some, networks.json
(benchmarks/networks.py: other networks), predict.json (benchmarks/predict_speed.py) and layers.json
(benchmarks/layers.py: where the time goes).
"""

import json
from pathlib import Path
from typing import Any

from fpn_ext.reporting.measuring import ratio_text

KINDS = {
    "amx": "AVX-512 and AMX, Intel",
    "avx512": "AVX-512, Intel",
    "avx2-emulated": "AVX2 (emulated), Intel",
    "avx512-amd": "AVX-512, AMD",
    "avx2-emulated-amd": "AVX2 (emulated), AMD",
}
SIZES = ("480x640", "800x1333")
PEER = "torchvision, OpenVINO"
FAST = "this project, channels_last, fold_norms, Winograd"  # as NUMERICS fast sets it
# Instructions -> figure -> what was aimed at.
TARGETS: dict[str, dict[str, float]] = {
    "avx2": {
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
HALF = "inference in bfloat16 at {}, times OpenVINO in bfloat16"
TARGETS["amx"] = {**TARGETS["avx512"], **{HALF.format(size): 1.1 for size in SIZES}}
MEMORY = {"optimised": "optimised", "exported, ONNX Runtime": "exported to ONNX Runtime"}
LEAST_SHARE = 0.9  # of the model's images a second
MOST_MEMORY = 0.75  # of the process's peak in Detectron2


class Figures:
    """The files of a kind of processor, in a folder of results/speed-cpu."""

    def __init__(self, results: Path, kind: str):
        self.name, self.folder = KINDS[kind], results / kind
        self.targets = next(bounds for name, bounds in TARGETS.items() if kind.startswith(name))
        self.deployment, self.whole = (
            json.loads((results / kind / file).read_text())
            for file in ("deployment.json", "whole_model.json")
        )

    @property
    def torch(self) -> str:
        return str(self.deployment["versions"]["torch"])

    @property
    def openvino(self) -> str:
        return str(self.deployment["versions"]["openvino"])

    def inference(self, size: str, side: str = "optimised") -> dict[str, Any]:
        return only(self.deployment["rows"], size=size, side=side)

    def training(self, side: str = "") -> dict[str, Any]:
        return only(self.whole["training"], side=side or FAST)

    @property
    def has_memory(self) -> bool:
        return bool(self.deployment.get("memory"))

    def memory(self, size: str, side: str = "optimised") -> tuple[float, float]:
        """MiB at the peak of the process: of a side, of Detectron2."""
        rows = self.deployment["memory"]
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
            if HALF.format(size) in self.targets:
                half = self.inference(size, "optimised, bfloat16")
                found[HALF.format(size)] = half["half_peer_ratio"]
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
    rows = []
    for kind in kinds:
        inference = [kind.inference(size) for size in SIZES]
        ratios = [[f"{row[key]:.2f}" for key in ("ratio", "peer_ratio")] for row in inference]
        rows.append([kind.name, *ratios[0], *ratios[1], f"{kind.training()['ratio']:.2f}"])
    header = ["processor"]
    header += [f"{size}, times {peer}" for size in SIZES for peer in ("Detectron2", "OpenVINO")]
    size = kinds[0].training()["size"]
    header.append(f"training step on 2 of {size}, times Detectron2")
    memory = [
        f"{' and '.join(shares)} {name}"
        for side, name in MEMORY.items()
        for shares in [[_share(kinds[0].memory(size, side)) for size in SIZES]]
    ]
    halves = [kinds[0].inference(size, "optimised, bfloat16") for size in SIZES]
    half, over = ([f"{row[key]:.2f}" for row in halves] for key in ("ratio", "half_peer_ratio"))
    in_half = (
        f"In bfloat16 on AMX, at these sizes: {' and '.join(half)} times Detectron2 in float32, "
        f"{' and '.join(over)} times OpenVINO in bfloat16."
    )
    words = (
        f"{in_half} Peak memory of the process, of Detectron2's, at these sizes: "
        f"{', '.join(memory)}."
    )
    above = f"2 threads, torch {kinds[0].torch}, OpenVINO {kinds[0].openvino}; medians:"
    return "\n\n".join([above, table(header, rows), words, networks_in_words(results)])


def _share(memory: tuple[float, float]) -> str:
    return f"{memory[0] / memory[1]:.2f}"


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


def kept_table(file: Path) -> str:
    """In bfloat16, where the process keeps its memory: Detectron2, this project, OpenVINO."""
    record = json.loads(file.read_text())
    rows = [
        [
            *(row["size"], row["side"], f"{row['ms']:.0f}", ratio_text(row)),
            ratio_text(row, "half_peer_ratio"),
        ]
        for row in record["rows"]
    ]
    header = ["size", "side", "ms", "times Detectron2", "times OpenVINO in bfloat16"]
    return f"Commit {record['commit']}, {record['rounds']} rounds:\n\n{table(header, rows)}"


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
    for kind, of_kind in _networks(results).items():
        networks = of_kind.values()
        for name in ("training", "inference"):
            ratios = [row[name]["ratio"] for row in networks]
            words.append(f"{name} {min(ratios):.2f} to {max(ratios):.2f} times ({KINDS[kind]})")
    return (
        f"Over {len(networks)} networks of Detectron2, torchvision and timm, fast numerics, the "
        f"default, gain on exact ones: {', '.join(words)}."
    )


def _networks(results: Path) -> dict[str, dict[str, Any]]:
    """What networks.json has, of the kinds of processor that it was measured on."""
    files = {kind: results / kind / "networks.json" for kind in KINDS}
    return {
        kind: json.loads(file.read_text())["networks"]
        for kind, file in files.items()
        if file.is_file()
    }


def networks_table(results: Path) -> str:
    """What NUMERICS fast gains over exact, network by network, on each kind of processor."""
    measured = _networks(results)
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


def memory_table(results: Path, kind: str) -> str:
    """Peak memory of a process that infers."""
    record = Figures(results, kind).deployment
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
    return f"{record['hardware']}, commit {record['commit']}:\n\n{table(header, rows)}"


def layers_tables(results: Path) -> str:
    """Where an optimised model's time goes, beside a matrix product; of each kind measured."""
    files = {kind: results / kind / "layers.json" for kind in KINDS}
    found = [_layers(KINDS[kind], file) for kind, file in files.items() if file.is_file()]
    command = "python benchmarks/layers.py --json results/speed-cpu/avx512/layers.json"
    return "\n\n".join(found) or f"Not run yet: `{command}`."


def _layers(kind: str, file: Path) -> str:
    record = json.loads(file.read_text())
    about, rows = record["about"], []
    for size, of_size in record["sizes"].items():
        product = of_size["product_gflops"]
        whole = max(row["ms"] for row in of_size["rows"])
        for row in of_size["rows"]:
            rate = [f"{row['gflops']:.0f}", f"{row['gflops'] / product:.2f}"]
            share = f"{row['ms'] / whole:.0%}"
            number = str(row["calls"] or "")
            known = rate if row["gflop"] else ["", ""]
            rows.append([size, row["kind"], number, f"{row['ms']:.0f}", share, *known])
    header = ["size", "layers", "calls", "ms", "share of the time", "GFLOP/s"]
    header += ["of a matrix product's"]
    return (
        f"{kind}, {about['threads']} threads, commit {about['commit']}, {about['rounds']} rounds:"
        f"\n\n{table(header, rows)}"
    )


def targets_table(results: Path) -> str:
    """What was wanted, and what was reached."""
    rows = []
    for figures in (Figures(results, kind) for kind in KINDS):
        reached = figures.reached()
        for what, bound in figures.targets.items():
            met = "met" if reached[what] >= bound else "not met"
            rows.append([figures.name, what, f">= {bound:g}", f"{reached[what]:.2f}", met])
        for size in SIZES:
            for side in MEMORY if figures.has_memory else ():
                share = float(_share(figures.memory(size, side)))
                what = f"peak memory of the process at {size}, of Detectron2's: {side}"
                met = "met" if share <= MOST_MEMORY else "not met"
                rows.append([figures.name, what, f"<= {MOST_MEMORY:g}", f"{share:.2f}", met])
        if predicted := figures.predict_share():
            met = "met" if predicted >= LEAST_SHARE else "not met"
            what = "`predict` on a folder, of the model's images a second"
            rows.append([figures.name, what, f">= {LEAST_SHARE:g}", f"{predicted:.2f}", met])
    return table(["processor", "figure", "wanted", "reached", ""], rows)


def predict_words(results: Path) -> str:
    """How fast predicting on a folder is, beside its model alone."""
    files = {kind: results / kind / "predict.json" for kind in KINDS}
    return "\n\n".join(_predict(KINDS[k], file) for k, file in files.items() if file.is_file())


def _predict(kind: str, file: Path) -> str:
    record = json.loads(file.read_text())
    about, rate = record["about"], record["images_a_second"]
    low, high = record["share_range"]
    return (
        f"{kind}, {about['images']} photographs, resized to {' and '.join(about['size'])}, "
        f"{about['threads']} threads, commit {about['commit']}, {about['rounds']} rounds: "
        f"{rate['predict']:.2f} images a second, the model alone {rate['model alone']:.2f}; "
        f"{record['share']:.2f} ({low:.2f} to {high:.2f}) of it."
    )
