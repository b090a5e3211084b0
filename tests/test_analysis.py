"""fpn-ext analyze, by numbers that can be worked out on paper."""

import io
import json
import math
import re

import fpn_ext
import pytest
from fpn_ext.__main__ import main
from fpn_ext.evaluation.coco import has_hotcoco

if not has_hotcoco():
    pytest.skip("hotcoco is not installed", allow_module_level=True)

from detectron2.data import DatasetCatalog, MetadataCatalog
from fpn_ext.engine.trainer import Trainer
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.inspection.analysis import analyze
from fpn_ext.inspection.analysis_case import renumbered
from fpn_ext.inspection.analysis_counts import matches_by_class
from fpn_ext.inspection.analysis_report import figures, html_report
from tiny import DATASET, options, register

CAT, DOG = 7, 9
CONFIG = "configs/demo/faster_rcnn_R_18_FPN.yaml"


def dataset(*objects, images=3, side=100):
    """Objects as (image, category, [x, y, w, h]); crowd regions have a fourth entry."""
    return {
        "images": [
            {"id": i, "width": side, "height": side, "file_name": f"{i}.png"}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(bool(crowd)),
            }
            for number, (image, category, box, *crowd) in enumerate(objects)
        ],
    }


def detections(*found):
    """(image, category, [x, y, w, h], score)."""
    names = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(names, values, strict=True)) for values in found]


A, B = [0, 0, 10, 10], [50, 50, 40, 40]
C, D = [0, 0, 20, 20], [50, 0, 20, 20]
TRUTH = dataset((1, CAT, A), (1, DOG, B), (2, CAT, C), (2, DOG, D))
FOUND = detections(
    (1, CAT, A, 0.9),  # correct
    (1, CAT, A, 0.8),  # duplicate
    (1, CAT, B, 0.7),  # a dog, exactly: classification
    (2, CAT, [10, 0, 20, 20], 0.6),  # half of C, IoU 1/3: localisation
    (2, CAT, [60, 0, 20, 20], 0.5),  # half of a dog, IoU 1/3: both
    (3, DOG, C, 0.4),  # background
)


@pytest.fixture(scope="module")
def report():
    return analyze(TRUTH, FOUND)


def test_each_type_of_error_once(report):
    """D is missed; B and C would be found, were it not for the errors of class and of place."""
    counts = {name: error["count"] for name, error in report.errors.items()}
    assert counts == {
        "classification": 1,
        "localisation": 1,
        "both": 1,
        "duplicate": 1,
        "background": 1,
        "missed": 1,
    }


def test_what_an_error_costs(report):
    """AP50 is 51/101 for cats, 0 for dogs. Were the dog named rightly, dogs had 51/101 as well."""
    assert report.everything.ap50 == pytest.approx(51 / 101 / 2)
    assert report.errors["classification"]["cost"] == pytest.approx(51 / 101 / 2)
    # Were the cat on its place, it would be the fourth detected as a cat and the second right:
    # precision 2/4 at the recalls over .5.
    cost = report.errors["localisation"]["cost"]
    assert cost == pytest.approx((51 + 50 * 2 / 4) / 101 / 2 - 51 / 101 / 2)
    assert report.errors["background"]["cost"] == 0, "no dog is found, so AP cannot fall lower"


def test_the_confusion_matrix_has_a_background():
    """Rows: cats, dogs, background. From score .5 on, five detections, all as cats."""
    report = analyze(TRUTH, FOUND, min_score=0.5)
    assert report.names == ["cat", "dog", "background"]
    assert report.confusion == [[1, 0, 1], [1, 0, 1], [3, 0, 0]]
    assert analyze(TRUTH, FOUND, min_score=0.0).confusion[2] == [3, 1, 0]


def test_the_confusion_matrix_is_by_default_at_the_best_f1(report):
    """From .9 on: one of one is right, one of four found, F1 2/5; from .8 on 2/6."""
    best = {"score": 0.9, "f1": 0.4, "precision": 1.0, "recall": 0.25}
    assert report.everything.best == pytest.approx(best)
    assert report.min_score == 0.9
    assert report.confusion == [[1, 0, 1], [0, 0, 2], [0, 0, 0]]


