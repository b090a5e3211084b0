"""Every file is whole or not there: which code writes files, and what a full disk leaves."""

import ast
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils.file_io import PathManager
from fpn_ext.__main__ import VERBS
from fpn_ext.data.convert import convert
from fpn_ext.engine import train
from fpn_ext.files.atomic import move_into_place, replacing, staged_folder, write_text
from fpn_ext.inference import kept as keeping
from fpn_ext.inference.kept import KeptResult
from fpn_ext.inspection.contact_sheet import draw_curves
from PIL import Image

PACKAGE = Path("fpn_ext")

# What writes to the file that it is given. `dump` and `save` are of json, pickle, torch, Pillow.
WRITERS = {
    *("write_text", "write_bytes", "savefig", "save", "imwrite", "dump", "tofile", "to_csv"),
    *("savez", "savetxt", "copyfile", "copy2", "move", "save_file", "save_model", "VideoWriter"),
}
# Contexts whose target is not the file itself: it gets its name when it is complete.
STREAMS = {"replacing", "BytesIO", "StringIO", "TemporaryFile"}
# Who writes otherwise, and why that is not a file that could be found half written.
OTHERS = {
    "data/formats": "into the folder that `convert` moves into place when it is complete",
    "data/demo_data.py": "the same",
    "evaluation/evaluators.py": "into a temporary folder, for Detectron2's own reader",
    "export/formats.py": "into a temporary folder; `export` moves the file when it is proved",
    "export/int8.py": "the same",
    "inference/video.py": "OpenCV, to a .partial name; moved when its last frame is readable",
    "engine/jobs.py": "a log: appended to",
    "reporting/measuring.py": "a switch of Linux, in /proc",
    "files/atomic.py": "what all others use",
    "files/checkpoint.py": "to a stream of `replacing`, handed on",
    "files/run_lock.py": "a lock, which is not read as a file",
}


def streams_in(function):
    """Names that a function binds to streams: by with, or by assignment."""
    for node in ast.walk(function):
        if isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
            value, target = node.context_expr, node.optional_vars
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value, target = node.value, node.targets[0]
        else:
            continue
        called = value.func if isinstance(value, ast.Call) else None
        if getattr(called, "id", getattr(called, "attr", "")) in STREAMS:
            yield target.id


def opens_to_write(call):
    """Whether a call is open(file, "w"), file.open("w") or os.open with flags that create."""
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    words = [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
    modes = [w.value for w in words if isinstance(w, ast.Constant) and isinstance(w.value, str)]
    return name in ("open", "fdopen") and any(
        set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes
    )


def writes_in_place(text):
    """Lines of a source that write to a file by its name, or to something unknown."""
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)] or [tree]
    lines = set()
    for function in [tree, *functions]:
        streams = set(streams_in(function))
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            to = {a.id for a in ast.walk(call) if isinstance(a, ast.Name)}
            of_a_module = isinstance(call.func, ast.Attribute)
            if opens_to_write(call) or (name in WRITERS and of_a_module and not to & streams):
                lines.add(call.lineno)
    return sorted(lines)


# Calls that have a writer's name and write no file, by their text.
HARMLESS = ("cfg.dump()", "config.dump()", "checkpointer.save(", "self.save(", ".export(")


def found_in(file):
    source = file.read_text()
    lines = source.splitlines()
    return [n for n in writes_in_place(source) if not any(h in lines[n - 1] for h in HARMLESS)]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_no_file_is_written_in_place(file):
    name = file.relative_to(PACKAGE).as_posix()
    if any(name.startswith(other) for other in OTHERS):
        return
    assert not found_in(file), f"{file}: write by fpn_ext.files.atomic, or say why not in OTHERS"


def test_every_exception_is_needed():
    for name in OTHERS:
        place = PACKAGE / name
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        assert any(writes_in_place(f.read_text()) or "os.open" in f.read_text() for f in files), (
            name
        )


IN_PLACE = [
    'open(file, "w").write(text)',
    'file.open(mode="wb")',
    "file.write_text(text)",
]
TO_A_STREAM_OR_NOT = [
    "torch.save(model, file)",
    "figure.savefig(file)",
    "json.dump(value, file)",
    "picture.save(file)",
    "numpy.save(file, array)",
    "cv2.imwrite(file, picture)",
]


@pytest.mark.parametrize("line", [*IN_PLACE, *TO_A_STREAM_OR_NOT])
def test_a_writer_is_seen(line):
    assert writes_in_place(f"def f():\n    {line}\n") == [2]


