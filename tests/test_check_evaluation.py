"""The evaluation before the training: right in spite of what exporters write, or refused.

Each kind was met in files of real exporters. What is scored here are the objects themselves, made
by hand: AP 100 is right, and anything else is wrong.
"""

import json
import math

import pytest
from coco_files import CLASSES, OBJECTS, Datasets, coco, config, found, records, score
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from fpn_ext.__main__ import main
from fpn_ext.engine import check_run
from fpn_ext.engine.trainer import Trainer
from fpn_ext.evaluation import ground_truth
from fpn_ext.evaluation.rehearsal import check_evaluation, rehearse
from fpn_ext.files.json_lists import ListInFile
from fpn_ext.proposals.loader import build_validation_loader, training_data
from pycocotools.coco import COCO


@pytest.fixture
def data(tmp_path):
    datasets = Datasets(tmp_path)
    yield datasets
    datasets.forget()


def changed(change, **how):
    """The COCO file, ``change`` done to it."""
    content = coco(**how)
    change(content)
    return content


def each(change):
    def of_all(content):
        for annotation in content["annotations"]:
            change(annotation)

    return lambda: changed(of_all)


def first(change):
    return lambda: changed(lambda content: change(content["annotations"][0]))


def from_zero():
    return changed(lambda content: [a.update(id=a["id"] - 1) for a in content["annotations"]])


# Right in spite of it


