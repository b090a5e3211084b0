"""fpn_ext.paper.reproduce: which runs are trained or skipped, and the tables."""

import dataclasses
import json
import os
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fpn_ext import load_config
from detectron2.modeling import build_model
from fpn_ext.__main__ import main
from fpn_ext.config.defaults import flat
from fpn_ext.config.load import written_keys
from fpn_ext.engine import jobs
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.paper import pretrain, published, reproduce, tables
from fpn_ext.paper.reproduce import Reproduction, Run
from fpn_ext.proposals.sources import ground_truth_proposals
from fpn_ext.registries.architectures import proposes_only
from fpn_ext.reporting import provenance
from fpn_ext.reporting.json_files import plain, write_json

# Two steps on two images: what runs, not how well.
TINY = [
    *("DATASETS.TRAIN", "('demo_multiscale_train',)"),
    *("DATASETS.TEST", "('demo_multiscale_val',)"),
    *("SOLVER.BASE_LR", "0.0001", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.FPN_EXT.MASK_PROPOSAL_TOPK", "20"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
]


@pytest.fixture
def reproduction(tmp_path):
    return Reproduction("small", tmp_path / "work", tmp_path / "results", opts=TINY)


def result(table, row, seed, **scores):
    return {"table": table, "row": row, "seed": seed, "scores": scores}


@pytest.mark.parametrize(
    "run",
    [Run(t, row, 1) for t in published.TABLES for row in published.TABLES[t]],
    ids=lambda run: run.name,
)
def test_a_scale_leaves_what_a_row_is_about(run, tmp_path):
    """Beside anchors' size, no key that tells a row from its neighbours is touched by the scale."""
    folders = tmp_path / "work", tmp_path / "results"
    row = Reproduction("coco", *folders).config(run).MODEL
    small = Reproduction("small", *folders).config(run).MODEL
    assert small.BACKBONE.NAME == row.BACKBONE.NAME
    assert small.RESNETS.OUT_FEATURES == row.RESNETS.OUT_FEATURES
    for key in ("HEAD_NAME", "IN_FEATURES", "PRE_NMS_TOPK_TEST"):
        assert small.RPN[key] == row.RPN[key]
    for key in ("NAME", "IN_FEATURES"):
        assert small.ROI_HEADS[key] == row.ROI_HEADS[key]
    for key in ("NUM_FC", "POOLER_RESOLUTION", "POOLER_TYPE"):
        assert small.ROI_BOX_HEAD[key] == row.ROI_BOX_HEAD[key]
    for key in ("WINDOWS", "SIZE"):
        assert small.FPN_EXT[f"MASK_PROPOSAL_{key}"] == row.FPN_EXT[f"MASK_PROPOSAL_{key}"]
    assert small.FPN_EXT.CANONICAL_BOX_SIZE == row.FPN_EXT.CANONICAL_BOX_SIZE / 2
    halved = [[side / 2 for side in of_map] for of_map in row.ANCHOR_GENERATOR.SIZES]
    assert halved == small.ANCHOR_GENERATOR.SIZES


OTHERS = ["table4/fast_rcnn_R_101", "table5/rpn_R_50", "table5/fast_rcnn_R_50"]
OTHERS += ["table5/rpn_R_101", "table5/fast_rcnn_R_101"]


@pytest.mark.parametrize(
    "row", [f"table{t}/{row}" for t in published.TABLES for row in published.TABLES[t]] + OTHERS
)
def test_every_row_trains_and_is_scored(row, tmp_path, demo_images):
    """Two steps and an evaluation; detectors use ground truth as proposals."""
    cfg = load_config(str(reproduce.CONFIGS / f"{row}.yaml"))
    overlay = reproduce.SCALES["small"].overlay_of(int(row[len("table")]))
    cfg.merge_from_file(str(reproduce.CONFIGS / "scale" / overlay))
    # Batch norm: with frozen ones, the activations of random weights grow with the depth.
    cfg.merge_from_list([*TINY, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path)])
    if cfg.MODEL.LOAD_PROPOSALS:
        for split in ("TRAIN", "TEST"):
            (name,) = cfg.DATASETS[split]
            file = tmp_path / f"{name}.safetensors"
            ground_truth_proposals(name, str(file))
            cfg.DATASETS[f"PROPOSAL_FILES_{split}"] = (str(file),)
    config_file = tmp_path / "row.yaml"
    config_file.write_text(cfg.dump())
    assert main(["train", "--config-file", str(config_file)]) == 0
    (scores,) = json.loads(
        (tmp_path / "inference/demo_multiscale_val/results.json").read_text()
    ).values()
    assert scores["AR@100" if proposes_only(cfg) else "AP"] is not None


