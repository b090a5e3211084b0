"""A run's folder: what is in it, that it is enough, and that two runs are never mixed in one."""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import photographs
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from fpn_ext.__main__ import main
from fpn_ext.data.digest import data_digest
from fpn_ext.data.named import register_data
from fpn_ext.engine.repeatable import RepeatableTrainLoader
from fpn_ext.engine.trained_on import check_test_classes, trained_on
from fpn_ext.engine.trainer import Trainer
from fpn_ext.files.earlier import earlier_kept
from fpn_ext.files.run_folder import left_by_a_run, new_folder, weights_of
from fpn_ext.files.run_lock import TURN, only_one_in
from fpn_ext.files.trained_on import TrainedOn, check_class_names, trained_on_of
from fpn_ext.proposals.loader import training_data
from fpn_ext.tools.options import split_words
from PIL import Image
from tiny import DATASET, FILE, config, options, register


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "tiny"
    register(root)
    yield root
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    """The folder of a training of one iteration."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    assert train(folder) == 0
    return folder


def train(folder, *words):
    """Words that begin with - are options, the others overrides."""
    given = [word for word in words if str(word).startswith("-")]
    overrides = [word for word in words if word not in given]
    opts = options(folder, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", *overrides)
    return main(["train", *given, "--config-file", FILE, *opts])


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, elsewhere, whose dataset nobody knows."""
    folder = tmp_path / "moved"
    shutil.copytree(trained, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(DATASET, "of_another_machine"))
    return folder


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (64, 48), "white").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def weights(file):
    return torch.load(file, weights_only=True)


# What it was trained on


def test_every_checkpoint_says_what_it_was_trained_on(trained, images):
    truth = json.loads((images / "annotations" / "instances_train.json").read_text())
    record = trained_on_of(weights(trained / "model_final.pth"))
    assert record.classes == [category["name"] for category in truth["categories"]]
    assert record.category_ids == [category["id"] for category in truth["categories"]]
    assert record.datasets == [DATASET] and record.images == 6
    assert record.boxes == sum(not a["iscrowd"] for a in truth["annotations"])
    assert record.data_sha256 == data_digest(DatasetCatalog.get(DATASET))
    cfg = config(trained)
    assert record.pixel_format == cfg.INPUT.FORMAT == "BGR"
    assert record.pixel_mean == cfg.MODEL.PIXEL_MEAN and record.pixel_std == cfg.MODEL.PIXEL_STD
    assert json.loads((trained / "trained_on.json").read_text()) == record.as_dict()


def test_the_averaged_and_the_best_weights_say_it_too(tmp_path):
    trainer = Trainer(config(tmp_path, "SOLVER.MAX_ITER", 1, "SOLVER.FPN_EXT.EMA_DECAY", 0.5))
    trainer.resume_or_load(resume=False)
    trainer.train()
    record = trained_on_of(weights(tmp_path / "model_final_ema.pth"))
    assert record == trainer.trained_on and record.images == 6


def test_keypoints_are_named_and_paired(small_cfg):
    names, pairs = ["left", "right"], [("left", "right")]
    small_cfg.DATASETS.TRAIN = ("of_keypoints",)
    MetadataCatalog.get("of_keypoints").set(
        thing_classes=["hand"], keypoint_names=names, keypoint_flip_map=pairs
    )
    try:
        assert trained_on(small_cfg, None).keypoint_names == []
        small_cfg.MODEL.KEYPOINT_ON = True
        record = trained_on(small_cfg, None)
    finally:
        MetadataCatalog.remove("of_keypoints")
    assert record.keypoint_names == names and record.keypoint_flip_map == [["left", "right"]]
    assert record.classes == ["hand"] and record.category_ids == [] and record.images == 0


