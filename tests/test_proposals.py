"""The proposal commands: check, convert, measure, and an end-to-end Fast R-CNN."""

import json
import math
import re
import subprocess
import sys

import fpn_ext
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from fpn_ext.__main__ import main
from fpn_ext.data import demo_data
from fpn_ext.engine.trainer import Trainer
from fpn_ext.evaluation.proposal_stats import proposal_stats
from fpn_ext.proposals.file import ProposalFile, write_proposals
from fpn_ext.proposals.validate import inspect_proposals
from pictures import box, registered
from proposals import rewrite, write_random
from safetensors.numpy import load_file

NAME = "test_proposals"
IMAGES = {1: ((80, 60), [box(0, 0, 40, 40)]), 2: ((60, 80), []), 3: ((80, 60), [])}
COUNTS = {1: 4, 2: 3, 3: 2}


@pytest.fixture(autouse=True)
def dataset(tmp_path):
    with registered(NAME, tmp_path / "images", IMAGES):
        yield


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.safetensors"
    write_random(path, COUNTS, dataset=NAME)
    return path


# validate


def test_a_sound_file(file, capsys):
    assert main(["proposals", "validate", str(file), "--dataset", NAME]) == 0
    out = capsys.readouterr().out
    assert "3 images, 9 boxes; proposals for 100.0% of the images of 'test_proposals'" in out
    assert "no problems" in out
    assert inspect_proposals(file, NAME).findings == []


def test_every_problem_at_once(file, capsys):
    tensors = load_file(file)
    boxes, scores = tensors["boxes"], tensors["scores"]
    boxes[0, 2] = np.nan
    boxes[1] = [10, 10, 10, 30]  # no width
    boxes[2] = [0, 0, 81, 60]  # image 1 is 80 wide
    boxes[4] = [30, 20, 20, 10]  # inverted
    boxes[5] = [-1, 0, 20, 10]
    scores[6] = np.inf
    scores[7:9] = [-9, 9]
    rewrite(file, {"image_ids": "[1, 2, 9]"}, **tensors)
    assert main(["proposals", "validate", str(file), "--dataset", NAME]) == 1
    problems = [line.strip() for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert problems == [
        "PROBLEM: the bytes of 'boxes' are not those that were written (CRC-32)",
        "PROBLEM: the bytes of 'scores' are not those that were written (CRC-32)",
        "PROBLEM: 1 images of 'test_proposals' have no entry: image ids 3",
        "PROBLEM: 1 entries are for images that are not in 'test_proposals': image ids 9",
        "PROBLEM: 2 boxes have a coordinate or score that is NaN or infinite, in 2 images: "
        "image ids 1, 2",
        "PROBLEM: 2 boxes have no area, in 2 images: image ids 1, 2",
        "PROBLEM: 2 boxes stick out of their image, in 2 images: image ids 1, 2",
        "PROBLEM: 2 boxes have a higher score than the one before, in 2 images: image ids 2, 9",
    ]
    found = inspect_proposals(file, NAME).problems
    assert [(p.subject, p.count, p.image_ids) for p in found[2:]] == [
        ("missing_ids", 1, (3,)),
        ("unknown_ids", 1, (9,)),
        ("not_finite", 2, (1, 2)),
        ("no_area", 2, (1, 2)),
        ("outside", 2, (1, 2)),
        ("order", 2, (2, 9)),
    ]


def test_the_machine_readable_form(file, tmp_path, capsys):
    tensors = load_file(file)
    tensors["boxes"][0] = 0
    rewrite(file, **tensors)
    words = ["proposals", "validate", str(file), "--dataset", NAME]
    assert main([*words, "--json", str(tmp_path / "new" / "report.json")]) == 1
    assert "2 problem(s)" in capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["valid"] is False
    assert (report["images"], report["boxes"], report["coverage"]) == (3, 9, 1.0)
    assert [p["subject"] for p in report["findings"]] == ["checksum", "no_area"]
    assert report["findings"][1]["count"] == 1 and report["findings"][1]["image_ids"] == [1]


def test_what_may_be_meant_is_a_note(tmp_path, capsys):
    write_random(tmp_path / "x.safetensors", {1: 4, 2: 0, 3: 0}, dataset="another")
    assert main(["proposals", "validate", str(tmp_path / "x.safetensors"), "--dataset", NAME]) == 0
    out = capsys.readouterr().out
    assert "proposals for 33.3% of the images" in out
    assert "note: it was made for dataset 'another'" in out
    assert "note: 2 images have an entry without boxes: image ids 2, 3" in out


def test_coverage_counts_the_images_of_the_dataset(tmp_path):
    write_random(tmp_path / "x.safetensors", {1: 4, 2: 0, 9: 3})
    assert inspect_proposals(tmp_path / "x.safetensors", NAME).coverage == pytest.approx(1 / 3)


def test_rounding_and_equal_scores_are_no_problem(file):
    boxes = load_file(file)["boxes"]
    boxes[0] = [0, -0.004, 80.004, 60]
    rewrite(file, boxes=boxes, scores=np.zeros(9, np.float32))
    assert {p.subject for p in inspect_proposals(file, NAME).problems} == {"checksum"}


def test_images_of_unknown_size(tmp_path, file):
    from detectron2.data import DatasetCatalog

    DatasetCatalog.register("test_unsized", lambda: [{"image_id": i} for i in IMAGES])
    try:
        report = inspect_proposals(file, "test_unsized")
    finally:
        DatasetCatalog.remove("test_unsized")
    assert report.problems == []
    assert [note.subject for note in report.notes] == ["dataset", "unsized"]
    assert report.notes[1].count == 3


@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle"])
def test_a_file_that_cannot_be_read_is_one_problem(tmp_path, file, damage, capsys):
    content = {"truncated": file.read_bytes()[:-1], "empty": b"", "pickle": b"cos\nsystem\n."}
    broken = tmp_path / ("x.pkl" if damage == "pickle" else "x.safetensors")
    broken.write_bytes(content[damage])
    assert main(["proposals", "validate", str(broken), "--dataset", NAME]) == 1
    assert "1 problem(s)" in capsys.readouterr().out
    (problem,) = inspect_proposals(broken, NAME).problems
    assert str(broken) in problem.text


def test_validate_takes_detectron2s_files(tmp_path, file, capsys):
    assert main(["proposals", "convert", str(file), str(tmp_path / "x.pkl")]) == 0
    assert main(["proposals", "validate", str(tmp_path / "x.pkl"), "--dataset", NAME]) == 0
    assert "9 boxes on 3 images" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["validate", "stats"])
