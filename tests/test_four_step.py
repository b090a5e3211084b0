"""The 4-step training: what each step starts from, freezes and passes to the next."""

import json
from pathlib import Path

import pytest
import torch
from fpn_ext import load_config, prepare
from detectron2.modeling import build_model
from fpn_ext.__main__ import main
from fpn_ext.config.load import written_keys
from fpn_ext.config.numerics import EXPERT_KEYS
from fpn_ext.data.datasets import register_datasets
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.paper import four_step
from fpn_ext.paper.four_step import STEPS
from fpn_ext.paper.reproduce import CONFIGS
from fpn_ext.proposals.file import ProposalFile
from fpn_ext.proposals.sources import generate_proposals
from fpn_ext.speed.optimize import model_for_inference

TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "5", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("DATASETS.TRAIN", "('demo_multiscale_val',)", "DATASETS.TEST", "('demo_multiscale_val',)"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"),
    *("SOLVER.BASE_LR", "0.00001", "DATALOADER.NUM_WORKERS", "0"),
    *("TEST.DETECTIONS_PER_IMAGE", "5"),
]
RPN = str(CONFIGS / "table5" / "rpn_R_50.yaml")
DETECTOR = str(CONFIGS / "table5" / "fast_rcnn_R_50.yaml")


def run_here(arguments, log):
    """As jobs.run, in this process: sparing it the imports."""
    assert main(arguments) == 0


def four(*arguments):
    """The exit status of the command."""
    return main(["four-step", "--rpn", RPN, "--detector", DETECTOR, *map(str, arguments), *TINY])


@pytest.fixture(scope="module")
def output(tmp_path_factory, demo_images):
    register_datasets()
    output = tmp_path_factory.mktemp("four_step")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(four_step.jobs, "run", run_here)
        assert four("--output", output) == 0
    return output


def weights(output, step):
    return torch.load(output / step / "model_final.pth", weights_only=True)["model"]


