"""JSON files are written atomically; detections in COCO's format."""

import json
import math
import os
import threading

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from fpn_ext.reporting.coco_json import annotations_of
from fpn_ext.reporting.json_files import write_json


def test_results_are_written_as_plain_json(tmp_path):
    file = tmp_path / "new" / "results.json"
    scores = {"AP": torch.tensor(1.5), "APs": math.nan, "APl": -math.inf, "images": np.int64(3)}
    write_json(file, {"bbox": scores, "runs": (1, "ä", True, None)})
    text = file.read_text(encoding="ascii")
    assert text.endswith("}\n")
    assert json.loads(text) == {
        "bbox": {"AP": 1.5, "APs": None, "APl": None, "images": 3},
        "runs": [1, "ä", True, None],
    }
    assert '"images": 3\n' in text  # an integer stays one


def test_one_line(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2]}, indent=None)
    assert (tmp_path / "x.json").read_bytes() == b'{"a":[1,2]}\n'


def test_a_write_that_fails_midway_leaves_the_old_file_or_none(tmp_path, monkeypatch):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write_json(old, {"done": True})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # once everything is written, nothing is on the disk
    for file in (old, new):
        with pytest.raises(OSError, match="No space left"):
            write_json(file, {"done": False})
    assert json.loads(old.read_text()) == {"done": True}
    assert [file.name for file in tmp_path.iterdir()] == ["old.json"]


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert (tmp_path / "x.json").read_text() == "1\n"


def test_a_detection_as_coco_writes_it():
    detections = Instances((100, 200))
    detections.pred_boxes = Boxes([[10, 20, 40, 60], [0, 0, 2, 1]])
    detections.scores = torch.tensor([0.75, 0.5])
    detections.pred_classes = torch.tensor([1, 0])
    first, second = annotations_of(detections, [7, 9])
    assert first == {
        "category_id": 9, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0, "score": 0.75,
    }  # fmt: skip
    assert second["category_id"] == 7 and second["area"] == 2
    detections.proposal_level = torch.tensor([3, 2])  # no pooled_level: as an RPN's
    first, second = annotations_of(detections, [7, 9])
    assert (first["proposal_level"], second["proposal_level"]) == (3, 2)
    assert "pooled_level" not in first


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path):
    file, link, pipe = tmp_path / "a.json", tmp_path / "link.json", tmp_path / "pipe"
    file.write_text("old")
    link.symlink_to(file)
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(file.read_text()) == {"a": 1}
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    read = []
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join(10)
    assert json.loads(read[0]) == {"a": 1} and pipe.is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "link.json", "pipe"}