def test_a_table_may_have_a_scale_of_its_own(tmp_path):
    """Objects of half the size in Table 6, as anchors in the others; the rest is the scale's."""
    reproduction = Reproduction("small", tmp_path, tmp_path)
    cfg, other = (reproduction.config(run) for run in (Run(6, "dual", 1), Run(1, "c", 1)))
    assert cfg.MODEL.FPN_EXT.MASK_PROPOSAL_OBJECT_CELLS == 4
    assert other.MODEL.FPN_EXT.MASK_PROPOSAL_OBJECT_CELLS == 8
    assert cfg.INPUT == other.INPUT and cfg.SOLVER == other.SOLVER
    assert cfg.MODEL.RESNETS == other.MODEL.RESNETS
    assert "MASK_PROPOSAL_OBJECT_CELLS: 4" in reproduction.config_text(Run(6, "dual", 1))


def test_rows_of_table_6_are_compared_with_its_first():
    scores = {"5x5": 30.0, "dual": 33.0, "dual28": 34.0, "dual28_2x": 38.0}
    results = [result(6, row, 1, **{"AR@1000": score}) for row, score in scores.items()]
    rows = tables.summarize(6, results)["rows"]
    assert [rows[row]["against"] for row in scores] == [None, "5x5", "5x5", "dual28"]
    entry = rows["dual"]["metrics"]["AR@1000"]
    assert (entry["difference"]["mean"], entry["paper_difference"]) == (3, 2.3)  # 45.7 - 43.4
    entry = rows["dual28_2x"]["metrics"]["AR@1000"]
    assert (entry["difference"]["mean"], entry["paper_difference"]) == (4, 1.4)  # 48.1 - 46.7


def test_rows_of_a_table_have_equal_budgets(tmp_path):
    reproduction = Reproduction("small", tmp_path, tmp_path)
    for table, rows in published.TABLES.items():
        solvers = {row: reproduction.config(Run(table, row, 1)).SOLVER for row in rows}
        longer = solvers.pop("dual28_2x", None)
        first = next(iter(solvers.values()))
        assert all(solver == first for solver in solvers.values())
        if longer:
            assert longer.MAX_ITER == 2 * first.MAX_ITER
            assert list(longer.STEPS) == [2 * step for step in first.STEPS]


def test_initial_weights_replaced_between_rows_are_refused(reproduction, monkeypatch):
    def train(arguments, log, threads=None):
        folder = log.parent
        (folder / "model_final.pth").touch()
        raise RuntimeError("killed")

    monkeypatch.setattr(jobs, "run", train)
    reproduction.work.mkdir()
    reproduction.weights.write_bytes(b"first")
    with pytest.raises(RuntimeError, match="killed"):
        reproduction.do(Run(1, "c", 1), False)
    wanted = [Run(1, "c", 1), Run(1, "d", 1)]
    assert reproduction.plan(wanted) == wanted
    reproduction.weights.write_bytes(b"second")
    with pytest.raises(ValueError, match=r"was replaced after table1_c_seed1 began in .*: SHA-256"):
        reproduction.plan(wanted)
    reproduction.weights.write_bytes(b"first")
    assert reproduction.plan(wanted) == wanted