def test_the_score_with_the_best_f1():
    """Of 3 cats: 1 of 1 right from .9 on, 1 of 2 from .8 on, 3 of 5 from .5 on, whose scores are
    equal and cannot be kept apart: F1 2/4, 2/5, 6/8.
    """
    truth = dataset((1, CAT, A), (2, CAT, A), (3, CAT, A), (3, DOG, B))
    found = detections(
        (1, CAT, A, 0.9),
        (1, CAT, B, 0.8),
        (2, CAT, A, 0.5),
        (3, CAT, A, 0.5),
        (2, CAT, B, 0.5),
        (3, DOG, B, 0.3),
        (1, DOG, B, 0.2),
    )
    cats, dogs = analyze(truth, found).classes
    assert cats.best == pytest.approx({"score": 0.5, "f1": 6 / 8, "precision": 0.6, "recall": 1})
    assert dogs.best == pytest.approx({"score": 0.3, "f1": 1, "precision": 1, "recall": 1})
    # One threshold for all: from .3 on 4 of 6 are right, and all 4 are found: 8/10.
    everything = analyze(truth, found).everything
    assert everything.best == pytest.approx(
        {"score": 0.3, "f1": 0.8, "precision": 4 / 6, "recall": 1}
    )


def test_detections_of_one_score_are_kept_together():
    """Of 2 cats: 1 of 1 right from .9 on, 2 of 5 from .5 on: F1 2/3, 4/7.

    The first of the four at .5 is right, and with it alone F1 would be 1.
    """
    truth = dataset((1, CAT, A), (2, CAT, A))
    wrong = [(3, CAT, box, 0.5) for box in (A, B, D)]
    found = detections((1, CAT, A, 0.9), (2, CAT, A, 0.5), *wrong)
    best = {"score": 0.9, "f1": 2 / 3, "precision": 1.0, "recall": 0.5}
    assert analyze(truth, found).everything.best == pytest.approx(best)


def test_a_class_that_is_never_right_has_no_best_score(report):
    assert report.classes[1].best is None


def test_precision_at_each_recall(report):
    """One of two cats is found, first of all: precision 1 up to a recall of .5, then none."""
    cats, dogs = report.classes
    assert cats.precision == pytest.approx([1.0] * 51 + [0.0] * 50)
    assert cats.ap50 == pytest.approx(51 / 101) and dogs.ap50 == 0
    assert [r["recall"] for r in report.by_score if r["score"] in (0.0, 0.9, 0.91)] == [
        *(0.25, 0.25, 0.0)
    ]


def test_sizes(report):
    """Below 16 px there is A alone, which is found; B is medium and not found."""
    assert report.sizes["below 16 px"]["ap"] == pytest.approx(1)
    assert report.sizes["medium"] == {"ap": 0.0, "ar": 0.0}
    assert math.isnan(report.sizes["large"]["ap"])


def test_false_positives_on_images_without_objects():
    """Image 3 has no objects and image 2 a crowd region: one image, detections at .4 and .15."""
    truth = dataset((1, CAT, A), (2, CAT, C, True))
    found = detections((3, DOG, A, 0.4), (3, CAT, B, 0.15), (1, CAT, A, 0.9), (2, DOG, B, 0.9))
    report = analyze(truth, found)
    assert report.empty_images == 1
    rates = dict(report.false_positives)
    assert (rates[0.1], rates[0.2], rates[0.4], rates[0.5]) == (2, 1, 1, 0)