def test_no_file_to_look_at(verb, capsys):
    assert main(["proposals", verb, "none.safetensors", "--dataset", NAME]) == 2
    assert "none.safetensors" in capsys.readouterr().err


# stats


def test_stats_by_hand(tmp_path, capsys):
    """One object, 40 x 40, so a medium one; found exactly by the second best box of its image."""
    entries = {
        1: (np.array([[50, 50, 80, 60], [0, 0, 40, 40]]), np.array([2, 1])),
        2: (np.zeros((0, 4)), np.zeros(0)),
        3: (np.array([[0, 0, 9, 9]]), np.array([3])),
    }
    file = tmp_path / "x.safetensors"
    write_proposals(file, entries, entries.values(), dataset=NAME, source="")
    stats = proposal_stats(file, NAME)
    assert stats["AR@10"] == stats["AR@1000"] == stats["ARm@10"] == 100
    assert math.isnan(stats["ARs@100"]) and math.isnan(stats["ARl@100"])
    assert stats["boxes per image"] == 1
    assert (stats["min boxes"], stats["max boxes"]) == (0, 2)
    assert stats["images with boxes"] == pytest.approx(200 / 3)
    assert main(["proposals", "stats", str(file), "--dataset", NAME]) == 0
    out = capsys.readouterr().out
    assert "   10   100.00      nan   100.00      nan" in out
    assert "1.0 boxes per image (0 to 2); 66.7% of the images have boxes" in out
    report = tmp_path / "stats.json"
    assert main(["proposals", "stats", str(file), "--dataset", NAME, "--json", str(report)]) == 0
    plain = json.loads(report.read_text())
    assert plain["AR@100"] == 100 and plain["ARs@100"] is None


def test_the_limit_counts_the_best_boxes(tmp_path):
    boxes = np.tile([50, 50, 80, 60], (11, 1))
    boxes[10] = [0, 0, 40, 40]
    entries = {1: (boxes, -np.arange(11)), 2: (boxes, -np.arange(11)), 3: (boxes, np.zeros(11))}
    file = tmp_path / "x.safetensors"
    write_proposals(file, entries, entries.values(), dataset=NAME, source="")
    stats = proposal_stats(file, NAME)
    assert (stats["AR@10"], stats["AR@100"]) == (0, 100)


def test_ground_truth_is_found_whole(tmp_path, capsys):
    assert (
        main(["proposals", "ground-truth", "--datasets", NAME, "--output", str(tmp_path / "gt")])
        == 0
    )
    assert proposal_stats(tmp_path / "gt" / f"{NAME}.safetensors", NAME)["AR@10"] == 100
    assert "1 boxes on 3 images" in capsys.readouterr().out


# The command line


