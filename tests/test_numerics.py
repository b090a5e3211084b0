"""``MODEL.FPN_EXT.NUMERICS``: what each choice sets, where, and what it does not touch."""

import re

import fpn_ext
import pytest
import torch
from detectron2.modeling import build_model
from fpn_ext.__main__ import VERBS
from fpn_ext.config import numerics
from fpn_ext.config.prepare import Caution, prepare
from fpn_ext.engine.train import setup

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
CONTROL = "configs/demo/faster_rcnn_R_18_FPN_builtin.yaml"
CPU = ["MODEL.DEVICE", "cpu"]
EXACT = ["MODEL.FPN_EXT.NUMERICS", "exact"]
KEYS = ("POOLER_IMPLEMENTATION", "CHANNELS_LAST", "WINOGRAD", "FOLD_NORMS", "INFERENCE_DTYPE")
AS_DETECTRON2 = ("per_level", False, False, False, "")
DEFAULTS = ("auto", False, False, False, "")
FAST = ("auto", True, True, True, "float32")


@pytest.fixture
def avx512(monkeypatch):
    """Set whether this CPU has AVX-512; without compiled kernels."""
    monkeypatch.setattr(numerics, "has_compiled_kernels", lambda: False)
    return lambda there: monkeypatch.setattr(numerics, "has_avx512", lambda: there)


def chosen(*opts, file=DEMO, device="cpu"):
    """The values of the expert keys in a prepared config, and what the log is told of them."""
    cfg, notes = prepare(file, ["MODEL.DEVICE", device, *opts])
    assert device == cfg.MODEL.DEVICE
    said = [note for note in notes if "NUMERICS" in note]
    return tuple(cfg.MODEL.FPN_EXT[key] for key in KEYS), said


def test_the_keys_are_those_there_are():
    assert set(numerics.EXPERT_KEYS) == set(numerics.EXACT) == set(KEYS)
    assert set(numerics.FAST) < set(KEYS)


@pytest.mark.parametrize("there", [True, False])
def test_exact_is_detectron2s_arithmetic_everywhere(avx512, there):
    avx512(there)
    assert chosen(*EXACT)[0] == AS_DETECTRON2


def test_fast_on_a_cpu(avx512, monkeypatch):
    """The default. Without AVX-512 and without the kernels it would be slower."""
    avx512(True)
    assert chosen()[0] == chosen("MODEL.FPN_EXT.NUMERICS", "fast")[0] == FAST
    avx512(False)
    monkeypatch.setattr(numerics, "has_compiled_kernels", lambda: True)
    values, (said,) = chosen()
    assert values == FAST and "fast (compiled kernels)" in said
    monkeypatch.setattr(numerics, "has_compiled_kernels", lambda: False)
    values, (said,) = chosen()
    assert values == DEFAULTS and "without AVX-512, no compiled kernels" in said


BFLOAT16 = ["MODEL.FPN_EXT.INFERENCE_DTYPE", "bfloat16"]
IN_BFLOAT16 = ["SOLVER.AMP.ENABLED", "True", "SOLVER.FPN_EXT.AMP_DTYPE", "bfloat16"]


@pytest.mark.parametrize(
    ("opts", "training", "remedies"),
    [
        (BFLOAT16, False, ["INFERENCE_DTYPE bfloat16: .* set it to float32"]),
        (IN_BFLOAT16, False, []),
        (IN_BFLOAT16, True, [r"AMP_DTYPE bfloat16: .* set SOLVER\.AMP\.ENABLED False"]),
        (BFLOAT16 + IN_BFLOAT16, True, ["INFERENCE_DTYPE", "AMP_DTYPE"]),
        ([], True, []),
    ],
)
def test_bfloat16_where_there_is_none_is_said_first(monkeypatch, opts, training, remedies):
    """A warning before anything is built, and none on a CPU or GPU that has it."""

    def cautions(supported):
        monkeypatch.setattr(numerics, "has_bfloat16_convolutions", lambda: supported)
        notes = prepare(DEMO, [*CPU, *opts], training=training).notes
        return [note for note in notes if isinstance(note, Caution)]

    assert cautions(True) == []
    said = cautions(False)
    assert len(said) == len(remedies)
    for note, remedy in zip(said, remedies, strict=True):
        assert re.search(remedy, note) and "no bfloat16 convolutions" in note


