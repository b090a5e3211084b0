"""The entry point `fpn-ext VERB`: listing, refusals, and user errors versus internal ones."""

import errno
import re
import runpy
import shlex
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from fpn_ext import __main__ as door
from detectron2.data import DatasetCatalog
from fpn_ext.__main__ import VERBS, main
from fpn_ext.tools.options import as_overrides, report_to_write
from PIL import Image

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"


def help_of(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # an option and its help on one line
    assert main([*verb.split(), "--help"]) == 0
    printed = capsys.readouterr()
    assert not printed.err
    return printed.out


# What it lists.


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_it_lists_every_verb_with_its_line(words, capsys):
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, verb in VERBS.items():
        (line,) = (line for line in lines if line.startswith(f"  {name}  "))
        assert line.removeprefix(f"  {name}").strip() == verb.summary


def test_verbs_that_begin_alike_are_listed_by_that_word(capsys):
    assert main(["compare", "--help"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^  (\w+ \w+)  ", printed, re.M) == ["compare weights", "compare train"]
    assert main(["compare"]) == 2
    assert "compare weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predcit", "--config-file", "x"], "no verb 'predcit'; nearest: predict"),
        (["proposals", "validat", "x"], "no verb 'proposals validat'; nearest: proposals validate"),
        (["--num-gpus", "8"], "no verb '--num-gpus'."),
        (["xyzzy"], "no verb 'xyzzy'."),
    ],
)
def test_an_unknown_verb_is_told_the_nearest(words, said, capsys):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_examples_that_parse(verb, capsys, monkeypatch):
    printed = help_of(verb, capsys, monkeypatch)
    examples = re.split(r"^examples?:\n", printed, flags=re.M)[1].replace("\\\n", " ")
    calls = [line.split("  #")[0] for line in examples.splitlines() if line.strip()]
    assert calls and all(call.startswith(f"  fpn-ext {verb}") for call in calls)
    for call in calls:
        words = shlex.split(call)[1 + len(verb.split()) :]
        VERBS[verb].parser().parse_intermixed_args(words)


def test_one_option_means_one_thing(capsys, monkeypatch):
    """Metavars in every verb; help texts of the most common options."""
    takes, helps = defaultdict(dict), defaultdict(set)
    for verb in VERBS:
        printed = help_of(verb, capsys, monkeypatch).split("\noptions:\n")
        for text in printed[-1].split("\n\n")[0].split("\n  -"):
            names, *meaning = re.split(r"\s{2,}", text.strip(), maxsplit=1)
            option, _, value = names.split(", ")[-1].lstrip("-").partition(" ")
            takes[option][verb] = value
            helps[option].add(" ".join(meaning))
        if "KEY VALUE" in printed[0]:
            takes["KEY VALUE"][verb] = ""
    others = {
        "output": {
            **{"video": "VIDEO", "pretrain": "FILE", "weights convert": "FILE"},
            "export": "FILE",
        },  # no folder
        "input": {"video": "VIDEO"},
    }
    for option, by_verb in takes.items():
        expected = others.get(option, {})
        usual = {value for verb, value in by_verb.items() if verb not in expected}
        assert len(usual) <= 1, (option, by_verb)
        assert {verb: by_verb[verb] for verb in expected} == expected
    assert takes["config-file"]["predict"] == takes["json"]["check"] == "FILE"
    assert takes["output"]["predict"] == "FOLDER"
    assert takes["config-file"].keys() <= takes["KEY VALUE"].keys()
    assert helps["config-file"] == {"a YAML config"}
    for meaning in helps["json"]:
        assert "to this file, as JSON" in meaning or "a line of JSON per frame" in meaning


@pytest.mark.parametrize("verb", ["train", "eval", "predict", "video", "proposals generate"])
def test_no_tune_is_the_key(verb):
    """In all verbs that infer."""
    parser = VERBS[verb].parser()
    words = {
        "predict": ["--run", "r"],
        "eval": ["--run", "r"],
        "video": ["--run", "r", "--camera", "0"],
        "proposals generate": ["--config-file", "c", "--datasets", "d", "--output", "o"],
        "train": ["--config-file", "c"],
    }[verb]
    args = parser.parse_intermixed_args([*words, "--no-tune", "SEED", "1"])
    as_overrides(args)
    assert args.opts == ["SEED", "1", "MODEL.FPN_EXT.TUNE", "False"]
    args = parser.parse_intermixed_args([*words, "SEED", "1"])
    as_overrides(args)
    assert args.opts == ["SEED", "1"]


