"""From a folder of photographs to a training: --data, data files, splits, and what follows."""

import json
import os
import re
from pathlib import Path

import fpn_ext
import photographs
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from fpn_ext.__main__ import main
from fpn_ext.config.data_keys import resolve_data
from fpn_ext.config.defaults import flat
from fpn_ext.config.load import load_config
from fpn_ext.config.numerics import unresolved_yaml
from fpn_ext.config.prepare import prepare
from fpn_ext.config.written import WrittenKeys
from fpn_ext.data.data_file import open_data
from fpn_ext.data.digest import data_digest
from fpn_ext.data.named import register_data
from fpn_ext.data.splits import held_out
from fpn_ext.engine.schedule import learning_rate_note
from hypothesis import given
from hypothesis import strategies as st
from photographs import OBJECTS, WRITERS, write_coco, write_pictures, write_yolo
from test_formats import REFUSED

FAST = "configs/start/faster_rcnn_fast_cpu.yaml"
START = sorted(map(str, Path("configs/start").glob("*.yaml")))
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": "0",
    "MODEL.FPN_EXT.BOTTOM_UP": "build_resnet_backbone",  # of FAST too: without a package
    "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS": "",
    "MODEL.FPN_EXT.BOTTOM_UP_NORM": "",
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.FPN.OUT_CHANNELS": "16",
    "MODEL.FPN_EXT.NUMERICS": "exact",
    "MODEL.RESNETS.NORM": "BN",  # where the weights are random, a frozen norm does not hold them
    "MODEL.PIXEL_STD": "[57.375, 57.12, 58.395]",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "16",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "DATALOADER.NUM_WORKERS": "0",
    "SOLVER.IMS_PER_BATCH": "2",
}
TINY = [word for pair in SMALL.items() for word in pair]


def prepared(data, folder, *opts, config=FAST, training=True):
    return prepare(
        config,
        [*TINY, "OUTPUT_DIR", str(folder), "DATASETS.FPN_EXT.DATA", str(data), *opts],
        training=training,
    )


# The data file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clases: [cat]", "unknown key 'clases'; nearest valid: 'classes'"),
        ("train: {imgs: a}", "train has an unknown key 'imgs'; nearest valid: 'images'"),
        ("format: coko", "format 'coko'; nearest valid: 'coco'"),
        ("split: 1.5", "split is a share of the images, from 0 to below 1, got 1.5"),
        ("split: half", "split must be int or float, got 'half'"),
        ("corners: 2", "corners is 0 or 1, the first pixel, got 2"),
        ("classes: cat", "classes is a list of names, got 'cat'"),
        ("classes: [yes, no]", "(yes, no, on and off are names only in quotes"),
        ("classes: [cat, cat]", "classes has 'cat' twice"),
        ("names: {0: cat, 2: dog}", "names must number the classes from 0 to 1, got [0, 2]"),
        ("train: 3", "train is a path or a list of paths, got 3"),
        ("path: elsewhere", "path 'elsewhere' is no folder"),
        ("kpt_shape: 17", "kpt_shape is [keypoints, 2 or 3], got 17"),
        ("- a", "must hold keys (name, format, path, "),
        ("a: [", "is not YAML in UTF-8"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_data_file(text, said, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)):
        open_data(tmp_path / "mine.yaml")


