"""One detector's AP with Detectron2's components, and with this project's in each numerics.

    python benchmarks/agreement.py --weights output/demo_R_18/model_final.pth \
        --config-file configs/demo/faster_rcnn_R_18_FPN.yaml --json results/agreement/agreement.json

Nothing is trained: the same weights are scored by `fpn-ext eval` on DATASETS.TEST once for each
side, in a process of its own. Weights and config belong together, as `fpn-ext train` leaves them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DETECTRON2 = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.ANCHOR_GENERATOR.NAME": "DefaultAnchorGenerator",
    "MODEL.PROPOSAL_GENERATOR.NAME": "RPN",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.FPN_EXT.NUMERICS": "exact",
}
SIDES: dict[str, dict[str, str]] = {
    "Detectron2": DETECTRON2,
    "`NUMERICS: exact`": {"MODEL.FPN_EXT.NUMERICS": "exact"},
    "`INFERENCE_DTYPE: float32`": {"MODEL.FPN_EXT.INFERENCE_DTYPE": "float32"},
    "`INFERENCE_DTYPE: bfloat16`": {"MODEL.FPN_EXT.INFERENCE_DTYPE": "bfloat16"},
}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def scores(options: argparse.Namespace, overrides: dict[str, str]) -> dict[str, float | None]:
    """The box AP of one side, in percent, by metric."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["eval", "--config-file", options.config_file, *options.opts]
        words += [word for pair in overrides.items() for word in pair]
        words += ["MODEL.WEIGHTS", options.weights, "OUTPUT_DIR", folder]
        subprocess.run(
            [sys.executable, "-m", "fpn_ext", *words], check=True, stdout=subprocess.DEVNULL
        )
        (file,) = Path(folder).glob("inference/*/results.json")
        found = json.loads(file.read_text())["bbox"]
    return {metric: found.get(metric) for metric in METRICS}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", required=True, metavar="FILE")
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of all sides")
    options = parser.parse_intermixed_args(argv)

    from fpn_ext.reporting.json_files import write_json
    from fpn_ext.reporting.provenance import commit, hardware, versions

    rows: list[dict[str, Any]] = []
    facts = {
        "config": options.config_file,
        "overrides": options.opts,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }
    for side, overrides in SIDES.items():
        rows.append({"side": side, "scores": scores(options, overrides)})
        write_json(options.json, {**facts, "rows": rows})  # what is done is kept
        print(side, *(f"{name} {value}" for name, value in rows[-1]["scores"].items()))


if __name__ == "__main__":
    main()
