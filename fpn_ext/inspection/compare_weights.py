"""One checkpoint in the models of two configs: agreement, scores, time and memory."""

import contextlib
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from torch import nn

from ..config.unread import unread_keys
from ..data.mapper import PictureMapper
from ..evaluation.evaluators import build_evaluator
from ..files.checkpoint import SafeCheckpointer
from ..files.weight_files import local_file, sha256
from ..inference.predictor import detections_of
from ..reporting.measuring import markdown_table, measure, peak_memory, ratio, ratio_text
from ..speed.optimize import model_for_inference
from .agreement import TO_ROUNDING, TO_THE_BIT, Matches, StageByStage, Tolerance, end_to_end_rows

TIMED_IMAGES = 5
SECONDS_BETWEEN_WORDS = 20


def compare_weights(
    sides: dict[str, CfgNode], weights: str, images: int | None, rounds: int, folder: Path
) -> dict[str, Any]:
    """Both models with the same weights, on ``DATASETS.TEST``.

    Args:
        sides: the configs ``ours`` and ``control``, with the same ``DATASETS.TEST``.
        weights: a path or URL, see :func:`fpn_ext.files.weight_files.local_file`.
        images: use only the first N of each dataset; None for all.
        rounds: of timing; with 0, neither time nor memory is measured.
        folder: for the evaluators' output.

    Returns:
        The input of :func:`markdown`. ``agrees`` says whether all differences are within the parity
        tests' tolerances; None if these do not cover such models.

    Raises:
        FileNotFoundError, ConnectionError: the weights are not available.
        ValueError: they do not match both models.
    """
    file = local_file(weights)
    models = build_models(sides, file)
    tolerance, words = tolerance_of(sides)
    stages, whole = StageByStage(models["control"], models["ours"]), Matches()
    test_sets = sides["ours"].DATASETS.TEST
    counts: dict[str, int] = {}
    scores: list[dict[str, Any]] = []
    for name in test_sets:
        evaluators = {
            side: build_evaluator(cfg, name, str(folder / side / name))
            for side, cfg in sides.items()
        }
        pairs = _with_words(_image_pairs(sides, name, images), name)
        image_ids = _detect(models, pairs, evaluators, stages, whole)
        counts[name] = len(image_ids)
        chosen = [] if images is None else [image_ids]
        with contextlib.redirect_stdout(sys.stderr):  # pycocotools prints
            by_side = {side: e.evaluate(*chosen) or {} for side, e in evaluators.items()}
        scores += score_rows(name, by_side["ours"], by_side["control"])
    results: dict[str, Any] = {
        "weights": weights,
        "sha256": sha256(file),
        "images": counts,
        "tolerance": words,
        "stages": stages.rows(tolerance),
        "left_out": stages.left_out,
        "end_to_end": end_to_end_rows(whole, tolerance),
        "scores": scores,
    }
    rows = results["stages"] + results["end_to_end"]
    results["agrees"] = tolerance and all(row["within"] is not False for row in rows)
    if rounds:
        timed = list(itertools.islice(_image_pairs(sides, test_sets[0], images), TIMED_IMAGES))
        results["rounds"] = rounds
        results["timed_images"] = len(timed)
        results["seconds_per_image"] = _seconds_per_image(models, timed, rounds)
        del models, stages
        results["memory"] = memory_of_sides(sides, file, timed)
    return results


# The checkpoint


class StrictCheckpointer(SafeCheckpointer):
    """A checkpointer for which an unmatched key is an error, not a log message."""

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        faults = []
        # A key with a different shape also counts as missing.
        other_shape = {key for key, *_ in incompatible.incorrect_shapes}
        missing = [key for key in incompatible.missing_keys if key not in other_shape]
        if missing:
            faults.append(f"not in the checkpoint: {', '.join(missing)}")
        if incompatible.unexpected_keys:
            faults.append(f"not in the model: {', '.join(incompatible.unexpected_keys)}")
        for key, in_checkpoint, in_model in incompatible.incorrect_shapes:
            faults.append(f"{key} is {in_checkpoint} in the checkpoint, {in_model} in the model")
        if faults:
            raise ValueError("; ".join(faults))


def build_models(sides: dict[str, CfgNode], file: str) -> dict[str, nn.Module]:
    """The configs' models as built by ``fpn-ext eval``, with weights from a local file.

    Raises:
        ValueError: lists, for each model, all unmatched keys.
    """
    models, faults = {}, []
    for side, cfg in sides.items():
        model = build_model(cfg).eval()
        try:
            StrictCheckpointer(model).load(file)
        except ValueError as error:
            faults.append(f"\n  - {side}: {error}")
        models[side] = model
    if faults:
        raise ValueError(f"the weights {file} do not fit:{''.join(faults)}")
    return {side: model_for_inference(sides[side], model) for side, model in models.items()}


# Agreement and scores