def test_tables_say_that_initial_weights_differ(tmp_path):
    origin = {"commit": "a", "hardware": "b", "versions": "c", "iterations": 2, "cpu_seconds": 60}
    for row, weights in (("c", "1234"), ("d", "1234")):
        write_json(
            tmp_path / "runs" / f"{row}.json",
            {**result(1, row, 1, **{"AR@100": 50.0}), **origin, "weights": weights},
        )
    tables.write_tables(tmp_path, [1], "small", "command")
    assert "same weights" not in (tmp_path / "table1.md").read_text()
    file = tmp_path / "runs" / "d.json"
    write_json(file, {**json.loads(file.read_text()), "weights": "5678"})
    tables.write_tables(tmp_path, [1], "small", "command")
    assert "the same weights (1234, 5678)" in (tmp_path / "table1.md").read_text()


def test_table_2_takes_the_proposals_of_row_1c_of_its_seed(reproduction):
    (train,) = reproduction.config(Run(2, "d", 7)).DATASETS.PROPOSAL_FILES_TRAIN
    assert train.endswith("work/table1_c_seed7/proposals/demo_multiscale_train.safetensors")
    todo = reproduction.plan([Run(2, "d", 7), Run(2, "e", 7), Run(1, "c", 7), Run(3, "a", 7)])
    names = ["table1_c_seed7", "table2_d_seed7", "table2_e_seed7", "table3_a_seed7"]
    assert [run.name for run in todo] == names


def test_what_is_done_is_not_done_again(reproduction):
    runs = [Run(1, "a", 1), Run(1, "b", 1)]
    kept = {"config_sha256": reproduction.digest(runs[0]), "scores": {}}
    file = reproduction.result_file(runs[0])
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(kept))
    assert reproduction.plan(runs) == runs[1:]
    kept["config_sha256"] = reproduction.digest(runs[1])
    file.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="was made with another config; move it away"):
        reproduction.plan(runs)


def test_numerics_choose_in_each_command_what_nobody_has_written(tmp_path):
    """A dump of the config would write every key, and fast would choose nothing."""
    keys = ("MODEL.FPN_EXT.CHANNELS_LAST", "MODEL.FPN_EXT.WINOGRAD")
    opts = [*TINY, keys[0], "False"]
    text = Reproduction("small", tmp_path, tmp_path, opts=opts).config_text(Run(3, "c", 1))
    (tmp_path / "run.yaml").write_text(text)
    assert {key for key in keys if key in written_keys(str(tmp_path / "run.yaml"))} == {keys[0]}
    loaded = load_config(str(tmp_path / "run.yaml"))
    config = Reproduction("small", tmp_path, tmp_path, opts=opts).config(Run(3, "c", 1))
    assert plain(flat(loaded)) == plain(flat(config))


def test_the_digest_is_of_the_experiment_not_of_the_place(reproduction, tmp_path):
    elsewhere = Reproduction("small", tmp_path / "x", tmp_path / "y", opts=TINY)
    digests = set()
    for run in (Run(2, "c", 1), Run(2, "c", 2), Run(2, "d", 1), Run(3, "c", 1)):
        assert reproduction.digest(run) == elsewhere.digest(run)
        digests.add(reproduction.digest(run))
    assert len(digests) == 4