def test_a_data_file_says_what_it_is_of(tmp_path):
    (tmp_path / "photos").mkdir()
    file = tmp_path / "mine.yaml"
    file.write_text(
        "path: photos\nformat: voc\nclasses: [dog, cat, 8]\ntrain: {annotations: xml}\n"
        "val: [a, b]\nsplit: 0.3\nseed: 4\ncorners: 0\nsplit_file: s.json\n"
    )
    data = open_data(file)
    assert (data.name, data.root, data.format) == ("mine", tmp_path / "photos", "voc")
    assert data.classes == ("dog", "cat", "8")
    assert data.splits["train"].annotations == ("xml",)
    assert data.splits["val"].images == ("a", "b") and "test" not in data.splits
    assert (data.split, data.seed, data.corners) == (0.3, 4, 0)
    assert data.split_file == tmp_path / "s.json"
    (tmp_path / "photos" / "data.yaml").write_text("corners: 1\n")
    assert open_data(tmp_path / "photos").name == "photos"
    (tmp_path / "photos" / "data.yml").write_text("corners: 0\n")
    with pytest.raises(ValueError, match=r"has data\.yaml and data\.yml"):
        open_data(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        open_data(tmp_path / "none")


def test_splits_and_classes_of_a_data_file_are_those_that_count(tmp_path):
    write_coco(tmp_path / "photos")
    for split, names in (("first", "abc"), ("second", "def")):
        content = json.dumps(photographs.coco_content(names))
        (tmp_path / f"{split}.json").write_text(content)
    (tmp_path / "mine.yaml").write_text(
        "train: {annotations: first.json, images: photos}\nval: {annotations: second.json}\n"
        "classes: [dog, cat]\n"
    )
    named = register_data(tmp_path / "mine.yaml", tmp_path / "out")
    assert named.names == {"train": "mine_train", "val": "mine_val"}
    assert named.counts == {"train": (3, 4), "val": (3, 3)}
    assert MetadataCatalog.get("mine_train").thing_classes == ["dog", "cat"]
    numbers = [a["category_id"] for a in DatasetCatalog.get("mine_train")[1]["annotations"]]
    assert numbers == [0]  # of b, a dog
    (tmp_path / "mine.yaml").write_text("format: coco\ntrain: first.json\nclasses: [dog]\n")
    with pytest.raises(ValueError, match=r"2 objects are of class 'cat', which classes does not"):
        register_data(tmp_path / "mine.yaml", tmp_path / "out")


def test_a_name_that_is_taken_is_not_taken_over(tmp_path):
    write_coco(tmp_path / "coco_2017")
    with pytest.raises(ValueError, match=r"'coco_2017_train' is registered already; .* `name: "):
        register_data(tmp_path / "coco_2017", tmp_path / "out")
    (tmp_path / "coco_2017" / "data.yaml").write_text("name: cats\n")
    assert register_data(tmp_path / "coco_2017", tmp_path / "out").names["train"] == "cats_train"


# Splits


@given(
    names=st.sets(st.text(min_size=1), min_size=2, max_size=40),
    share=st.floats(0.01, 0.99),
    seed=st.integers(),
    random=st.randoms(),
)
def test_a_draw_depends_on_names_and_seed_alone(names, share, seed, random):
    shuffled = list(names)
    random.shuffle(shuffled)
    val = held_out(shuffled, share, seed)
    assert val == held_out(sorted(names), share, seed)
    assert val < names and 1 <= len(val) < len(names)
    assert abs(len(val) - share * len(names)) <= 1


def test_another_seed_draws_others():
    names = [f"{i}.jpg" for i in range(100)]
    assert len({frozenset(held_out(names, 0.2, seed)) for seed in range(10)}) == 10


def split_of(folder):
    content = json.loads((folder / "photos_split.json").read_text())
    return content["train"], content["val"]


def test_a_split_stays_while_the_folder_grows(tmp_path):
    """As --resume needs it: what was trained on never becomes what is scored on."""
    write_coco(tmp_path / "photos")
    out = tmp_path / "out"
    assert register_data(tmp_path / "photos", out).counts["val"][0] == 1
    train, val = split_of(out)
    assert sorted([*train, *val]) == [f"{name}.png" for name in "abcdef"]
    assert not list((tmp_path / "photos").glob("*split*"))
    before = (out / "photos_val.json").read_bytes()
    for new in ("g", "h", "i", "j", "k"):
        OBJECTS[new] = [("cat", 5, 5, 20, 20)]
    try:
        write_coco(tmp_path / "photos")
        named = register_data(tmp_path / "photos", out)
    finally:
        for new in ("g", "h", "i", "j", "k"):
            del OBJECTS[new]
    assert (out / "photos_val.json").read_bytes() == before
    assert "an earlier draw; 5 images are not in it and are trained on" in named.notes[0]
    (tmp_path / "photos" / "data.yaml").write_text("split: 0.5\n")
    assert register_data(tmp_path / "photos", out).counts["val"][0] == 6  # of 11, drawn anew


def test_the_same_data_read_again_leaves_every_file_as_it_was(tmp_path):
    """A command that is refused afterwards has changed nothing, not even a time."""
    write_yolo(tmp_path / "photos")
    seen = []
    for _ in range(2):
        register_data(tmp_path / "photos", tmp_path / "out")
        files = (file for file in (tmp_path / "out").iterdir() if file.suffix != ".lock")
        seen.append({file.name: file.stat().st_mtime_ns for file in files})
    assert seen[0] == seen[1] and len(seen[0]) == 4  # two splits, the draw, the mark


def test_an_earlier_split_of_other_images_is_refused(tmp_path):
    """What was held out would be trained on under its new name."""
    write_yolo(tmp_path / "photos")
    register_data(tmp_path / "photos", tmp_path / "out")
    (name,) = split_of(tmp_path / "out")[1]
    for kind, file in (("images", Path(name)), ("labels", Path(name).with_suffix(".txt"))):
        (tmp_path / "photos" / kind / file).rename(tmp_path / "photos" / kind / f"new{file.suffix}")
    with pytest.raises(ValueError, match=r"holds out 1 images of which none is there now"):
        register_data(tmp_path / "photos", tmp_path / "out")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("output", ["", "output/mine"])
def test_a_training_within_the_data_is_no_data(name, output, tmp_path):
    """Its files of annotations, and drawings of a later prediction."""
    photos = WRITERS[name](tmp_path / "photos")
    before = register_data(photos, photos / output / "data")
    if output:
        write_pictures(photos / output / "predictions")
    assert register_data(photos, photos / output / "data").counts == before.counts
    assert register_data(photos, tmp_path / "elsewhere").counts == before.counts


@pytest.mark.parametrize("output", [".", "mine"])
def test_a_training_into_a_folder_of_photographs_is_refused(output, tmp_path):
    """It would be left out as a training's from then on, and the photographs with it."""
    photos, run = tmp_path / "photos", tmp_path / "photos" / output
    write_coco(run / "data")
    before = sorted(photos.rglob("*"))
    with pytest.raises(ValueError, match=r"OUTPUT_DIR .*/data/a\.png of the data lies where"):
        register_data(photos, run / "data")
    assert sorted(photos.rglob("*")) == before
    if output != ".":
        (run / "data").rename(run / "pictures")
        with pytest.raises(ValueError, match=r"/mine/pictures/a\.png of the data lies where"):
            register_data(photos, run / "data")
    with pytest.raises(ValueError, match=r"OUTPUT_DIR .*\.png of the data lies where"):
        register_data(photos, photos)  # OUTPUT_DIR is the folder that the data are in, as data/
    register_data(photos, tmp_path / "run" / "data")
    register_data(photos, tmp_path)  # around them


def test_data_that_changed_since_the_last_command_are_said_to_have(tmp_path):
    """Whatever the command, and whatever the change: scores before and after are of other data."""
    photos, out = write_coco(tmp_path / "photos"), tmp_path / "out" / "data"
    assert register_data(photos, out).warnings == ()
    assert register_data(photos, out).warnings == ()
    (held_out_image,) = split_of(out)[1]

    def without_objects(content):
        (number,) = (i["id"] for i in content["images"] if i["file_name"] == held_out_image)
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != number]

    write_coco(photos, without_objects)
    count = len(OBJECTS[Path(held_out_image).stem])
    assert register_data(photos, out).warnings == (
        "the data changed since the last command in this OUTPUT_DIR: photos_val.json had 1 images "
        f"with {count} objects, and has 1 images with 0 objects; scores of before are of other "
        "data",
    )
    assert register_data(photos, out).warnings == ()