def tolerance_of(sides: dict[str, CfgNode]) -> tuple[Tolerance | None, str]:
    """The parity tests' tolerance for two such models, also in words; None without such a test."""
    reasons = []
    for cfg in sides.values():
        own, unread = cfg.MODEL.FPN_EXT, unread_keys(cfg)
        if own.INFERENCE_DTYPE in ("bfloat16", "float16"):
            return (
                None,
                f"no test holds one for MODEL.FPN_EXT.INFERENCE_DTYPE {own.INFERENCE_DTYPE}",
            )
        if cfg.MODEL.DEVICE != "cpu":
            reasons.append(f"MODEL.DEVICE {cfg.MODEL.DEVICE}")
        if own.INFERENCE_DTYPE:
            reasons.append(f"MODEL.FPN_EXT.INFERENCE_DTYPE {own.INFERENCE_DTYPE}")
        if own.CHANNELS_LAST and "MODEL.FPN_EXT.CHANNELS_LAST" not in unread:
            reasons.append("MODEL.FPN_EXT.CHANNELS_LAST True")
        if "MODEL.FPN_EXT.BOXES_PER_CHUNK" not in unread:
            reasons.append(f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME}")
        if (
            own.POOLER_IMPLEMENTATION != "per_level"
            and "MODEL.FPN_EXT.POOLER_IMPLEMENTATION" not in unread
        ):
            reasons.append(f"MODEL.FPN_EXT.POOLER_IMPLEMENTATION {own.POOLER_IMPLEMENTATION}")
    if not reasons:
        return TO_THE_BIT, "equal to the bit, being float32 on CPU with per_level pooling"
    return TO_ROUNDING, (
        f"equal to rounding, because of {', '.join(dict.fromkeys(reasons))}: the values of a stage "
        f"to {TO_ROUNDING.values:g} of their largest, its boxes to {TO_ROUNDING.boxes:g} px, its "
        f"scores to {TO_ROUNDING.scores:g}; {TO_ROUNDING.found_again:.0%} of the end-to-end "
        "detections found again"
    )


def _image_pairs(
    sides: dict[str, CfgNode], dataset: str, images: int | None
) -> Iterator[dict[str, list[dict]]]:
    """Each image as input for both models, as in Detectron2's evaluation."""
    loaders = [
        build_detection_test_loader(cfg, dataset, mapper=PictureMapper(cfg, False))
        for cfg in sides.values()
    ]
    for inputs in itertools.islice(zip(*loaders, strict=True), images):
        yield dict(zip(sides, inputs, strict=True))


def _detect(
    models: dict[str, nn.Module],
    pairs: Iterable[dict[str, list[dict]]],
    evaluators: dict[str, Any],
    stages: StageByStage,
    whole: Matches,
) -> list[Any]:
    """Run both models on every image, update stages, matches, evaluators; return image ids."""
    image_ids = []
    for evaluator in evaluators.values():
        evaluator.reset()
    with torch.no_grad(), _exact_convolutions():
        for inputs in pairs:
            outputs = {"control": stages.compare(inputs["control"], inputs["ours"])}
            outputs["ours"] = models["ours"](inputs["ours"])
            for own, control in zip(outputs["ours"], outputs["control"], strict=True):
                whole.add(detections_of(own), detections_of(control), "pred_boxes", "scores")
            for side, evaluator in evaluators.items():
                evaluator.process(inputs[side], outputs[side])
            image_ids += [image["image_id"] for image in inputs["ours"]]
    return image_ids