def test_means_spreads_and_differences_by_hand():
    results = [
        *(result(1, "c", seed, **{"AR@100": 50.0 + seed, "ARs@1000": 40.0}) for seed in (1, 2, 3)),
        # 9, 10 and 11 below (c) of the same seed.
        *(result(1, "d", s, **{"AR@100": 42.0, "ARs@1000": 40.0 + s}) for s in (1, 2, 3)),
        result(1, "e", 9, **{"AR@100": 1.0}),  # no (c) with this seed
        result(2, "d", 1, AP=1.0),  # another table
    ]
    rows = tables.summarize(1, results)["rows"]
    assert list(rows) == ["c", "d", "e"]
    ours = rows["c"]["metrics"]["AR@100"]["ours"]
    assert ours == {"n": 3, "mean": 52.0, "sd": 1.0}
    entry = rows["d"]["metrics"]["AR@100"]
    assert entry["difference"] == {"n": 3, "mean": -10.0, "sd": 1.0}
    assert entry["paper"] == 37.4 and entry["paper_difference"] == -6.6
    assert entry["verdict"] == "holds"
    # +1, +2, +3: over two standard errors (2 / (1 / sqrt 3) = 3.5) from 0, the paper says -14.4.
    assert rows["d"]["metrics"]["ARs@1000"]["verdict"] == "reversed"
    assert rows["e"]["metrics"]["AR@100"]["difference"]["n"] == 0
    assert rows["e"]["metrics"]["AR@100"]["verdict"] == "open"
    assert rows["d"]["metrics"]["AR@1000"]["ours"] == {"n": 0, "mean": None, "sd": None}


@pytest.mark.parametrize(
    "differences, verdict",
    [
        ([-1.0], "open"),
        ([-1.0, 1.0], "open"),
        ([-2.2, -1.0, 0.2], "open"),  # two standard errors are 2 * 1.2 / sqrt 3 = 1.39
        ([-1.7, -1.0, -0.3], "holds"),  # 2 * 0.7 / sqrt 3 = 0.81
        ([3.0, 3.1], "reversed"),
    ],
)
def test_verdicts(differences, verdict):
    results = [result(2, "c", s, AP=30.0) for s in range(len(differences))]
    results += [result(2, "d", s, AP=30.0 + d) for s, d in enumerate(differences)]
    rows = tables.summarize(2, results)["rows"]
    assert rows["d"]["metrics"]["AP"]["verdict"] == verdict


def test_an_unshared_row_is_set_against_its_shared_one():
    results = [
        result(1, row, 1, **{"AR@100": v}) for row, v in (("c", 9), ("d", 5), ("d_unshared", 7))
    ]
    row = tables.summarize(1, results)["rows"]["d_unshared"]
    assert row["against"] == "d"
    assert row["metrics"]["AR@100"]["difference"]["mean"] == 2
    assert "paper" not in row["metrics"]["AR@100"] and "verdict" not in row["metrics"]["AR@100"]


def test_the_markdown_says_what_the_summary_says():
    results = [result(3, "c", s, AP=20.0 + s, AP50=40.0) for s in (1, 2)]
    results += [result(3, "b", s, AP=10.0 + s, AP50=None) for s in (1, 2)]
    text = tables.markdown(tables.summarize(3, results))
    assert "| (c) | Faster R-CNN on FPN | 40.0 ± 0.0 (56.9) | 21.5 ± 0.7 (33.9) | - |" in text
    assert "| (b) - (c) | Faster R-CNN on C5 | - | -10.0 ± 0.0 (-5.9) holds | - |" in text


def test_a_row_with_fewer_seeds_than_the_others_says_so():
    results = [result(3, row, seed, AP=20.0) for row in "bc" for seed in (1, 2)]
    assert "only" not in tables.markdown(tables.summarize(3, results))
    text = tables.markdown(tables.summarize(3, results[1:]))
    assert "\n(b) has seed 2 only.\n" in text


def test_the_table_names_the_command_that_made_it(tmp_path):
    (tmp_path / "runs").mkdir()
    made = result(3, "c", 1, AP=20.0)
    facts = {"commit": "abc", "hardware": "CPU", "versions": "", "iterations": 1, "weights": ""}
    text = json.dumps({**made, **facts, "cpu_seconds": 60})
    (tmp_path / "runs/table3_c_seed1.json").write_text(text)
    words = ["SOLVER.MAX_ITER", "1200", "--table", "3", "--rows", "c", "--scale", "small"]
    command = ["reproduce", *words, "--seeds", "1"]
    assert main([*command, "--output", str(tmp_path), "--report-only"]) == 0
    assert f"    fpn-ext {' '.join(command)}\n" in (tmp_path / "table3.md").read_text()