def test_a_dataset_without_any_object():
    """No AP, but false positives: 3 of 2 images from .1 on, 1 from .5 on."""
    found = detections((1, CAT, A, 0.1), (1, DOG, B, 0.3), (2, CAT, A, 0.5))
    report = analyze(dataset(images=2), found)
    assert math.isnan(report.everything.ap) and report.everything.best is None
    rates = dict(report.false_positives)
    assert (rates[0.1], rates[0.2], rates[0.5], rates[0.6]) == (1.5, 1.0, 0.5, 0.0)
    assert report.min_score == 0.5 and report.confusion[2] == [1, 0, 0]
    assert "There are no objects, so there is no AP" in str(report)
    assert set(figures(report)) == {"confusion", "false_positives"}


def test_no_detections():
    report = analyze(TRUTH, [])
    assert report.everything.ap == 0 and report.errors["missed"]["count"] == 4
    assert report.confusion == [[0, 0, 2], [0, 0, 2], [0, 0, 0]]


def test_a_detection_in_a_crowd_region_counts_nowhere():
    truth = dataset((1, CAT, [0, 0, 50, 50], True), (1, CAT, [60, 60, 10, 10]))
    found = detections((1, CAT, A, 0.9), (1, CAT, [60, 60, 10, 10], 0.9))
    report = analyze(truth, found)
    assert report.everything.objects == report.everything.detections == report.crowds == 1
    assert report.confusion == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert sum(error["count"] for error in report.errors.values()) == 0
    assert report.everything.best["f1"] == 1
    _, _, ignored = matches_by_class(renumbered(truth, found))
    assert ignored == {1}


def test_annotation_id_0_counts_as_any_other():
    assert TRUTH["annotations"][0]["id"] == 0
    perfect = detections(*((o["image_id"], o["category_id"], o["bbox"], 0.9)
                           for o in TRUTH["annotations"]))  # fmt: skip
    assert analyze(TRUTH, perfect).everything.ap == pytest.approx(1)


# By pyramid level.


def leveled(opts=()):
    size = ["INPUT.MIN_SIZE_TEST", "200", "INPUT.MAX_SIZE_TEST", "1000"]
    return fpn_ext.load_config(CONFIG, [*size, *opts])


SMALL, LARGE = [0, 0, 50, 50], [0, 0, 60, 60]