def test_a_dataset_that_nobody_registered(file, tmp_path, capsys):
    for verb in ("validate", "stats"):
        assert main(["proposals", verb, str(file), "--dataset", "test_proposal"]) == 2
        said = capsys.readouterr().err
        assert re.search(r"'test_proposal' .*nearest valid: 'test_proposals'", said)
    arguments = ["proposals", "generate", "--config-file", "x", "--output", str(tmp_path)]
    assert main([*arguments, "--datasets", NAME, "MODEL.WEIGHTS", "x.pth"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"'MODEL\.WEIGHTS' is not a reg.*come last, after anoth", said)


@pytest.mark.parametrize(
    "command",
    [[], ["generate"], ["ground-truth"], ["selective-search"], ["validate"], ["convert"],
     ["stats"]],
    ids=str,
)  # fmt: skip
def test_help(command, capsys):
    assert main(["proposals", *command, "--help"]) == 0
    assert len(capsys.readouterr().out) > 300


def test_the_exit_code_reaches_the_shell(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fpn_ext", "proposals", "validate",
         str(tmp_path / "x.safetensors"), "--dataset", "bccd_test",
         "--json", str(tmp_path / "report.json")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["findings"][0]["subject"] == "unreadable"


def test_generate_needs_a_model(tmp_path, capsys):
    rest = ["--datasets", NAME, "--output", str(tmp_path / "out")]
    rpn = [
        "proposals",
        "generate",
        "--config-file",
        "configs/demo/faster_rcnn_R_18_FPN.yaml",
        *rest,
    ]
    assert main(rpn) == 2
    assert "MODEL.WEIGHTS is empty" in capsys.readouterr().err
    assert main([*rpn, "--top-k", "0", "MODEL.WEIGHTS", "x.pth"]) == 2
    assert "--top-k) must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# From an RPN to a Fast R-CNN.

SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)"),
    *("INPUT.MIN_SIZE_TEST", "96"),
    *("DATASETS.TRAIN", "('test_end_train',)"),
    *("DATASETS.TEST", "('test_end_val',)"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Ten generated images; some have no object."""
    root = tmp_path_factory.mktemp("demo") / "demo_multiscale"
    demo_data.generate(root, num_train=6, num_val=4)
    for split in ("train", "val"):
        json_file = root / "annotations" / f"instances_{split}.json"
        register_coco_instances(f"test_end_{split}", {}, str(json_file), str(root / split))
        MetadataCatalog.get(f"test_end_{split}").thing_classes = list(demo_data.CLASS_NAMES)


def test_a_network_of_a_library_sees_its_own_pixels(demo, tmp_path, capsys):
    opts = [*SMALL, "MODEL.FPN_EXT.BOTTOM_UP", "torchvision/shufflenet_v2_x0_5"]
    opts += ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]
    cfg = fpn_ext.load_config("configs/demo/faster_rcnn_R_18_FPN.yaml", opts)
    fpn_ext.resolve_bottom_up(cfg)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "rpn.pth")
    assert main([
        "proposals", "generate", "--config-file", "configs/demo/faster_rcnn_R_18_FPN.yaml",
        "--datasets", "test_end_val", "--top-k", "5", "--output", str(tmp_path), *opts,
        "MODEL.WEIGHTS", str(tmp_path / "rpn.pth"),
    ]) == 0  # fmt: skip
    assert len(ProposalFile(tmp_path / "test_end_val.safetensors")) == 4
    assert "MODEL.PIXEL_MEAN" in capsys.readouterr().out


def test_end_to_end(demo, tmp_path, capsys):
    config = "configs/demo/faster_rcnn_R_18_FPN.yaml"
    rpn = fpn_ext.load_config(config, [*SMALL, "MODEL.META_ARCHITECTURE", "ProposalNetwork"])
    torch.save({"model": build_model(rpn).state_dict()}, tmp_path / "rpn.pth")
    splits = ("test_end_train", "test_end_val")
    assert main([
        "proposals", "generate", "--config-file", config, "--datasets", *splits, "--top-k", "50",
        "--output", str(tmp_path), *SMALL, "MODEL.META_ARCHITECTURE", "ProposalNetwork",
        "MODEL.WEIGHTS", str(tmp_path / "rpn.pth"),
    ]) == 0  # fmt: skip
    files = [str(tmp_path / f"{split}.safetensors") for split in splits]
    for file, split, count in zip(files, splits, (6, 4), strict=True):
        assert len(ProposalFile(file)) == count
        assert main(["proposals", "validate", file, "--dataset", split]) == 0
        assert main(["proposals", "stats", file, "--dataset", split]) == 0
    assert "no problems" in capsys.readouterr().out

    cfg = fpn_ext.load_config(config, [
        *SMALL, "MODEL.LOAD_PROPOSALS", "True",
        "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals",
        "DATASETS.PROPOSAL_FILES_TRAIN", f"('{files[0]}',)",
        "DATASETS.PROPOSAL_FILES_TEST", f"('{files[1]}',)",
        "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001",
        "TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "1", "OUTPUT_DIR", str(tmp_path),
    ])  # fmt: skip
    fpn_ext.check_config(cfg, training=True)
    trainer = Trainer(cfg)
    trainer.train()
    assert trainer.iter == 2
    results = tmp_path / "inference" / "test_end_val" / "results.json"
    assert "AP50" in json.loads(results.read_text())["bbox"]