def test_pictures_are_crops_in_bgr_and_half_of_them_are_mirrored(monkeypatch):
    y, x = np.mgrid[: pretrain.SIDE, : pretrain.SIDE].astype(np.uint8)
    red_is_x_and_blue_is_y = np.dstack([x, 0 * x, y])
    monkeypatch.setattr(pretrain, "PICTURES", 20)
    monkeypatch.setattr(pretrain.demo_scenes, "picture", lambda *_: red_is_x_and_blue_is_y)
    pixels, classes = next(pretrain.batches(seed=1))
    assert pixels.shape == (pretrain.BATCH, 3, pretrain.CROP, pretrain.CROP)
    assert (pixels[:, 0].diff(dim=1) == 1).all() and (pixels[:, 1] == 0).all()
    steps = pixels[:, 2].diff(dim=2)
    mirrored = (steps == -1).all(dim=(1, 2))
    assert (mirrored | (steps == 1).all(dim=(1, 2))).all()
    assert 20 <= mirrored.sum() <= 44  # of 64: a fair coin gives fewer or more once in 500
    assert len(pixels[:, 0, 0, 0].unique()) > 3, "crops of several places"
    assert classes.min() == 0 and classes.max() == pretrain.NUM_CLASSES - 1


@pytest.mark.slow
def test_one_row_end_to_end_and_again(reproduction, demo_images, capsys, monkeypatch):
    """Train, propose, train on the proposals; the second time there is nothing to do."""
    monkeypatch.setattr(pretrain, "PICTURES", 20)
    monkeypatch.setattr(pretrain, "BATCH", 4)
    weights = ["pretrain", "--output", str(reproduction.weights), "--iterations", "2"]
    small = str(reproduce.CONFIGS / "scale/small.yaml")
    assert main([*weights, "--config-file", small, *TINY]) == 0
    model = build_model(reproduction.config(Run(1, "c", 5)))
    checkpointer = SafeCheckpointer(model)
    checkpointer.load(str(reproduction.weights))
    filled = len(model.backbone.bottom_up.state_dict())
    assert f"backbone {filled} of {filled}" in checkpointer.matched
    arguments = ["reproduce", "--table", "2", "--rows", "c", "--seeds", "5"]
    arguments += ["--work", str(reproduction.work), "--results", str(reproduction.results), *TINY]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "[2/2] table2_c_seed5: AP50" in printed and "min left" in printed
    kept = json.loads((reproduction.results / "runs/table2_c_seed5.json").read_text())
    assert kept["seed"] == 5 and kept["iterations"] == 2 and kept["cpu_seconds"] > 0
    assert kept["weights"] and kept["scores"]["AP"] is not None
    table = (reproduction.results / "table2.md").read_text()
    assert f"| (c) | Fast R-CNN on FPN | {kept['scores']['AP50']:.1f} (56.9)" in table
    summary = json.loads((reproduction.results / "table2.json").read_text())
    mean = summary["rows"]["c"]["metrics"]["AP"]["ours"]["mean"]
    assert mean == statistics.mean([kept["scores"]["AP"]])

    monkeypatch.setattr(Reproduction, "do", lambda *_: pytest.fail("it was done"))
    assert main(arguments) == 0
    assert "1 of 1 runs are done" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(reproduction, monkeypatch):
    run, asked = Run(1, "a", 1), []
    folder = reproduction.folder(run)
    folder.mkdir(parents=True)
    (folder / "last_checkpoint").write_text("model_0000000.pth")

    def command(arguments, log, threads):
        asked.append(arguments)
        raise RuntimeError("stopped")

    monkeypatch.setattr(jobs, "run", command)
    with pytest.raises(RuntimeError, match="stopped"):
        reproduction.do(run, propose=False)
    assert asked[0][0] == "train" and "--resume" in asked[0]
    assert reproduction.result(run) is None