def test_file_names_that_are_not_utf_8(tmp_path):
    """As on disks of another system: bytes that no encoding explains."""
    photos = write_yolo(tmp_path / "photos")
    for kind, suffix in (("images", ".png"), ("labels", ".txt")):
        for name in OBJECTS:
            old = photos / kind / f"{name}{suffix}"
            old.rename(photos / kind / os.fsdecode(f"{name}é{suffix}".encode("latin-1")))
    named = register_data(photos, tmp_path / "out")
    records = [r for name in named.names.values() for r in DatasetCatalog.get(name)]
    assert len(records) == len(OBJECTS) and all(Path(r["file_name"]).is_file() for r in records)
    assert data_digest(records) == data_digest(records[::-1])
    assert register_data(photos, tmp_path / "out").counts == named.counts


def test_a_split_file_is_followed_or_refused(tmp_path):
    write_coco(tmp_path / "photos")
    about = tmp_path / "photos" / "data.yaml"
    about.write_text("split_file: s.json\n")
    with pytest.raises(FileNotFoundError, match="split_file: no file"):
        register_data(tmp_path / "photos", tmp_path / "out")
    file = tmp_path / "photos" / "s.json"
    file.write_text("[]")
    with pytest.raises(ValueError, match="must hold the lists train and val"):
        register_data(tmp_path / "photos", tmp_path / "out")
    about.write_text("format: coco\ntrain: {annotations: all.json}\nsplit_file: s.json\n")
    file.write_text('{"train": [], "val": ["a.png", "c.png"]}')
    register_data(tmp_path / "photos", tmp_path / "out")
    names = [Path(record["file_name"]).name for record in DatasetCatalog.get("photos_val")]
    assert names == ["a.png", "c.png"]
    file.write_text('{"train": [], "val": ["x.png"]}')
    with pytest.raises(ValueError, match=r"names 1 images that are not there, first 'x.png'"):
        register_data(tmp_path / "photos", tmp_path / "out")