def test_ap_by_the_level_of_an_objects_box():
    """Images of 100 px are enlarged twofold: 50 px become 100, of P2; 60 become 120, of P3."""
    truth = dataset((1, CAT, SMALL), (2, CAT, LARGE), (3, CAT, LARGE))
    found = detections(
        (1, CAT, SMALL, 0.9),
        (2, CAT, LARGE, 0.8),
        (3, CAT, [40, 40, 60, 60], 0.95),  # beside it: a false positive of P3
    )
    opts = ["MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "224", "MODEL.FPN_EXT.CANONICAL_LEVEL", "4"]
    p2, p3, p4, _ = analyze(truth, found, cfg=leveled(opts)).levels
    assert [p2.level, p3.level] == ["p2", "p3"]
    assert (p2.objects, p3.objects, p4.objects) == (1, 2, 0)
    assert (p2.detections, p3.detections) == (1, 2)
    assert p2.ap == pytest.approx(1) and p2.ar == pytest.approx(1)
    assert p3.ap == p3.ap50 == pytest.approx(51 / 101 / 2), "half found, half of it false"
    assert math.isnan(p4.ap)


def test_a_detection_counts_on_the_level_it_was_pooled_from():
    """The false positive was pooled from P2, of which AP is now 1/2."""
    truth = dataset((1, CAT, SMALL), (2, CAT, LARGE))
    found = detections((1, CAT, SMALL, 0.9), (2, CAT, LARGE, 0.8), (3, CAT, LARGE, 0.95))
    found[2]["pooled_level"] = 2
    opts = ["MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "224", "MODEL.FPN_EXT.CANONICAL_LEVEL", "4"]
    p2, p3, *_ = analyze(truth, found, cfg=leveled(opts)).levels
    assert p2.ap == pytest.approx(0.5) and p3.ap == pytest.approx(1)
    assert (p2.detections, p3.detections) == (2, 1)


def test_heads_without_a_level_rule():
    cfg = leveled(["MODEL.ROI_HEADS.NAME", "AllLevelsROIHeads"])
    report = analyze(TRUTH, FOUND, cfg=cfg)
    assert report.levels is None and "needs a config whose RoI heads" in str(report)


# The command.


@pytest.fixture
def files(tmp_path):
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    truth.write_text(json.dumps(TRUTH))
    found.write_text(json.dumps(FOUND))
    return truth, found


def test_the_command_writes_tables_figures_and_one_page(files, tmp_path, capsys):
    truth, found = files
    words = ["--detections", str(found), "--annotations", str(truth), "--config-file", CONFIG]
    out, result = tmp_path / "out", tmp_path / "result.json"
    assert main(["analyze", *words, "--output", str(out), "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^  all +4 +6 +25\.2 +25\.2 +40\.0 +0\.900", printed, re.M)
    assert re.search(r"^  p2 ", printed, re.M)
    written = json.loads(result.read_text())["bbox"]
    assert written["errors"]["duplicate"]["count"] == 1
    assert written["sizes"]["large"] == {"ap": None, "ar": None}, "not a number"
    images = {file.stem.removeprefix("bbox_") for file in out.glob("bbox_*.png")}
    assert images == {
        *("precision_recall", "scores", "confusion", "errors", "levels", "false_positives")
    }
    page = (out / "analysis.html").read_text()
    for term in ("AP50", "from score", "both", "missed", "cost in AP50", "background", "duplicate"):
        assert re.search(rf"<dt>[^<]*{term}[^<]*</dt><dd>.", page), term
    assert page.count('src="data:image/png;base64,') == len(images) == page.count("<img")
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import', page), "loaded from elsewhere"


def test_objects_below_the_one_threshold_are_said_to_be():
    """Cats are found from .9 on; the dog from .4 on, and so is missed in the confusion matrix."""
    truth = dataset((1, CAT, A), (2, DOG, B))
    report = analyze(truth, detections((1, CAT, A, 0.9), (2, DOG, B, 0.4)), min_score=0.9)
    (note,) = (note for note in report.notes() if "one score 0.900" in note)
    assert "lower for dog (0.400; 1 of 1 missed): " in note and "--min-score" in note
    assert report.tables()["confusion, detections from score 0.900 (row: object)"][0] == [
        *("", "cat", "dog", "missed")
    ]
    at_both = analyze(truth, detections((1, CAT, A, 0.9), (2, DOG, B, 0.4)), min_score=0.4)
    assert not any("one score" in note for note in at_both.notes())


def test_without_a_folder_it_is_said_what_one_would_have(files, capsys):
    truth, found = files
    assert main(["analyze", "--detections", str(found), "--annotations", str(truth)]) == 0
    assert "--output FOLDER writes figures, and analysis.html" in capsys.readouterr().out


def test_names_are_no_html_and_no_formulas():
    truth = dataset((1, CAT, A), (1, DOG, B))
    truth["categories"][0]["name"] = "<script>alert(1)</script>"
    truth["categories"][1]["name"] = r"_$\nothing$ & $b$"
    report = analyze(truth, FOUND, title="<b>")
    for figure in figures(report).values():
        figure.savefig(io.BytesIO())
    page = html_report({"bbox": report}, {})
    assert "<script>" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and r"_$\nothing$ &amp; $b$" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name what to analyse: --run, --config-file with MODEL.WEIGHTS, or --detections with"),
        (["--annotations", "TRUTH"], "--annotations needs --detections"),
        (["--detections", "FOUND"], "name what to analyse"),
        (["--detections", "TRUTH", "--annotations", "TRUTH"], "must be a list of detections"),
        (["--detections", "FOUND", "--annotations", "FOUND"], "is no COCO annotation file"),
        (
            ["--detections", "FOUND", "--annotations", "TRUTH", "--dataset", "x"],
            "--dataset and --annotations both name the ground truth",
        ),
        (
            ["--detections", "FOUND", "--annotations", "TRUTH", "--json", "FOUND"],
            "which the report would replace",
        ),
    ],
)
def test_what_the_command_refuses(files, capsys, words, message):
    named = {"TRUTH": str(files[0]), "FOUND": str(files[1])}
    assert main(["analyze", *(named.get(word, word) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert json.loads(files[1].read_text()) == FOUND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 5}, "detection of image 5 and category 7, of which the annotation file"),
        ({"category_id": 1}, "detection of image 1 and category 1"),
        ({"score": math.nan}, "a score is not finite"),
    ],
)
def test_detections_of_another_dataset(change, message):
    with pytest.raises(ValueError, match=message):
        analyze(TRUTH, [{**FOUND[0], **change}])


