import fpn_ext
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from fpn_ext.config.defaults import flat
from fpn_ext.config.prepare import resolve_device
from fpn_ext.keys import declare, declared_keys
from fpn_ext.registries.lookup import look_up

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"


def test_get_cfg_is_detectron2s_plus_our_node():
    ours, theirs = flat(fpn_ext.get_cfg()), flat(get_detectron2_cfg())
    assert {k: v for k, v in ours.items() if ".FPN_EXT." not in k} == theirs
    assert len(ours) > len(theirs)


def test_the_defaults_are_the_papers():
    node = fpn_ext.get_cfg().MODEL.FPN_EXT
    assert (node.CANONICAL_LEVEL, node.CANONICAL_BOX_SIZE) == (4, 224)
    assert node.BOTTOM_UP == "build_resnet_backbone"


def test_adding_the_keys_twice_keeps_what_was_set():
    cfg = fpn_ext.get_cfg()
    cfg.MODEL.FPN_EXT.CANONICAL_LEVEL = 3
    fpn_ext.add_fpn_ext_config(cfg)
    assert cfg.MODEL.FPN_EXT.CANONICAL_LEVEL == 3


def test_every_key_is_declared_with_a_comment_and_a_reader():
    declared = {key.name: key for key in declared_keys()}
    ours = {name for name in flat(fpn_ext.get_cfg()) if ".FPN_EXT." in name}
    assert ours == set(declared)
    for key in declared.values():
        assert key.comment.endswith((".", "...")) and key.readers, key
        is_mapping = isinstance(key.default, dict)
        assert key.kind == ("mapping" if is_mapping else type(key.default).__name__)


def test_a_key_is_declared_once():
    with pytest.raises(ValueError, match=r"MODEL\.FPN_EXT\.LEVELS is declared twice"):
        declare("MODEL.FPN_EXT.LEVELS", ["p2"], "Something else.", "FeaturePyramid")
    assert fpn_ext.get_cfg().MODEL.FPN_EXT.LEVELS == []


def test_defaults_are_not_shared():
    fpn_ext.get_cfg().MODEL.FPN_EXT.LEVELS.append("p2")
    assert fpn_ext.get_cfg().MODEL.FPN_EXT.LEVELS == []


@pytest.mark.parametrize(
    ("old", "new"),
    [("EMA_DECAY", "SOLVER.FPN_EXT.EMA_DECAY"), ("BEST_METRIC", "TEST.FPN_EXT.BEST_METRIC")],
)
def test_a_key_that_moved_says_where_to(old, new):
    with pytest.raises(
        ValueError, match=rf"no config key 'MODEL\.FPN_EXT\.{old}'; it is {new} now"
    ):
        fpn_ext.load_config(DEMO, [f"MODEL.FPN_EXT.{old}", "1"])
    cfg = fpn_ext.get_cfg()
    cfg.MODEL.FPN_EXT[old] = 1
    with pytest.raises(ValueError, match=rf"it is {new} now"):
        fpn_ext.check_config(cfg)


def test_overrides():
    cfg = fpn_ext.load_config(DEMO, ["SOLVER.MAX_ITER", "7", "MODEL.FPN_EXT.CANONICAL_LEVEL", "3"])
    assert (cfg.SOLVER.MAX_ITER, cfg.MODEL.FPN_EXT.CANONICAL_LEVEL) == (7, 3)
    assert not cfg.is_frozen()


# What a user can get wrong in a file or on the command line.


def load_text(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return fpn_ext.load_config(str(file))


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"'configs/none\.yaml'.*configs/README\.md"):
        fpn_ext.load_config("configs/none.yaml")