def test_detectron2_reads_such_a_checkpoint(trained):
    from detectron2.checkpoint import DetectionCheckpointer

    model = build_model(config(trained))
    rest = DetectionCheckpointer(model).load(str(trained / "model_final.pth"))
    assert rest["trained_on"]["images"] == 6
    saved = weights(trained / "model_final.pth")["model"]
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_resuming_says_in_what_the_data_changed(tmp_path, caplog):
    class OnThese(Trainer):
        records = DatasetCatalog.get(DATASET)

        @classmethod
        def build_train_loader(cls, cfg):
            return RepeatableTrainLoader(cfg, records=cls.records)

    def begin(resume, iterations):
        trainer = OnThese(config(tmp_path, "SOLVER.MAX_ITER", iterations))
        trainer.resume_or_load(resume)
        return trainer

    begin(False, 2).train()
    whole = OnThese.records
    moved = [dict(record) for record in whole]
    first = next(i for i, record in enumerate(whole) if record["annotations"])
    moved[first]["annotations"] = [{**a, "bbox": [0, 0, 9, 9]} for a in whole[first]["annotations"]]
    boxes = [sum(not a["iscrowd"] for a in record["annotations"]) for record in whole]
    for records, said in (
        (whole, []),
        (moved, ["other images, sizes or boxes, though as many: data_sha256 was"]),
        (
            whole[:4],
            [
                "there were 6 images, now 4",
                f"there were {sum(boxes)} boxes, now {sum(boxes[:4])}",
            ],
        ),
    ):
        caplog.clear()
        OnThese.records = records
        begin(True, 3)
        found = [r.getMessage() for r in caplog.records if "the data changed" in r.getMessage()]
        assert len(found) == len(said)
        assert all(text in line for text, line in zip(said, found, strict=True))


def test_a_picture_that_was_replaced_is_noticed(tmp_path):
    """By its bytes: name, size in pixels and boxes are as they were."""
    photos = photographs.write_coco(tmp_path / "photos")
    named = register_data(photos, tmp_path / "data")

    def record():
        names = ("DATASETS.TRAIN", f"('{named.names['train']}',)", "MODEL.ROI_HEADS.NUM_CLASSES", 2)
        cfg = config(tmp_path, *names)
        return trained_on(cfg, RepeatableTrainLoader(cfg, **training_data(cfg)))

    before = record()
    (split,) = (json.loads(f.read_text()) for f in (tmp_path / "data").glob("*_split.json"))
    file = photos / split["train"][0]
    Image.new("RGB", Image.open(file).size).save(file)
    assert before.changes(before) == []
    (said,) = before.changes(record())
    assert "pictures were replaced" in said


def test_classes_in_another_order_are_not_gone_on_with(tmp_path):
    """Weights learned for one class would be trained on for another."""
    cfg = config(tmp_path, "SOLVER.MAX_ITER", 2)
    Trainer(cfg).train()
    trainer = Trainer(config(tmp_path, "SOLVER.MAX_ITER", 3))
    now = trainer.trained_on
    assert len(now.classes) > 1
    trainer.trained_on = replace(now, classes=now.classes[::-1])
    with pytest.raises(ValueError, match="the same names in another order"):
        trainer.resume_or_load(True)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ((), []),
        (("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3, "INPUT.MIN_SIZE_TEST", 99), []),
        (("INPUT.FORMAT", "RGB"), ["INPUT.FORMAT is RGB, and weights.pth was trained with BGR"]),
        (("MODEL.PIXEL_STD", "[1, 1, 2]"), ["MODEL.PIXEL_STD is [1.0, 1.0, 2.0], and weights.pth"]),
        (
            ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [64], [128]]"),
            ["MODEL.ANCHOR_GENERATOR.SIZES is [[8], [16], [32], [64], [128]], and weights.pth"],
        ),
        (
            ("MODEL.FPN_EXT.CANONICAL_BOX_SIZE", 99, "MODEL.FPN_EXT.LEVEL_RULE", "LongerSideRule"),
            ["MODEL.FPN_EXT.CANONICAL_BOX_SIZE is 99, ", "LEVEL_RULE is LongerSideRule, "],
        ),
    ],
)
def test_what_was_otherwise_in_the_training_is_said(keys, said, trained, caplog):
    """Of what no tensor's shape tells: predictions would be other than those of the training."""
    check_test_classes(config(trained, *keys), "weights.pth", weights(trained / "model_final.pth"))
    found = [r.getMessage() for r in caplog.records if r.name == "fpn_ext.engine.trained_on"]
    assert len(found) == len(said)
    assert all(text in line for text, line in zip(said, found, strict=True))


