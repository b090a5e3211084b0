"""examples/train_and_deploy.md from beginning to end, with a small network and few iterations."""

import re
import shlex
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from fpn_ext.__main__ import main
from fpn_ext.export.formats import FORMATS
from photographs import write_coco
from PIL import Image
from test_own_data import TINY
from tiny import photo

PAGE = Path("examples/train_and_deploy.md").resolve()
SHORT = [*TINY, "SOLVER.FPN_EXT.EPOCHS", "0", "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()"]
SHORT += ["MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "224", "TEST.FPN_EXT.BEST_METRIC", ""]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with photos/, one.jpg and two.jpg, and the project's configs."""
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    write_coco(tmp_path / "photos")
    for seed, name in enumerate(("one.jpg", "two.jpg")):
        Image.fromarray(photo(seed=seed)).save(tmp_path / name)
    known = set(DatasetCatalog)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(DatasetCatalog) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_every_command_works_after_the_one_before(place, capsys):
    pytest.importorskip("hotcoco", reason="fpn-ext analyze needs hotcoco")
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package, reason="the extra onnx is not installed")
    text = PAGE.read_text()
    commands = re.findall(r"^    fpn-ext ([^\n]+)$", text, flags=re.M)
    assert [c.split()[0] for c in commands] == [
        *("data", "train", "eval", "analyze", "predict", "export", "config"),
    ]
    for command in commands:
        words = shlex.split(command.partition(">")[0])
        if words[0] == "train":
            words += SHORT
        assert main(words) == 0, (command, capsys.readouterr().err[-3000:])
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.count("<Detections: ") == 2
