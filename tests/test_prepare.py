"""One preparation for every command: its order, its messages, and which commands use it."""

import logging

import fpn_ext
import pytest
import torch
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork, build_model
from fpn_ext.__main__ import VERBS, main
from fpn_ext.config import prepare as preparing
from fpn_ext.config.load import written_keys
from fpn_ext.config.numerics import unresolved_yaml
from fpn_ext.config.prepare import Caution, prepare, prepare_loaded
from fpn_ext.engine.trainer import Trainer
from fpn_ext.levels import LevelError

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
CONTROL = "configs/demo/faster_rcnn_R_18_FPN_builtin.yaml"
CPU = ["MODEL.DEVICE", "cpu"]
TABLE = "The levels as configured:"


@pytest.fixture
def a_gpu(monkeypatch):
    """``torch.cuda.is_available()`` set by a test."""
    return lambda there: monkeypatch.setattr(torch.cuda, "is_available", lambda: there)


@pytest.fixture
def checkpoint(tmp_path):
    file = tmp_path / "model.pth"
    torch.save({"model": {}}, file)
    return str(file)


# The order


def test_the_stages_in_their_order():
    stages = prepare_loaded(fpn_ext.load_config(DEMO, CPU), training=True, weights="start")
    order = ["device", "data", "config", "keys", "weights", "pixels", "numerics"]
    assert [stage.subject for stage in stages] == order


def test_a_stage_is_taken_when_it_is_asked_for():
    """So that a check stops at the same point as a command."""
    cfg = fpn_ext.load_config(DEMO, [*CPU, "MODEL.FPN_EXT.NUMERICS", "exact"])
    stages = prepare_loaded(cfg, training=False, weights="unread")
    while next(stages).subject != "pixels":
        assert cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION == "auto"
    assert next(stages).subject == "numerics"
    assert cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION == "per_level"


def test_the_device_comes_before_the_check(a_gpu):
    """float16 is for GPUs: checked before the device is known, it would run on the CPU."""
    opts = ["MODEL.DEVICE", "cuda", "MODEL.FPN_EXT.INFERENCE_DTYPE", "float16"]
    a_gpu(False)
    with pytest.raises(ValueError, match=r"INFERENCE_DTYPE float16 needs a GPU"):
        prepare(DEMO, opts)
    a_gpu(True)
    model = prepare(DEMO, opts).cfg.MODEL
    assert (model.DEVICE, model.FPN_EXT.INFERENCE_DTYPE) == ("cuda", "float16")


def test_a_device_that_is_not_there_is_said(a_gpu):
    a_gpu(False)
    cfg, notes = prepare(DEMO, ["MODEL.DEVICE", "cuda:1"])
    assert cfg.MODEL.DEVICE == "cpu"
    assert notes[0] == "MODEL.DEVICE is 'cuda:1' and no CUDA device is there: using 'cpu'"
    assert not any("CUDA" in note for note in prepare(DEMO, CPU).notes)


def test_a_device_that_nobody_asked_for_is_no_warning(a_gpu, tmp_path):
    a_gpu(False)
    own = tmp_path / "own.yaml"
    own.write_text("MODEL:\n  DEVICE: cuda\n")
    for file, is_asked_for in (("configs/start/faster_rcnn_fast_cpu.yaml", False), (own, True)):
        cfg = fpn_ext.load_config(str(file))
        stage = next(prepare_loaded(cfg, False, "unread", written_keys(str(file))))
        (note,) = stage.notes
        assert cfg.MODEL.DEVICE == "cpu" and isinstance(note, Caution) == is_asked_for


def test_a_cuda_toolkit_without_a_gpu_is_no_warning(caplog):
    """What torch says at the import of torch.utils.cpp_extension, which Detectron2 imports."""
    assert main(["help"]) == 0
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
    logger.warning("anything else")
    assert [record.getMessage() for record in caplog.records] == ["anything else"]


def test_the_pixels_follow_the_network():
    defaults = ["MODEL.PIXEL_STD", str(get_detectron2_cfg().MODEL.PIXEL_STD)]
    by_name = ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/resnet18"]
    cfg, notes = prepare(DEMO, [*CPU, *defaults, *by_name])
    assert cfg.INPUT.FORMAT == "RGB"
    assert any("INPUT.FORMAT" in note for note in notes)


def test_all_that_is_wrong_with_a_config_is_said_at_once():
    opts = [*CPU, "MODEL.ROI_HEADS.NAME", "None", "DATASETS.TEST", "('none',)"]
    with pytest.raises(ValueError, match=r"2 problem\(s\)(.|\n)*ROI_HEADS\.NAME(.|\n)*'none'"):
        prepare(DEMO, opts)


def test_what_only_training_needs():
    opts = [*CPU, "DATASETS.TRAIN", "()"]
    prepare(DEMO, opts)
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN names no data ?set"):
        prepare(DEMO, opts, training=True)


def test_what_is_returned_can_be_changed_and_built():
    cfg = prepare(DEMO, CPU).cfg
    assert not cfg.is_frozen()
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    assert build_model(cfg).backbone.output_shape()["p2"].channels == 8