def of(part, state):
    return {name: tensor for name, tensor in state.items() if name.startswith(part)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_shared_and_what_is_trained(output):
    rpn1, detector2, rpn3, detector4 = (weights(output, step.name) for step in STEPS)
    assert not same(of("backbone", rpn1), of("backbone", detector2))
    assert same(of("backbone", detector2), of("backbone", rpn3))
    assert same(of("backbone", detector2), of("backbone", detector4))
    assert not same(of("roi_heads", detector2), of("roi_heads", detector4))
    assert not same(of("proposal_generator", rpn1), of("proposal_generator", rpn3))


def test_the_last_two_become_one_model(output):
    unified = torch.load(output / "model_final.pth", weights_only=True)["model"]
    _, _, rpn3, detector4 = (weights(output, step.name) for step in STEPS)
    assert same(of("backbone", unified), of("backbone", detector4))
    assert same(of("roi_heads", unified), of("roi_heads", detector4))
    assert same(of("proposal_generator", unified), of("proposal_generator", rpn3))


def test_the_one_model_proposes_what_the_detector_was_trained_on(output, tmp_path):
    cfg = prepare(str(output / "config.yaml")).cfg  # NUMERICS as in step 3
    model = build_model(cfg).eval()
    SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    model = model_for_inference(cfg, model)
    name = cfg.DATASETS.TEST[0]
    generate_proposals(cfg, model, name, str(tmp_path / "x.safetensors"), 20)
    proposed = ProposalFile(tmp_path / "x.safetensors")
    of_step_3 = ProposalFile(output / "step3_rpn" / "proposals" / f"{name}.safetensors")
    assert len(proposed) == len(of_step_3) > 0
    for image_id in proposed:
        for found, expected in zip(proposed[image_id], of_step_3[image_id], strict=True):
            assert len(found) > 0 and (found == expected[: len(found)]).all()


def test_it_says_what_each_step_does(output, capsys, monkeypatch):
    """Run again: everything is done, and said."""
    run = []
    monkeypatch.setattr(four_step.jobs, "run", lambda arguments, log: run.append(arguments))
    assert four("--output", output) == 0
    assert [arguments[0] for arguments in run] == ["eval"]
    printed = capsys.readouterr().out
    assert "step1_rpn: starts from random weights; trains backbone, proposal_generator" in printed
    step2 = output / "step2_detector" / "model_final.pth"
    assert f"step3_rpn: starts from {step2}; backbone frozen, trains proposal_gen" in printed
    assert f"step4_detector: starts from {step2}; backbone frozen, trains roi_heads" in printed
    assert "one Faster R-CNN, shared backbone: AP" in printed


def test_an_interrupted_step_goes_on(output, monkeypatch):
    step = output / "step4_detector"
    final, run = step / "model_final.pth", []
    monkeypatch.setattr(four_step.jobs, "run", lambda arguments, log: run.append(arguments))
    final.rename(step / "aside")
    try:
        four_step.train(STEPS[3], load_config(RPN, TINY), load_config(DETECTOR, TINY), output, 0)
    finally:
        (step / "aside").rename(final)
    assert [arguments[-1] for arguments in run] == ["--resume"]


def test_each_detector_takes_the_proposals_of_the_step_before():
    rpn, detector = load_config(RPN), load_config(DETECTOR)
    files = [
        four_step.step_config(step, rpn, detector, Path("out")).DATASETS.PROPOSAL_FILES_TEST
        for step in STEPS
    ]
    assert files[1] == ("out/step1_rpn/proposals/coco_2017_val.safetensors",)
    assert files[3] == ("out/step3_rpn/proposals/coco_2017_val.safetensors",)
    unified = four_step.unified_config(rpn, detector, Path("out"))
    assert unified.MODEL.RPN.POST_NMS_TOPK_TEST == 1000 and not unified.MODEL.LOAD_PROPOSALS
    assert unified.MODEL.PROPOSAL_GENERATOR.NAME == "PyramidRPN"


def test_two_steps_share_nothing(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(four_step, "train", lambda step, *_: done.append(step.name))
    monkeypatch.setattr(four_step, "unify", lambda *_: pytest.fail("nothing to unify"))
    assert four("--output", tmp_path, "--steps", "2") == 0
    assert done == ["step1_rpn", "step2_detector"]


def test_what_is_wrong_with_the_detector_is_said_before_the_first_step(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(four_step, "train", lambda *_: pytest.fail("nothing may begin"))
    base = f'_BASE_: "{Path(DETECTOR).absolute()}"\n'
    for text, message in (
        ("MODEL: {ROI_BOX_HEAD: {NAME: NoHead}}\n", "MODEL.ROI_BOX_HEAD.NAME: 'NoHead'"),
        (
            "MODEL: {FPN_EXT: {BOTTOM_UP_WEIGHTS: none.pth}}\n",
            "BOTTOM_UP_WEIGHTS: no file none.pth",
        ),
    ):
        (tmp_path / "detector.yaml").write_text(base + text)
        arguments = ["--rpn", RPN, "--detector", str(tmp_path / "detector.yaml")]
        assert main(["four-step", *arguments, "--output", str(tmp_path), *TINY]) == 2
        assert message in capsys.readouterr().err


def test_a_bottom_up_by_name_brings_the_same_pixels_to_both(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(four_step, "train", lambda step, *_: steps.append(step.name))
    by_name = ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/resnet18"]
    # Detectron2's default: these follow the network.
    by_name += ["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"]
    arguments = ["--rpn", RPN, "--detector", DETECTOR, "--output", str(tmp_path), "--steps", "2"]
    assert main(["four-step", *arguments, *TINY, *by_name]) == 0
    assert steps == ["step1_rpn", "step2_detector"]


def test_numerics_choose_for_every_step(output, monkeypatch):
    """As for a training with its config alone: a step's file sets none of its keys."""
    for step in STEPS:
        written = written_keys(str(output / step.name / "four_step.yaml"))
        assert "MODEL.FPN_EXT.NUMERICS" in written
        assert not {f"MODEL.FPN_EXT.{key}" for key in EXPERT_KEYS} & written
    monkeypatch.setattr(four_step.jobs, "run", lambda arguments, log: None)
    rpn, detector = load_config(RPN, TINY), load_config(DETECTOR, TINY)
    key = "MODEL.FPN_EXT.WINOGRAD"
    four_step.train(STEPS[0], rpn, detector, output, 0, explicitly_set=[key])
    assert key in written_keys(str(output / STEPS[0].name / "four_step.yaml"))


def test_different_backbones_do_not_become_one_model(output, tmp_path):
    first, second = (output / step.name / "model_final.pth" for step in STEPS[:2])
    with pytest.raises(ValueError, match="do not share their backbone"):
        four_step.unify(first, second, tmp_path / "model.pth")


def test_configs_that_do_not_belong_together():
    rpn, detector = load_config(RPN), load_config(DETECTOR)
    with pytest.raises(
        ValueError,
        match=r"--rpn needs MODEL.META_ARCHITECTURE ProposalNetwork, got GeneralizedRCNN",
    ):
        four_step.check_pair(detector, detector)
    with pytest.raises(
        ValueError, match=r"--detector needs MODEL.PROPOSAL_GENERATOR.NAME Precomputed"
    ):
        four_step.check_pair(rpn, rpn)
    detector.MODEL.RESNETS.DEPTH = 101
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS must be the same in both"):
        four_step.check_pair(rpn, detector)


def begun(folder, made_with):
    (folder / "model_0000001.pth").parent.mkdir(parents=True)
    (folder / "model_0000001.pth").touch()
    (folder / four_step.RECORD).write_text(json.dumps(made_with))


def test_steps_of_another_schedule_are_not_taken_for_these(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(four_step, "train", lambda *_: pytest.fail("trained"))
    rpn, detector = load_config(RPN, TINY), load_config(DETECTOR, TINY)
    digest = four_step.digest(STEPS[0], rpn, detector)
    begun(tmp_path / "step1_rpn", {"config_sha256": digest})
    four_step.check_earlier(rpn, detector, tmp_path)
    rpn.SOLVER.MAX_ITER += 1
    with pytest.raises(ValueError, match=r"step1_rpn was made with another config"):
        four_step.check_earlier(rpn, detector, tmp_path)
    command = ["four-step", "--rpn", RPN, "--detector", DETECTOR, "--output", str(tmp_path)]
    assert main([*command, *TINY, "SOLVER.MAX_ITER", "3"]) == 2
    assert "step1_rpn was made with another config" in capsys.readouterr().err


def test_steps_on_other_data_are_not_gone_on_with(output, monkeypatch, capsys):
    """A detector would be trained on boxes that its proposals were not made for."""
    monkeypatch.setattr(four_step, "train", lambda *_: pytest.fail("trained"))
    record = output / "step1_rpn" / "trained_on.json"
    before = record.read_text()
    content = json.loads(before)
    record.write_text(json.dumps({**content, "data_sha256": "0" * 64}))
    try:
        assert four("--output", output) == 2
    finally:
        record.write_text(before)
    assert "step1_rpn was trained on other data" in capsys.readouterr().err


def test_a_step_is_of_the_experiment_not_of_the_place(tmp_path):
    rpn, detector = load_config(RPN, TINY), load_config(DETECTOR, TINY)
    for step in STEPS:
        before = four_step.digest(step, rpn, detector)
        assert before == four_step.digest(step, load_config(RPN, TINY), load_config(DETECTOR, TINY))
    digests = {four_step.digest(step, rpn, detector) for step in STEPS}
    assert len(digests) == 4, "shared or not, and from which weights"


def test_a_step_without_the_one_it_was_made_from(tmp_path):
    rpn, detector = load_config(RPN, TINY), load_config(DETECTOR, TINY)
    digest = four_step.digest(STEPS[1], rpn, detector)
    begun(tmp_path / "step2_detector", {"config_sha256": digest})
    with pytest.raises(ValueError, match=r"step2_detector is there and step1_rpn is not"):
        four_step.check_earlier(rpn, detector, tmp_path)
