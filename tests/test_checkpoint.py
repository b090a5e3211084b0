"""Checkpoints: atomic writes, skipping damaged files, and the share of tensors matched."""

import errno
import logging
import os
import resource
import signal

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fpn_ext.files.atomic import replacing
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.files.weight_files import DamagedFileError
from fvcore.common.checkpoint import Checkpointer
from torch import nn
from unsafe import touches


class Counter:
    """A checkpointable that records which checkpoint was read."""

    iteration = -1

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def checkpointer(folder):
    return SafeCheckpointer(nn.Linear(3, 2), str(folder), trainer=Counter())


def iteration_of(saved):
    return saved.checkpointables["trainer"].iteration


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of iterations 1, 3 and 5 in ``tmp_path``; the last is tagged."""
    writer = checkpointer(tmp_path)
    for iteration in (1, 3, 5):
        writer.checkpointables["trainer"].iteration = iteration
        writer.save(f"model_{iteration:07d}")
    return writer


def files(folder):
    return sorted(f.name for f in folder.iterdir())


def test_a_round_trip(saved, tmp_path):
    reader = checkpointer(tmp_path)
    assert reader.has_checkpoint()
    reader.resume_or_load("", resume=True)
    assert iteration_of(reader) == 5
    assert torch.equal(reader.model.weight, saved.model.weight)
    assert files(tmp_path) == ["last_checkpoint", *(f"model_000000{i}.pth" for i in (1, 3, 5))]


def test_without_resume_weights_alone_are_taken(saved, tmp_path):
    reader = checkpointer(tmp_path / "new")
    reader.resume_or_load(str(tmp_path / "model_0000003.pth"), resume=False)
    assert iteration_of(reader) == -1
    assert torch.equal(reader.model.weight, saved.model.weight)


# Writing


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a"
    with replacing(file) as stream:
        stream.write(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as stream:
        stream.write(b"new")
        assert files(tmp_path) == ["a", "a.partial"]
        assert file.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert files(tmp_path) == ["a"] and file.read_bytes() == b"old"


def full_disk(folder, name):
    """Linux's always-full device in place of the temporary file."""
    (folder / f"{name}.partial").symlink_to("/dev/full")


@pytest.mark.parametrize("name", ["model_0000007.pth", "last_checkpoint"])
def test_a_full_disk(saved, tmp_path, name):
    full_disk(tmp_path, name)
    before = [f for f in files(tmp_path) if not f.endswith(".partial")]
    with pytest.raises(
        OSError, match=r"No space left on device\. Make room in .*/test_a_full"
    ) as e:
        saved.save("model_0000007")
    assert e.value.errno == errno.ENOSPC
    assert name in str(e.value)
    assert f"--resume goes on from {tmp_path}/model_0000005.pth" in str(e.value)
    assert [f for f in files(tmp_path) if f != "model_0000007.pth"] == before
    reader = checkpointer(tmp_path)
    reader.resume_or_load("", resume=True)
    assert iteration_of(reader) == 5


def test_a_full_disk_before_the_first_checkpoint(tmp_path):
    full_disk(tmp_path, "model_0000001.pth")
    with pytest.raises(OSError, match="it holds no checkpoint yet"):
        checkpointer(tmp_path).save("model_0000001")
    assert files(tmp_path) == []


def test_a_disk_that_fills_up_within_a_file(saved, tmp_path):
    """torch's writer then raises its own error, which does not mention the disk."""
    saved.checkpointables["big"] = nn.Linear(1000, 3)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"model_0000007\.pth could not be written: File too large"
        ):
            saved.save("model_0000007")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "model_0000007.pth.partial" not in files(tmp_path)


def test_other_errors_are_not_taken_for_a_full_disk(saved, monkeypatch):
    def fail(data, stream):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        saved.save("model_0000007")


def test_what_a_kill_left_does_not_matter(saved, tmp_path):
    (tmp_path / "model_0000007.pth.partial").write_bytes(b"half")
    reader = checkpointer(tmp_path)
    reader.resume_or_load("", resume=True)
    assert iteration_of(reader) == 5
    reader.save("model_0000007")
    assert "model_0000007.pth.partial" not in files(tmp_path)