def test_fast_on_a_gpu(avx512, monkeypatch):
    avx512(True)  # of the CPU beside it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values, (said,) = chosen(device="cuda")
    assert values == DEFAULTS and "(on cuda)" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [("CHANNELS_LAST", False), ("WINOGRAD", False), ("FOLD_NORMS", False),
     ("INFERENCE_DTYPE", ""), ("INFERENCE_DTYPE", "bfloat16"),
     ("POOLER_IMPLEMENTATION", "per_level")],
)  # fmt: skip
def test_a_key_that_is_written_stays_as_it_is_written(avx512, key, value, tmp_path):
    """On the command line, in the file, or in one that it is based on; the others are chosen."""
    avx512(True)
    expected = list(FAST)
    expected[KEYS.index(key)] = value
    values, (said,) = chosen(f"MODEL.FPN_EXT.{key}", str(value))
    assert values == tuple(expected) and said.endswith(f"; as written: {key}")

    base, file = tmp_path / "base.yaml", tmp_path / "config.yaml"
    text = f"MODEL: {{FPN_EXT: {{{key}: {value!r}}}}}\n".replace("''", '""')
    base.write_text(f'_BASE_: "{fpn_ext.__path__[0]}/../{DEMO}"\n{text}')
    file.write_text("_BASE_: base.yaml\nSEED: 7\n")
    assert chosen(file=str(file))[0] == tuple(expected)


def test_a_key_may_be_written_in_spite_of_the_machine(avx512):
    avx512(False)
    expected = ("auto", True, False, False)
    assert chosen("MODEL.FPN_EXT.CHANNELS_LAST", "True")[0][:4] == expected


@pytest.mark.parametrize(
    "opts",
    [["CHANNELS_LAST", "True"], ["WINOGRAD", "True"], ["FOLD_NORMS", "True"],
     ["INFERENCE_DTYPE", "float32"], ["POOLER_IMPLEMENTATION", "weighted_rows"]],
    ids=lambda opts: opts[0],
)  # fmt: skip
def test_exact_and_a_key_that_is_not_contradict(opts):
    key, value = f"MODEL.FPN_EXT.{opts[0]}", opts[1]
    message = rf"NUMERICS exact contradicts {key} {value}: take one out"
    with pytest.raises(ValueError, match=message):
        prepare(DEMO, [*CPU, *EXACT, key, value])


def test_exact_with_what_it_would_set_anyhow():
    written = [word for key, value in zip(KEYS, AS_DETECTRON2, strict=True)
               for word in (f"MODEL.FPN_EXT.{key}", str(value))]  # fmt: skip
    assert chosen(*EXACT, *written)[0] == AS_DETECTRON2
    auto = ("MODEL.FPN_EXT.POOLER_IMPLEMENTATION", "auto")  # whatever exact needs
    assert chosen(*EXACT, *auto)[0] == AS_DETECTRON2


def test_there_is_no_third():
    with pytest.raises(ValueError, match=r"must be one of \('exact', 'fast'\), got 'quick'"):
        prepare(DEMO, [*CPU, "MODEL.FPN_EXT.NUMERICS", "quick"])


def test_a_config_of_detectron2s_backbone_chooses_nothing(avx512):
    avx512(True)
    assert chosen(file=CONTROL) == (DEFAULTS, [])