def test_a_missing_base(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"_BASE_.*no_such\.yaml"):
        load_text(tmp_path, '_BASE_: "no_such.yaml"\n')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "MODEL:\n  FPN_EXT:\n    BOTOM_UP: x\n",
            r"no config key 'MODEL\.FPN_EXT\.BOTOM_UP'; nearest valid: 'MODEL\.FPN_EXT\.BOTTOM_UP'",
        ),
        ("SOLVER:\n  LR: 0.1\n", r"no config key 'SOLVER\.LR'; nearest valid: .*SOLVER"),
        ("MODLE:\n  WEIGHTS: x\n", r"no config key 'MODLE'"),
        (
            "SOLVER:\n  BASE_LR: fast\n",
            r"mine\.yaml, line 2: SOLVER\.BASE_LR must be of type float, as 0\.001 is; got 'fast'$",
        ),
        ("MODEL: [1,\n", r"mine\.yaml.* is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", r"mine\.yaml is not valid YAML"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_text(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("just words\n", r"mine\.yaml must be a mapping of keys, got str"),
        ("_BASE_: base.yaml\n", r"names .*base\.yaml, which must be a mapping of keys, got list"),
        ("_BASE_:\nSEED: 1\n", r"_BASE_ must name a file, or a list of files; got None"),
        ("_BASE_: [base.yaml, 1]\n", r"_BASE_ must name a file, or a list of files; got \['base"),
    ],
)
def test_files_without_keys(tmp_path, text, fault):
    (tmp_path / "base.yaml").write_text("[1, 2]\n")
    with pytest.raises(TypeError, match=fault):
        load_text(tmp_path, text)


def test_all_mistakes_of_a_file_at_once(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL:\n  FPN:\n    NORN: GN\n")
    with pytest.raises(ValueError) as error:
        load_text(
            tmp_path,
            "_BASE_: base.yaml\nMODEL:\n  WEIGHTS: []\n  RESNETS: 4\nZZZ:\n  A: 1\n"
            "SOLVER:\n  QQQQQQQQQQQQQQQQ: 1\n  MAX_ITER: 7\n",
        )
    first, *rest = str(error.value).splitlines()
    assert first == f"5 problem(s) in {tmp_path}/mine.yaml:"
    found = [line.removeprefix(f"  - {tmp_path}/mine.yaml") for line in rest]
    assert found[0].startswith(": no config key 'MODEL.FPN.NORN'; nearest valid: 'MODEL.FPN.NORM'")
    assert found[1] == ", line 3: MODEL.WEIGHTS must be of type str, as '' is; got []"
    assert found[2].startswith(", line 4: MODEL.RESNETS has keys of its own (DEPTH, OUT_FEATURES, ")
    # Nothing is near: what there is beside it.
    assert found[3].startswith(", line 5: no config key 'ZZZ'; valid: 'CUDNN_BENCHMARK', ")
    assert "'SOLVER.BASE_LR'" in found[4] and "'MODEL" not in found[4]


def test_all_mistakes_on_the_command_line_at_once():
    with pytest.raises(ValueError, match=r"2 problem\(s\) in the command line") as error:
        fpn_ext.load_config(DEMO, ["A.B", "1", "SOLVER.MAX_ITER", "3", "SEED", "one"])
    assert "no config key 'A.B'" in str(error.value) and "SEED must be" in str(error.value)


def test_values_that_nobody_defined():
    cfg = fpn_ext.load_config(DEMO)
    cfg.MODEL_DEVICE = "cpu"
    cfg.MODEL.FPN.OUT_CHANELS = 64
    cfg.MODEL.MINE = CfgNode({"KEY": 1})  # a node of another project's, with what is in it
    with pytest.raises(ValueError) as error:
        fpn_ext.check_config(cfg)
    problems = str(error.value).splitlines()
    assert problems[0] == "2 problem(s) in the config:"
    assert "OUT_CHANELS is set to 64" in problems[1] and "'MODEL.FPN.OUT_CHANNELS'" in problems[1]
    assert "MODEL_DEVICE is set to 'cpu'" in problems[2] and "'MODEL.DEVICE'" in problems[2]
    fpn_ext.check_config(cfg, also_defined=["MODEL_DEVICE", "MODEL.FPN.OUT_CHANELS"])


def test_a_config_cannot_run_code(tmp_path):
    victim = tmp_path / "touched"
    with pytest.raises(ValueError):
        load_text(tmp_path, f"a: !!python/object/apply:pathlib.Path.touch [{victim}]\n")
    assert not victim.exists()


def test_nor_can_the_file_it_is_based_on(tmp_path):
    victim = tmp_path / "touched"
    (tmp_path / "base.yaml").write_text(f"a: !!python/object/apply:os.mkdir [{victim}]\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_text(tmp_path, '_BASE_: "base.yaml"\n')
    assert not victim.exists()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ["SOLVER.MAX_ITERS", "7"],
            r"no config key 'SOLVER\.MAX_ITERS'; nearest valid: 'SOLVER\.MAX_ITER'",
        ),
        (["SOLVER.MAX_ITER"], r"pairs KEY VALUE, got 1 words: SOLVER\.MAX_ITER"),
        (
            ["SOLVER.MAX_ITER", "many"],
            r"command line: SOLVER\.MAX_ITER must be of type int, as 40000 is; got 'many'",
        ),
        (
            ["TEST.FPN_EXT.BEST_METRIC", "None"],
            r"command line: TEST\.FPN_EXT\.BEST_METRIC must be of type str, as '' is; got 'None'",
        ),
        (
            ["TEST.FPN_EXT.AREA_RANGES", "{tiny: [0, 16]}"],
            r"AREA_RANGES has entries of any names, .* TEST\.FPN_EXT\.AREA_RANGES\.NAME VALUE; got",
        ),
        (
            ["MODEL.FPN_EXT", "x"],
            r"command line: MODEL\.FPN_EXT has keys of its own \(.*BOTTOM_UP, .*, got 'x'",
        ),
    ],
)
def test_mistakes_on_the_command_line(opts, message):
    with pytest.raises(ValueError, match=message):
        fpn_ext.load_config(DEMO, opts)