@pytest.mark.parametrize("extend", [False, True])
def test_weights_of_other_classes_to_begin_with_are_named(extend, trained, tmp_path, caplog):
    """As many, in another order: the head that tells cats is begun with to tell dogs."""
    trainer = Trainer(config(tmp_path, "MODEL.WEIGHTS", trained / "model_final.pth"))
    now = trainer.trained_on
    begin = trainer.extend if extend else lambda: trainer.resume_or_load(False)
    begin()
    assert "as there are as many" not in caplog.text
    trainer.trained_on = replace(now, classes=now.classes[::-1])
    begin()
    assert f"was trained on the classes {now.classes}" in caplog.text
    assert "as there are as many" in caplog.text


@pytest.mark.parametrize(
    ("other", "how"),
    [
        (["a", "b"], "3 and 2 classes"),
        (["b", "a", "c"], "the same names in another order"),
        (["a", "B", "c"], "the first to differ is class 1: 'b' and 'B'"),
    ],
)
def test_other_classes_are_refused_and_both_lists_shown(other, how):
    with pytest.raises(ValueError) as error:
        check_class_names(["a", "b", "c"], other, "dataset 'x'", "model.pth", "KEY")
    said = str(error.value)
    assert how in said and "['a', 'b', 'c']" in said and f"dataset 'x': {other}" in said
    assert "rename the model's: KEY" in said
    check_class_names(["a", "b"], ["a", "b"], "dataset 'x'", "model.pth", "KEY")


@pytest.mark.parametrize("value", [3, {"classes": "cat"}, {"classes": [1]}, {"images": "3"}])
def test_a_record_of_another_form_is_an_error(value):
    with pytest.raises(ValueError, match="of the checkpoint"):
        trained_on_of({"trained_on": value})
    assert trained_on_of({"model": {}}) is None
    assert trained_on_of({"trained_on": {"of_a_later_version": 1}}) == TrainedOn()


# A run's folder is enough


def test_a_run_predicts_on_another_machine(run, photo, trained, capsys):
    """Two times, into two folders; with the names and ids of the classes it was trained on."""
    record = trained_on_of(weights(trained / "model_final.pth"))
    words = ["predict", "--run", str(run), str(photo), "--min-score", "0.0"]
    assert main(words) == 0
    assert f"weights: {run / 'model_final.pth'}, after 1 iterations" in capsys.readouterr().out
    found = json.loads((run / "predictions" / "detections.json").read_text())
    expected = dict(zip(record.category_ids, record.classes, strict=True))
    assert {c["id"]: c["name"] for c in found["categories"]} == expected
    assert (run / "predictions" / "photo.png").is_file()
    assert main([*words, "MODEL.DEVICE", "cpu"]) == 0
    assert (run / "predictions-2" / "detections.json").is_file()


def test_a_run_is_looked_into(run, photo):
    assert main(["look", "--run", str(run), "--input", str(photo)]) == 0
    assert (run / "look" / "photo_proposals.png").is_file()