def _exact_convolutions() -> Any:
    """Float32 convolutions on CUDA, which default to TF32 (10-bit mantissa)."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False
    )


def _with_words(pairs: Iterable[Any], dataset: str) -> Iterator[Any]:
    """The same pairs, with occasional progress on stderr."""
    said = time.monotonic()
    for number, pair in enumerate(pairs):
        yield pair
        if time.monotonic() - said > SECONDS_BETWEEN_WORDS:
            said = time.monotonic()
            print(f"{dataset}: {number + 1} images", file=sys.stderr, flush=True)


def score_rows(dataset: str, ours: dict, control: dict) -> list[dict[str, Any]]:
    """One row per score: ``dataset``, ``task``, ``metric``, both values, their difference.

    >>> score_rows("val", {"bbox": {"AP": 40.5}}, {"bbox": {"AP": 40.0}})[0]["difference"]
    0.5
    """
    return [
        {
            "dataset": dataset,
            "task": task,
            "metric": metric,
            "ours": value,
            "control": control[task][metric],
            "difference": value - control[task][metric],
        }
        for task, metrics in ours.items()
        for metric, value in metrics.items()
        if metric in control.get(task, {})
    ]


# Time and memory


def _seconds_per_image(
    models: dict[str, nn.Module], timed: list[dict[str, list[dict]]], rounds: int
) -> list[dict[str, Any]]:
    def on_all(side: str) -> None:
        with torch.no_grad():
            for inputs in timed:
                models[side](inputs[side])

    device = next(models["ours"].parameters()).device.type
    times, _ = measure({side: partial(on_all, side) for side in models}, rounds, device)
    return [
        {
            "side": side,
            "seconds": statistics.median(of_rounds) / 1000 / len(timed),
            **ratio(times, side, "control"),
        }
        for side, of_rounds in times.items()
    ]


def memory_of_sides(
    sides: dict[str, CfgNode], file: str, timed: list[dict[str, list[dict]]]
) -> list[dict[str, Any]]:
    """MiB of each side with its model loaded, and at peak; [] if the system does not report it."""
    rows = []
    for side, cfg in sides.items():
        largest = max((inputs[side] for inputs in timed), key=lambda x: x[0]["image"].numel())
        # In a fresh process.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            threads = torch.get_num_threads()
            figures = process.submit(_memory_of_one, cfg, file, largest, threads).result()
        if figures is None:
            return []
        rows.append({"side": side, **figures, "over_model": figures["peak"] - figures["before"]})
    return rows


def _memory_of_one(
    cfg: CfgNode, file: str, inputs: list[dict], threads: int
) -> dict[str, float] | None:
    torch.set_num_threads(threads)
    model = build_models({"the model": cfg}, file)["the model"]
    small = [{**x, "image": x["image"][:, :64, :64]} for x in inputs]
    with torch.no_grad():
        model(small)  # excludes one-time setup
        return peak_memory(lambda: [model(inputs) for _ in range(2)], cfg.MODEL.DEVICE)


# The report


def markdown(results: dict[str, Any]) -> str:
    """The sections of the report, from the JSON form of :func:`compare_weights`' result."""
    images = ", ".join(f"{count} of {name}" for name, count in results["images"].items())
    sections = [
        f"Weights: {results['weights']} (SHA-256 {results['sha256']}). Images: {images}.",
        f"## Agreement\n\nTolerance: {results['tolerance']}. {_verdict(results)}",
        "Each stage of ours is given what the control's stage before it returned; end to end, both "
        "models are left alone. A box is found again where one of the same class lies within a "
        "pixel of it; differences of boxes and scores are those of the boxes found again.",
        agreement_table(results["stages"] + results["end_to_end"]),
    ]
    if results["left_out"]:
        sections.append(f"Only one of the two has: {', '.join(results['left_out'])}.")
    sections.append(f"## Scores\n\n{score_table(results['scores'])}")
    if "seconds_per_image" in results:
        sections.append(
            f"## Time and memory\n\nBoth in one process, in turn, {results['rounds']} rounds over "
            f"{results['timed_images']} image(s), one at a time; medians. Peak memory in a process "
            "of its own each, of the largest of these images."
        )
        sections.append(cost_table(results["seconds_per_image"], results["memory"]))
    return "\n\n".join(sections)


def _verdict(results: dict[str, Any]) -> str:
    if results["agrees"] is None:
        return "Nothing is judged."
    rows = results["stages"] + results["end_to_end"]
    beyond = [row["what"] for row in rows if row["within"] is False]
    return f"**Beyond it: {', '.join(beyond)}.**" if beyond else "**All within it.**"


def agreement_table(rows: list[dict[str, Any]]) -> str:
    header = [
        "",
        "largest difference",
        "of the largest value",
        "tolerance",
        "found again",
        "within",
    ]
    verdict = {True: "yes", False: "**no**", None: ""}
    cells = []
    for row in rows:
        found = ""
        if "found_again" in row:
            found = f"{row['found_again']} of {row['of']}"
            found += f", {row['others']} other(s)" if row["others"] else ""
        difference = "not comparable" if row["difference"] is None else f"{row['difference']:.2g}"
        cells.append(
            [
                *(row["what"], difference, _number(row["relative"]), _number(row["tolerance"])),
                *(found, verdict[row["within"]]),
            ]
        )
    return markdown_table(header, cells)


def score_table(rows: list[dict[str, Any]]) -> str:
    header = ["dataset", "", "ours", "control", "difference"]
    return markdown_table(
        header,
        [
            [r["dataset"], f"{r['task']} {r['metric']}"]
            + ["" if r[k] is None else f"{r[k]:.3f}" for k in ("ours", "control", "difference")]
            for r in rows
        ],
    )


def cost_table(seconds: list[dict[str, Any]], memory: list[dict[str, Any]]) -> str:
    header = ["", "seconds per image", "times the control (min to max)"]
    header += ["MiB with the model", "MiB at the peak"]
    figures = {row["side"]: row for row in memory}
    cells = []
    for row in seconds:
        own = figures.get(row["side"])
        mib = [f"{own['before']:.0f}", f"{own['peak']:.0f}"] if own else ["not measured"] * 2
        cells.append([row["side"], f"{row['seconds']:.4g}", ratio_text(row), *mib])
    return markdown_table(header, cells)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