def test_detections_that_are_none(files, capsys):
    truth, found = files
    no_score = {k: v for k, v in FOUND[1].items() if k != "score"}
    for wrong, message in (
        (no_score, "has no 'score'"),
        (3, "has no 'image_id'"),
        ({**FOUND[1], "bbox": None}, "needs a bbox of four numbers, got None"),
        ({**FOUND[1], "bbox": [1, 2, 3]}, "needs a bbox of four numbers, got [1, 2, 3]"),
        ({**FOUND[1], "score": "high"}, "needs a score that is a number, got 'high'"),
    ):
        found.write_text(json.dumps([FOUND[0], wrong]))
        assert main(["analyze", "--detections", str(found), "--annotations", str(truth)]) == 2
        assert f"detection 2 {message}" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["bbox", "image_id", "area", "iscrowd"])
def test_an_annotation_without_a_field(files, capsys, field):
    truth, found = files
    incomplete = json.loads(truth.read_text())
    del incomplete["annotations"][2][field]
    truth.write_text(json.dumps(incomplete))
    assert main(["analyze", "--detections", str(found), "--annotations", str(truth)]) == 2
    assert field in capsys.readouterr().err


def test_hotcoco_is_asked_for_before_anything_is_read(capsys, monkeypatch):
    monkeypatch.setattr("fpn_ext.inspection.analysis_case.has_hotcoco", lambda: False)
    assert main(["analyze", "--detections", "none.json", "--annotations", "none.json"]) == 2
    assert "not installed: pip install hotcoco" in capsys.readouterr().err


def test_file_names_that_are_not_utf_8():
    truth = {
        "images": [{"id": 7, "file_name": "caf\udce9.png", "height": 9, "width": 9}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 1,
                "bbox": [0, 0, 9, 9],
                "area": 81,
                "iscrowd": 0,
            }
        ],
    }
    found = [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5}]
    assert analyze(truth, found).everything.ap == pytest.approx(1)


def test_the_model_of_a_run_folder(tmp_path, capsys):
    """Of random weights: what it detects is counted, the objects are those of the dataset."""
    register(tmp_path / "tiny")
    try:
        run = tmp_path / "run"
        opts = options(run, "DATASETS.TEST", f"('{DATASET}',)")
        opts += ["INPUT.MIN_SIZE_TEST", "64", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
        cfg = fpn_ext.load_config(CONFIG, opts)
        SafeCheckpointer(Trainer.build_model(cfg), str(run)).save("model_final")
        (run / "config.yaml").write_text(cfg.dump())
        result = tmp_path / "result.json"
        assert main(["analyze", "--run", str(run), "--json", str(result)]) == 0
        page = (run / "analysis" / "analysis.html").read_text()
        assert f"Detections of {run / 'model_final.pth'}." in page
        report = json.loads(result.read_text())["bbox"]
        objects = [a for r in DatasetCatalog.get(DATASET) for a in r["annotations"]]
        count = sum(not a["iscrowd"] for a in objects)
        assert report["title"] == DATASET and report["images"] == 6
        assert report["everything"]["objects"] == count > 0
        assert report["everything"]["detections"] > 0
        assert sum(level["objects"] for level in report["levels"]) == count
    finally:
        DatasetCatalog.remove(DATASET)
        MetadataCatalog.remove(DATASET)