@pytest.mark.parametrize("words", [["--help"], ["predict", "--help"], ["predict"], ["predcit"]])
def test_help_and_usage_errors_import_nothing_heavy(words):
    code = f"""if True:
        import sys
        from fpn_ext.__main__ import main
        status = main({words!r})
        heavy = {{"torch", "numpy", "detectron2", "matplotlib", "cv2", "PIL"}} & set(sys.modules)
        print("heavy:", *sorted(heavy))
        sys.exit(status)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in words else 2), done.stderr
    assert done.stdout.splitlines()[-1].strip() == "heavy:"
    assert "Traceback" not in done.stderr


def test_python_m_is_the_same_door():
    done = subprocess.run(
        [sys.executable, "-m", "fpn_ext", "predict", "README.md"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    required = "one of the arguments --config-file --run is required"
    assert f"fpn-ext predict: error: {required}" in done.stderr


# A user's mistake: one message, status 2.


@pytest.fixture
def arguments(tmp_path):
    """The minimal arguments of each verb, besides the config."""
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    output = ["--output", str(tmp_path / "out")]
    return {
        "train": [],
        "eval": [],
        "predict": ["--input", str(tmp_path / "photo.png"), *output],
        "video": ["--camera", "0", "--output", str(tmp_path / "out.mp4")],
        "check": [],
        "config": [],
        "data": ["--dataset", "bccd_train"],
        "anchors": [],
        "levels": [],
        "explain": [],
        "look": output,
        "analyze": [],
        "contact-sheet": output,
        "export": ["--format", "torchscript", "--output", str(tmp_path / "model.pt")],
        "compare weights": ["--control", DEMO, "--weights", "none.pth"],
        "compare train": ["--control", DEMO, "--seeds", "1", *output],
        "proposals generate": ["--datasets", "bccd_train", *output],
        "pretrain": ["--output", str(tmp_path / "shapes.pth")],
    }


VERBS_WITH_CONFIG = [
    verb for verb in VERBS if "--config-file" in VERBS[verb].parser().format_help()
]


def mistake(verb, words, capsys):
    """A verb's output on a user error: only the message; `check` reports it as a finding."""
    if verb == "video":
        pytest.importorskip("cv2", reason="OpenCV, the extra video, is not installed")
    status = main([*verb.split(), *words])
    printed = capsys.readouterr()
    if verb == "check":
        assert status == 1 and printed.out.startswith("error ")
        return printed.out
    assert status == 2
    assert printed.err.startswith(f"fpn-ext {verb}: error: ")
    assert "Traceback" not in printed.err
    return printed.err


def test_every_verb_with_a_config_is_tried(arguments):
    assert set(arguments) == set(VERBS_WITH_CONFIG)


@pytest.mark.parametrize("verb", VERBS_WITH_CONFIG)
def test_a_config_that_is_not_there(verb, arguments, capsys):
    said = mistake(verb, ["--config-file", "none.yaml", *arguments[verb]], capsys)
    assert "config file 'none.yaml' does not exist" in said


@pytest.mark.parametrize("verb", VERBS_WITH_CONFIG)
def test_a_config_that_is_no_text(verb, arguments, tmp_path, capsys):
    (tmp_path / "latin1.yaml").write_bytes("SOLVER: é".encode("latin-1"))
    said = mistake(verb, ["--config-file", str(tmp_path / "latin1.yaml"), *arguments[verb]], capsys)
    assert "latin1.yaml" in said and "not text in UTF-8" in said


@pytest.mark.parametrize("verb", VERBS_WITH_CONFIG)
def test_a_misspelt_key(verb, arguments, capsys):
    words = ["--config-file", DEMO, *arguments[verb], "MODEL.WEIGTHS", "x"]
    said = mistake(verb, words, capsys)
    assert "no config key 'MODEL.WEIGTHS'; nearest valid: 'MODEL.WEIGHTS'" in said