# The weights


FROZEN = ["MODEL.FPN_EXT.FREEZE", "['backbone']"]


@pytest.mark.parametrize(
    ("weights", "empty", "missing"),
    [("unread", True, True), ("optional", True, False), ("start", True, False),
     ("required", False, False)],
)  # fmt: skip
def test_what_the_weights_are_to_a_command(weights, empty, missing, checkpoint):
    """Whether no weights, or a missing file, are acceptable."""
    cfg = prepare(DEMO, [*CPU, "MODEL.WEIGHTS", checkpoint], weights=weights).cfg
    assert checkpoint == cfg.MODEL.WEIGHTS
    for file, accepted in (("", empty), ("none.pth", missing)):
        opts = [*CPU, "MODEL.WEIGHTS", file]
        if accepted:
            prepare(DEMO, opts, weights=weights)
            continue
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            prepare(DEMO, opts, weights=weights)
        assert str(error.value).startswith(
            "MODEL.WEIGHTS: no file none.pth" if file else "MODEL.WEIGHTS is empty"
        )


def test_a_training_does_not_start_by_freezing_random_weights(checkpoint):
    with pytest.raises(ValueError, match=r"FREEZE \['backbone'\] would freeze random weights"):
        prepare(DEMO, [*CPU, *FROZEN], weights="start")
    prepare(DEMO, [*CPU, *FROZEN], weights="optional")  # it goes on from its own checkpoint
    prepare(DEMO, [*CPU, *FROZEN, "MODEL.WEIGHTS", checkpoint], weights="start")
    of_bottom_up = ["MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS", checkpoint]
    prepare(DEMO, [*CPU, *FROZEN, *of_bottom_up], weights="start")


@pytest.mark.parametrize("weights", ["start", "optional", "required"])
def test_addresses_are_checked_but_not_fetched(weights):
    zoo = "detectron2://COCO-Detection/none.pkl"
    prepare(DEMO, [*CPU, "MODEL.WEIGHTS", zoo], weights=weights)
    with pytest.raises(ValueError, match="http://"):
        prepare(DEMO, [*CPU, "MODEL.WEIGHTS", "http://x/model.pth"], weights=weights)


def test_the_config_may_tell_what_the_weights_are():
    asked = []

    def weights(cfg):
        asked.append(cfg.OUTPUT_DIR)
        return "required"

    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        prepare(DEMO, [*CPU, "OUTPUT_DIR", "x/y"], weights=weights)
    assert asked == ["x/y"]


# Levels that do not fit together


WRONG_LEVELS = ["MODEL.ROI_HEADS.IN_FEATURES", "['p3', 'p2']"]


def test_a_component_says_what_is_wrong_with_what_it_is_given():
    with pytest.raises(LevelError) as error:
        build_model(fpn_ext.load_config(DEMO, [*CPU, *WRONG_LEVELS]))
    assert "MODEL.ROI_HEADS.IN_FEATURES: pyramid levels must be" in str(error.value)
    assert TABLE not in str(error.value)


def test_the_check_adds_the_table_once():
    for prepared in (prepare, lambda *a: fpn_ext.check_config(fpn_ext.load_config(*a))):
        with pytest.raises(ValueError) as error:
            prepared(DEMO, [*CPU, *WRONG_LEVELS])
        assert str(error.value).count(TABLE) == 1


@pytest.mark.parametrize("verb", ["train", "eval", "predict", "proposals generate"])
def test_whoever_builds_adds_the_table_once(verb, arguments, monkeypatch, capsys):
    """Where only building detects it, as for a network of unknown strides."""
    monkeypatch.setattr(preparing, "config_problems", lambda *_: [])
    assert main([*arguments(verb), *WRONG_LEVELS]) == 2
    message = capsys.readouterr().err
    assert f"fpn-ext {verb}: error: MODEL.ROI_BOX_HEAD: MODEL.ROI_HEADS.IN_FEATURES" in message
    assert message.count(TABLE) == 1


# Every verb


# Verbs that prepare a config by a function of this module, or in the processes that they start.
PREPARE = (
    *("train", "eval", "predict", "video", "check", "look", "compare weights", "compare train"),
    *("proposals generate", "four-step", "analyze", "export", "config", "explain"),
)
# Verbs that build no detector, by themselves.
BUILD_NONE = (
    *("data", "data convert", "anchors", "levels", "contact-sheet", "proposals ground-truth"),
    *("proposals selective-search", "proposals validate", "proposals stats", "proposals convert"),
    *("weights list", "weights convert", "reproduce", "pretrain", "demo-data", "doctor"),
)


