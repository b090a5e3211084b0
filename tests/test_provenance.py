"""Commit, hardware and versions as stated in reports."""

import shutil
import subprocess
from pathlib import Path

import detectron2
import pytest
import torch
from fpn_ext.reporting import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with a stand-in for provenance.py; returns a function that runs git in it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    file = tmp_path / "provenance.py"
    file.write_text("1\n")
    monkeypatch.setattr(provenance, "__file__", str(file))
    git("init", "-q")
    return git


def test_commit_of_a_clean_and_of_a_changed_checkout(checkout):
    checkout("add", ".")
    checkout("commit", "-qm", "first")
    clean = provenance.commit()
    assert len(clean) >= 7 and not clean.endswith("-dirty")
    Path(provenance.__file__).write_text("2\n")
    assert provenance.commit() == f"{clean}-dirty"


def test_the_checkout_of_another_project_has_no_say(checkout):
    """As for a package in a virtual environment inside another repository."""
    checkout("commit", "-qm", "without the file", "--allow-empty")
    assert provenance.commit() == ""


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == ""


def test_versions_are_those_imported():
    versions = provenance.versions()
    assert versions["torch"] == torch.__version__
    assert versions["detectron2"].startswith(detectron2.__version__ + " (")


def test_hardware_has_a_name():
    assert provenance.hardware()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
        assert provenance.hardware("cuda:1") == "GPU of cuda:1"
