"""A config trained from several seeds, each in a process of its own: scores, CPU time, time.

    python benchmarks/seeds.py --config-file configs/demo/faster_rcnn_efficientnet_lite0_FPN.yaml \
        --seeds 1 2 3 --json results/demo/seeds.json
    python benchmarks/seeds.py --data "$DETECTRON2_DATASETS/BCCD" \
        --config-file configs/start/faster_rcnn_fast_cpu.yaml --json results/start/bccd.json

The file is written after each seed. What a user runs, `fpn-ext train`, from its start to the end of
the last evaluation; the seconds are those of the machine as it is. CPU time counts all threads and
says more beside other work.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# What the environment may say of threads and instructions.
VARIABLES = ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def train(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Train with a seed; returns its seconds, CPU seconds and scores by dataset."""
    words = [sys.executable, "-m", "fpn_ext", "train", "--config-file", options.config_file]
    words += ["--data", options.data] if options.data else []
    words += ["SEED", str(seed), "OUTPUT_DIR", str(folder), *options.opts]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    files = sorted(folder.glob("inference/*/results.json"))
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "results": {file.parent.name: json.loads(file.read_text()) for file in files},
    }


def shown(score: float | None) -> str:
    """A score, or a dash where nothing was detected."""
    return "-" if score is None else f"{score:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--data", metavar="PATH", help="as for fpn-ext train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE")
    options = parser.parse_intermixed_args()

    from fpn_ext.reporting.json_files import write_json
    from fpn_ext.reporting.provenance import commit, hardware, versions

    # Before training: the checkout may change meanwhile.
    facts = {
        "config": options.config_file,
        "data": Path(options.data).name if options.data else None,
        "overrides": options.opts,
        "commit": commit(),
        "hardware": hardware(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "versions": versions(),
    }
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            runs.append(train(options, seed, Path(folder, str(seed))))
            write_json(options.json, {**facts, "runs": runs})  # what is done is kept
    for run in runs:
        for dataset, results in run["results"].items():
            box = results["bbox"]
            print(
                f"seed {run['seed']}: {dataset} AP {shown(box['AP'])}, AP50 {shown(box['AP50'])}, "
                f"{run['seconds']:.0f} s, CPU {run['cpu_seconds']:.0f} s"
            )


if __name__ == "__main__":
    main()
