"""Average recall of one RPN's proposals: by pycocotools, and by Detectron2's own routine.

    python benchmarks/recall_difference.py --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
        MODEL.META_ARCHITECTURE ProposalNetwork MODEL.WEIGHTS output/rpn/model_final.pth

Both score the same proposals on the first data set of ``DATASETS.TEST``. Nothing is trained. What
docs/evidence/average_recall.md shows is in results/average_recall/recall_difference.json.
"""

import argparse
from collections.abc import Sequence

import torch
from fpn_ext import prepare  # before detectron2
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from fpn_ext.evaluation.recall import ProposalRecallEvaluator
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.measuring import markdown_table
from fpn_ext.reporting.provenance import commit, hardware

SIDES = ("pycocotools", "Detectron2")


def compare(cfg: CfgNode) -> list[dict]:
    """AR in percent by both, for what both compute: {"metric", *SIDES, "difference"}."""
    (dataset_name, *_) = cfg.DATASETS.TEST
    model = build_model(cfg).eval()
    SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    evaluators = [ProposalRecallEvaluator(dataset_name), COCOEvaluator(dataset_name)]
    for evaluator in evaluators:
        evaluator.reset()
    with torch.no_grad():
        for inputs in build_detection_test_loader(cfg, dataset_name):
            outputs = model(inputs)
            for evaluator in evaluators:
                evaluator.process(inputs, outputs)
    ours, theirs = (evaluator.evaluate()["box_proposals"] for evaluator in evaluators)
    return [
        {
            "metric": metric,
            **dict(zip(SIDES, (ours[metric], theirs[metric]), strict=True)),
            "difference": theirs[metric] - ours[metric],
        }
        for metric in ours
        if metric in theirs
    ]


def table(rows: list[dict]) -> str:
    cells = [
        [
            r["metric"],
            *(f"{r[side]:.2f}" for side in SIDES),
            f"{round(r['difference'], 2) + 0.0:+.2f}",  # + 0.0: no "-0.00"
        ]
        for r in rows
    ]
    return markdown_table(["", *SIDES, "difference"], cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    options = parser.parse_args(argv)
    cfg, notes = prepare(options.config_file, options.opts, weights="required")
    print("\n".join(notes))
    if cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork":
        parser.error("the model must be an RPN alone: MODEL.META_ARCHITECTURE ProposalNetwork")
    rows = compare(cfg)
    print(table(rows))
    if options.json:
        write_json(options.json, {"commit": commit(), "hardware": hardware(), "rows": rows})


if __name__ == "__main__":
    main()
