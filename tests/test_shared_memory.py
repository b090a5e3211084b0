"""Processes that load images need a shared memory that can be written."""

import fpn_ext
import pytest
import tiny
from fpn_ext.__main__ import main
from fpn_ext.data import shared_memory
from fpn_ext.data.shared_memory import check_shared_memory
from fpn_ext.engine.check_run import examine


@pytest.fixture
def read_only(monkeypatch):
    """Where no file can be made, by root neither."""
    monkeypatch.setattr(shared_memory, "FOLDER", "/proc")


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_written_only_by_workers(read_only, workers):
    cfg = fpn_ext.get_cfg()
    cfg.DATALOADER.NUM_WORKERS = workers
    if workers == 0:
        check_shared_memory(cfg)
        return
    with pytest.raises(ValueError, match=r"NUM_WORKERS 2: .* in /proc, which cannot be written"):
        check_shared_memory(cfg)


def test_where_there_is_none_nothing_is_said(monkeypatch, tmp_path):
    cfg = fpn_ext.get_cfg()
    for folder in (tmp_path, tmp_path / "none"):  # one that can be written; not Linux
        monkeypatch.setattr(shared_memory, "FOLDER", str(folder))
        check_shared_memory(cfg)


def test_a_training_and_its_check_say_so_at_the_door(read_only, tmp_path, capsys):
    tiny.register(tmp_path / "images")
    words = tiny.options(tmp_path / "run", "DATALOADER.NUM_WORKERS", "2")
    assert main(["train", "--config-file", tiny.FILE, *words]) == 2
    said = "DATALOADER.NUM_WORKERS 2: processes that load images hand them over in /proc"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*.pth"))
    findings = examine(tiny.FILE, words)
    assert any(f.status == "error" and f.subject == "shared memory" for f in findings)