# check_config


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.BACKBONE.NAME", "FeaturePyramide"],
         r"MODEL\.BACKBONE\.NAME: 'FeaturePyramide' is not registered; nearest valid: 'FeatureP"),
        (["MODEL.FPN_EXT.BOTTOM_UP", "build_resnet"], r"BOTTOM_UP: .*'build_resnet_backbone'"),
        (["MODEL.ANCHOR_GENERATOR.NAME", "Anchors"], r"MODEL\.ANCHOR_GENERATOR\.NAME: 'Anchors'"),
        (["MODEL.ROI_HEADS.NAME", "PyramidROIHead"], r"nearest valid: 'PyramidROIHeads'"),
        (["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNHead"], r"nearest valid: 'FastRCNNConvFCHead'"),
        (["MODEL.META_ARCHITECTURE", "FasterRCNN"], r"MODEL\.META_ARCHITECTURE: 'FasterRCNN'"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "RPM"], r"nearest valid: .*'RPN'"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", "256"], r"DEPTH 18 needs .*RES2_OUT_CHANNELS 64"),
        (["MODEL.RESNETS.OUT_FEATURES", "('res4',)"], r"IN_FEATURES asks for \['res2', 'res3'"),
        (["MODEL.RPN.IN_FEATURES", "('p2', 'p7')"], r"MODEL\.RPN\.IN_FEATURES asks for \['p7'\]"),
        (["MODEL.ROI_HEADS.IN_FEATURES", "('p7',)"], r"MODEL\.ROI_HEADS\.IN_FEATURES asks for"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]"], r"SIZES has 2 lists .* 5 maps"),
        (["MODEL.FPN_EXT.BOTTOM_UP", "FeaturePyramide"], r"nearest valid: 'FeaturePyramid'"),
        (["MODEL.RESNETS.DEPTH", "20"], r"MODEL\.RESNETS\.DEPTH must be one of .*got 20"),
        (["MODEL.RESNETS.NORM", "bn"], r"MODEL\.RESNETS\.NORM: no normalisation 'bn'"),
        (["MODEL.ROI_BOX_HEAD.NAME", ""], r"MODEL\.ROI_BOX_HEAD\.NAME: '' is not registered"),
        (["MODEL.RPN.IN_FEATURES", "('p3', 'p2', 'p4', 'p5', 'p6')"], r"from fine to coarse"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0], [1.0], [1.0], [1.0], [1.0, 2.0]]"],
         r"ASPECT_RATIOS: StandardRPNHead .*same number of anchors"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "2"], r"NUM_CLASSES is 2, but .*_train' has 5 classes"),
        (["DATASETS.TRAIN", "('demo_multiscale_trian',)"],
         r"DATASETS\.TRAIN: 'demo_multiscale_trian' .*nearest valid: 'demo_multiscale_train'"),
        (["MODEL.FPN_EXT.INFERENCE_DTYPE", "int8"], r"INFERENCE_DTYPE must be one of .*'int8'"),
        (["MODEL.FPN_EXT.INFERENCE_DTYPE", "float16", "MODEL.DEVICE", "cpu"], r"needs a GPU"),
        (["MODEL.FPN_EXT.INFERENCE_DTYPE", "float32", "MODEL.META_ARCHITECTURE", "RetinaNet"],
         r"INFERENCE_DTYPE serves .*got RetinaNet"),
        (["DATASETS.TEST", "('coco_2071_val',)"], r"DATASETS\.TEST: .*'coco_2017_val'"),
    ],
)  # fmt: skip
def test_check_config(opts, message):
    with pytest.raises(ValueError, match=message):
        fpn_ext.check_config(fpn_ext.load_config(DEMO, opts))


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.ANCHOR_GENERATOR.SIZES", "[]"],
        ["MODEL.FPN.IN_FEATURES", "('c2',)", "MODEL.RESNETS.OUT_FEATURES", "('c2',)"],
        ["MODEL.FPN.IN_FEATURES", "()"],
        ["MODEL.RPN.IN_FEATURES", "()"],
    ],
)
def test_what_the_check_leaves_to_the_build_ends_in_its_error(opts):
    cfg = fpn_ext.load_config(DEMO, [*opts, "MODEL.DEVICE", "cpu"])
    with pytest.raises((ValueError, AssertionError)):  # of Detectron2's ResNet: an unknown stage
        fpn_ext.check_config(cfg)
        build_model(cfg)


