"""What is read is bounded before anything is built. The limits are lowered here: no input of these
tests is large."""

import codecs
import io
import itertools
import json
import math
import pickle
import zipfile

import fpn_ext
import numpy as np
import pytest
import tiny
import torch
import yacs.config
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager
from fpn_ext.__main__ import main
from fpn_ext.config import files as config_files
from fpn_ext.data import coco_file, demo_data, voc_files
from fpn_ext.data.coco_file import check_coco_file
from fpn_ext.data.data_file import open_data
from fpn_ext.data.reading import read_picture
from fpn_ext.data.voc_files import read_voc_annotation
from fpn_ext.files import limits, safe_yaml, weight_files
from fpn_ext.files.safe_pickle import load_pickle
from fpn_ext.files.weight_files import DamagedFileError, read_weights
from PIL import Image

# YAML


def nested(levels):
    return "[" * levels + "]" * levels


ABOVE = {
    "levels": ("MOST_LEVELS", 5, nested(5), nested(6), "line 1: nested more than 5 levels"),
    "values": ("MOST_VALUES", 4, "[1, 2, 3]", "[1, 2, 3, 4]", "more than 4 values"),
    "repeated": ("MOST_VALUES", 8, "[&a [1, 2], *a]", "[&a [1, 2], *a, *a]", "more than 8"),
    "in turn": (
        *("MOST_VALUES", 18, "[&a [1, 2], &b [*a, *a], *b]"),
        *("[&a [1, 2], &b [*a, *a], *b, 1]", "aliases"),
    ),
    "text": ("MOST_TEXT", 9, "[&a long, *a]", "[&a long, *a, *a]", "or 9 characters"),
    "merged": (
        "MOST_VALUES",
        9,
        "{a: &a {b: 1}, <<: *a}",
        "{a: &a {b: 1}, c: {<<: *a}}",
        "more than 9",
    ),
    "number": ("MOST_DIGITS", 3, "a: 123", "a: 1234", "line 1: a number of 4 characters"),
    "length": ("MOST_CHARACTERS", 6, "a: 123", "a: 1234", "has 7 characters; at most 6"),
}


@pytest.mark.parametrize("case", ABOVE)
def test_yaml_is_bounded(monkeypatch, case):
    name, most, fits, exceeds, said = ABOVE[case]
    monkeypatch.setattr(safe_yaml, name, most)
    assert safe_yaml.load_yaml(fits, "x.yaml") == yaml.safe_load(fits)
    built = []
    monkeypatch.setattr(yaml, "safe_load", built.append)
    with pytest.raises(ValueError, match=f"x.yaml.*{said}"):
        safe_yaml.load_yaml(exceeds, "x.yaml")
    assert not built


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", r"x\.yaml, line 1: \*a is a part of itself"),
        ("a: 2000-13-01", r"x\.yaml has a value that YAML does not allow: month must be"),
    ],
)
def test_what_yaml_cannot_mean(text, said):
    with pytest.raises(ValueError, match=said):
        safe_yaml.load_yaml(text, "x.yaml")


