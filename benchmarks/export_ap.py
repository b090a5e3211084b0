"""Average precision of an exported detector beside that of the model it was made from.

    python benchmarks/export_ap.py --run output/demo --format onnx openvino torchscript \
        --int8 onnx openvino --json results/export/demo.json

Each file is made by what `fpn-ext export` calls, into a temporary folder, and scored on the first
dataset of DATASETS.TEST by the evaluation of `fpn-ext eval`. Results are written after each, and
the same command again at the same commit goes on with what is missing. Exit status 1 if a score
differs by more than 0.1, or in eight bits is lower by more than 1.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

MOST_APART = 0.1  # AP, of 100


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR")
    parser.add_argument("--format", nargs="+", required=True)
    parser.add_argument("--int8", nargs="+", default=[], help="formats, in eight bits")
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--name", help="of the model, in the file; unless given, the folder's")
    options = parser.parse_args()

    import fpn_ext  # noqa: F401, before detectron2
    from detectron2.data import build_detection_test_loader
    from detectron2.evaluation import inference_on_dataset
    from fpn_ext.evaluation.evaluators import build_evaluator
    from fpn_ext.export.formats import FORMATS
    from fpn_ext.export.runtime import ExportedModel
    from fpn_ext.export.write import export
    from fpn_ext.export.write_int8 import export_int8
    from fpn_ext.files.run_folder import config_of, weights_of
    from fpn_ext.inference.predictor import Predictor, inference_config
    from fpn_ext.reporting.json_files import write_json
    from fpn_ext.reporting.provenance import commit, hardware, versions

    opts = ["MODEL.WEIGHTS", str(weights_of(options.run)), "MODEL.DEVICE", "cpu"]
    cfg, _ = inference_config(str(config_of(options.run)), opts)
    predictor = Predictor(cfg)
    dataset = cfg.DATASETS.TEST[0]

    def scores(model):
        loader = build_detection_test_loader(cfg, dataset)
        evaluator = build_evaluator(cfg, dataset, None)
        results = inference_on_dataset(model, loader, evaluator)
        return {task: results[task]["AP"] for task in results if "AP" in results[task]}

    facts = {"commit": commit(), "hardware": hardware(), "versions": versions()}
    record = {"model": options.name or options.run.name, "dataset": dataset, **facts}
    output = Path(options.json)
    before = json.loads(output.read_text()) if output.is_file() else {}
    if before.get("commit") == record["commit"]:
        record = before
    else:
        record |= {"pytorch": scores(predictor.model), "exported": {}}
        write_json(output, record)
    in_pytorch, exported = record["pytorch"], record["exported"]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.format:
            if name in exported:
                continue
            file = Path(folder, f"model{FORMATS[name].suffix}")
            rows = export(cfg, predictor.model, predictor.classes, file, name)
            exported[name] = {
                "scores": scores(ExportedModel(file)),
                "largest_difference_px": max(row.boxes for row in rows),
                "largest_difference_of_a_score": max(row.scores for row in rows),
            }
            write_json(output, record)
        for name in options.int8:
            if f"{name}, int8" in exported:
                continue
            file = Path(folder, f"int8{FORMATS[name].suffix}")
            found = export_int8(cfg, predictor.model, predictor.classes, file, name)
            of_dataset = [cost for cost in found.costs if cost.dataset == dataset]
            exported[f"{name}, int8"] = {
                "scores": {c.score.removesuffix(" AP"): c.int8 for c in of_dataset},
                "calibration_pictures": found.pictures,
                "mib_in_float32_and_int8": found.mib,
            }
            write_json(output, record)
    apart = 0.0
    for name, of_file in exported.items():
        for task, score in of_file["scores"].items():
            if not name.endswith("int8"):
                apart = max(apart, abs(score - in_pytorch[task]))
            print(f"{name}: {task} AP {score:.2f}, PyTorch {in_pytorch[task]:.2f}")
    return int(apart > MOST_APART)


if __name__ == "__main__":
    sys.exit(main())
