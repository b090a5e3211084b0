"""End to end, from the command line to drawings, on a few generated images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fpn_ext.__main__ import VERBS, main
from fpn_ext.engine.train import setup
from fpn_ext.inference.pictures import find_pictures
from fpn_ext.inference.predictor import build_predictor, load_inference_config
from fpn_ext.inspection.contact_sheet import draw_curves
from PIL import Image
from unsafe import touches

DATASET = Path(os.environ["DETECTRON2_DATASETS"], "demo_multiscale")  # set by conftest.py
DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)"),
    *("INPUT.MIN_SIZE_TEST", "96"),
    *("SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.BASE_LR", "0.001"),
    *("SOLVER.CHECKPOINT_PERIOD", "2"),
    *("TEST.EVAL_PERIOD", "0"),
]
EXACT = ("MODEL.FPN_EXT.NUMERICS", "exact")


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "train_net.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_images):
    """The folder and the log of a model trained for two iterations."""
    output = tmp_path_factory.mktemp("trained")
    arguments = ["--config-file", DEMO, *SMALL, *EXACT, "SOLVER.MAX_ITER", 2]
    code, log = run(*arguments, "OUTPUT_DIR", output)
    assert code == 0, log
    return output, log


def results(output):
    file = output / "inference" / "demo_multiscale_val" / "results.json"
    return json.loads(file.read_text())


def test_training_ends_in_a_checkpoint_and_scores(trained):
    output, log = trained
    assert (output / "model_final.pth").is_file()
    assert {"AP", "AP50", "APs", "APm", "APl", "AP-disc"} <= set(results(output)["bbox"])
    assert "demo_multiscale_val: bbox AP " in log and "|  AP   |" not in log
    assert "|  AP   |  AP50  |" in (output / "log.txt").read_text()
    assert "training images have no boxes" not in log, "all six have"
    assert f"; all scores are in {output}/inference" in log


def test_eval_only_gives_the_same_scores_and_a_folder_per_dataset(trained, tmp_path):
    output, _ = trained
    code, log = run(
        "--config-file", DEMO, "--eval-only", *SMALL, *EXACT,
        "MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR", tmp_path,
        "DATASETS.TEST", "('demo_multiscale_val', 'demo_multiscale_train')",
    )  # fmt: skip
    assert code == 0, log
    assert "|  AP   |  AP50  |" in log
    assert results(tmp_path) == results(output)
    for name in ("demo_multiscale_val", "demo_multiscale_train"):
        assert (tmp_path / "inference" / name / "coco_instances_results.json").is_file()
        assert (tmp_path / "inference" / name / "results.json").is_file()


def test_eval_only_of_the_optimised_model(trained, tmp_path):
    output, _ = trained
    code, log = run(
        "--config-file", DEMO, "--eval-only", *SMALL,
        "MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR", tmp_path,
        "MODEL.FPN_EXT.INFERENCE_DTYPE", "float32",
    )  # fmt: skip
    assert code == 0, log
    assert "inferring with the optimised model (MODEL.FPN_EXT.INFERENCE_DTYPE float32)" in log
    optimised, plain = results(tmp_path)["bbox"], results(output)["bbox"]
    assert optimised.keys() == plain.keys()
    assert optimised["AP"] == pytest.approx(plain["AP"], abs=0.5, nan_ok=True)


def test_resume_goes_on_where_it_stopped(trained):
    output, _ = trained
    arguments = ("--config-file", DEMO, "--resume", *SMALL, "SOLVER.MAX_ITER", 4)
    code, log = run(*arguments, "OUTPUT_DIR", output)
    assert code == 0, log
    assert "Starting training from iteration 2" in log
    assert "Next: iteration 2, learning rate" in log and "MAX_ITER 4 (was 2)" in log


def test_weights_that_would_run_code_are_refused(trained, tmp_path):
    torch.save({"model": {"w": touches(tmp_path / "canary")}}, tmp_path / "model.pth")
    arguments = [*SMALL, "MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    cfg = load_inference_config(DEMO, arguments)
    with pytest.raises(ValueError, match=r"model\.pth asks for .*eval; it was not read"):
        build_predictor(cfg)
    code, log = run("--config-file", DEMO, "--eval-only", *arguments, "OUTPUT_DIR", tmp_path / "o")
    assert code != 0 and "it was not read and nothing in it was run" in log.splitlines()[-1]
    assert not (tmp_path / "canary").exists()


def test_the_builtin_control_runs_through_the_same_script(trained, tmp_path):
    output, _ = trained
    control = DEMO.replace(".yaml", "_builtin.yaml")
    code, log = run(
        "--config-file", control, "--eval-only", *SMALL, "OUTPUT_DIR", tmp_path,
        "MODEL.WEIGHTS", output / "model_final.pth",
    )  # fmt: skip
    assert code == 0, log
    # What fvcore says of keys that are left over, and of those that are missing.
    assert "not used by the model" not in log and "not found in the checkpoint" not in log
    assert set(results(tmp_path)["bbox"]) == set(results(output)["bbox"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["train", "MODEL.BACKBONE.NAME", "Pyramid"],
            "nearest valid: .*'FeaturePyramid'",
        ),
        (["train", "MODEL.WEIGHTS", "none.pth"], r"MODEL\.WEIGHTS: no file none\.pth"),
        (["train", "DATASETS.TRAIN", "()"], r"DATASETS\.TRAIN names no dataset"),
        (["train", "--extend"], r"MODEL\.WEIGHTS is empty"),
        (["eval", "--resume"], r"MODEL\.WEIGHTS is empty"),  # nor is there a checkpoint
        (["train", "--extend", "--resume"], "--extend begins a training; leave --resume out"),
    ],
)
def test_a_mistake_ends_before_anything_is_built(tmp_path, capsys, options, message):
    verb, *rest = options
    assert main([verb, "--config-file", DEMO, *rest, "OUTPUT_DIR", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not any(tmp_path.iterdir())


def test_a_mistake_reaches_the_shell(tmp_path):
    code, log = run("--config-file", DEMO, "--eval-only", "OUTPUT_DIR", tmp_path)
    assert code != 0
    assert "MODEL.WEIGHTS is empty" in log.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_a_schedule_that_is_scaled_is_said_in_full(tmp_path):
    words = [
        "--config-file",
        DEMO,
        "SOLVER.REFERENCE_WORLD_SIZE",
        "8",
        "SOLVER.IMS_PER_BATCH",
        "16",
    ]
    words += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path)]
    cfg = setup(VERBS["train"].parser().parse_intermixed_args(words))
    # One process does what eight would: an eighth of the batch and of the rate, for eight times as
    # long.
    assert cfg.SOLVER.IMS_PER_BATCH == 2 and pytest.approx(0.005) == cfg.SOLVER.BASE_LR
    log = (tmp_path / "log.txt").read_text()
    for key, before, after in [("BASE_LR", 0.04, 0.005), ("MAX_ITER", 520, 4160)]:
        assert f"SOLVER.{key} {before} -> {after}" in log
    assert "is 2 times the 0.0025 usual" in log


def test_an_rpn_alone_predicts_its_proposals(trained, tmp_path):
    output, _ = trained
    picture = min((DATASET / "val").iterdir())
    assert main([
        "predict", "--config-file", DEMO,
        "--input", str(picture), "--output", str(tmp_path),
        "--min-score", "0.0", *SMALL, "MODEL.META_ARCHITECTURE", "ProposalNetwork",
        "MODEL.WEIGHTS", str(output / "model_final.pth"),
    ]) == 0  # fmt: skip
    found = json.loads((tmp_path / "detections.json").read_text())
    assert found["categories"] == [{"id": 1, "name": "object"}]
    assert len(found["annotations"]) > 10


def test_a_model_on_precomputed_proposals_cannot_predict(tmp_path):
    weights = tmp_path / "model.pth"
    weights.touch()
    with pytest.raises(ValueError, match=r"MODEL\.LOAD_PROPOSALS"):
        load_inference_config(
            "configs/detectron2/fast_rcnn_R_50_FPN_1x.yaml", ["MODEL.WEIGHTS", str(weights)]
        )


def test_prediction_on_files_and_folders(trained, tmp_path, capsys):
    output, _ = trained
    images = DATASET / "val"
    one = sorted(images.iterdir())[0]
    assert main([
        "predict", "--config-file", DEMO,
        "--input", str(one), str(images), "--output", str(tmp_path / "out"),
        "--min-score", "0.0", "--label-levels",
        *SMALL, "MODEL.WEIGHTS", str(output / "model_final.pth"),
    ]) == 0  # fmt: skip
    assert "on 5 image(s)" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [image["file_name"] for image in found["images"]][:1] == [str(one)]
    assert len({c["id"] for c in found["categories"]}) == 5
    assert len(found["annotations"]) > 0
    for annotation in found["annotations"]:
        assert annotation["image_id"] in range(1, 6)
        assert annotation["category_id"] in range(1, 6)
        assert 2 <= annotation["pooled_level"] <= 5
        assert 2 <= annotation["proposal_level"] <= 6
        x, y, width, height = annotation["bbox"]
        picture = found["images"][annotation["image_id"] - 1]
        assert x >= 0 and x + width <= picture["width"] + 1e-3
        assert y >= 0 and y + height <= picture["height"] + 1e-3
    drawings = list((tmp_path / "out").glob("*.png"))
    assert len(drawings) == 5, "one for each, the two of the same name too"
    assert Image.open(tmp_path / "out" / f"{one.stem}.png").size == Image.open(one).size

    from pycocotools.coco import COCO

    truth = COCO(str(tmp_path / "out" / "detections.json"))
    assert len(truth.loadRes(found["annotations"]).anns) == len(found["annotations"])


def test_prediction_in_bfloat16(trained, tmp_path, caplog):
    output, _ = trained
    caplog.set_level("INFO", logger="fpn_ext")
    assert main([
        "predict", "--config-file", DEMO,
        "--input", str(DATASET / "val"), "--output", str(tmp_path),
        "--min-score", "0.0", *SMALL, "MODEL.WEIGHTS", str(output / "model_final.pth"),
        "MODEL.FPN_EXT.INFERENCE_DTYPE", "bfloat16",
    ]) == 0  # fmt: skip
    assert "INFERENCE_DTYPE bfloat16" in caplog.text
    found = json.loads((tmp_path / "detections.json").read_text())
    assert len(found["annotations"]) > 0
    assert all(2 <= a["pooled_level"] <= 5 for a in found["annotations"])


def test_contact_sheet_and_curves(trained, tmp_path):
    output, _ = trained
    assert main([
        "contact-sheet", "--config-file", DEMO, "--output", str(tmp_path),
        "--num-images", "3", "--label-levels", *SMALL,
        "MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(output),
    ]) == 0  # fmt: skip
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.width > sheet.height > 600  # two rows of two pairs
    assert len(sheet.convert("RGB").getcolors(1 << 24)) > 1000
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_curves_are_those_of_the_last_run(tmp_path, monkeypatch):
    iterations = [19, 39, 59, 19, 39, 59, 79, 59, 79]
    entries = [{"iteration": i, "total_loss": float(n)} for n, i in enumerate(iterations)]
    metrics = tmp_path / "metrics.json"
    metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, **_: drawn.append((x, y)))
    draw_curves(metrics, tmp_path / "curves.png")
    assert drawn == [((19, 39, 59, 79), (3.0, 4.0, 7.0, 8.0))]


def test_curves_need_a_training(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        draw_curves(tmp_path / "metrics.json", tmp_path / "curves.png")


def test_inputs_of_prediction(tmp_path):
    with pytest.raises(FileNotFoundError, match="no picture in this folder"):
        find_pictures([tmp_path])
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        find_pictures([tmp_path / "nothing_here"])
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, format="png")
    assert [p.name for p in find_pictures([tmp_path])] == ["a.jpg", "b.PNG"]


def test_prediction_needs_weights():
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        load_inference_config(DEMO)
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS: no file none\.pth"):
        load_inference_config(DEMO, ["MODEL.WEIGHTS", "none.pth"])
    assert Path(DEMO).is_file()


def test_a_diverging_training_says_where_and_why(trained, tmp_path):
    code, log = run(
        "--config-file", DEMO, *SMALL, "SOLVER.BASE_LR", "1e9", "SOLVER.MAX_ITER", 20,
        "SOLVER.WARMUP_ITERS", 0, "OUTPUT_DIR", tmp_path,
    )  # fmt: skip
    assert code != 0
    message = log[log.rindex("training met NaN or infinity in iteration") :]
    assert "first: " in message and "SOLVER.BASE_LR 1e+09" in message
    (folder,) = (tmp_path / "nonfinite").iterdir()
    assert {f.name for f in folder.iterdir()} == {"batch.pth", "model.pth", "report.json"}