@pytest.fixture
def arguments(tmp_path, checkpoint, demo_images):
    """A verb's arguments, with all its inputs in place."""
    picture, output = str(next(demo_images.glob("val/*"))), str(tmp_path / "out")
    rpn, detector = (f"configs/paper/table5/{name}_R_50.yaml" for name in ("rpn", "fast_rcnn"))
    of = {
        "predict": ["--input", picture, "--output", output],
        "video": ["--camera", "0", "--output", output],
        "look": ["--input", picture, "--output", output],
        "export": ["--format", "torchscript", "--output", f"{output}.pt"],
        "compare weights": ["--control", CONTROL, "--weights", checkpoint],
        "compare train": ["--control", CONTROL, "--seeds", "1", "--output", output],
        "proposals generate": ["--datasets", "demo_multiscale_val", "--output", output],
        "four-step": ["--rpn", rpn, "--detector", detector, "--output", output],
    }

    def words(verb):
        if verb == "video":
            pytest.importorskip("cv2", reason="OpenCV, the extra video, is not installed")
        config_file = [] if verb == "four-step" else ["--config-file", DEMO]
        opts = [*CPU, "MODEL.WEIGHTS", checkpoint, "OUTPUT_DIR", output]
        return [*verb.split(), *config_file, *of.get(verb, []), *opts]

    return words


def test_every_verb_is_one_that_prepares_or_builds_none():
    assert sorted([*PREPARE, *BUILD_NONE]) == sorted(VERBS)


@pytest.mark.parametrize("verb", PREPARE)
def test_every_verb_that_builds_a_model_prepares_its_config(verb, arguments, monkeypatch, capsys):
    """To the last stage, which alone reads this key, and before it builds anything."""
    built_too_early = lambda *_, **__: pytest.fail("built before it was prepared")  # noqa: E731
    for architecture in (GeneralizedRCNN, ProposalNetwork):
        monkeypatch.setattr(architecture, "__init__", built_too_early)
    status = main([*arguments(verb), "MODEL.FPN_EXT.NUMERICS", "quick"])
    assert status == (1 if verb == "check" else 2)
    message = "".join(capsys.readouterr())
    assert "MODEL.FPN_EXT.NUMERICS must be one of ('exact', 'fast'), got 'quick'" in message


@pytest.mark.parametrize("verb", ["eval", "predict", "video", "look", "proposals generate"])
def test_verbs_that_need_a_trained_model(verb, arguments, capsys):
    assert main([*arguments(verb), "MODEL.WEIGHTS", ""]) == 2
    assert "MODEL.WEIGHTS is empty: name the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "option", "weights"),
    [("train", [], "start"), ("train", ["--resume"], "start"), ("train", ["--extend"], "required"),
     ("eval", [], "required"), ("eval", ["--resume"], "required")],
)  # fmt: skip
def test_what_weights_are_to_train_and_eval(verb, option, weights, tmp_path, capsys, monkeypatch):
    """With a checkpoint to go on with, ``--resume`` needs none."""
    monkeypatch.setattr(Trainer, "build_model", lambda *_: 1 / 0)
    words = [verb, *option, "--config-file", DEMO, *CPU, *FROZEN, "OUTPUT_DIR", str(tmp_path)]
    message = "MODEL.WEIGHTS is empty" if weights == "required" else "would freeze random weights"
    assert main(words) == 2
    assert message in capsys.readouterr().err
    (tmp_path / "model_0000001.pth").touch()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    if option == ["--resume"]:
        with pytest.raises(ZeroDivisionError):
            main(words)
    else:
        assert main(words) == 2
        used = "holds a training already" if verb == "train" else message
        assert used in capsys.readouterr().err


def test_a_written_key_that_nothing_reads_is_said():
    """On the command line or in a file; a component of ours that is there reads it."""
    rule = ["MODEL.DEVICE", "cpu", "MODEL.FPN_EXT.LEVEL_RULE", "LongerSideRule"]
    said = "MODEL.FPN_EXT.LEVEL_RULE LongerSideRule does nothing: no component of this config reads"
    assert not any(said in note for note in prepare(DEMO, rule).notes)
    notes = prepare(DEMO.replace(".yaml", "_builtin.yaml"), rule).notes
    (note,) = (note for note in notes if said in note)
    assert isinstance(note, Caution)


def test_a_dumped_config_is_not_told_of_all_its_keys(tmp_path):
    """OUTPUT_DIR/config.yaml, of --run, has every key; what is written besides is still said."""
    mask = ["MODEL.ROI_MASK_HEAD.NUM_CONV", "3", "MODEL.RETINANET.NUM_CLASSES", "5"]
    cfg = prepare(DEMO, [*CPU, *mask]).cfg
    dumped = tmp_path / "config.yaml"
    dumped.write_text(unresolved_yaml(cfg, written_keys(DEMO, CPU)))
    assert not [note for note in prepare(str(dumped)).notes if "nothing" in note]
    own = tmp_path / "own.yaml"
    own.write_text("_BASE_: config.yaml\nTEST: {AUG: {FLIP: False}}\n")
    for file, opts in ((dumped, ["TEST.AUG.FLIP", "False"]), (own, [])):
        (note,) = (note for note in prepare(str(file), opts).notes if "nothing" in note)
        assert note == "TEST.AUG.FLIP does nothing: TEST.AUG.ENABLED is False"


def test_a_training_needs_an_iteration():
    opts = ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "0"]
    with pytest.raises(ValueError, match=r"SOLVER\.MAX_ITER must be at least 1 to train, got 0"):
        prepare(DEMO, opts, training=True)
    prepare(DEMO, opts)