@pytest.fixture
def trained(reproduction, monkeypatch):
    """A run whose training takes no time, and changes the checkout."""
    run, checkout = Run(1, "a", 1), ["before"]

    def train(arguments, log, threads):
        checkout.append("after")
        (name,) = reproduction.config(run).DATASETS.TEST
        scores = reproduction.folder(run) / "inference" / name / "results.json"
        scores.parent.mkdir(parents=True, exist_ok=True)
        scores.write_text(json.dumps({"box_proposals": {"AR@100": 12.5}}))
        return 3.0

    monkeypatch.setattr(jobs, "run", train)
    monkeypatch.setattr(provenance, "commit", lambda: checkout[-1])
    return run


def test_the_commit_is_that_of_the_training(reproduction, trained):
    kept = reproduction.do(trained, propose=False)
    assert kept["commit"] == "before" and kept["scores"] == {"AR@100": 12.5}
    assert reproduction.result(trained) == kept
    assert provenance.commit() == "after"


def test_commits_and_time_are_of_all_that_trained(reproduction, trained):
    """Three seconds by one commit, three more by the next, none by the one that finds it done."""
    reproduction.do(trained, propose=False)
    folder = reproduction.folder(trained)
    (folder / "last_checkpoint").write_text("model_0000000.pth")
    reproduction.result_file(trained).unlink()
    continued = reproduction.do(trained, propose=False)
    assert (continued["commit"], continued["cpu_seconds"]) == ("before, after", 6)
    (folder / "finished.json").write_text(json.dumps({"files": []}))
    reproduction.result_file(trained).unlink()
    found = reproduction.do(trained, propose=False)
    assert (found["commit"], found["cpu_seconds"]) == ("before, after", 6)


def test_a_training_with_another_config_is_not_taken_for_this_one(reproduction, trained):
    """Same --work, another --output, an override: it would get the scores of the one without."""
    reproduction.do(trained, propose=False)
    (reproduction.folder(trained) / "last_checkpoint").write_text("model_0000000.pth")
    other = dataclasses.replace(
        reproduction, results=reproduction.work / "other", opts=["SOLVER.BASE_LR", "0.5"]
    )
    with pytest.raises(ValueError, match=r"table1_a_seed1 with another config .*--work"):
        other.plan([trained])
    same = dataclasses.replace(reproduction, results=reproduction.work / "other")
    assert same.plan([trained]) == [trained]


def test_a_folder_from_before_commits_were_kept_says_so(reproduction, trained):
    folder = reproduction.folder(trained)
    folder.mkdir(parents=True)
    (folder / "last_checkpoint").write_text("model_0000000.pth")
    (folder / "begun.json").write_text(json.dumps({"weights": ""}))
    kept = reproduction.do(trained, propose=False)
    assert (kept["commit"], kept["cpu_seconds"]) == ("unknown, before", 3)


def test_a_result_that_cannot_be_written_whole_is_none(reproduction, trained, monkeypatch):
    """Nor does it replace a completed one: the file marking a row as done is atomic."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    reproduction.do(trained, propose=False)
    file = reproduction.result_file(trained)
    for before in (file.read_bytes(), None):
        if before is None:
            file.unlink()
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
            patched.setattr(os, "fsync", full)
            reproduction.do(trained, propose=False)  # again: there is no model_final.pth
        assert (file.read_bytes() if file.exists() else None) == before
        assert [path.name for path in file.parent.iterdir()] == [file.name] * file.exists()
    assert reproduction.plan([trained]) == [trained]


def test_as_many_at_a_time_as_asked_for(reproduction, monkeypatch):
    together, most, lock = 0, [], threading.Lock()

    def do(run, propose):
        nonlocal together
        with lock:
            together += 1
            most.append(together)
        time.sleep(0.05)
        with lock:
            together -= 1
        return {"scores": {}}

    monkeypatch.setattr(reproduction, "do", do)
    wanted = [Run(1, row, seed) for row in "abc" for seed in (1, 2)]
    assert reproduce.train_all(reproduction, wanted, at_once=2) == []
    assert len(most) == 6 and max(most) == 2


def test_the_papers_recipe_is_for_8_gpus(tmp_path):
    """Fewer GPUs get a smaller batch, lower rate and longer schedule, by Detectron2's rule."""
    config = Reproduction("coco", tmp_path, tmp_path).config(Run(3, "c", 1))
    assert config.SOLVER.REFERENCE_WORLD_SIZE == 8
    assert (
        Reproduction("small", tmp_path, tmp_path).config(Run(3, "c", 1)).SOLVER.REFERENCE_WORLD_SIZE
        == 0
    )