def test_a_run_is_evaluated_and_drawn(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = (folder / "config.yaml").read_bytes()
    opts = ["DATASETS.TEST", f"('{DATASET}',)"]
    assert main(["eval", "--run", str(folder), *opts]) == 0
    assert (folder / "inference" / DATASET / "results.json").is_file()
    assert (folder / "config.yaml").read_bytes() == before, "the training's, not the evaluation's"
    assert main(["contact-sheet", "--run", str(folder), "--num-images", "1", *opts]) == 0
    assert (folder / "contact_sheet.png").is_file()
    assert main(["levels", "--run", str(folder), "--output", str(folder)]) == 0
    assert main(["anchors", "--run", str(folder), "--output", str(folder)]) == 0


def test_scores_of_other_weights_replace_none(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    scores = run / "inference" / DATASET / "results.json"
    kept = scores.with_name("results-1.json")
    evaluate = ["eval", "--run", str(run), "DATASETS.TEST", f"('{DATASET}',)"]
    assert main(evaluate) == 0
    assert main(evaluate) == 0
    assert not kept.exists()  # the same scores, once
    earlier = json.dumps({"bbox": {"AP": 42.0}})
    scores.write_text(earlier)
    assert main(evaluate) == 0
    assert kept.read_text() == earlier != scores.read_text()


def test_curves_are_of_the_training_whose_weights_are_drawn(trained, tmp_path):
    """Not of another one, in the OUTPUT_DIR that the config has."""
    other, output = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    shutil.copy(trained / "model_final.pth", other)
    opts = options(trained, "DATASETS.TEST", f"('{DATASET}',)")
    words = ["contact-sheet", "--config-file", FILE, "--output", str(output), "--num-images", "1"]
    assert main([*words, *opts, "MODEL.WEIGHTS", str(other / "model_final.pth")]) == 0
    assert [f.name for f in output.iterdir()] == ["contact_sheet.png"]
    assert main([*words, *opts, "MODEL.WEIGHTS", str(trained / "model_final.pth")]) == 0
    assert (output / "curves.png").is_file()


def test_two_evaluations_at_once_keep_the_earlier_scores(tmp_path):
    """Of the same weights, which change nothing, and of others, which end last."""
    scores = tmp_path / "results.json"
    scores.write_text("earlier")
    with earlier_kept([scores], print):
        with earlier_kept([scores], print):
            pass
        scores.write_text("of other weights")
    kept = [file for file in tmp_path.iterdir() if file != scores]
    assert [file.read_text() for file in kept] == ["earlier"]


@pytest.mark.parametrize("verb", ["eval", "look", "contact-sheet", "analyze"])
def test_no_dataset_to_score_on(verb, trained, tmp_path, capsys):
    """It was trained without one."""
    words = [] if verb == "eval" else ["--output", str(tmp_path / "out")]
    assert main([verb, "--run", str(trained), *words]) == 2
    assert "DATASETS.TEST is empty: name a dataset there" in capsys.readouterr().err
    assert not (trained / "inference").exists() and not (tmp_path / "out").exists()


def test_two_evaluations_at_once_take_turns(trained, tmp_path, holder):
    """The second is waiting, and has written nothing, until the first, here a stand-in, ends."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    scores = run / "inference" / DATASET / "results.json"
    scores.parent.mkdir(parents=True)
    scores.write_text("{}")
    first = holder(run, turn="in_turn")
    waits = threading.Event()
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: (said.append(record.getMessage()), waits.set())
    logging.getLogger("fpn_ext.files.run_lock").addHandler(handler)
    status = []
    words = ["eval", "--run", str(run), "DATASETS.TEST", f"('{DATASET}',)"]
    second = threading.Thread(target=lambda: status.append(main(words)))
    try:
        second.start()
        assert waits.wait(60)
        assert f"process {first.pid} on " in said[0] and "and is waited for" in said[0]
        assert scores.read_text() == "{}"
    finally:
        first.kill()
        second.join()
        logging.getLogger("fpn_ext.files.run_lock").removeHandler(handler)
    assert status == [0]
    assert "bbox" in scores.read_text()
    assert (scores.parent / "results-1.json").read_text() == "{}"
    assert not (run / TURN).exists()


def test_a_prediction_beside_one_that_has_not_begun_to_write(run, photo):
    """Two that begin together have a folder each."""
    words = ["predict", "--run", str(run), str(photo)]
    with new_folder(run / "predictions") as other:
        assert main(words) == 0
        assert not any(other.iterdir())
    assert sorted(f.name for f in run.glob("predictions*")) == ["predictions-2"]
    assert main([*words[:-1], "--tiles", "64", "nowhere.png"]) == 2
    assert not (run / "predictions").exists(), "a mistake leaves no empty folder"


def test_detections_of_before_are_kept_and_say_what_found_them(run, photo, tmp_path, capsys):
    output = tmp_path / "out"
    second = shutil.copy(photo, tmp_path / "second.png")
    words = ["predict", "--run", str(run), "--output", str(output)]
    assert main([*words, str(photo)]) == 0
    first = json.loads((output / "detections.json").read_text())
    assert first["info"]["weights"] == f"{run / 'model_final.pth'}, after 1 iterations"
    assert main([*words, str(photo)]) == 0
    assert not (output / "detections-1.json").exists()  # the same, once
    assert main([*words, str(second)]) == 0
    assert f"before is in {output / 'detections-1.json'}" in capsys.readouterr().out
    assert json.loads((output / "detections-1.json").read_text()) == first


def test_a_dataset_of_other_classes_is_not_evaluated(trained, tmp_path, capsys):
    names = MetadataCatalog.get(DATASET).thing_classes
    other = [name.upper() for name in names]
    DatasetCatalog.register("tiny_upper", lambda: DatasetCatalog.get(DATASET))
    MetadataCatalog.get("tiny_upper").set(
        thing_classes=other, evaluator_type="coco",
        json_file=MetadataCatalog.get(DATASET).json_file,
        thing_dataset_id_to_contiguous_id=MetadataCatalog.get(
            DATASET
        ).thing_dataset_id_to_contiguous_id,
    )  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    words = ["--run", str(folder), "DATASETS.TEST", "('tiny_upper',)"]
    try:
        for verb, *more in (["eval"], ["contact-sheet", "--num-images", "1"]):
            assert main([verb, *more, *words]) == 2
            said = capsys.readouterr().err
            assert "tiny_upper" in said
            assert any(name in said for name in other)
            assert all(f"'{name}'" in said for name in names)
            assert "TEST.FPN_EXT.CLASS_NAMES" in said
            assert main([verb, *more, *words, "TEST.FPN_EXT.CLASS_NAMES", str(other)]) == 0
    finally:
        DatasetCatalog.remove("tiny_upper")
        MetadataCatalog.remove("tiny_upper")


def test_the_best_weights_of_a_run_are_taken(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights in this folder"):
        weights_of(tmp_path)
    best_last = [
        "model_0000099.pth", "model_0000199.pth", "model_final.pth", "model_final_ema.pth",
        "model_best.pth",
    ]  # fmt: skip
    for name in best_last:
        (tmp_path / name).touch()
        assert weights_of(tmp_path).name == name


def test_weights_of_before_a_training_went_on_without_are_not_taken(tmp_path):
    for name in ("model_final.pth", "model_final_ema.pth", "model_best.pth"):
        (tmp_path / name).touch()
    record = tmp_path / "finished.json"
    for files, taken in (
        (["model_final.pth", "inference/x/results.json"], "model_final.pth"),
        (["model_final.pth", "model_final_ema.pth"], "model_final_ema.pth"),
        (["model_final.pth", "model_best.pth"], "model_best.pth"),
        ([], "model_best.pth"),
        (None, "model_best.pth"),
    ):
        record.write_text(json.dumps({"iterations": 2, "files": files}))
        assert weights_of(tmp_path).name == taken


def test_final_weights_of_before_a_training_goes_on_are_not_taken(tmp_path):
    """It was finished, goes on with more iterations, and has not ended: or was killed."""
    last = "model_0000007.pth"
    for name in ("model_final.pth", "model_final_ema.pth", "model_0000003.pth", last):
        (tmp_path / name).touch()
    tag, config_file = tmp_path / "last_checkpoint", tmp_path / "config.yaml"
    tag.write_text("model_final.pth")  # it has not got to a checkpoint yet
    assert weights_of(tmp_path).name == "model_final_ema.pth"
    tag.write_text(last)
    assert weights_of(tmp_path).name == last
    (tmp_path / "model_best.pth").touch()
    for metric, taken in (("bbox/AP", "model_best.pth"), ("", last)):  # "" since it goes on
        config_file.write_text(f"TEST: {{FPN_EXT: {{BEST_METRIC: '{metric}'}}}}\n")
        assert weights_of(tmp_path).name == taken


def test_a_folder_that_is_no_run(tmp_path, photo, capsys):
    for folder, said in (("none", "no such folder"), (".", "no config.yaml in this folder")):
        assert main(["predict", "--run", str(tmp_path / folder), str(photo)]) == 2
        assert said in capsys.readouterr().err
    assert main(["predict", "--run", str(tmp_path), "--config-file", FILE, str(photo)]) == 2
    assert "not allowed with argument" in capsys.readouterr().err
    assert main(["predict", "--run", str(tmp_path)]) == 2
    assert "no pictures" in capsys.readouterr().err
    assert main(["predict", "--config-file", FILE, str(photo)]) == 2
    assert "--output FOLDER is needed without --run" in capsys.readouterr().err


def test_pictures_and_overrides_in_any_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "cpu", "SEED"):
        Path(name).touch()
    words = ["a.png", "MODEL.DEVICE", "cpu", "cpu", "INPUT.FORMAT", "L"]
    assert split_words(words) == (["a.png", "cpu"], ["MODEL.DEVICE", "cpu", "INPUT.FORMAT", "L"])
    assert split_words(["MODL.DEVICE", "cpu"]) == ([], ["MODL.DEVICE", "cpu"])
    with pytest.raises(ValueError, match=r"'SEED' is a config key, .* write './SEED'"):
        split_words(["SEED", "1"])
    assert split_words(["./SEED"]) == (["./SEED"], [])
    with pytest.raises(FileNotFoundError, match=r"b\.png: no such file or folder, nor a config"):
        split_words(["b.png"])


# Two runs in one folder


def test_a_training_into_a_used_folder_is_refused(trained, capsys, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in trained.rglob("*") if f.is_file()}
    assert train(trained) == 2
    said = capsys.readouterr().err
    assert f"OUTPUT_DIR {trained} holds a training already (model_final.pth)" in said
    assert "--resume" in said
    assert f"--new-folder trains into a new folder beside it ({trained}-2)" in said
    assert {f: f.stat().st_mtime_ns for f in trained.rglob("*") if f.is_file()} == before


def test_a_new_folder_beside_it(trained):
    assert train(trained, "--new-folder") == 0
    second = trained.with_name("mine-2")
    assert (second / "model_final.pth").is_file()
    assert f"OUTPUT_DIR: {second}" in (second / "config.yaml").read_text()
    assert train(trained, "--new-folder", "--resume") == 2
    shutil.rmtree(second)


def test_what_a_run_leaves(tmp_path):
    assert left_by_a_run(tmp_path / "none") == ""
    for name in ("config.yaml", "log.txt", "metrics.json", "resnet18.pth"):
        (tmp_path / name).touch()
    assert left_by_a_run(tmp_path) == "", "an empty metrics.json is of no iteration"
    (tmp_path / "metrics.json").write_text("{}")
    assert left_by_a_run(tmp_path) == "metrics.json"
    (tmp_path / "last_checkpoint").touch()
    assert left_by_a_run(tmp_path) == "last_checkpoint"
    (tmp_path / "model_0000099.pth").touch()
    assert left_by_a_run(tmp_path) == "model_0000099.pth"


def test_a_run_killed_before_its_first_checkpoint_is_gone_on_with(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text('{"iteration": 19, "total_loss": 1.0}\n')
    assert train(tmp_path) == 2
    assert "(metrics.json)" in capsys.readouterr().err
    assert train(tmp_path, "--resume") == 0
    assert (tmp_path / "model_final.pth").is_file()


HOLD = """
import os, sys, time
from pathlib import Path
from fpn_ext.files import run_lock
with getattr(run_lock, sys.argv[2])(Path(sys.argv[1])):
    if len(sys.argv) > 3 and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    started = []

    def hold(folder, *more, turn="only_one_in"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), turn, *more],
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "in\n"
        return process

    yield hold
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_copy_of_a_run_goes_on_and_not_the_run(trained, tmp_path, capsys):
    """Its config names the folder that it was in."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    before = {f: f.stat().st_mtime_ns for f in trained.rglob("*")}
    config_file = copy / "config.yaml"
    for verb in ("train", "eval"):
        words = [verb, "--resume", "--config-file", str(config_file), "SOLVER.MAX_ITER", "2"]
        assert main(words) == 2
        assert f"Append OUTPUT_DIR {copy} to go on with it" in capsys.readouterr().err
    assert main(["train", *words[1:], "OUTPUT_DIR", str(copy)]) == 0
    assert {f: f.stat().st_mtime_ns for f in trained.rglob("*")} == before
    assert (copy / "model_0000001.pth").is_file()


def test_a_second_process_is_refused_at_once(tmp_path, holder, capsys):
    first = holder(tmp_path)
    assert train(tmp_path) == 2
    said = capsys.readouterr().err
    assert f"OUTPUT_DIR {tmp_path} is in use: process {first.pid} on " in said
    assert ", started 20" in said
    assert [f.name for f in tmp_path.iterdir()] == ["run.lock"]


def test_a_crash_leaves_no_lock(tmp_path, holder):
    """Nor does one whose workers live on."""
    first = holder(tmp_path, "with a child")
    with pytest.raises(ValueError, match="is in use"), only_one_in(tmp_path):
        pass
    first.kill()
    first.wait()
    with only_one_in(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_data_of_a_running_training_stay_as_they_are(tmp_path, holder):
    """Its evaluations read them again, whichever command looks at other data of the same name."""
    run, data = tmp_path / "run", photographs.write_coco(tmp_path / "one" / "photos")
    other = photographs.write_coco(
        tmp_path / "two" / "photos", lambda content: content["annotations"].pop()
    )
    register_data(data, run / "data")
    before = {file.name: file.read_bytes() for file in (run / "data").iterdir()}
    first = holder(run)
    register_data(data, run / "data")
    with pytest.raises(ValueError, match="a training is running there"):
        register_data(other, run / "data")
    assert {file.name: file.read_bytes() for file in (run / "data").iterdir()} == before
    first.kill()
    first.wait()
    with only_one_in(run):  # this process may, and is in still
        register_data(other, run / "data")
        assert subprocess.run(
            [sys.executable, "-c", HOLD, str(run), "only_one_in"], capture_output=True
        ).returncode, "the lock was given back"


def test_a_second_training_leaves_the_data_of_the_first_alone(tmp_path, holder, capsys):
    """What the first is reading is in its folder, under the name of the data."""
    photos = photographs.write_coco(tmp_path / "photos")
    run = tmp_path / "mine"
    run.mkdir()
    holder(run)
    assert train(run, "DATASETS.FPN_EXT.DATA", str(photos)) == 2
    assert "is in use" in capsys.readouterr().err
    assert [f.name for f in run.iterdir()] == ["run.lock"]


def test_the_log_says_what_was_done_to_the_data(tmp_path):
    """By the command, which looks at them before the training does."""
    photos, run = photographs.write_coco(tmp_path / "photos"), tmp_path / "mine"
    data = ["DATASETS.FPN_EXT.DATA", str(photos)]
    assert train(run, *data) == 0
    log = (run / "log.txt").read_text()
    assert "drawn by seed 1" in log and "an earlier draw" not in log and "changed" not in log
    photographs.write_coco(photos, lambda content: content["annotations"].pop())
    assert train(run, "--resume", *data, "SOLVER.MAX_ITER", 2) == 0
    said = (run / "log.txt").read_text().removeprefix(log)
    assert "photos_train.json had 5 images" in said and "an earlier draw" in said


def test_a_mistake_leaves_no_empty_folder(tmp_path):
    assert train(tmp_path / "mine", "MODEL.WEIGHTS", "nowhere.pth") == 2
    assert not (tmp_path / "mine").exists()


def test_a_new_folder_beside_one_in_use(tmp_path, holder):
    holder(tmp_path / "mine")
    assert train(tmp_path / "mine", "--new-folder", "SOLVER.MAX_ITER", "1") == 0
    assert (tmp_path / "mine-2" / "model_final.pth").is_file()
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["run.lock"]


def test_two_that_look_for_a_new_folder_at_once(trained, monkeypatch):
    """As the jobs of an array do: the other one has begun in it after this one looked."""
    whole, second = left_by_a_run, trained.with_name("mine-2")
    looked = []

    def left(folder):
        looked.append(folder)
        if looked.count(second) > 1:  # the first time it was free
            second.mkdir(exist_ok=True)
            (second / "last_checkpoint").touch()
        return whole(folder)

    monkeypatch.setattr("fpn_ext.engine.train.left_by_a_run", left)
    assert train(trained, "--new-folder") == 0
    third = trained.with_name("mine-3")
    assert (third / "model_final.pth").is_file()
    assert [f.name for f in second.iterdir()] == ["last_checkpoint"]
    for folder in (second, third):
        shutil.rmtree(folder)


def test_a_resumption_that_is_refused_leaves_the_run_as_it_was(run, capsys):
    written = {name: (run / name).read_bytes() for name in ("config.yaml", "trained_on.json")}

    def resume(*more):
        words = options(run, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", *more)
        return main(["train", "--resume", "--config-file", FILE, *words])

    assert resume("MODEL.ROI_BOX_HEAD.FC_DIM", 32) == 2
    assert "optimizer was made for another model" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in written} == written
    assert resume() == 0
    assert "MAX_ITER: 2" in (run / "config.yaml").read_text()