@pytest.mark.parametrize(
    "verb", [verb for verb in VERBS_WITH_CONFIG if verb not in ("pretrain", "explain")]
)
def test_a_dataset_that_is_not_registered(verb, arguments, tmp_path, capsys):
    words = [word.replace("bccd_train", "bccd_tran") for word in arguments[verb]]
    opts = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "runs")]
    opts += [word for key in ("TRAIN", "TEST") for word in (f"DATASETS.{key}", "('bccd_tran',)")]
    (tmp_path / "model.pth").touch()
    if verb != "compare weights":
        opts += ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    said = mistake(verb, ["--config-file", DEMO, *words, *opts], capsys)
    assert re.search(r"'bccd_tran' is not a registered dataset; nearest valid: 'bccd_tra", said)
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (["MODEL.BACKBONE.NAME", "Pyramid"], "MODEL.BACKBONE.NAME: 'Pyramid' is not registered"),
        (["MODEL.ANCHOR_GENERATOR.NAME", "Anchors"], "'Anchors' is not registered"),
        (["MODEL.RPN.IN_FEATURES", "['p2', 'p9']"], "MODEL.RPN.IN_FEATURES ['p2', 'p9']"),
    ],
)
def test_names_that_the_anchors_cannot_be_of(opts, said, demo_images, capsys):
    assert said in mistake("anchors", ["--config-file", DEMO, *opts], capsys)


def test_detectron2s_own_script_has_the_same_door(monkeypatch, tmp_path, capsys):
    """`train_net.py --eval-only` is `fpn-ext eval`, and without it `fpn-ext train`."""
    called = []
    monkeypatch.setattr(door, "main", lambda words: called.append(words) or 0)
    for options in (["--config-file", DEMO], ["--config-file", DEMO, "--eval-only", "SEED", "1"]):
        monkeypatch.setattr(sys, "argv", ["train_net.py", *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("train_net.py", run_name="__main__")
        assert ended.value.code == 0
    assert called == [
        ["train", "--config-file", DEMO],
        ["eval", "--config-file", DEMO, "SEED", "1"],
    ]


# Ours: a traceback.


def a_verb_that(monkeypatch, action):
    """`fpn-ext doctor`, made to do this."""
    monkeypatch.setattr("fpn_ext.tools.doctor.run", lambda args: action())
    return ["doctor"]


def compiled(source):
    """A function defined in a module of this package, not of the tests."""
    scope = {"__name__": "fpn_ext.somewhere"}
    exec(compile(source, "somewhere.py", "exec"), scope)
    return scope["act"]


@pytest.mark.parametrize(
    "action",
    [
        lambda: np.zeros(3) + np.zeros(2),  # ValueError
        lambda: torch.zeros(3).view(2, 2),  # RuntimeError
        lambda: torch.zeros("3"),  # TypeError
        compiled("def act(): None + 1"),
        compiled("def act(): int('one')"),
        compiled("def act(): raise AssertionError('ours')"),
        compiled("def act(): assert False"),
        compiled("def act(): {}['key']"),
        lambda: DatasetCatalog.get("nowhere"),  # KeyError
    ],
)
def test_a_bug_of_ours_keeps_its_traceback(monkeypatch, action):
    with pytest.raises(Exception) as expected:
        action()
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        main(a_verb_that(monkeypatch, action))


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("raise ValueError('a message')", 2),
        ("raise TypeError('a message')", 2),
        ("raise ImportError('a message')", 2),
        ("raise FileNotFoundError('a message')", 2),
        ("raise RuntimeError('a message')", 1),
        ("raise FloatingPointError('a message')", 1),
    ],
)
def test_what_is_raised_to_tell_the_user_is_a_message(monkeypatch, capsys, source, status):
    assert main(a_verb_that(monkeypatch, compiled(f"def act(): {source}"))) == status
    assert capsys.readouterr().err == "fpn-ext doctor: error: a message\n"


def test_an_error_of_the_system_is_a_message(monkeypatch, tmp_path, capsys):
    assert main(a_verb_that(monkeypatch, (tmp_path / "none.json").read_text)) == 2
    assert "none.json" in capsys.readouterr().err

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    assert main(a_verb_that(monkeypatch, full)) == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err