# Resuming


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file):
    file.write_bytes(b"")


def alter(file):
    text = bytearray(file.read_bytes())
    place = text.index(torch.load(file)["model"]["weight"].numpy().tobytes())
    text[place] ^= 1
    file.write_bytes(text)


@pytest.mark.parametrize("damage", [cut, empty, alter, os.remove])
def test_a_damaged_last_checkpoint_is_passed_over(saved, tmp_path, damage, caplog):
    damage(tmp_path / "model_0000005.pth")
    reader = checkpointer(tmp_path)
    reader.resume_or_load("", resume=True)
    assert iteration_of(reader) == 3
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "model_0000005.pth" in warning
    assert f"Going on from the one before: {tmp_path}/model_0000003.pth" in warning
    damage(tmp_path / "model_0000003.pth")
    reader.resume_or_load("", resume=True)
    assert iteration_of(reader) == 1


def load_of_main(self, path, *args, **kwargs):
    """As Detectron2 main's: it notes the address, and not that reading it has failed."""
    assert getattr(self, "noted", None) is None
    self.noted, _, query = path.partition("?")
    assert not query, f"{self.noted} is no file"
    content = Checkpointer.load(self, path, *args, **kwargs)
    self.noted = None
    return content


@pytest.mark.parametrize("folder", [".", "a?b"])
def test_a_damaged_checkpoint_is_passed_over_on_main(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(DetectionCheckpointer, "load", load_of_main)
    folder = tmp_path / folder
    folder.mkdir(exist_ok=True)
    writer = checkpointer(folder)
    for iteration in (1, 3):
        writer.checkpointables["trainer"].iteration = iteration
        writer.save(f"model_{iteration:07d}")
    cut(folder / "model_0000003.pth")
    reader = checkpointer(folder)
    reader.resume_or_load("", resume=True)
    assert iteration_of(reader) == 1


def test_none_left_is_an_error(saved, tmp_path):
    for file in tmp_path.glob("*.pth"):
        cut(file)
    reader = checkpointer(tmp_path)
    weight = reader.model.weight.clone()
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* can be resumed from: .*start anew"
    ) as e:
        reader.resume_or_load("", resume=True)
    assert all(f"model_000000{i}.pth is damaged" in str(e.value) for i in (1, 3, 5))
    assert torch.equal(reader.model.weight, weight)


@pytest.mark.parametrize("text", [None, b"", b"\xff\x00\xfe", b"model_0000009.pth\n"])
def test_without_a_valid_tag_the_newest_is_taken(saved, tmp_path, text):
    tag = tmp_path / "last_checkpoint"
    tag.unlink() if text is None else tag.write_bytes(text)
    reader = checkpointer(tmp_path)
    assert reader.has_checkpoint()
    reader.resume_or_load("", resume=True)
    assert iteration_of(reader) == 5


def test_the_final_checkpoint_is_the_newest(saved, tmp_path):
    saved.checkpointables["trainer"].iteration = 7
    saved.save("model_final")
    (tmp_path / "last_checkpoint").unlink()
    reader = checkpointer(tmp_path)
    reader.resume_or_load("", resume=True)
    assert iteration_of(reader) == 7
    saved.tag_last_checkpoint("model_final.pth")
    cut(tmp_path / "model_final.pth")
    reader.resume_or_load("", resume=True)
    assert iteration_of(reader) == 5


def test_a_longer_run_before_in_the_same_folder_is_not_gone_on_with(saved, tmp_path):
    saved.tag_last_checkpoint("model_0000003.pth")  # 5 is of the run before
    cut(tmp_path / "model_0000003.pth")
    reader = checkpointer(tmp_path)
    reader.resume_or_load("", resume=True)
    assert iteration_of(reader) == 1