@pytest.mark.parametrize("line", TO_A_STREAM_OR_NOT)
def test_a_writer_to_a_stream_is_none(line):
    assert not writes_in_place(f"def f():\n    with replacing(x) as file:\n        {line}\n")


# What is left where a write fails


@pytest.fixture
def limited():
    """No file may grow beyond some bytes: as where a disk is full, but without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_with_the_file_and_leaves_the_old_one(tmp_path, limited):
    file = tmp_path / "a.md"
    write_text(file, "old")
    limited(100)
    with pytest.raises(OSError, match=r"File too large: '.*a\.md'"):
        write_text(file, "new" * 100)
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.md"]


def test_what_a_library_wrote_is_moved_into_place(tmp_path):
    (tmp_path / "a.partial").write_text("new")
    (tmp_path / "a").write_text("old")
    move_into_place(tmp_path / "a.partial", tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "new"


def test_two_that_write_a_file_at_once_do_not_mix_it(tmp_path):
    """Two evaluations of one folder do: each of the two is whole, one after the other."""
    file, begun = tmp_path / "results.json", threading.Event()

    def second():
        begun.set()
        write_text(file, "second")

    thread = threading.Thread(target=second)
    with replacing(file) as stream:
        stream.write(b"fir")
        stream.flush()
        thread.start()
        begun.wait()
        thread.join(0.2)
        assert thread.is_alive() and not file.exists()
        stream.write(b"st")
    thread.join()
    assert file.read_text() == "second"
    assert [f.name for f in tmp_path.iterdir()] == ["results.json"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "data") as folder:
        (folder / "1.txt").write_text("1")
        assert not (tmp_path / "data").exists()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    (tmp_path / "data").mkdir()  # an empty one is replaced
    with staged_folder(tmp_path / "data") as folder:
        (folder / "1.txt").write_text("1")
    assert [f.name for f in (tmp_path / "data").iterdir()] == ["1.txt"]
    with pytest.raises(OSError, match="not empty"), staged_folder(tmp_path / "data"):
        pass
    assert os.listdir(tmp_path) == ["data"]


def test_a_folder_left_by_a_kill_is_removed_by_the_next(tmp_path, caplog):
    """The lock ends with the process, however that ends."""
    program = (
        "import os, signal, sys\n"
        "from fpn_ext.files.atomic import staged_folder\n"
        "with staged_folder(sys.argv[1]) as folder:\n"
        "    (folder / '1.txt').write_text('1')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "data")])
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".data.partial"]
    with staged_folder(tmp_path / "data") as folder:
        (folder / "2.txt").write_text("2")
    assert os.listdir(tmp_path) == ["data"] and os.listdir(tmp_path / "data") == ["2.txt"]
    assert "left by a command that was killed" in caplog.text


def test_a_folder_of_somebody_elses_stays(tmp_path):
    (tmp_path / ".data.partial").mkdir()
    (tmp_path / ".data.partial" / "mine.txt").write_text("mine")
    with staged_folder(tmp_path / "data") as folder:
        (folder / "1.txt").write_text("1")
    assert os.listdir(tmp_path / "data") == ["1.txt"]
    assert (tmp_path / ".data.partial" / "mine.txt").read_text() == "mine"


def test_two_that_make_a_folder_take_turns(tmp_path):
    """The second makes nothing: the first's is there by then."""
    failed = []

    def second():
        try:
            with staged_folder(tmp_path / "data") as folder:
                (folder / "2.txt").write_text("2")
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=second)
    with staged_folder(tmp_path / "data") as folder:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        (folder / "1.txt").write_text("1")
    thread.join()
    assert failed and os.listdir(tmp_path / "data") == ["1.txt"]
    assert os.listdir(tmp_path) == ["data"]


def test_torchs_own_error_names_the_full_disk(tmp_path, limited):
    limited(10_000)
    tensors = [torch.zeros(9999), torch.zeros(9999)]
    said = pytest.raises(OSError, match=r"File too large: '.*a\.pth'")
    with said, replacing(tmp_path / "a.pth") as stream:
        torch.save(tensors, stream)
    assert os.listdir(tmp_path) == []


def test_detectron2_writes_no_file_of_a_run_in_place(demo_images, tmp_path, monkeypatch):
    """Its default_setup would write config.yaml, which a kill could leave cut short."""
    opened = []
    whole = type(PathManager).open

    def spy(self, path, mode="r", **kwargs):
        opened.append((Path(path).name, mode))
        return whole(self, path, mode, **kwargs)

    monkeypatch.setattr(type(PathManager), "open", spy)
    words = ["--config-file", "configs/demo/faster_rcnn_R_18_FPN.yaml", "MODEL.DEVICE", "cpu"]
    words += ["OUTPUT_DIR", str(tmp_path)]
    train.setup(VERBS["train"].parser().parse_args(words))
    assert ("faster_rcnn_R_18_FPN.yaml", "r") in opened
    assert [name for name, mode in opened if "w" in mode] == []
    assert "MAX_ITER" in (tmp_path / "config.yaml").read_text()