MENDED = {
    "annotation id 0": (from_zero, "1 object(s) with an id that cannot be scored"),
    "no area": (each(lambda a: a.pop("area")), "4 object(s) without 'area'"),
    "area 0": (each(lambda a: a.update(area=0)), "4 object(s) without 'area', or with one of 0"),
    "no iscrowd": (each(lambda a: a.pop("iscrowd")), "4 object(s) without 'iscrowd'"),
    "string ids": (
        each(lambda a: a.update(id=f"a{a['id']}")), "4 object(s) with an id that cannot be scored"
    ),
    "false for iscrowd": (each(lambda a: a.update(iscrowd=False)), None),
    "no info": (lambda: changed(lambda content: content.pop("info")), None),
    "empty masks": (each(lambda a: a.update(segmentation=[])), None),
    "class ids from 0": (lambda: coco(ids=(0, 1, 2)), None),
    "class ids with gaps": (lambda: coco(ids=(7, 20, 90)), None),
    "image ids that are text": (
        lambda: changed(
            lambda content: [
                entry.update({key: f"i{entry[key]}"})
                for entries, key in (("images", "id"), ("annotations", "image_id"))
                for entry in content[entries]
            ]
        ),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("test", "metric", "nearest"),
    [
        (["val"], "bbox/AP", None),
        (["val"], "bbox/AP-owl", None),
        (["val"], "validation_loss/total_loss", None),
        (["val"], "bbox/AP5", "bbox/AP"),
        (["val"], "val/bbox/AP", "bbox/AP"),
        (["val", "test"], "val/bbox/AP", None),
        (["val", "test"], "bbox/AP", "val/bbox/AP"),
    ],
)
def test_the_best_is_looked_for_by_a_score_that_there_will_be(
    test, metric, nearest, data, tmp_path
):
    """Said before the training, not by its first evaluation."""
    for name in ("val", "test"):
        data.write(name, coco())
    cfg = config(tmp_path, [], test, "TEST.FPN_EXT.BEST_METRIC", metric)
    check_evaluation(cfg)  # of an evaluation, which looks for none
    if nearest is None:
        check_evaluation(cfg, training=True)
        return
    with pytest.raises(ValueError, match=f"no score .* '{metric}'; nearest valid: .*'{nearest}'"):
        check_evaluation(cfg, training=True)


@pytest.mark.parametrize("most_in_memory", [ground_truth.MOST_IN_MEMORY, 0])
@pytest.mark.parametrize("kind", MENDED)
def test_an_evaluation_is_right_in_spite_of(kind, most_in_memory, data, tmp_path, monkeypatch):
    monkeypatch.setattr(ground_truth, "MOST_IN_MEMORY", most_in_memory)
    make, note = MENDED[kind]
    name = data.write("val", make())
    before = (tmp_path / "val.json").read_bytes()
    cfg = config(tmp_path, test=[name])
    notes = check_evaluation(cfg)
    assert len(notes) == (note is not None) and all(note in said for said in notes)
    if "text" not in kind:
        scores = score(cfg, name)
        by_size = {"AP": 100, "APs": 100, "APm": 100, "APl": 100}
        assert {key: scores[key] for key in by_size} == pytest.approx(by_size)
        assert scores["AP-owl"] == pytest.approx(100)
        assert score(cfg, name, OBJECTS[:3])["AP-cat"] < 60  # one of two cats is missed
    assert (tmp_path / "val.json").read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_annotations_of_a_large_file_stay_in_it(data, monkeypatch):
    monkeypatch.setattr(ground_truth, "MOST_IN_MEMORY", 0)
    truth = ground_truth.GroundTruth(data.write("val", coco()))
    assert isinstance(truth.dataset["annotations"], ListInFile)
    assert truth.coco.dataset["annotations"] == coco()["annotations"]


def test_detectron2_scores_annotation_0_as_missed(data, tmp_path):
    """What the mended copy is for: the same detections, Detectron2's evaluator."""
    name = data.write("val", from_zero())
    cfg = config(tmp_path, test=[name])
    check_evaluation(cfg)
    theirs = COCOEvaluator(name, output_dir=None)
    ours = score(cfg, name)["AP-cat"]
    theirs.reset()
    for image in (1, 2):
        objects = [(c, box) for i, c, box in OBJECTS if i == image]
        theirs.process([{"image_id": image}], [found(objects)])
    assert theirs.evaluate()["bbox"]["AP-cat"] < 60 < ours == pytest.approx(100)


def test_a_pycocotools_that_asks_for_info(data, tmp_path, monkeypatch):
    """As 2.0.9 and 2.0.10 do, which pyproject.toml leaves out."""
    load = COCO.loadRes
    asking = lambda self, results: (self.dataset["info"], load(self, results))[1]  # noqa: E731
    monkeypatch.setattr(COCO, "loadRes", asking)
    name = data.write("val", changed(lambda content: content.pop("info")))
    assert not check_evaluation(config(tmp_path, test=[name]))


def test_what_is_mended_is_logged_once(data, tmp_path, caplog):
    name = data.write("said_once", from_zero())
    cfg = config(tmp_path, test=[name])
    check_evaluation(cfg)  # says nothing: whoever calls it does
    assert not caplog.text
    for _ in range(2):
        score(cfg, name)
    assert caplog.text.count("1 object(s) with an id that cannot be scored") == 1


def test_a_box_without_width_is_no_missed_object(data, tmp_path):
    """Training leaves it out; no detection could find it."""
    flat = {"image_id": 1, "category_id": 1, "bbox": [3, 3, 0, 9], "area": 0, "iscrowd": 0}
    content = changed(lambda c: c["annotations"].append({**flat, "id": 9}))
    cfg = config(tmp_path, test=[data.write("val", content)])
    (note,) = check_evaluation(cfg)
    assert "1 object(s) without width or height: left out" in note
    assert score(cfg, "val")["AP"] == pytest.approx(100)


def test_a_crowd_is_neither_found_nor_missed(data, tmp_path):
    content = first(lambda a: a.update(iscrowd=True))()
    cfg = config(tmp_path, test=[data.write("val", content)])
    assert not check_evaluation(cfg)
    assert score(cfg, "val", OBJECTS[1:])["AP-cat"] == pytest.approx(100)
    assert score(cfg, "val")["AP-cat"] == pytest.approx(100)


def test_a_polygon_of_two_points(data, tmp_path):
    """Detectron2's training leaves the object out: it is neither found nor missed."""
    content = first(lambda a: a.update(segmentation=[[5, 5, 10, 10]]))()
    cfg = config(tmp_path, test=[data.write("val", content)])
    assert "polygons of fewer than 3 points" in " ".join(check_evaluation(cfg))
    assert score(cfg, "val", OBJECTS[1:])["AP-cat"] == pytest.approx(100)


def test_nothing_to_find(data, tmp_path):
    for name, content in (
        ("crowds", each(lambda a: a.update(iscrowd=1))()),
        ("empty", {**coco(), "annotations": []}),
    ):
        cfg = config(tmp_path, test=[data.write(name, content)])
        (note,) = check_evaluation(cfg)
        assert "no object to find" in note
    hidden = coco()
    del hidden["annotations"]  # as COCO's test-dev
    cfg = config(tmp_path, test=[data.write("hidden", hidden)])
    assert any("no object to find" in note for note in check_evaluation(cfg))


def test_more_objects_than_detections_that_are_kept(data, tmp_path):
    cfg = config(tmp_path, [], [data.write("val", coco())], "TEST.DETECTIONS_PER_IMAGE", 1)
    (note,) = check_evaluation(cfg)
    assert "2 image(s) of dataset 'val' have more objects than TEST.DETECTIONS_PER_IMAGE 1" in note


# Classes of splits


def test_the_same_names_under_other_ids(data, tmp_path):
    """As labelme2coco numbers each folder in the order in which it meets the classes."""
    train = data.write("train", coco())
    val = data.write("val", coco(names=["owl", "cat", "dog"], ids=(0, 1, 2)))
    cfg = config(tmp_path, [train], [val])
    (note,) = check_evaluation(cfg)
    assert "'val' numbers its classes otherwise than DATASETS.TRAIN" in note
    assert "class 0 is 'cat' and 'owl'" in note
    scores = score(cfg, val)
    assert [scores[f"AP-{name}"] for name in CLASSES] == pytest.approx([100, 100, 100])
    # The classes are apart: cats as dogs are none.
    wrong = [(image, {0: 1, 1: 0, 2: 2}[c], box) for image, c, box in OBJECTS]
    scores = score(cfg, val, wrong)
    assert scores["AP-cat"] == scores["AP-dog"] == 0 and scores["AP-owl"] == pytest.approx(100)


def test_a_validation_loss_has_the_classes_of_the_training(data, tmp_path):
    train = data.write("train", coco())
    val = data.write("val", coco(names=["owl", "cat", "dog"]))
    cfg = config(tmp_path, [train], [val], "TEST.FPN_EXT.VALIDATION_LOSS", True)
    assert len(list(rehearse(cfg))) == 1
    loader = build_validation_loader(cfg, val)
    assert [loader.dataset[i]["instances"].gt_classes.tolist() for i in (0, 1)] == [[0, 1], [2, 0]]


def test_a_class_that_the_validation_has_not(data, tmp_path):
    train, val = (
        data.write("train", coco()),
        data.write("val", coco(names=["cat", "owl"], ids=(1, 2))),
    )
    cfg = config(tmp_path, [train], [val])
    check_evaluation(cfg)
    scores = score(cfg, val, [o for o in OBJECTS if o[1] != 1])
    assert [scores["AP"], scores["AP-owl"]] == pytest.approx([100, 100])
    assert math.isnan(scores["AP-dog"])


def test_a_class_that_the_training_has_not(data, tmp_path):
    train, val = (
        data.write("train", coco(names=["cat", "dog"], ids=(1, 2))),
        data.write("val", coco()),
    )
    cfg = config(tmp_path, [train], [val], "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    with pytest.raises(ValueError, match=r"'val' has objects of class 'owl', which DATASETS.TRAIN"):
        check_evaluation(cfg)
    unused = coco(names=["cat", "dog", "bat"])  # listed, and no object is one
    assert check_evaluation(config(
        tmp_path, [train], [data.write("with_bat", unused)], "MODEL.ROI_HEADS.NUM_CLASSES", 2
    ))  # fmt: skip


def test_training_sets_that_number_their_classes_differently(data, tmp_path):
    one, other = data.write("one", coco()), data.write("other", coco(names=["dog", "cat", "owl"]))
    with pytest.raises(ValueError, match=r"'one' and 'other' number their classes differently"):
        training_data(config(tmp_path, [one, other]))


def test_voc_classes_are_found_by_name(data, tmp_path):
    from fpn_ext.data.datasets import register_voc_layout
    from voc import write_voc

    write_voc(tmp_path, {"a": [("cat", 1, 1, 20, 20), ("dog", 31, 21, 70, 50)]})
    for name, classes in (("voc_train", ["cat", "dog"]), ("voc_val", ["dog", "cat"])):
        register_voc_layout(name, tmp_path, "train", classes)
        data.names.append(name)
    options = "MODEL.ROI_HEADS.NUM_CLASSES", 2
    assert not check_evaluation(config(tmp_path, ["voc_train"], ["voc_train"], *options))
    cfg = config(tmp_path, ["voc_train"], ["voc_val"], *options)
    (rehearsed,) = rehearse(cfg)
    assert not rehearsed.error and "AP50 100.0" in rehearsed.summary


# Functions registered in the tutorials' way


def test_a_registered_function_without_evaluator_type(data, tmp_path):
    given = records()
    name = data.give("balloons", lambda: given, thing_classes=CLASSES)  # the same list each time
    cfg = config(tmp_path, [name], [name])
    for _ in range(2):
        assert not check_evaluation(cfg)
    assert score(cfg, name)["AP"] == pytest.approx(100)
    assert given == records()
    assert not MetadataCatalog.get(name).get("json_file")  # the next one reads the data again


def test_names_of_a_registered_function_in_another_order(data, tmp_path):
    train = data.give("train", records, thing_classes=CLASSES)
    numbers = {0: 2, 1: 0, 2: 1}  # of dog, owl, cat

    def other():
        return [
            {**r, "annotations": [
                {**a, "category_id": numbers[a["category_id"]]} for a in r["annotations"]
            ]}
            for r in records()
        ]  # fmt: skip

    val = data.give("val", other, thing_classes=["dog", "owl", "cat"])
    cfg = config(tmp_path, [train], [val])
    assert "found by name" in check_evaluation(cfg)[0]
    scores = score(cfg, val)
    assert [scores[f"AP-{name}"] for name in CLASSES] == pytest.approx([100, 100, 100])


def test_a_registered_function_beside_a_json_that_numbers_otherwise(data, tmp_path):
    """The records count in the order of thing_classes, the file in that of its ids."""
    file = tmp_path / "file.json"
    file.write_text(json.dumps(coco(names=["owl", "dog", "cat"], ids=(3, 5, 8))))
    how = {"thing_classes": CLASSES, "json_file": str(file), "evaluator_type": "coco"}
    cfg = config(tmp_path, test=[data.give("both", records, **how)])
    assert not check_evaluation(cfg)
    scores = score(cfg, "both")
    assert [scores[f"AP-{name}"] for name in CLASSES] == pytest.approx([100, 100, 100])


def test_records_that_are_not_what_is_scored(data, tmp_path):
    """A file of other boxes under the same dataset: refused, with the score that it would get."""
    file = tmp_path / "file.json"
    file.write_text(json.dumps(each(lambda a: a.update(bbox=[80, 80, 20, 20]))()))
    how = {"thing_classes": CLASSES, "json_file": str(file), "evaluator_type": "coco"}
    cfg = config(tmp_path, test=[data.give("moved", records, **how)])
    with pytest.raises(ValueError, match=r"(?s)score bbox/AP 0\.0 \(cat 0\.0.*100 is due"):
        check_evaluation(cfg)


def without(key):
    return lambda: [{k: v for k, v in r.items() if k != key} for r in records()]


def numbered_from_one():
    for record in (given := records()):
        for annotation in record["annotations"]:
            annotation["category_id"] += 1
    return given


FUNCTIONS = {
    "ids from 1": (numbered_from_one, r"classes 1 to 3: Detectron2 counts from 0"),
    "no images": (list, r"dataset 'given' has no images"),
    "no sizes": (without("width"), r"needs 'width' and 'height'"),
    "no image ids": (without("image_id"), r"needs an 'image_id' of its own"),
    "one id": (lambda: [{**r, "image_id": 1} for r in records()], r"'image_id' of its own"),
    "KeyError": (lambda: {}["x"], r"'given' cannot be read: KeyError: 'x'"),
    "no box mode": (
        lambda: [{**r, "annotations": [{"bbox": [1, 1, 2, 2], "category_id": 0}]}
                 for r in records()],
        r"'bbox_mode' must be",
    ),
    "nothing but None": (lambda: None, r"cannot be read: TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_registered_function_that_cannot_be_evaluated(kind, data, tmp_path):
    function, message = FUNCTIONS[kind]
    cfg = config(tmp_path, test=[data.give("given", function, thing_classes=CLASSES)])
    with pytest.raises(ValueError, match=message):
        check_evaluation(cfg)


def test_no_names_of_classes(data, tmp_path):
    cfg = config(tmp_path, test=[data.give("nameless", records)])
    with pytest.raises(ValueError, match=r"MetadataCatalog.get\('nameless'\).thing_classes = "):
        check_evaluation(cfg)


# Refused before the training


def windows(content):
    content["images"][0]["file_name"] = "photos\\1.jpg"


def twice(content):
    content["images"][1]["id"] = 1


def unsized(content):
    del content["images"][0]["width"]


REFUSED = {
    "byte order mark": (lambda: b"\xef\xbb\xbf" + json.dumps(coco()).encode(), "byte order mark"),
    "utf-16": (lambda: json.dumps(coco()).encode("utf-16"), "byte order mark"),
    "not JSON": (lambda: "{", "is not JSON"),
    "a list": (lambda: b"[]", "must hold an object"),
    "no categories": (lambda: {**coco(), "categories": []}, "'categories' is"),
    "no images": (lambda: {**coco(), "images": []}, "'images' is"),
    "backslashes": (lambda: changed(windows), "backslashes"),
    "images without sizes": (lambda: changed(unsized), "'width' and 'height' in whole pixels"),
    "image id twice": (lambda: changed(twice), "an id of its own; the last alone"),
    "image_id as text": (
        each(lambda a: a.update(image_id=str(a["image_id"]))),
        r"\(the first of 4\): 'image_id' and the image's 'id' must both be",
    ),
    "annotation id twice": (each(lambda a: a.update(id=1)), "each annotation needs an id"),
    "no annotation id": (first(lambda a: a.pop("id")), "each needs an 'id'"),
    "unknown class": (first(lambda a: a.update(category_id=9)), "not the id of one of"),
    "no box": (first(lambda a: a.pop("bbox")), "four finite numbers"),
    "iscrowd 2": (first(lambda a: a.update(iscrowd=2)), "'iscrowd' must be 0 or 1"),
    "iscrowd '0'": (first(lambda a: a.update(iscrowd="0")), "'iscrowd' must be 0 or 1"),
    "ignore": (first(lambda a: a.update(ignore=1)), "Detectron2 refuses 'ignore'"),
    "run lengths without size": (
        first(lambda a: a.update(segmentation={"counts": []})), "needs 'size' and 'counts'"
    ),
    "a mask that is a number": (
        first(lambda a: a.update(segmentation=3)), "'segmentation' must be a list of polygons"
    ),
    "a polygon that is no list": (
        first(lambda a: a.update(segmentation=[1, 1, 2, 2, 3, 3])), "a list of lists"
    ),
    "class name twice": (
        lambda: changed(lambda c: c["categories"][1].update(name="cat")),
        "a name of its own|'cat' twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, data, tmp_path):
    """As a test set, and as a training set."""
    make, message = REFUSED[kind]
    name = data.write("refused", make())
    with pytest.raises(ValueError, match=message) as error:
        check_evaluation(config(tmp_path, test=[name]))
    assert "refused.json" in str(error.value)
    with pytest.raises(ValueError, match=message):
        training_data(config(tmp_path, [name]))


def test_annotations_of_images_that_are_not_listed(data, tmp_path):
    """A subset of the images with all annotations is as good."""
    content = coco()
    content["images"].pop()
    cfg = config(tmp_path, test=[data.write("subset", content)])
    assert not check_evaluation(cfg)


@pytest.mark.parametrize("drop", [True, False])
def test_a_training_on_crowds_alone(data, tmp_path, drop):
    name = data.write("crowds", each(lambda a: a.update(iscrowd=1))())
    cfg = config(tmp_path, [name], [], "DATALOADER.FILTER_EMPTY_ANNOTATIONS", drop)
    with pytest.raises(ValueError, match=r"no object to train on in its 2 images; crowd"):
        training_data(cfg)


# The commands


def options(folder, *opts):
    values = {
        "MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.FPN.OUT_CHANNELS": 8, "MODEL.ROI_BOX_HEAD.FC_DIM": 8, "OUTPUT_DIR": folder / "out",
        "DATASETS.TRAIN": ("train",), "DATASETS.TEST": ("val",),
    }  # fmt: skip
    return [str(w) for pair in values.items() for w in pair] + list(opts)


BASE = "configs/Base-FPN.yaml"


def test_check_reports_and_train_refuses(data, tmp_path, capsys, monkeypatch):
    data.write("train", coco())
    data.write("val", each(lambda a: a.update(image_id=str(a["image_id"])))())
    findings = check_run.examine(BASE, options(tmp_path))
    (error,) = (f for f in findings if f.status == "error")
    assert error.subject == "test data" and "must both be numbers" in error.text
    monkeypatch.setattr(Trainer, "build_model", lambda *_: pytest.fail("built before the check"))
    assert main(["train", "--config-file", BASE, *options(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "the evaluation on DATASETS.TEST would fail" in message and "must both" in message
    assert not (tmp_path / "out").exists()


def test_check_warns_and_train_says(data, tmp_path, monkeypatch):
    data.write("train", coco())
    data.write("val", from_zero())
    findings = check_run.examine(BASE, options(tmp_path))
    assert not [f for f in findings if f.status == "error"]
    assert [f.text for f in findings if f.subject == "evaluation" and f.status == "ok"] == [
        "val: its 4 objects of 2 images score bbox/AP 100.0"
    ]
    (warning,) = (f for f in findings if f.subject == "evaluation" and f.status == "warning")
    assert "1 object(s) with an id that cannot be scored" in warning.text

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(Trainer, "build_model", stop)
    with pytest.raises(Stop):
        main(["train", "--config-file", BASE, *options(tmp_path)])
    assert "1 object(s) with an id that cannot be scored" in (tmp_path / "out/log.txt").read_text()


@pytest.mark.parametrize("error", [AssertionError, KeyError, AttributeError, IndexError])
def test_whatever_a_dataset_raises_is_a_finding(error, data, tmp_path):
    def fail():
        raise error("spoilt")

    data.give("train", fail)
    data.give("val", fail)
    findings = check_run.examine(BASE, options(tmp_path))
    errors = {f.subject: f.text for f in findings if f.status == "error"}
    assert set(errors) == {"test data"} or set(errors) == {"test data", "training data"}
    assert f"'val' cannot be read: {error.__name__}" in errors["test data"]


def test_an_evaluator_that_fails_is_a_finding(data, tmp_path, monkeypatch):
    name = data.write("val", coco())

    def fail(*_, **__):
        raise IndexError("in the evaluator")

    monkeypatch.setattr(COCOEvaluator, "evaluate", fail)
    with pytest.raises(ValueError, match=r"'val' \(DATASETS.TEST\) ends in IndexError: in the"):
        check_evaluation(config(tmp_path, test=[name]))


def test_what_the_model_raises_is_a_finding(data, tmp_path, monkeypatch):
    data.write("train", coco())
    data.write("val", coco())

    def fail(*_):
        raise AttributeError("of a user's class")

    monkeypatch.setattr(check_run, "build_model", fail)
    findings = check_run.examine(BASE, options(tmp_path))
    assert [f.text for f in findings if f.status == "error"] == [
        "AttributeError: of a user's class"
    ]


def test_an_rpn_alone_is_rehearsed(data, tmp_path):
    name = data.write("val", from_zero())
    cfg = config(tmp_path, [], [name], "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    (rehearsed,) = rehearse(cfg)
    assert rehearsed.summary == "its 4 objects of 2 images score box_proposals/AR@1000 100.0"
    cfg = config(tmp_path, [], [name], "TEST.FPN_EXT.EVALUATE_PROPOSALS", True)
    (rehearsed,) = rehearse(cfg)
    assert "bbox/AP 100.0, box_proposals/AR@1000 100.0" in rehearsed.summary


def test_big_data_is_sampled(data, tmp_path):
    """The first images, and one of each class that they lack."""
    content = coco()
    content["images"] = [{**content["images"][0], "id": i} for i in range(1, 301)]
    box = {"bbox": [5, 5, 10, 20], "area": 200, "iscrowd": 0}
    content["annotations"] = [
        {**box, "id": i, "image_id": i, "category_id": 3 if i == 290 else 1} for i in range(1, 301)
    ]
    (rehearsed,) = rehearse(config(tmp_path, test=[data.write("val", content)]))
    assert rehearsed.images == 300
    assert "of a sample, the 51 objects of 51 images" in rehearsed.summary


@pytest.mark.parametrize("grouping", [True, False])
def test_training_images_without_sizes(data, grouping):
    """Detectron2 learns them when it reads the images, unless it groups them by shape before."""
    unsized = [{k: v for k, v in r.items() if k not in ("width", "height")} for r in records()]
    name = data.give("unsized", lambda: unsized, thing_classes=CLASSES)
    opts = ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", 3]
    opts += ["DATALOADER.ASPECT_RATIO_GROUPING", grouping]
    findings = check_run.examine(BASE, [str(word) for word in opts])
    of_data = [f for f in findings if f.subject == "training data"]
    assert ("error" in {f.status for f in of_data}) == grouping
    assert ("or set DATALOADER.ASPECT_RATIO_GROUPING False" in of_data[-1].text) == grouping