@pytest.mark.parametrize("name", ["../other/model_0000005.pth", "..", "/other/model_final.pth"])
def test_the_checkpoint_of_another_folder_is_not_gone_on_with(saved, tmp_path, name):
    (tmp_path / "last_checkpoint").write_text(name)
    with pytest.raises(ValueError, match=r"last_checkpoint names '.*', a file of another folder"):
        checkpointer(tmp_path).resume_or_load("", resume=True)


def test_an_empty_folder_begins_anew_and_says_so(tmp_path, caplog):
    reader = checkpointer(tmp_path)
    assert not reader.has_checkpoint()
    reader.resume_or_load("", resume=True)
    assert f"No checkpoint to resume from in {tmp_path}" in caplog.text


def test_code_in_a_checkpoint_is_refused_not_passed_over(saved, tmp_path):
    canary = tmp_path / "canary"
    torch.save(
        {"model": saved.model.state_dict(), "x": touches(canary)}, tmp_path / "model_0000005.pth"
    )
    with pytest.raises(ValueError, match=r"model_0000005\.pth asks for .*eval"):
        checkpointer(tmp_path).resume_or_load("", resume=True)
    assert not canary.exists()


# How much of the model


def load_into(model, weights, folder):
    torch.save(weights, folder / "w.pth")
    SafeCheckpointer(model).load(str(folder / "w.pth"))


def named(*names):
    """A model with one weight of 2 x 2 under each name."""
    model = nn.Module()
    for name in names:
        inner = model
        *folders, last = name.split(".")
        for part in folders:
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = getattr(inner, part)
        inner.register_parameter(last, nn.Parameter(torch.zeros(2, 2)))
    return model


NAMES = (
    "backbone.bottom_up.stem",
    "backbone.bottom_up.res2",
    "backbone.fpn_lateral2",
    "backbone.top_block.p6",
    "proposal_generator.head",
    "roi_heads.box",
)


def test_the_share_matched_is_said_by_part(tmp_path, caplog):
    caplog.set_level("INFO")
    load_into(named(*NAMES), {name: torch.ones(2, 2) for name in NAMES[:3]}, tmp_path)
    assert (
        f"Weights of {tmp_path}/w.pth: backbone 2 of 2, pyramid 1 of 2, heads 0 of 2 tensors "
        "matched; the rest keeps its first values" in caplog.text
    )
    assert {r.levelname for r in caplog.records if "tensors matched" in r.message} == {"WARNING"}
    caplog.clear()
    load_into(named(*NAMES), {name: torch.ones(2, 2) for name in NAMES}, tmp_path)
    assert "pyramid 2 of 2, heads 2 of 2 tensors matched" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_tensor_of_another_shape_does_not_match(tmp_path, caplog):
    weights = {name: torch.ones(2, 2) for name in NAMES[:-1]} | {NAMES[-1]: torch.ones(3, 2)}
    load_into(named(*NAMES), weights, tmp_path)
    assert "heads 1 of 2 tensors matched" in caplog.text


def test_batch_norms_counters_do_not_count(tmp_path, caplog):
    model = nn.Sequential(nn.BatchNorm2d(2))
    weights = {k: v for k, v in model.state_dict().items() if "tracked" not in k}
    caplog.set_level("INFO")
    load_into(model, weights, tmp_path)
    assert "heads 4 of 4 tensors matched" in caplog.text


def test_weights_of_another_model_are_an_error(tmp_path):
    expected = (
        r"w\.pth fits no tensor of the model: it has \['conv1'\] \(of 1\), the model "
        r"\['backbone\..*\] \(of 6\)\. Check MODEL\.WEIGHTS"
    )
    with pytest.raises(ValueError, match=expected):
        load_into(named(*NAMES), {"conv1": torch.ones(2, 2)}, tmp_path)


def test_a_damaged_file_of_weights_is_an_error(tmp_path):
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "w.pth")
    cut(tmp_path / "w.pth")
    with pytest.raises(DamagedFileError, match=r"w\.pth is damaged"):
        SafeCheckpointer(nn.Linear(3, 2)).load(str(tmp_path / "w.pth"))