def test_one_line_says_what_was_chosen(avx512):
    avx512(True)
    _, said = chosen()
    assert said == [
        "MODEL.FPN_EXT.NUMERICS fast (AVX-512): POOLER_IMPLEMENTATION auto, CHANNELS_LAST True, "
        "WINOGRAD True, FOLD_NORMS True, INFERENCE_DTYPE float32"
    ]
    _, said = chosen(*EXACT)
    assert said == [
        "MODEL.FPN_EXT.NUMERICS exact (bit-equal to Detectron2 on CPU): POOLER_IMPLEMENTATION "
        "per_level, CHANNELS_LAST False, WINOGRAD False, FOLD_NORMS False, INFERENCE_DTYPE ''"
    ]


def test_what_a_key_is_not_for_is_not_chosen(avx512):
    """Inference is optimised for two architectures, over any network."""
    avx512(True)
    by_name = ("MODEL.FPN_EXT.BOTTOM_UP", "torchvision/resnet18")
    values, _ = chosen(*by_name, "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]")
    assert values == FAST
    retinanet = (
        *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "5"),
        *("MODEL.RETINANET.IN_FEATURES", "['p2', 'p3', 'p4', 'p5', 'p6']"),
    )
    assert chosen(*retinanet)[0] == ("auto", True, True, True, "")


def test_exact_pools_per_level_without_prepare(small_cfg):
    """A model built from a loaded config has no command that resolves the switch."""
    assert small_cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION == "auto"
    small_cfg.MODEL.MASK_ON = True
    for choice, implementation in (("exact", "per_level"), ("fast", "auto")):
        small_cfg.MODEL.FPN_EXT.NUMERICS = choice
        heads = build_model(small_cfg).roi_heads
        poolers = heads.box_pooler, heads.mask_pooler
        assert {pooler.implementation for pooler in poolers} == {implementation}
    small_cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = "weighted_rows"
    assert build_model(small_cfg).roi_heads.box_pooler.implementation == "weighted_rows"


def test_exact_is_bit_equal_to_detectron2(small_cfg):
    small_cfg.MODEL.FPN_EXT.NUMERICS = "exact"
    ours = build_model(small_cfg).eval()
    for node, name in (
        ("BACKBONE", "build_resnet_fpn_backbone"),
        ("ANCHOR_GENERATOR", "DefaultAnchorGenerator"),
        ("PROPOSAL_GENERATOR", "RPN"),
        ("ROI_HEADS", "StandardROIHeads"),
    ):
        small_cfg.MODEL[node].NAME = name
    small_cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    small_cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    control = build_model(small_cfg).eval()
    control.load_state_dict(ours.state_dict())
    inputs = [{"image": torch.randint(0, 256, (3, 128, 160)).float()}]
    with torch.no_grad():
        (found,), (expected,) = ours(inputs), control(inputs)
    found, expected = found["instances"], expected["instances"]
    assert len(found) == len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize(
    ("capability", "bfloat16", "expected"),
    # An AVX2 processor may have bfloat16 (AVX-NE-CONVERT); oneDNN may be told to use AVX2 alone.
    [("AVX512", True, True), ("AVX2", True, False), ("AVX512", False, False)],
)
def test_what_counts_as_avx512(capability, bfloat16, expected, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr(numerics, "has_bfloat16_convolutions", lambda: bfloat16)
    assert numerics.has_avx512() == expected


def test_the_config_of_a_run_lets_another_machine_choose(avx512, demo_images, tmp_path):
    """config.yaml is written without what NUMERICS chose, and with what somebody wrote."""
    avx512(True)
    words = ["--config-file", DEMO, "OUTPUT_DIR", str(tmp_path), *CPU, "MODEL.FPN_EXT.WINOGRAD"]
    cfg = setup(VERBS["train"].parser().parse_args([*words, "False"]))
    assert cfg.MODEL.FPN_EXT.CHANNELS_LAST and not cfg.MODEL.FPN_EXT.WINOGRAD
    avx512(False)
    assert chosen(file=str(tmp_path / "config.yaml"))[0][:4] == DEFAULTS[:4]
    avx512(True)
    again = chosen(file=str(tmp_path / "config.yaml"))[0]
    assert again == ("auto", True, False, True, "float32")