FAST = "configs/detectron2/fast_rcnn_R_50_FPN_1x.yaml"


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.LOAD_PROPOSALS", "False"], r"Precomputed\w+ needs MODEL\.LOAD_PROPOSALS True"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "RPN"], r"LOAD_PROPOSALS True needs .*, got RPN, which"),
        (["DATASETS.PROPOSAL_FILES_TEST", "()"], r"FILES_TEST has 0 files for the 1 datasets"),
        (["DATASETS.PROPOSAL_FILES_TRAIN", "('a.pkl', 'b.pkl')"],
         r"(?s)FILES_TRAIN has 2 files .*FILES_TRAIN: no file a\.pkl.*FILES_TRAIN: no file b\.pkl"),
        (["DATASETS.PROPOSAL_FILES_TEST", "('none.safetensors',)"],
         r"PROPOSAL_FILES_TEST: no file none\.safetensors; fpn-ext proposals makes"),
        (["DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST", "0"], r"TOPK_TEST must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_precomputed_proposals(opts, message):
    with pytest.raises(ValueError, match=message):
        fpn_ext.check_config(fpn_ext.load_config(FAST, opts), training=True)


def test_files_of_the_training_matter_to_the_training_alone():
    cfg = fpn_ext.load_config(FAST, ["DATASETS.PROPOSAL_FILES_TRAIN", "('none.pkl',)"])
    fpn_ext.check_config(cfg)


def test_training_needs_a_dataset():
    cfg = fpn_ext.load_config(DEMO, ["DATASETS.TRAIN", "()"])
    fpn_ext.check_config(cfg)
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN names no dataset"):
        fpn_ext.check_config(cfg, training=True)


def test_check_config_lists_all_problems_at_once():
    cfg = fpn_ext.load_config(
        DEMO, ["MODEL.BACKBONE.NAME", "x", "MODEL.ROI_HEADS.NAME", "y", "DATASETS.TRAIN", "('z',)"]
    )
    with pytest.raises(ValueError) as raised:
        fpn_ext.check_config(cfg)
    assert str(raised.value).startswith("3 problem(s) in the config:\n")


def test_check_config_knows_what_needs_compiled_operators(monkeypatch):
    cfg = fpn_ext.load_config(DEMO, ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[0, 0, 0, 1]"])
    monkeypatch.setattr("fpn_ext.config.check.has_compiled_operators", lambda: False)
    with pytest.raises(ValueError, match=r"DEFORM_ON_PER_STAGE.*build Detectron2 from source"):
        fpn_ext.check_config(cfg)
    monkeypatch.setattr("fpn_ext.config.check.has_compiled_operators", lambda: True)
    fpn_ext.check_config(cfg)


def test_the_device_falls_back_to_cpu_and_says_so(monkeypatch):
    cfg = fpn_ext.get_cfg()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "using 'cpu'" in resolve_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu"
    assert resolve_device(cfg) is None
    cfg.MODEL.DEVICE = "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(cfg) is None
    assert cfg.MODEL.DEVICE == "cuda"


def test_looking_up_a_name():
    assert look_up(BACKBONE_REGISTRY, "FeaturePyramid", "X") is fpn_ext.FeaturePyramid
    with pytest.raises(ValueError, match=r"MY\.KEY: 'nothing like it' .*valid: .*'FeaturePyramid'"):
        look_up(BACKBONE_REGISTRY, "nothing like it", "MY.KEY")