def test_configs_and_descriptions_of_data_are_read_so(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_yaml, "MOST_LEVELS", 3)
    (tmp_path / "a.yaml").write_text("classes: [[[1]]]\n")
    for read in (fpn_ext.load_config, open_data):
        with pytest.raises(ValueError, match=r"a\.yaml, line 1: nested more than 3 levels deep"):
            read(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml, line 1: nested more than 3 levels deep"):
        fpn_ext.load_config(str(tmp_path / "b.yaml"))


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
def test_a_value_that_is_nested_as_an_expression(monkeypatch, error):
    """What yacs takes for an expression of Python: where its parser comes to its limit."""
    evaluate = yacs.config.literal_eval

    def limited(text):
        if text.count("[") > 3:
            raise error("too deep")
        return evaluate(text)

    monkeypatch.setattr(yacs.config, "literal_eval", limited)
    with pytest.raises(ValueError, match=r"the command line: SEED must be of type int"):
        fpn_ext.load_config("configs/Base-FPN.yaml", ["SEED", "[[[[1]]]]"])


# _BASE_


def test_a_chain_of_bases_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(config_files, "MOST_FILES", 4)
    (tmp_path / "0.yaml").write_text("SEED: 7\n")
    for number in range(1, 5):
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: {number - 1}.yaml\n")
    assert fpn_ext.load_config(str(tmp_path / "3.yaml")).SEED == 7
    with pytest.raises(ValueError, match=r"4\.yaml: with the files that _BASE_ names, more than 4"):
        fpn_ext.load_config(str(tmp_path / "4.yaml"))


def test_a_base_of_many_is_counted_each_time(tmp_path, monkeypatch):
    """Two names of two names: files double at each step."""
    monkeypatch.setattr(config_files, "MOST_FILES", 7)
    (tmp_path / "0.yaml").write_text("SEED: 7\n")
    for number in range(1, 4):
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: [{number - 1}.yaml, {number - 1}.yaml]")
    assert fpn_ext.load_config(str(tmp_path / "2.yaml")).SEED == 7
    with pytest.raises(ValueError, match="more than 7 files"):
        fpn_ext.load_config(str(tmp_path / "3.yaml"))


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b", "a")])
def test_a_config_based_on_itself(tmp_path, names):
    for name, base in itertools.pairwise(names):
        (tmp_path / f"{name}.yaml").write_text(f"_BASE_: {base}.yaml\n")
    with pytest.raises(ValueError, match=r"names .*a\.yaml, which is based on this file itself"):
        fpn_ext.load_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("scheme", ["http", "ftp", "HTTP"])
def test_a_base_is_not_fetched_unencrypted(tmp_path, monkeypatch, scheme):
    asked = []
    monkeypatch.setattr(type(PathManager), "open", lambda self, *args: asked.append(args))
    monkeypatch.setattr(type(PathManager), "get_local_path", lambda self, *args: asked.append(args))
    (tmp_path / "a.yaml").write_text(f"_BASE_: {scheme}://example.org/base.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml: _BASE_: \w+://.* without protection"):
        fpn_ext.load_config(str(tmp_path / "a.yaml"))
    assert not asked


# Pickles


class Calls:
    """An object that a pickle makes by a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


TEXT = "x" * 500
PAIR = (1, 2)
NESTED = [1]  # met first where it is not deep
PICKLES = {
    "steps": ("MOST_STEPS", 60, [0] * 40, [0] * 60, "it takes more than 60 steps"),
    "levels": ("MOST_LEVELS", 2, [[1]], [[[1]]], "nested more than 2 levels deep"),
    "levels of a part": (
        "MOST_LEVELS",
        3,
        [NESTED, [NESTED]],
        [NESTED, [[NESTED]]],
        "than 3 levels",
    ),
    "values": ("MOST_VALUES", 7, (PAIR, PAIR), (PAIR, PAIR, PAIR), "more than 7 values"),
    "copies": (
        *("MORE_BYTES", 100, [Calls(codecs.encode, TEXT, "latin1")]),
        *([Calls(codecs.encode, TEXT, "latin1") for _ in range(9)], "it repeats parts"),
    ),
    "key": ("LONGEST_KEY", 2, {PAIR: 0}, {(1, 2, 3): 0}, "a key that is a tuple of other"),
    "key of keys": ("LONGEST_KEY", 2, {PAIR: 0}, {(PAIR, 1): 0}, "a key that is a tuple of other"),
    "member": ("LONGEST_KEY", 2, {PAIR}, {(PAIR, 1)}, "a key that is a tuple of other"),
    "frozen": ("LONGEST_KEY", 2, frozenset([PAIR]), frozenset([(PAIR, 1)]), "a key that is"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_is_bounded(tmp_path, monkeypatch, case, protocol):
    name, most, fits, exceeds, said = PICKLES[case]
    monkeypatch.setattr(limits, name, most)
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps(fits, protocol))
    load_pickle(file)
    file.write_bytes(pickle.dumps(exceeds, protocol))
    with pytest.raises(ValueError, match=rf"a\.pkl is not read: .*{said}"):
        load_pickle(file)


def test_arrays_of_the_same_bytes_are_counted_each(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MORE_BYTES", 0)
    file = tmp_path / "a.pkl"
    array = np.arange(100)
    file.write_bytes(pickle.dumps([array, array], 2))  # one array, held twice
    first, second = load_pickle(file)
    assert first is second
    state = array.__reduce__()[2]  # whose bytes are one object in the file
    arrays = [Array(state) for _ in range(9)]
    file.write_bytes(pickle.dumps(arrays, 2))
    with pytest.raises(ValueError, match="it repeats parts"):
        load_pickle(file)


class Array:
    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return *np.zeros(0).__reduce__()[:2], self.state


# Files of torch


def rewritten(file, change, compression=zipfile.ZIP_STORED):
    """The archive with members changed by ``change(name, content)``."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(3), "b": torch.zeros(5)}, file)
    rewritten(file, lambda name, content: content)  # as it is, it is read
    assert len(read_weights(str(file))["model"]["w"]) == 3
    return file


def shorter(name, content):
    return content[:4] if name.endswith("data/0") else content


def larger(name, content):
    """Three numbers said to be four: (3,), its size, is K\\x03\\x85 in the pickle."""
    return content.replace(b"K\x03\x85", b"K\x04\x85") if name.endswith("data.pkl") else content


@pytest.mark.parametrize(
    ("change", "compression", "said"),
    [
        (shorter, zipfile.ZIP_STORED, "states a storage '0' of 12 bytes, which is not there"),
        (larger, zipfile.ZIP_STORED, r"states a tensor of \(4,\) in a storage of 3 numbers"),
        (lambda name, content: content, zipfile.ZIP_DEFLATED, "is compressed, which torch.save"),
    ],
)
def test_an_archive_holds_what_it_states(weights, change, compression, said):
    rewritten(weights, change, compression)
    with pytest.raises(DamagedFileError, match=rf"a\.pth is not read: .*{said}"):
        read_weights(str(weights))


def test_two_members_of_one_name(weights):
    with zipfile.ZipFile(weights, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    with pytest.raises(DamagedFileError, match="two members of its archive have one name"):
        read_weights(str(weights))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (Calls(bytearray, 3), r"__builtin__\.bytearray of a size"),
        (Calls(torch.FloatTensor, 3), "torch.FloatTensor of a size"),
    ],
)
def test_nothing_is_allocated_by_number(tmp_path, zipped, call, said):
    file = tmp_path / "a.pth"
    torch.save({"w": call}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"a\.pth asks for {said}; it was not read"):
        read_weights(str(file))