def test_no_share_holds_nothing_out(tmp_path):
    write_yolo(tmp_path / "photos")
    (tmp_path / "photos" / "data.yaml").write_text("names: [cat, dog]\nsplit: 0\n")
    cfg, notes = prepared(tmp_path / "photos", tmp_path / "out")
    assert cfg.DATASETS.TEST == () and cfg.TEST.EVAL_PERIOD == 0
    assert any("nothing is scored" in note for note in notes)


# What follows for the config


def test_what_the_data_decide(tmp_path):
    write_coco(tmp_path / "photos")
    cfg, notes = prepared(
        tmp_path / "photos", tmp_path / "out", "SOLVER.FPN_EXT.EPOCHS", "9",
        "MODEL.ROI_HEADS.NUM_CLASSES", "7", "DATASETS.TRAIN", "('bccd_train',)",
    )  # fmt: skip
    assert cfg.DATASETS.TRAIN == ("photos_train",) and cfg.DATASETS.TEST == ("photos_val",)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 2
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == fpn_ext.get_cfg().MODEL.SEM_SEG_HEAD.NUM_CLASSES
    # 9 x 5 images in steps of 2: 22.5
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (23, (15, 20), 5)
    assert (solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (3, 3)  # once an epoch
    assert solver.BASE_LR == 0.02 * 2 / 4  # of SOLVER.FPN_EXT.REFERENCE_BATCH 4
    assert learning_rate_note(cfg) == ""  # though 0.02 for 16 is the usual rate
    cfg.SOLVER.FPN_EXT.REFERENCE_BATCH = 0
    assert "is 4 times the 0.0025 usual" in learning_rate_note(cfg)
    said = "\n".join(notes)
    assert re.search(r"data .*photos \(coco\): train 5 images with \d objects, val 1 images", said)
    assert "NUM_CLASSES 2: cat, dog" in said
    assert "DATASETS.TRAIN is ('photos_train',), not ('bccd_train',)" in said
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 2, not 7" in said
    assert "SOLVER.BASE_LR 0.01: 0.02 for 4 images, scaled to 2" in said
    assert "epochs of 5 images in steps of 2: SOLVER.MAX_ITER 23, STEPS (15, 20)" in said
    assert len(notes) <= 10


def test_accumulated_batches_count_as_one(tmp_path):
    write_coco(tmp_path / "photos")
    opts = ["SOLVER.FPN_EXT.EPOCHS", "8", "SOLVER.FPN_EXT.ACCUMULATE", "4"]
    solver = prepared(tmp_path / "photos", tmp_path / "out", *opts).cfg.SOLVER
    assert solver.MAX_ITER == 5 and solver.BASE_LR == 0.02 * 8 / 4


@pytest.mark.parametrize(
    ("opts", "steps", "period"),
    [
        ([], (13, 17), 3),
        (["SOLVER.STEPS", "(3,)"], (3,), 3),
        (["TEST.EVAL_PERIOD", "0"], (13, 17), 0),
    ],
)
def test_what_is_written_after_the_epochs_stays(opts, steps, period, tmp_path):
    """8 epochs of 5 images in steps of 2, 20 iterations; FAST itself writes the epochs."""
    write_coco(tmp_path / "photos")
    file = tmp_path / "mine.yaml"
    base = Path(FAST).resolve()
    file.write_text(f"_BASE_: {base}\nSOLVER:\n  FPN_EXT:\n    EPOCHS: 8\n")
    cfg = prepared(tmp_path / "photos", tmp_path / "out", *opts, config=str(file)).cfg
    assert (steps, period, 20) == (cfg.SOLVER.STEPS, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.MAX_ITER)


def test_iterations_or_epochs(tmp_path):
    """The one that is written later counts; both in one place are refused."""
    write_coco(tmp_path / "photos")
    cfg, notes = prepared(tmp_path / "photos", tmp_path / "out", "SOLVER.MAX_ITER", "10")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (10, (6, 8))
    assert any(note.startswith("4 epochs of 5 images") for note in notes)
    both = ["SOLVER.MAX_ITER", "10", "SOLVER.FPN_EXT.EPOCHS", "3"]
    with pytest.raises(ValueError, match=r"MAX_ITER 10 and .*EPOCHS 3 both say how long"):
        prepared(tmp_path / "photos", tmp_path / "out", *both)
    off = ["SOLVER.MAX_ITER", "10", "SOLVER.FPN_EXT.EPOCHS", "0"]
    assert prepared(tmp_path / "photos", tmp_path / "out", *off).cfg.SOLVER.MAX_ITER == 10
    with pytest.raises(ValueError, match=r"REFERENCE_BATCH 4 and .*REFERENCE_WORLD_SIZE 2 both"):
        prepared(tmp_path / "photos", tmp_path / "out", "SOLVER.REFERENCE_WORLD_SIZE", "2")
    for key in ("EPOCHS", "REFERENCE_BATCH"):
        with pytest.raises(ValueError, match=f"{key} must be 0 or more, got -1"):
            prepared(tmp_path / "photos", tmp_path / "out", f"SOLVER.FPN_EXT.{key}", "-1")


def test_a_trainer_without_a_prepared_config_is_refused(tmp_path):
    cfg = fpn_ext.load_config(FAST, [*TINY, "OUTPUT_DIR", str(tmp_path)])
    from fpn_ext.engine.steps import build_step

    with pytest.raises(ValueError, match=r"EPOCHS 12 has not been made SOLVER.MAX_ITER"):
        build_step(cfg, None, None, None)


def test_a_split_of_the_datas_own_may_be_scored_on(tmp_path):
    for split, names in (("train", "abc"), ("val", "de"), ("test", "af")):
        write_pictures(tmp_path / "photos" / split, names)
        content = json.dumps(photographs.coco_content(names))
        (tmp_path / "photos" / split / "a.json").write_text(content)
    of_test = ["DATASETS.TEST", "('photos_test',)"]
    cfg = prepared(tmp_path / "photos", tmp_path / "out", *of_test, training=False).cfg
    assert cfg.DATASETS.TEST == ("photos_test",)
    assert prepared(tmp_path / "photos", tmp_path / "out").cfg.DATASETS.TEST == ("photos_val",)
    none = prepared(tmp_path / "photos", tmp_path / "out", "DATASETS.TEST", "()").cfg
    assert none.DATASETS.TEST == () and none.TEST.EVAL_PERIOD == 0


def test_the_dumped_config_decides_the_same(tmp_path):
    write_coco(tmp_path / "photos")
    cfg = prepared(tmp_path / "photos", tmp_path / "out").cfg
    file = tmp_path / "config.yaml"
    file.write_text(unresolved_yaml(cfg, ["MODEL.FPN_EXT.NUMERICS"]))
    again = flat(prepare(str(file), training=True).cfg)
    first = flat(cfg)
    assert {key for key in first if json.dumps(first[key]) != json.dumps(again[key])} == set()
    assert first["DATASETS.FPN_EXT.DATA"] == str(tmp_path / "photos")


# The digest


def test_the_digest_is_of_pictures_and_boxes(tmp_path):
    def records(folder, change=lambda records: None):
        write_coco(tmp_path / folder)
        names = register_data(tmp_path / folder, tmp_path / f"{folder}_out").names
        found = DatasetCatalog.get(names["train"])
        change(found)
        return found

    digest = data_digest(records("one"))
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert data_digest(records("two")) == digest
    assert data_digest(records("three")[::-1]) == digest
    assert data_digest(records("three"), ["cat", "dog"]) != digest
    for change in (
        lambda r: r[0].update(width=81),
        lambda r: r[0].update(file_name=str(Path(r[0]["file_name"]).with_name("z.png"))),
        lambda r: r[0]["annotations"][0].update(bbox=[0, 0, 40, 30.02]),
        lambda r: r[0]["annotations"][0].update(category_id=1),
        lambda r: r[0]["annotations"][0].update(iscrowd=1),
        lambda r: r[0]["annotations"].pop(),
        lambda r: r.pop(),
    ):
        assert data_digest(records("one", change)) != digest
    assert data_digest(records("one", lambda r: r[0].update(image_id=9))) == digest


# The command line


def losses_of(folder):
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [line["total_loss"] for line in lines if "total_loss" in line]


def train(data, folder, config=FAST, *opts):
    words = ["train", "--data", str(data), "--config-file", config, *TINY]
    return main([*words, "OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", "2", *opts])


def test_three_formats_train_and_score_alike(tmp_path):
    scores, losses = {}, {}
    for name, write in WRITERS.items():
        folder = tmp_path / name
        write(folder / "photos")
        with (folder / "photos" / "data.yaml").open("a") as about:
            about.write("split: 0.34\n")
        assert train(folder / "photos", folder / "out") == 0
        results = folder / "out" / "inference" / "photos_val" / "results.json"
        scores[name] = json.loads(results.read_text())
        losses[name] = losses_of(folder / "out")
    assert losses["coco"] and scores["coco"]["bbox"]["AP"] is not None
    assert losses["coco"] == losses["voc"] == losses["yolo"]
    assert scores["coco"] == scores["voc"] == scores["yolo"]


def test_there_are_three_beginnings():
    assert len(START) == 3


@pytest.mark.parametrize("config", [file for file in START if file != FAST])
def test_a_beginning_trains(config, tmp_path, capsys):
    """FAST does above."""
    write_coco(tmp_path / "photos")
    words = ["--data", str(tmp_path / "photos"), "--config-file", config, *TINY]
    assert main(["check", *words, "OUTPUT_DIR", str(tmp_path / "out")]) == 0, capsys.readouterr()
    assert train(tmp_path / "photos", tmp_path / "out", config, "DATASETS.TEST", "()") == 0
    assert (tmp_path / "out" / "model_final.pth").is_file()


def test_data_as_a_key_of_the_config(tmp_path):
    """The option wins over it."""
    write_coco(tmp_path / "photos")
    write_yolo(tmp_path / "others")
    file = tmp_path / "mine.yaml"
    text = f"_BASE_: {Path(FAST).resolve()}\nDATASETS:\n  FPN_EXT:\n    DATA: {tmp_path}/photos\n"
    file.write_text(text)
    opts = [*TINY, "OUTPUT_DIR", str(tmp_path / "out")]
    assert prepare(str(file), opts, training=True).cfg.DATASETS.TRAIN == ("photos_train",)
    words = ["levels", "--config-file", str(file), "--data", str(tmp_path / "others"), *opts]
    assert main([*words, "--json", str(tmp_path / "report.json")]) == 0
    assert (tmp_path / "out" / "data" / "others_train.json").is_file()


def test_the_data_are_checked_by_folder(tmp_path, capsys):
    write_yolo(tmp_path / "photos")
    assert main(["data", "--data", str(tmp_path / "photos")]) == 0
    said = capsys.readouterr().out
    assert "(yolo): 6 images, 7 boxes (cat 4, dog 3)" in said and "0 error(s)" in said
    (tmp_path / "photos" / "labels" / "a.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    assert main(["data", "--data", str(tmp_path / "photos")]) == 1
    assert "lines have a class that is none of 0 to 1" in capsys.readouterr().out
    of_corners = REFUSED["corners for width and height"][0]
    write_coco(tmp_path / "others", of_corners)
    assert main(["data", "--data", str(tmp_path / "others")]) == 1
    assert "looks-like-xyxy" in capsys.readouterr().out


def test_a_used_folder_keeps_the_data_of_its_training(tmp_path, capsys):
    """Of two folders of one name: the second training is refused before its data are written."""
    write_coco(tmp_path / "photos")
    register_data(tmp_path / "photos", tmp_path / "out" / "data")
    (tmp_path / "out" / "model_final.pth").touch()
    before = (tmp_path / "out" / "data" / "photos_train.json").read_bytes()
    write_coco(tmp_path / "other" / "photos", lambda content: content["annotations"].pop())
    assert train(tmp_path / "other" / "photos", tmp_path / "out") == 2
    assert "holds a training already" in capsys.readouterr().err
    assert (tmp_path / "out" / "data" / "photos_train.json").read_bytes() == before


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert train(tmp_path / "none", tmp_path / "out") == 2
    assert "--data: no file or folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    words = ["--data", str(tmp_path / "none"), "--config-file", FAST, *TINY]
    assert main(["check", *words]) == 1
    said = capsys.readouterr().out
    assert "--data: no file or folder" in said and "1 error(s)" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "DATASETS.TRAIN names no dataset, and SOLVER.FPN_EXT.EPOCHS 12 counts its images"),
        (["DATASETS.TRAIN", "('photos_trian',)"], "'photos_trian' is not a registered dataset"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_a_beginning_without_data_says_so(verb, overrides, said, tmp_path, capsys):
    words = [verb, "--config-file", FAST, *TINY, "OUTPUT_DIR", str(tmp_path), *overrides]
    assert main(words) == {"train": 2, "check": 1}[verb]
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


@pytest.mark.parametrize("words", [["train", "--config-file", FAST], ["data"], ["eval"]])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_word_after_data_is_a_mistake(words, empty, capsys):
    """As an unset variable of a script leaves it; not the folder one happens to be in."""
    assert main([*words, "--data", empty]) == 2
    assert "argument --data: is empty: name a folder" in capsys.readouterr().err


@given(images=st.integers(1, 500), batch=st.integers(1, 16), iterations=st.integers(1, 5000))
def test_what_follows_from_a_length(images, batch, iterations):
    """Written after the config, as on the command line: a trial of six iterations, too."""
    cfg = load_config(FAST, ["DATASETS.TRAIN", "('of_a_length',)", "DATASETS.TEST", "('val',)"])
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH = iterations, batch
    DatasetCatalog.register("of_a_length", lambda: [{}] * images)
    try:
        (note,) = [
            note
            for note in resolve_data(
                cfg, True, WrittenKeys([{"SOLVER.FPN_EXT.EPOCHS"}, {"SOLVER.MAX_ITER"}])
            )
            if "MAX_ITER" in note
        ]
    finally:
        DatasetCatalog.remove("of_a_length")
    solver, epoch = cfg.SOLVER, -(-images // batch)
    assert iterations == solver.MAX_ITER
    assert cfg.TEST.EVAL_PERIOD == solver.CHECKPOINT_PERIOD
    assert min(epoch, iterations) <= cfg.TEST.EVAL_PERIOD  # once an epoch, or at the end
    assert iterations // cfg.TEST.EVAL_PERIOD <= 19
    assert min(iterations // 4, 20) <= solver.WARMUP_ITERS <= max(iterations // 10, 20)
    for said in ("EVAL_PERIOD", "CHECKPOINT_PERIOD", "WARMUP_ITERS", "STEPS"):
        assert said in note


def test_what_is_not_used_of_the_data_is_said(tmp_path, capsys):
    photos = tmp_path / "photos"
    write_pictures(photos)
    for split, names in (("train", "abc"), ("val", "d"), ("test", "e")):
        (photos / f"{split}.json").write_text(json.dumps(photographs.coco_content(names)))
    cfg, notes = prepared(photos, tmp_path / "out", "SOLVER.FPN_EXT.EPOCHS", "7")
    assert cfg.DATASETS.TEST == ("photos_val",)
    assert any("photos_test is neither" in n and "\"('photos_test',)\"" in n for n in notes)
    assert any(note.startswith("7 epochs of 3 images in steps of 2: ") for note in notes)
    test = ["DATASETS.TEST", "('photos_test',)"]
    cfg, notes = prepared(photos, tmp_path / "out", *test)
    assert not any("is neither" in note for note in notes)
    assert main(["data", "--data", str(photos)]) == 0
    assert "(coco; train 3, val 1, test 1): 5 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "PanopticFPN needs 'sem_seg_file_name'"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "needs 'sem_seg_file_name'"),
        (["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"], "CLS_AGNOSTIC_BBOX_REG must be True"),
        (
            ["MODEL.KEYPOINT_ON", "True"],
            "no object of 1 images has an annotated keypoint",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_models_that_the_data_do_not_suffice_for(verb, overrides, said, tmp_path, capsys):
    photos = write_coco(tmp_path / "photos")
    words = [verb, "--config-file", FAST, "--data", str(photos), *TINY, *overrides]
    assert main([*words, "OUTPUT_DIR", str(tmp_path / "run")]) == {"train": 2, "check": 1}[verb]
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