def test_a_curve_is_drawn_without_a_line_cut_short(tmp_path, capsys):
    lines = ['{"iteration": 1, "total_loss": 2.0}', '{"iteration": 2, "tot']
    lines.append('{"iteration": 3, "total_loss": 1.0}')
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    draw_curves(tmp_path / "metrics.json", tmp_path / "curves.png")
    assert f"{tmp_path / 'metrics.json'}, line 2: cut short" in capsys.readouterr().err
    assert Image.open(tmp_path / "curves.png").format == "PNG"


@pytest.mark.parametrize("to", ["coco", "voc", "yolo"])
def test_a_dataset_is_converted_whole_or_not_at_all(tmp_path, limited, to):
    """The images fit on the disk but for the last, which is large."""
    source = tmp_path / "photos"
    source.mkdir()
    for number, side in ((1, 8), (2, 8), (3, 64)):
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    images = [
        {"id": n, "file_name": f"{n}.png", "width": side, "height": side}
        for n, side in ((1, 8), (2, 8), (3, 64))
    ]
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "cat"}]
    (source / "all.json").write_text(json.dumps(content))
    limited(6000)
    with pytest.raises(OSError, match="File too large"):
        convert(source, to, tmp_path / "out")
    assert os.listdir(tmp_path) == ["photos"]


# predict


def result_of(*names):
    """Entries of pictures with a box each."""
    for number, name in enumerate(names, start=1):
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, 9, 9]}
        yield {"id": number, "file_name": name}, [box]


def names_in(file):
    return [image["file_name"] for image in json.loads(file.read_text())["images"]]


def test_the_file_grows_with_the_pictures(tmp_path, monkeypatch):
    """Valid after each; not written more often than a share of the time allows."""
    file = tmp_path / "detections.json"
    now = [0.0]
    monkeypatch.setattr(keeping.time, "monotonic", lambda: now[0])
    entries = list(result_of("a", "b", "c", "d"))
    with KeptResult(file, [], 4) as kept:
        for (entry, boxes), second, there in zip(
            entries, (0, 1, 6, 7), (["a"], ["a"], ["a", "b", "c"], ["a", "b", "c"]), strict=True
        ):
            now[0] = second
            with kept.room_for(entry, boxes):
                pass
            assert names_in(file) == there
            assert json.loads(file.read_text())["complete"] is False
    assert names_in(file) == ["a", "b", "c", "d"]
    assert json.loads(file.read_text()) == kept.result and kept.result["complete"]
    assert os.listdir(tmp_path) == ["detections.json"]


@pytest.mark.parametrize("size", [1000, 2000, 3000, 10_000])
def test_a_disk_that_fills_loses_nothing_found(tmp_path, limited, capsys, size):
    file = tmp_path / "detections.json"
    done = []
    limited(size)
    with pytest.raises(OSError, match="File too large"), KeptResult(file, [], 999) as kept:
        for entry, boxes in result_of(*(f"{n:03}.jpg" for n in range(999))):
            with kept.room_for(entry, boxes):
                pass
            done.append(entry["file_name"])
    assert len(done) > 1 and names_in(file) == done
    said = capsys.readouterr().err
    assert f"ended after {len(done)} of 999 pictures; {file} has {len(done)} of them" in said
    assert os.listdir(tmp_path) == ["detections.json"]


def test_no_room_for_the_last_write_is_said_too(tmp_path, limited, capsys):
    """What was written before is there, and valid."""
    file = tmp_path / "detections.json"
    with pytest.raises(KeyboardInterrupt), KeptResult(file, [], 3) as kept:
        for entry, boxes in result_of("a", "b"):
            with kept.room_for(entry, boxes):
                pass
        limited(100)
        raise KeyboardInterrupt
    assert names_in(file) == ["a"]
    said = capsys.readouterr().err
    assert "not up to date: " in said and f"ended after 2 of 3 pictures; {file} has 1" in said


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError])
def test_an_error_of_whoever_writes_comes_out_as_it_is(error, tmp_path):
    with pytest.raises(error, match="of the writer"), replacing(tmp_path / "a.json"):
        raise error("of the writer")
    assert not list(tmp_path.iterdir())