def test_a_failure_is_reported_and_the_rest_goes_on(reproduction, monkeypatch, capsys):
    def do(run, propose):
        if run.row != "a":  # (d) must not be begun at all
            raise RuntimeError("exit status 3; see train.log: out of memory")
        return {"scores": {"AR@100": 5.0}}

    monkeypatch.setattr(reproduction, "do", do)
    failed = reproduce.train_all(reproduction, [Run(2, "d", 1), Run(1, "a", 1)], at_once=2)
    assert failed == [
        "table1_c_seed1: exit status 3; see train.log: out of memory",
        "table2_d_seed1: needs the proposals of table1_c_seed1",
    ]
    assert "table1_a_seed1: AR@100 5.0" in capsys.readouterr().out


def test_a_command_that_fails_says_why(tmp_path):
    log = tmp_path / "x.log"
    in_place_of_ours(tmp_path, "print('last words'); raise SystemExit(7)")
    message = r"^fpn-ext train ended with exit status 7; see .*x.log: last words$"
    with pytest.raises(RuntimeError, match=message):
        jobs.run(["train", "--config-file", "x.yaml"], log, folder=tmp_path)


def in_place_of_ours(folder, code):
    """A package that shadows this one in processes started in a folder."""
    (folder / "fpn_ext").mkdir()
    (folder / "fpn_ext" / "__init__.py").touch()  # or one on PYTHONPATH would come first
    (folder / "fpn_ext" / "__main__.py").write_text(code)


def test_a_command_runs_in_its_folder_with_its_threads(tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['OMP_NUM_THREADS'], sys.argv[1:])"
    in_place_of_ours(tmp_path, code)
    log = tmp_path / "x.log"
    assert jobs.run(["eval", "--resume"], log, threads=3, folder=tmp_path) > 0
    assert log.read_text() == f"{tmp_path} 3 ['eval', '--resume']\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--table", "1", "--rows", "z"], "--rows z: the tables have a b c"),
        (["--table", "9"], "invalid choice: "),
        (["--table", "1", "--scale", "huge"], "invalid choice: 'huge'"),
        (["--table", "1", "--num-gpus", "99"], "99 GPU"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["reproduce", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and arguments[-1] in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_scale_for_gpus_needs_one(capsys):
    assert main(["reproduce", "--table", "1", "--scale", "small-gpu"]) == 2
    assert "--num-gpus 0 trains on the CPU" in capsys.readouterr().err


def test_the_figures_of_the_document_are_those_of_the_results():
    page, verdicts, minutes = Path("docs/paper/reproducing.md").read_text(), Counter(), 0
    for table in (1, 2, 3):
        summary = json.loads(Path(f"results/paper-small/table{table}.json").read_text())
        figures, _, _ = tables.markdown(summary).partition("\nDifferences")
        assert figures in page
        assert all(entry["seeds"] == [1, 2, 3] for entry in summary["rows"].values())
        verdicts += Counter(
            metric["verdict"]
            for entry in summary["rows"].values()
            for metric in entry["metrics"].values()
            if "verdict" in metric
        )
        minutes += summary["origin"]["cpu_minutes"]
    text = " ".join(page.split())
    assert (
        f"Of the {verdicts.total()} differences from row (c) that the paper has too, "
        f"{verdicts['holds']} have its sign by more than two standard errors, "
        f"{verdicts['reversed']} the other one, {verdicts['open']} are open"
    ) in text
    assert f"54 trainings, seeds 1, 2, 3: {minutes} minutes of CPU time" in text