def test_the_older_format_holds_what_it_states(tmp_path):
    file = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    assert len(read_weights(str(file))["model"]["w"]) == 3
    count = b"K\x03N"  # how many numbers, and no view of another storage
    content = file.read_bytes()
    assert content.count(count) == 1
    file.write_bytes(content.replace(count, b"M\xff\x7fN"))  # 32767
    with pytest.raises(DamagedFileError, match=r"it states storages of more bytes than its own"):
        read_weights(str(file))


def test_a_tensor_that_repeats_numbers_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "MORE_BYTES", 0)
    file = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(1).expand(500)}, file)
    assert len(read_weights(str(file))["model"]["w"]) == 500
    monkeypatch.setattr(weight_files, "MOST_GROWTH", 1)
    with pytest.raises(ValueError, match=r"its tensors have 1 times .* 'w' of shape \(500,\)"):
        read_weights(str(file))


# Images and annotations


def array_stating(shape):
    """A .npy whose header states a shape, with ten numbers."""
    stream = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + bytes(10)


def test_an_array_is_no_larger_than_its_file(tmp_path):
    (tmp_path / "a.npy").write_bytes(array_stating((2, 5)))
    assert read_picture(tmp_path / "a.npy", "L").shape == (2, 5, 1)
    (tmp_path / "a.npy").write_bytes(array_stating((3, 5)))
    with pytest.raises(ValueError, match=r"a\.npy: no array of numbers \(mmap length is greater"):
        read_picture(tmp_path / "a.npy", "L")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".bmp"])
def test_an_image_of_more_pixels_than_pillow_reads_is_named(tmp_path, monkeypatch, suffix):
    file = tmp_path / f"a{suffix}"
    Image.new("RGB", (10, 10)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # twice as many are an error
    with pytest.warns(Image.DecompressionBombWarning):
        assert read_picture(file, "RGB").shape == (10, 10, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 49)
    with pytest.raises(OSError, match=rf"a\{suffix} cannot be read: DecompressionBombError: "):
        read_picture(file, "RGB")


def test_an_annotation_file_is_bounded(tmp_path, monkeypatch):
    (tmp_path / "a.xml").write_text("<annotation/>")
    monkeypatch.setattr(voc_files, "MOST_BYTES", 13)
    assert read_voc_annotation(tmp_path / "a.xml").tag == "annotation"
    (tmp_path / "a.xml").write_text("<annotation />")
    with pytest.raises(ValueError, match=r"a\.xml has 14 bytes; at most 13 of XML are read"):
        read_voc_annotation(tmp_path / "a.xml")


def coco(width, polygon):
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": width, "height": 8}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{**annotation, "segmentation": [polygon]}],
    }