def test_ctrl_c_is_no_error(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert main(a_verb_that(monkeypatch, interrupted)) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("opts", [["MODEL.RPN.IN_FEATURES", "['p9']"], ["SOLVER.MAX_ITR", "3"]])
def test_a_mistake_is_one_message_where_several_processes_are_asked_for(opts, capsys):
    """It is detected before they are started."""
    words = ["train", "--num-processes", "2", "--config-file", DEMO, "MODEL.DEVICE", "cpu"]
    assert main([*words, *opts]) == 2
    said = capsys.readouterr().err
    assert said.count("fpn-ext train: error:") == 1 and "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--num-gpus", "-1"], "--num-gpus must be at least 0, got -1"),
        (["train", "--num-processes", "0"], "--num-processes must be at least 1, got 0"),
        (["check", "--num-gpus", "-1"], "--num-gpus must be at least 0, got -1"),
        (["train", "MODEL.DEVICE", "nonsense"], "MODEL.DEVICE must be cpu, cuda or cuda:N, got"),
        (["train", "OUTPUT_DIR", ""], "OUTPUT_DIR is empty; name a folder"),
        (["train", "OUTPUT_DIR", "README.md"], "OUTPUT_DIR README.md is a file; name a folder"),
        (["train", "SOLVER.BASE_LR", "-0.1"], "SOLVER.BASE_LR must not be negative, got -0.1"),
        (["check", "--json", ""], "argument --json: '' is no name of a file"),
        (["check", "--json", "tests"], "argument --json: 'tests' is no name of a file"),
        (["levels", "--json", "README.md/x.json"], "'README.md' is no folder, and none can be"),
        (["anchors", "--output", "README.md"], "argument --output: 'README.md' is no folder"),
    ],
)
def test_a_place_or_number_that_cannot_be_is_said_at_once(words, message, tmp_path, capsys):
    verb, *rest = words
    # Short, should it be trained after all; in a folder that `make demo` has not used.
    short = ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"] if verb == "train" else []
    unused = ["OUTPUT_DIR", str(tmp_path)] if verb == "train" else []
    assert main([verb, "--config-file", DEMO, *unused, *rest, *short]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_no_gpu_to_check_for_is_one_process(demo_images, capsys):
    assert main(["check", "--config-file", DEMO, "--num-gpus", "0", "MODEL.DEVICE", "cpu"]) == 0


def test_a_reader_that_ends_is_no_error():
    """As `fpn-ext | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fpn_ext"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() in (0, 141)


# What a report may replace.


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"images": [], "annotations": [], "categories": []}', "annotations or detections"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5}]', "detections"),
        ('{"bbox": {"AP": 52.7, "AP50": 85.7}}', "scores of a training"),
        ('{"iteration": 19, "total_loss": 1.0}\n{"iteration": 39}\n', "the curves of a training"),
        ('{"iterations": 2, "files": ["model_final.pth"]}', "the record of a training"),
        ('{"classes": ["cat"], "data_sha256": "00"}', "what a training was on"),
        ('{"share": 0.2, "train": ["a.jpg"], "val": ["b.jpg"]}', "a split"),
        ("MODEL:\n  DEVICE: cpu\n", "not JSON"),
        ("0 0.5 0.5 0.1 0.1\n", "not JSON of a report"),
        ("\x80 weights", "not JSON"),
    ],
)
def test_json_replaces_nothing_but_reports(content, what, tmp_path, capsys):
    """The annotations of the data, for one, when the shell completes the wrong name."""
    file = tmp_path / "file"
    file.write_text(content, "latin-1")
    assert main(["weights", "list", "nothing-of-that-name", "--json", str(file)]) == 2
    assert f"is there, and {what}, which the report would replace" in capsys.readouterr().err
    assert file.read_text("latin-1") == content


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"findings": [{"status": "ok"}]}',
        '{"photos_val": {"bbox": {"AP": 52.7}}}',
        '{"source": "photos", "images": 6, "errors": 0, "warnings": 0}',
        '{"bbox": {"title": "photos_val", "images": 6}}',
    ],
)
def test_json_replaces_a_report(content, tmp_path):
    (tmp_path / "file").write_text(content)
    assert report_to_write(str(tmp_path / "file")) == tmp_path / "file"
    assert report_to_write("/dev/stdout").name == "stdout"
