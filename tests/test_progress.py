"""What a training shows: little before its first iteration, progress from there on, a plain log."""

import json
import logging
import os
import subprocess
import sys

import pytest
from fpn_ext.engine.progress import (
    Countdown,
    FirstLineOnly,
    ProgressWriter,
    WithoutEscapes,
    only_on_console,
)

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
SCREEN = 25  # lines


@pytest.fixture(scope="module")
def captured(demo_images, tmp_path_factory):
    """The console of a training of two iterations, as lines; and its folder."""
    pytest.importorskip("timm", reason="timm, an extra, is not installed")
    output = tmp_path_factory.mktemp("run")
    command = [
        *(sys.executable, "-m", "fpn_ext", "train", "--config-file", DEMO, "OUTPUT_DIR", output),
        *("MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"),
        *(
            "SOLVER.IMS_PER_BATCH",
            "2",
            "INPUT.MIN_SIZE_TRAIN",
            "(64,)",
            "INPUT.MIN_SIZE_TEST",
            "64",
        ),
        *("MODEL.FPN_EXT.BOTTOM_UP", "timm/test_resnet", "MODEL.FPN_EXT.KEEP_PIXELS", "True"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FORCE_COLOR": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout.splitlines(), output


def progress(lines):
    return [i for i, line in enumerate(lines) if "total_loss" in line]


def test_at_most_one_screen_before_the_first_iteration(captured):
    lines, _ = captured
    first = progress(lines)[0]
    assert first <= SCREEN, "\n".join(lines[:first])
    before = "\n".join(lines[:first])
    assert "levels:" in before and "log.txt has environment, config, model and data" in before


def test_progress_from_the_first_iteration_with_time_left(captured):
    lines, _ = captured
    shown = [lines[i] for i in progress(lines)]
    assert [line.partition("iter: ")[2].split()[0] for line in shown] == ["0", "1"]
    assert all("eta: 0:00:0" in line and " time: " in line for line in shown)


def test_the_log_has_everything_and_no_escapes(captured):
    lines, output = captured
    log = (output / "log.txt").read_text()
    assert "\x1b" not in log and "\x1b" not in "\n".join(lines)
    for text in ("Environment info:\n", "Running with full config:\n", "Model:\nGeneralizedRCNN"):
        assert text in log
    assert "Distribution of instances" in log
    assert len(log.splitlines()) > 300


def test_an_evaluation_is_one_line_and_its_scores(captured):
    """After the last iteration; what Detectron2 says of it is in the log alone."""
    lines, output = captured
    texts = [line.partition("]: ")[2] or line for line in lines[progress(lines)[-1] + 1 :]]
    begins = texts.index("evaluating on demo_multiscale_val")
    assert texts[begins + 1].startswith("demo_multiscale_val: bbox AP ")
    assert texts[begins + 1].endswith("inference/demo_multiscale_val/results.json")
    assert not any(word in "\n".join(texts) for word in ("Inference", "copypaste", "Evaluation"))
    log = (output / "log.txt").read_text()
    assert "Start inference on" in log and "Evaluation results for bbox" in log


def test_what_the_console_has_in_between(capsys):
    """Warnings and the named logger; afterwards all again, and no level was changed."""
    logger = logging.getLogger("detectron2.of_this_test")
    parent = logging.getLogger("detectron2")
    handler = logging.StreamHandler(sys.stdout)
    before = parent.level, parent.handlers[:]
    parent.addHandler(handler)
    parent.setLevel(logging.INFO)
    try:
        with only_on_console("detectron2.of_that"):
            logger.info("hidden")
            logger.warning("a warning")
            logging.getLogger("detectron2.of_that").info("named")
            assert (parent.level, handler.level) == (logging.INFO, logging.NOTSET)
        logger.info("shown")
    finally:
        parent.setLevel(before[0])
        parent.removeHandler(handler)
    assert capsys.readouterr().out.splitlines() == ["a warning", "named", "shown"]


def test_time_left_of_a_long_evaluation(monkeypatch, caplog):
    """Ten batches of 6 s: a line after every third, as 15 s without one are too long."""
    now = [0.0]
    monkeypatch.setattr("fpn_ext.engine.progress.time.monotonic", lambda: now[0])
    caplog.set_level("INFO", logger="fpn_ext")
    batches = Countdown(list("abcdefghij"), "evaluating on cells")
    got = []
    for batch in batches:
        got.append(batch)
        now[0] += 6
    assert got == list("abcdefghij") and len(batches) == 10
    assert [record.getMessage() for record in caplog.records] == [
        "evaluating on cells: 3 of 10, eta 0:00:42",
        "evaluating on cells: 6 of 10, eta 0:00:24",
        "evaluating on cells: 9 of 10, eta 0:00:06",
    ]


def test_metrics_have_each_iteration_once(captured):
    metrics = [json.loads(line) for line in (captured[1] / "metrics.json").read_text().splitlines()]
    assert [m["iteration"] for m in metrics if "total_loss" in m] == [0, 1]


class Counting:
    """A trainer and an EventWriter in one: which iterations were written."""

    def __init__(self, start, last):
        self.start_iter, self.max_iter, self.written = start, last, []

    def write(self):
        self.written.append(self.iter + 1)


@pytest.mark.parametrize(
    ("start", "last", "written"),
    [
        (0, 45, [1, 2, 5, 10, 20, 40, 45]),
        (0, 2, [1, 2]),
        (30, 65, [31, 32, 35, 40, 60, 65]),  # resumed: its first ones, whatever their number
        (19, 21, [20, 21]),
    ],
)
def test_which_iterations_are_written(monkeypatch, start, last, written):
    monkeypatch.setattr("detectron2.engine.hooks.EventWriter", object)
    trainer = Counting(start, last)
    hook = ProgressWriter([trainer])
    hook.trainer = trainer
    for trainer.iter in range(start, last):
        hook.after_step()
    assert trainer.written == written


def record(level, text, *args):
    return logging.LogRecord("name", level, "file", 1, text, args, None)


def test_long_messages_lose_lines_on_the_console_and_warnings_none():
    plain = logging.Formatter("%(message)s")
    text = "Model:\na\nb\nc %s"
    long = record(logging.INFO, text, "d")
    assert FirstLineOnly(plain).format(long) == "Model (4 lines, in log.txt)"
    assert plain.format(long) == "Model:\na\nb\nc d", "other handlers get it whole"
    warning = record(logging.WARNING, text, "d")
    assert FirstLineOnly(plain).format(warning) == "Model:\na\nb\nc d"


def test_escapes_of_every_kind_go():
    text = "\x1b[5m\x1b[31mWARNING\x1b[0m \x1b[38;5;245mgrey\x1b[39m [not one]"
    formatter = WithoutEscapes(logging.Formatter("%(message)s"))
    assert formatter.format(record(logging.INFO, text)) == "WARNING grey [not one]"