@pytest.mark.parametrize(
    ("width", "polygon", "said"),
    [
        (20, [-20, 0, 40, 0, 4, 8], ""),
        (21, [0, 0, 4, 0, 4, 4], "no image of more than 160 pixels"),
        (20, [-21, 0, 4, 0, 4, 4], "no further outside the image than it is long"),
        (20, [0, 0, 41, 0, 4, 4], "no further outside the image than it is long"),
        (20, [0, 0, 4, 0, 4, math.nan], "a polygon's coordinates must be numbers"),
        (20, [0, 0, 4, 0, 4, "4"], "a polygon's coordinates must be numbers"),
    ],
)
def test_a_mask_is_one_of_its_image(tmp_path, monkeypatch, width, polygon, said):
    monkeypatch.setattr(coco_file, "MOST_PIXELS", 160)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(coco(width, polygon)))
    if not said:
        assert check_coco_file(file) == []
        return
    with pytest.raises(ValueError, match=said):
        check_coco_file(file)


# A damaged image, wherever it is met


DAMAGED = "damaged_train"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A run's folder, and an image that is cut short, of the dataset that it trains on."""
    root = tmp_path_factory.mktemp("damaged")
    demo_data.ensure(root / "data", num_train=3, num_val=1, image_size=128)
    tiny.register(root / "other")
    image = root / "data" / "train" / "000002.jpg"
    image.write_bytes(image.read_bytes()[:-900])
    annotations = root / "data" / "annotations" / "instances_train.json"
    register_coco_instances(DAMAGED, {}, str(annotations), str(image.parent))
    run = tiny.saved_run(root / "run", "DATASETS.TEST", f"('{DAMAGED}',)")
    weights = torch.load(run / "model_final.pth")["model"]  # without the classes of another dataset
    torch.save({"model": weights}, run / "model_final.pth")
    yield run, image
    DatasetCatalog.remove(DAMAGED)
    MetadataCatalog.remove(DAMAGED)


def training(run, *opts):
    words = ["train", "--config-file", tiny.FILE, *tiny.options(run.parent / "new", *opts)]
    return [*words, "DATASETS.TRAIN", f"('{DAMAGED}',)"]


VERBS = {
    "train": lambda run, image: training(run, "DATALOADER.NUM_WORKERS", 0),
    "train, workers": lambda run, image: training(run, "DATALOADER.NUM_WORKERS", 1),
    "eval": lambda run, image: ["eval", "--run", str(run), "DATALOADER.NUM_WORKERS", "0"],
    "eval, workers": lambda run, image: ["eval", "--run", str(run), "DATALOADER.NUM_WORKERS", "1"],
    "look": lambda run, image: ["look", "--run", str(run), "--input", str(image)],
    "contact-sheet": lambda run, image: ["contact-sheet", "--run", str(run)],
    "compare": lambda run, image: [
        *("compare", "weights", "--config-file", str(run / "config.yaml"), "--control"),
        *(str(run / "config.yaml"), "--weights", str(run / "model_final.pth"), "--rounds", "0"),
    ],
    "predict": lambda run, image: ["predict", "--run", str(run), str(image)],
    "data": lambda run, image: ["data", "--dataset", DAMAGED],
    "export": lambda run, image: [
        *("export", "--run", str(run), "--format", "torchscript", "--pictures", str(image)),
        *("--output", str(run / "a.pt")),
    ],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_image_is_named(damaged, capfd, verb):
    run, image = damaged
    words = [str(word) for word in VERBS[verb](run, image)]
    assert main(words) in (1, 2)
    output, errors = capfd.readouterr()
    said = [line for line in (output + errors).splitlines() if image.name in line]
    assert said, errors
    assert "Traceback" not in errors
    if verb not in ("data", "predict"):  # which go on, and list it
        assert f"{image} cannot be read: OSError: image file is truncated" in errors
