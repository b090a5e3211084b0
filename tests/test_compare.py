"""Comparing two configs from the command line, on a few generated images."""

import hashlib
import itertools
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fpn_ext
import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from fpn_ext.__main__ import main
from fpn_ext.config import numerics
from fpn_ext.config.unread import unread_keys
from fpn_ext.data import demo_data
from fpn_ext.engine import jobs
from fpn_ext.inspection import compare_training, compare_weights
from fpn_ext.inspection.compare_configs import differences, load_sides
from fpn_ext.inspection.compare_training import check_same_data, spread_rows

DATASET = Path(os.environ["DETECTRON2_DATASETS"], "demo_multiscale")  # set by conftest.py
OURS = "configs/demo/faster_rcnn_R_18_FPN.yaml"
CONTROL = "configs/demo/faster_rcnn_R_18_FPN_builtin.yaml"
SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "50"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)"),
    *("INPUT.MIN_SIZE_TEST", "96"),
    *("SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.BASE_LR", "0.001"),
    *("TEST.EVAL_PERIOD", "0"),
]
# What Detectron2's components have no key for, as they do it.
SAME = [*SMALL, "MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "224"]
EXACT = [*SAME, "MODEL.FPN_EXT.NUMERICS", "exact"]
# What NUMERICS exact sets, key by key, so that one can be set otherwise.
PLAIN = [
    *SAME,
    *("MODEL.FPN_EXT.POOLER_IMPLEMENTATION", "per_level", "MODEL.FPN_EXT.CHANNELS_LAST", "False"),
    *("MODEL.FPN_EXT.INFERENCE_DTYPE", ""),
]


@pytest.fixture(scope="module", autouse=True)
def data():
    demo_data.ensure(DATASET, num_train=6, num_val=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights of the small demo model, scaled so that scores differ from each other."""
    torch.manual_seed(0)
    state = build_model(fpn_ext.load_config(OURS, SMALL)).state_dict()
    for name, tensor in state.items():
        if "predictor" in name or "rpn_head" in name:
            tensor.mul_(10)
    file = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": state}, file)
    return file


def command(*words):
    """The exit status of ``fpn-ext compare`` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fpn-ext", "compare", *words])
        return main()


def weights(checkpoint, *arguments, opts=EXACT, ours=OURS, control=CONTROL):
    """The exit status of the command, on two images per dataset without timing."""
    return command(
        "weights", "--config-file", str(ours), "--control", str(control),
        "--weights", str(checkpoint), "--num-images", "2", "--rounds", "0", *arguments, *opts,
    )  # fmt: skip


def said(capsys, status, expected=2):
    """The message of a command that exited with this status."""
    assert status == expected
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message.strip()


def report(folder, mode="weights"):
    return json.loads((folder / f"{mode}.json").read_text())


def beyond(found):
    return [r["what"] for r in found["stages"] + found["end_to_end"] if r["within"] is False]


def table(markdown, heading):
    """The rows of the first table below a heading."""
    lines = markdown.partition(f"\n## {heading}\n")[2].splitlines()
    rows = list(itertools.takewhile(lambda x: x[:1] == "|", itertools.dropwhile(
        lambda x: x[:1] != "|", lines)))  # fmt: skip
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


# weights


def test_the_same_weights_are_equal_to_the_bit_with_per_level_pooling(checkpoint, tmp_path, capsys):
    assert weights(checkpoint, "--output", str(tmp_path)) == 0
    found = report(tmp_path)
    stages = {row["what"]: row for row in found["stages"]}
    assert {"p2", "p6", "objectness logits", "pooled box features", "class logits"} <= set(stages)
    for row in found["stages"] + found["end_to_end"]:
        assert row["difference"] == row["tolerance"] == 0 and row["largest"] > 0, row
    assert found["agrees"] is True and found["tolerance"].startswith("equal to the bit")
    assert found["end_to_end"][0]["of"] > 50
    assert found["images"] == {"demo_multiscale_val": 2}
    assert {row["metric"] for row in found["scores"]} >= {"AP", "AP50", "APs"}
    assert all(row["difference"] in (0, None) for row in found["scores"])
    about = found["about"]
    assert about["command"].startswith("fpn-ext compare weights --config-file configs/")
    assert about["torch"] == torch.__version__ and about["hardware"] and about["seconds"] > 0
    out = capsys.readouterr().out
    assert out.strip() == (tmp_path / "weights.md").read_text().strip(), "nothing but the report"


def test_the_faster_pooling_is_equal_to_rounding(checkpoint, tmp_path):
    opts = [*PLAIN, "MODEL.FPN_EXT.POOLER_IMPLEMENTATION", "auto"]
    assert weights(checkpoint, "--output", str(tmp_path), opts=opts) == 0
    found = report(tmp_path)
    pooled = next(row for row in found["stages"] if row["what"] == "pooled box features")
    assert 0 < pooled["difference"] <= pooled["tolerance"]
    assert "because of MODEL.FPN_EXT.POOLER_IMPLEMENTATION auto" in found["tolerance"]


def test_a_key_that_the_control_does_not_read_is_said_and_its_effect_found(
    checkpoint, tmp_path, capsys
):
    """Detectron2 maps boxes to levels with 224 pixels, whatever that key says."""
    opts = [*EXACT, "MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "16"]
    assert weights(checkpoint, "--output", str(tmp_path), opts=opts) == 1
    said = "CANONICAL_BOX_SIZE is 16 (ours, default 224); control has no component that reads it"
    assert said in capsys.readouterr().err
    found = report(tmp_path)
    assert found["agrees"] is False
    assert beyond(found)[0] == "pooled box features"
    end_to_end = ["end-to-end detections, boxes", "end-to-end detections, scores"]
    assert beyond(found)[1:] == end_to_end
    text = (tmp_path / "weights.md").read_text()
    assert "**Beyond it: pooled box features" in text and said in text


def test_a_weight_that_is_not_the_same_is_found(checkpoint, tmp_path, monkeypatch):
    load = compare_weights.build_models

    def changed(sides, file):
        models = load(sides, file)
        models["ours"].backbone.fpn_lateral4.bias.data[0] += 0.1  # packed weights are oneDNN's
        return models

    monkeypatch.setattr(compare_weights, "build_models", changed)
    assert weights(checkpoint, "--output", str(tmp_path), opts=SAME) == 1
    assert beyond(report(tmp_path))[:3] == ["p2", "p3", "p4"]
    assert "pooled box features" not in beyond(report(tmp_path))


def test_markdown_and_json_agree(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        compare_weights, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n)
    )  # which spares two imports of everything
    assert weights(checkpoint, "--rounds", "1", "--output", str(tmp_path), opts=SAME) == 0
    found, text = report(tmp_path), (tmp_path / "weights.md").read_text()
    rows = found["stages"] + found["end_to_end"]
    cells = table(text, "Agreement")
    assert [c[0] for c in cells] == [row["what"] for row in rows]
    for cell, row in zip(cells, rows, strict=True):
        assert float(cell[1]) == pytest.approx(row["difference"], rel=0.06)
        assert cell[5] == {True: "yes", None: ""}[row["within"]]
        if "of" in row:
            assert cell[4] == f"{row['found_again']} of {row['of']}"
    for cell, row in zip(table(text, "Scores"), found["scores"], strict=True):
        assert cell[0] == row["dataset"] and cell[1] == f"bbox {row['metric']}"
        for shown, key in zip(cell[2:], ("ours", "control", "difference"), strict=True):
            assert shown == ("" if row[key] is None else f"{row[key]:.3f}")
    costs = zip(
        table(text, "Time and memory"), found["seconds_per_image"], found["memory"], strict=True
    )
    for cell, seconds, memory in costs:
        assert cell[0] == seconds["side"] == memory["side"]
        assert float(cell[1]) == pytest.approx(seconds["seconds"], rel=1e-3) and float(cell[1]) > 0
        assert cell[2].startswith(f"{seconds['ratio']:.2f} (")
        assert cell[3:] == [f"{memory['before']:.0f}", f"{memory['peak']:.0f}"]
        assert memory["peak"] >= memory["before"] > 0
    assert f"Weights: {checkpoint} (SHA-256 {found['sha256']}). Images: 2 of demo" in text
    assert found["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for key, value in found["about"].items():
        assert f"- {key}: {value}\n" in text


def test_memory_in_a_process_of_its_own(checkpoint):
    sides = load_sides(OURS, CONTROL, SMALL, training=False)
    del sides["control"]
    images = [{"image": torch.rand(3, 192, 256) * 255, "height": 192, "width": 256}]
    rows = compare_weights.memory_of_sides(sides, str(checkpoint), [{"ours": images}])
    if not Path("/proc/self/clear_refs").exists():
        assert rows == []
    else:
        assert rows[0]["over_model"] == rows[0]["peak"] - rows[0]["before"] > 0


def test_all_images_are_scored_where_no_number_is_given(checkpoint, tmp_path, monkeypatch):
    asked = []
    evaluate = COCOEvaluator.evaluate

    def spy(self, *arguments):
        asked.append(*arguments or [None])
        return evaluate(self, *arguments)

    monkeypatch.setattr(COCOEvaluator, "evaluate", spy)
    weights(checkpoint, "--num-images", "3", "--output", str(tmp_path))
    assert asked == [[1, 2, 3], [1, 2, 3]], "the others count neither as found nor as missed"
    asked.clear()
    command(
        "weights", "--config-file", OURS, "--control", CONTROL, "--weights", str(checkpoint),
        "--rounds", "0", "--output", str(tmp_path), *EXACT,
    )  # fmt: skip
    assert asked == [None, None] and report(tmp_path)["images"] == {"demo_multiscale_val": 4}


def test_half_precision_is_stated_and_not_judged(checkpoint, tmp_path):
    opts = [*SAME, "MODEL.FPN_EXT.INFERENCE_DTYPE", "bfloat16"]
    assert weights(checkpoint, "--output", str(tmp_path), opts=opts) == 0
    found = report(tmp_path)
    assert found["agrees"] is None
    assert all(row["within"] is None for row in found["stages"] + found["end_to_end"])
    assert "Nothing is judged." in (tmp_path / "weights.md").read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CHANNELS_LAST", "True"),
        ("INFERENCE_DTYPE", "float32"),
        ("POOLER_IMPLEMENTATION", "weighted_rows"),
    ],
)
def test_what_is_equal_to_rounding_only(key, value):
    opts = [*PLAIN, f"MODEL.FPN_EXT.{key}", value]
    tolerance, words = compare_weights.tolerance_of(load_sides(OURS, CONTROL, opts, False))
    assert tolerance.values > 0 and f"because of MODEL.FPN_EXT.{key} {value}:" in words


def test_keys_that_nobody_reads_loosen_nothing():
    sides = load_sides(CONTROL, CONTROL, [*SMALL, "MODEL.FPN_EXT.CHANNELS_LAST", "True"], False)
    assert compare_weights.tolerance_of(sides)[0].values == 0


# The checkpoint


def test_keys_that_do_not_match_are_named_for_each_model(checkpoint, tmp_path, capsys):
    state = torch.load(checkpoint, weights_only=True)["model"]
    state["backbone.fpn_lateral9.weight"] = state.pop("backbone.fpn_lateral2.weight")
    state["roi_heads.box_head.fc1.bias"] = torch.zeros(5)
    torch.save({"model": state}, tmp_path / "other.pth")
    message = said(capsys, weights(tmp_path / "other.pth"))
    for side in ("ours", "control"):
        assert re.search(
            rf"- {side}: not in the checkpoint: backbone\.fpn_lateral2\.weight; not in the model: "
            r"backbone\.fpn_lateral9\.weight; roi_heads\.box_head\.fc1\.bias is \(5,\) in the "
            r"checkpoint, \(32,\) in the model",
            message,
        )


def test_a_file_that_is_not_there(capsys):
    assert "error: no file of weights none.pth" in said(capsys, weights("none.pth"))


# The two configs


@pytest.fixture
def another(tmp_path):
    """A control that differs in more than the components."""
    file = tmp_path / "another.yaml"
    file.write_text(f'_BASE_: "{Path(CONTROL).absolute()}"\nMODEL: {{RPN: {{NMS_THRESH: 0.6}}}}\n')
    return file


def test_configs_that_differ_in_more_than_the_components(checkpoint, another, tmp_path, capsys):
    message = r"MODEL\.RPN\.NMS_THRESH is 0\.7 in ours, 0\.6 in the control$"
    refused = said(capsys, weights(checkpoint, control=another))
    assert re.search(r"\(--allow-different .*" + "\n  - " + message, refused)
    output = ("--output", str(tmp_path))
    assert weights(checkpoint, "--allow-different", *output, control=another) == 1
    assert re.search(message, report(tmp_path)["remarks"][0])
    assert beyond(report(tmp_path))[0] == "proposals, boxes", "where suppression is"


def test_what_only_one_of_them_reads_is_no_difference(another):
    file, key = another, "MODEL.FPN_EXT.CANONICAL_BOX_SIZE"
    file.write_text(
        f'_BASE_: "{Path(OURS).absolute()}"\nMODEL: {{FPN_EXT: {{CANONICAL_BOX_SIZE: 9}}}}\n'
    )
    for control, expected in ((CONTROL, []), (OURS, [{"key": key, "ours": 9, "control": 112}])):
        assert differences(load_sides(str(file), control, SMALL, False), ["OUTPUT_DIR"]) == expected


def test_a_bottom_up_by_name_brings_its_pixels_as_in_train_net():
    """The control lacks it, which counts as a difference."""
    opts = ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/resnet18", "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"]
    sides = load_sides(OURS, CONTROL, ["MODEL.DEVICE", "cpu", *opts], False)
    assert sides["ours"].INPUT.FORMAT == "RGB" and sides["control"].INPUT.FORMAT == "BGR"
    found = [d["key"] for d in differences(sides, ["OUTPUT_DIR"])]
    assert found == ["INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"]


def test_what_numerics_choose_for_each_is_no_difference(another, monkeypatch):
    """The control's components have nothing to choose among; a key that is written counts."""
    monkeypatch.setattr(numerics, "has_avx512", lambda: True)
    monkeypatch.setattr(numerics, "has_bfloat16_convolutions", lambda: True)
    sides = load_sides(OURS, CONTROL, SMALL, False)
    chosen = [cfg.MODEL.FPN_EXT.INFERENCE_DTYPE for cfg in sides.values()]
    assert chosen == ["float32", ""] and differences(sides, ["OUTPUT_DIR"]) == []
    base = f'_BASE_: "{Path(CONTROL).absolute()}"\n'
    another.write_text(base + "MODEL: {FPN_EXT: {INFERENCE_DTYPE: bfloat16}}\n")
    (found,) = differences(load_sides(OURS, str(another), SMALL, False), ["OUTPUT_DIR"])
    assert found == {
        "key": "MODEL.FPN_EXT.INFERENCE_DTYPE", "ours": "float32", "control": "bfloat16",
    }  # fmt: skip


@pytest.mark.parametrize("test_sets", ["()", "('demo_multiscale_train',)"])
def test_there_must_be_something_to_be_compared_on(checkpoint, another, test_sets, capsys):
    another.write_text(f'_BASE_: "{Path(CONTROL).absolute()}"\nDATASETS: {{TEST: "{test_sets}"}}\n')
    message = said(capsys, weights(checkpoint, "--allow-different", control=another))
    assert "DATASETS.TEST names what the two are compared on" in message


@pytest.mark.parametrize(("option", "value"), [("--num-images", "0"), ("--rounds", "-1")])
def test_numbers_too_small(checkpoint, option, value, capsys):
    assert f"{option} must be at least" in said(capsys, weights(checkpoint, option, value))


def test_every_key_of_ours_that_a_component_reads_is_known():
    """A new key of MODEL.FPN_EXT names the components that read it, or is read by all."""
    keys = {f"MODEL.FPN_EXT.{key}" for key in fpn_ext.get_cfg().MODEL.FPN_EXT}
    by_all = {
        *("INFERENCE_DTYPE", "FREEZE", "WINOGRAD", "FOLD_NORMS", "NUMERICS", "TUNE"),
    }
    expected = keys - {f"MODEL.FPN_EXT.{key}" for key in by_all}
    assert unread_keys(fpn_ext.load_config(CONTROL)) == expected
    of_variants = ("BOXES_PER_CHUNK", "LEVEL_FUSION", "BIFPN_REPEATS", "IMAGE_SCALES")
    of_variants = {f"MODEL.FPN_EXT.{key}" for key in of_variants}
    of_variants |= {key for key in keys if key.startswith("MODEL.FPN_EXT.MASK_PROPOSAL_")}
    assert unread_keys(fpn_ext.load_config(OURS)) == of_variants


# train


TRAINED = [*SAME, "SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1"]
ALL_RUNS = [("ours", "seed_1"), ("control", "seed_1"), ("ours", "seed_2"), ("control", "seed_2")]


def train(folder, seeds=("1", "2"), opts=TRAINED):
    return command(
        "train", "--config-file", OURS, "--control", CONTROL, "--seeds", *seeds,
        "--output", str(folder), *opts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of finished runs, and those begun: until one was interrupted, and afterwards."""
    folder = tmp_path_factory.mktemp("compared")
    run, begun, begun_again = jobs.run, [], []

    def interrupted(arguments, log):
        begun.append(log.parent.parts[-2:])
        if len(begun) < 3:
            return run(arguments, log)
        # After one iteration of two.
        run([*arguments, "SOLVER.MAX_ITER", "1"], log)
        config = log.parent / "config.yaml"
        config.write_text(config.read_text().replace("MAX_ITER: 1\n", "MAX_ITER: 2\n"))
        (log.parent / "model_final.pth").unlink()
        (log.parent / "last_checkpoint").write_text("model_0000000.pth")
        raise KeyboardInterrupt

    def goes_on(arguments, log):
        begun_again.append(log.parent.parts[-2:])
        run(arguments, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "run", interrupted)
        assert train(folder) == 130, "as a command ends on SIGINT"
        assert not (folder / "train.json").exists()
        patch.setattr(jobs, "run", goes_on)
        assert train(folder) == 0
    return folder, begun, begun_again


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_what_was_interrupted_goes_on(trained):
    folder, begun, begun_again = trained
    assert begun == ALL_RUNS[:3] and begun_again == ALL_RUNS[2:]
    runs = report(folder, "train")["runs"]
    assert [(run["side"], f"seed_{run['seed']}") for run in runs] == ALL_RUNS
    assert [run["resumed"] for run in runs] == [False, False, True, False]
    log = (folder / "ours/seed_2/console.log").read_text()
    assert "Starting training from iteration 1" in log


@pytest.mark.slow
def test_a_run_interrupted_in_its_last_evaluation_is_evaluated(trained):
    folder, *_ = trained
    file = folder / "control" / "seed_1" / "results.json"
    before = json.loads(file.read_text())["scores"]
    file.unlink()
    assert train(folder) == 0
    assert json.loads(file.read_text())["scores"] == before
    log = (file.parent / "console.log").read_text()
    assert log.count("Starting training from iteration") == 1
    assert train(folder) == 0, "still a run of this config"


@pytest.mark.slow
def test_every_run_is_the_users_own_with_its_seed(trained):
    folder, *_ = trained
    for side, seed in ALL_RUNS:
        cfg = fpn_ext.load_config(str(folder / side / seed / "config.yaml"))
        assert f"seed_{cfg.SEED}" == seed and cfg.SOLVER.MAX_ITER == 2
        ours = cfg.MODEL.BACKBONE.NAME == "FeaturePyramid"
        assert ours is (side == "ours")
        assert (folder / side / seed / "model_final.pth").is_file()


@pytest.mark.slow
def test_markdown_and_json_of_trainings_agree(trained):
    folder, *_ = trained
    found, text = report(folder, "train"), (folder / "train.md").read_text()
    by_run = [run["scores"]["demo_multiscale_val"]["bbox"] for run in found["runs"]]
    for cell, row in zip(table(text, "Scores"), found["scores"], strict=True):
        assert cell[:2] == ["demo_multiscale_val", f"bbox {row['metric']}"]
        for shown, side, first in ((cell[2], "ours", 0), (cell[3], "control", 1)):
            values = [scores[row["metric"]] for scores in by_run[first::2]]
            spread = row[side]
            assert spread["mean"] == pytest.approx(sum(values) / 2)
            assert [spread["min"], spread["max"]] == sorted(values)
            assert shown == (
                f"{spread['mean']:.3f} ± {spread['std']:.3f} "
                f"({spread['min']:.3f} to {spread['max']:.3f})"
            )
        assert cell[4] == f"{row['difference']:.3f} ± {row['standard_error']:.3f}"
    for cell, run in zip(table(text, "Runs"), found["runs"], strict=True):
        assert cell[:3] == [run["side"], str(run["seed"]), f"{run['seconds']:.1f}"]
        assert cell[4:] == [run["commit"], run["hardware"]]


@pytest.mark.slow
def test_runs_of_another_config_are_not_taken_for_these(trained, capsys):
    folder, *_ = trained
    message = said(capsys, train(folder, opts=[*TRAINED, "SOLVER.MAX_ITER", "3"]))
    assert re.search(r"another --output.*\n.*SOLVER\.MAX_ITER is 2 there, 3 now", message)


@pytest.fixture
def fails(tmp_path, monkeypatch):
    """A Python stub that prints what it was asked to run, and fails."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$PWD: $*"\necho iteration 3\necho loss is NaN\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setattr(jobs.sys, "executable", str(script))


def test_a_training_that_fails(tmp_path, fails, capsys):
    message = said(capsys, train(tmp_path), expected=1)
    pattern = r"fpn-ext train ended with exit status 1; see .*console\.log: .*"
    assert re.search(pattern + r" \| iteration 3 \| loss is NaN$", message)
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize("seeds", [["-1"], ["1", "1"]])
def test_seeds_are_different_numbers(tmp_path, seeds, capsys):
    message = said(capsys, train(tmp_path, seeds))
    assert "--seeds must be different numbers from 0 up" in message


def test_weights_to_start_from_are_looked_for_before_the_first_run(tmp_path, capsys):
    opts = [*TRAINED, "MODEL.WEIGHTS", "catalog://none"]
    message = said(capsys, train(tmp_path / "runs", opts=opts))
    assert "no catalog://none in Detectron2's catalogue" in message
    assert not (tmp_path / "runs").exists()


def test_trainings_need_the_package_alone(tmp_path, monkeypatch, fails, capsys):
    """Not the project's folder: they run where the command does."""
    monkeypatch.chdir(tmp_path)
    said(capsys, train(tmp_path / "runs"), expected=1)
    log = (tmp_path / "runs" / "ours" / "seed_1" / "console.log").read_text()
    assert log.startswith(f"{tmp_path}: -m fpn_ext train --config-file {OURS} --resume")


def runs(side, *values, metric="AP"):
    return [{"side": side, "scores": {"val": {"bbox": {metric: value}}}} for value in values]


def test_runs_on_different_data_are_not_put_into_one_mean(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "photos_val.json").write_text("{}")
        (folder / "data" / "photos_split.json").write_text(folder.name)
    check_same_data(folders)
    (folders[2] / "data" / "photos_val.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"c are of different data \(photos_val.json\)"):
        check_same_data(folders)


def test_spread_by_hand():
    """Deviations of 1, 2, 3: variance 1. Of 0, 6: variance 18. 1 / 3 + 18 / 2 = 28 / 3."""
    (row,) = spread_rows([*runs("ours", 1.0, 2.0, 3.0), *runs("control", 0.0, 6.0)])
    assert row["ours"] == {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0, "runs": 3}
    assert row["control"]["std"] == pytest.approx(18**0.5)
    assert row["difference"] == -1.0
    assert row["standard_error"] == pytest.approx((28 / 3) ** 0.5)


def test_one_seed_has_no_spread():
    (row,) = spread_rows([*runs("ours", 3.0), *runs("control", 1.0)])
    assert row["difference"] == 2.0 and row["standard_error"] is None
    text = compare_training.markdown({"scores": [row], "runs": []})
    assert table("\n" + text, "Scores") == [["val", "bbox AP", "3.000", "1.000", "2.000"]]


def test_a_score_that_is_no_number_somewhere():
    (row,) = spread_rows([*runs("ours", 3.0, None), *runs("control", 1.0, 2.0)])
    assert row["ours"] is row["difference"] is None and row["control"]["mean"] == 1.5
    text = compare_training.markdown({"scores": [row], "runs": []})
    assert table("\n" + text, "Scores")[0][2] == "not a number in every run"


def test_runs_of_different_commits_are_said_to_be():
    some = [{"side": "ours", "seed": 1, "seconds": 1.0, "resumed": False, "commit": commit,
             "hardware": "h", "versions": {}} for commit in "ab"]  # fmt: skip
    text = compare_training.markdown({"scores": [], "runs": some})
    assert "**The runs are not all of the same commit.**" in text
    assert "same hardware" not in text
