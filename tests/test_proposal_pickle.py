"""Detectron2's pickles: every valid form is read, all others are refused."""

import os
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from fpn_ext.proposals.detectron2_pickle import convert, open_proposals, read_pickle, write_pickle
from fpn_ext.proposals.file import ProposalFile
from hypothesis import given, settings
from hypothesis import strategies as st
from proposals import random_proposals, write_random
from unsafe import Runs

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
BOXES = np.array([[1, 2, 3.5, 4], [5, 6, 9, 9.25]], dtype=np.float32)
SCORES = np.array([1.5, -0.5], dtype=np.float32)
EMPTY = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.float32)


def content(**changes):
    """Two images, the second without boxes, in Detectron2's form."""
    plain = {
        "ids": [7, "b"],
        "boxes": [BOXES, EMPTY[0]],
        "objectness_logits": [SCORES, EMPTY[1]],
        "bbox_mode": BoxMode.XYXY_ABS,
    }
    return {k: v for k, v in {**plain, **changes}.items() if v is not None}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "some.pkl"


def dump(file, what, protocol=None):
    file.write_bytes(pickle.dumps(what, protocol=protocol))
    return file


def check_is_content(proposals):
    assert proposals.image_ids == [7, "b"]
    assert proposals[7][0].tolist() == BOXES.tolist()
    assert proposals[7][1].tolist() == SCORES.tolist()
    assert proposals["b"][0].shape == (0, 4) and proposals["b"][1].shape == (0,)
    for array in (*proposals[7], *proposals["b"]):
        assert type(array) is np.ndarray and array.dtype == np.float32


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bbox_mode": None},
        {"bbox_mode": 0},
        {"ids": [np.int64(7), np.str_("b")]},
        {"ids": (7, "b")},
        {"boxes": [np.asfortranarray(BOXES), EMPTY[0]]},
        {"boxes": [BOXES.astype(">f8"), EMPTY[0]]},
        {"boxes": [BOXES.astype(np.float16), EMPTY[0]]},
        {"boxes": [BOXES, EMPTY[1]]},  # Detectron1 has (0,) for no boxes
        {"boxes": [BOXES[::-1], EMPTY[0]], "objectness_logits": [SCORES[::-1], EMPTY[1]]},
        {"extra": {"nested": [None, True, 1.5, "x", b"y"]}},
    ],
    ids=str,
)
def test_every_form_and_protocol(file, protocol, changes):
    check_is_content(read_pickle(dump(file, content(**changes), protocol)))


def objects(items):
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_objects(file, protocol):
    whole = content(boxes=objects(content()["boxes"]), ids=objects([7, "b"]))
    check_is_content(read_pickle(dump(file, whole, protocol)))


def test_ids_in_an_array(file):
    whole = content(ids=np.array([7, 8]))
    assert read_pickle(dump(file, whole)).image_ids == [7, 8]


def test_integer_boxes_are_exact(file):
    boxes = np.array([[0, 0, 65535, 3], [5, 6, 7, 8]], dtype=np.uint16)
    scores = np.array([0, 200], dtype=np.uint8)
    read = read_pickle(dump(file, content(boxes=[boxes, EMPTY[0]],
                                          objectness_logits=[scores, EMPTY[1]])))  # fmt: skip
    assert read[7][0].tolist() == [[5, 6, 7, 8], [0, 0, 65535, 3]]
    assert read[7][1].tolist() == [200, 0] and read[7][1].dtype == np.float32


def test_xywh_boxes_are_converted(file):
    boxes = [np.array([[10, 20, 5, 6], [65000, 0, 600, 2]], dtype=np.uint16), EMPTY[0]]
    read = read_pickle(dump(file, content(boxes=boxes, bbox_mode=BoxMode.XYWH_ABS)))
    assert read[7][0].tolist() == [[10, 20, 15, 26], [65000, 0, 65600, 2]]


def test_detectron1s_keys(file):
    old = {"indexes": [7, "b"], "boxes": content()["boxes"], "scores": [SCORES, EMPTY[1]]}
    check_is_content(read_pickle(dump(file, old, 2)))


def python2(value):
    """The bytes that Python 2's pickle, protocol 2, has for a value: text and bytes are one."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, str | bytes):
        raw = value.encode("latin1") if isinstance(value, str) else value
        return b"T" + struct.pack("<i", len(raw)) + raw  # BINSTRING
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    code, shape = value.dtype.str[1:], b"(" + b"".join(map(python2, value.shape)) + b"t"
    dtype = (
        b"cnumpy\ndtype\n(" + python2(code) + python2(0) + python2(1) + b"tR"
        b"(" + python2(3) + python2("<") + b"NNN" + 2 * python2(-1) + python2(0) + b"tb"
    )
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n("
        + python2(0) + b"t" + python2("b") + b"tR"
        b"(" + python2(1) + shape + dtype + b"\x89" + python2(value.tobytes()) + b"tb"
    )  # fmt: skip


def test_a_file_of_python_2(file):
    old = {"indexes": [7, "b"], "boxes": content()["boxes"], "scores": [SCORES, EMPTY[1]]}
    raw = b"\x80\x02" + python2(old) + b"."
    assert pickle.loads(raw, encoding="latin1")["boxes"][0].tolist() == BOXES.tolist()
    file.write_bytes(raw)
    check_is_content(read_pickle(file))


# There and back.


def test_round_trip_bit_for_bit(tmp_path, file):
    counts = {3: 5, "b": 0, 9: 1}
    written = dict(zip(counts, random_proposals(counts.values()), strict=True))
    boxes, scores = zip(*written.values(), strict=True)
    dump(file, {"ids": list(counts), "boxes": list(boxes), "objectness_logits": list(scores)})
    convert(file, tmp_path / "ours.safetensors", dataset="a_set")
    ours = ProposalFile(tmp_path / "ours.safetensors")
    assert (ours.dataset, ours.source) == ("a_set", "some.pkl, a .pkl of Detectron2")
    convert(tmp_path / "ours.safetensors", tmp_path / "back.pkl")
    back = read_pickle(tmp_path / "back.pkl")
    for found in (ours, back):
        assert found.image_ids == list(counts)
        for image_id, (own_boxes, own_scores) in written.items():
            assert found[image_id][0].tobytes() == own_boxes.tobytes()
            assert found[image_id][1].tobytes() == own_scores.tobytes()


def test_what_is_written_detectron2_reads(tmp_path, file):
    written = write_random(tmp_path / "x.safetensors", {3: 5, 4: 0})
    write_pickle(file, ProposalFile(tmp_path / "x.safetensors"))
    records = load_proposals_into_dataset([{"image_id": 4}, {"image_id": 3}], str(file))
    assert records[1]["proposal_boxes"].tobytes() == written[3][0].tobytes()
    assert records[1]["proposal_objectness_logits"].tobytes() == written[3][1].tobytes()
    assert records[1]["proposal_bbox_mode"] == BoxMode.XYXY_ABS
    assert records[0]["proposal_boxes"].shape == (0, 4)


def test_the_suffix_says_the_kind(tmp_path, file):
    write_random(tmp_path / "x.safetensors", {3: 5})
    convert(tmp_path / "x.safetensors", file)
    assert isinstance(open_proposals(tmp_path / "x.safetensors"), ProposalFile)
    assert open_proposals(str(file)).num_boxes == 5
    for source, target in ((file, file), ("a.safetensors", "b.safetensors")):
        with pytest.raises(ValueError, match=r"one of .* must be a \.pkl of Detectron2"):
            convert(source, target)


def test_an_address_is_fetched_by_detectron2(file, monkeypatch):
    dump(file, content())
    fetched = {"detectron2://proposals/some.pkl": str(file)}
    monkeypatch.setattr(PathManager, "get_local_path", fetched.__getitem__)
    check_is_content(open_proposals("detectron2://proposals/some.pkl"))


# What is refused.


class Instance:
    """Setting its state would set attributes of any named object."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_code_is_refused_by_name_and_not_run(tmp_path, file, protocol):
    victim = tmp_path / "touched"
    ways = {
        Runs(os.mkdir, str(victim)): r"mkdir",
        Runs(eval, f"open({str(victim)!r}, 'w')"): r"(builtins|__builtin__)\.eval",
        Runs(getattr, 1, "real"): r"getattr",
        Runs(np.save, str(victim), BOXES): r"numpy\.save",
        torch.zeros(1): r"torch\._utils\._rebuild_tensor_v2",
        Instance(): r"(copyreg|copy_reg)|test_proposal_pickle\.Instance",
    }
    for what, message in ways.items():
        dump(file, content(extra=what), protocol)
        with pytest.raises(ValueError, match=r"some\.pkl asks for .* not read") as error:
            read_pickle(file)
        assert error.match(message) and error.match("nothing in it was run")
    assert not victim.exists()
    assert not (tmp_path / "touched.npy").exists()


def test_nor_inside_of_an_array_of_objects(tmp_path, file):
    victim = tmp_path / "touched"
    dump(file, content(boxes=objects([BOXES, Runs(os.mkdir, str(victim))])), 2)
    with pytest.raises(ValueError, match=r"asks for (posix|nt|os)\.mkdir"):
        read_pickle(file)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        # Attributes of what may be named: a function's code, a class's methods.
        (b"cnumpy\ndtype\n}X\x08\x00\x00\x00__init__Nsb.", r"changes to an admitted name"),
        (b"c_codecs\nencode\nN}X\x08\x00\x00\x00__code__Ns\x86b.", r"changes to an admitted name"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.", r"encode to 'hex'"),
        (b"cnumpy\nndarray\n(J\x00\x00\x00\x7ftR.", r"a call of numpy\.ndarray"),
        (b"cnumpy\ndtype\n(X\x03\x00\x00\x00V99tR.", r"an array of dtype 'V99'"),
        (b"(X\x01\x00\x00\x00xios\nsystem\n.", r"os\.system"),
        (b"\x80\x02\x8c\x02os\x8c\x06system\x93.", r"os\.system"),
    ],
)
def test_programs_by_hand(file, program, message):
    file.write_bytes(program)
    with pytest.raises(ValueError, match=r"some\.pkl asks for .* not read") as error:
        read_pickle(file)
    assert error.match(message)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([1, 2], r"must hold a dict, it holds a list"),
        (content(boxes=None), r"no key \['boxes'\] among its keys \['bbox_mode', 'ids', 'obj"),
        (content(ids=[7]), r"1 ids, 2 boxes, 2 objectness_logits"),
        (content(ids=[7, 7]), r"1 image ids occur more than once"),
        (content(ids=[7, 1.5]), r"image ids must be integers or strings, got 1\.5"),
        (content(boxes=BOXES.tolist()), r"image id 7: boxes must be an array of numbers"),
        (content(boxes={"7": BOXES}), r"boxes must be a list, it is a dict"),
        (content(boxes=[BOXES[:, :3], EMPTY[0]]), r"image id 7: boxes must be \(R, 4\), .*\(2, 3"),
        (content(boxes=[BOXES[0], EMPTY[0]]), r"image id 7: boxes has the shape \(4,\)"),
        (content(boxes=[BOXES[:1], EMPTY[0]]), r"image id 7 has 1 boxes and 2 scores"),
        (content(boxes=[objects([1, 2]), EMPTY[0]]), r"image id 7: boxes must be an array of numb"),
        (content(boxes=[np.array(["a"]), EMPTY[0]]), r"image id 7: boxes must be an array of numb"),
        (content(objectness_logits=[SCORES[:, None], EMPTY[1]]), r"logits has the shape \(2, 1\)"),
        (content(bbox_mode=BoxMode.XYWHA_ABS), r"bbox_mode must be one of .*'XYWH_ABS'\], got 4"),
        (content(bbox_mode="XYXY"), r"bbox_mode must be one of \['XYXY_ABS', .* got 'XYXY'"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_proposals(file, what, message):
    with pytest.raises(ValueError, match=r"some\.pkl: ") as error:
        read_pickle(dump(file, what))
    assert error.match(message)


def test_what_is_no_pickle(tmp_path, file):
    with pytest.raises(FileNotFoundError, match=r"no file of proposals .*some\.pkl"):
        read_pickle(file)
    for raw in (b"", b"text", b"\x80\x04", b"\x80\xff."):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match=r"some\.pkl is damaged or not a pickle"):
            read_pickle(file)


def read_any(file):
    try:
        read_pickle(file)
    except ValueError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_damaged_pickle_is_an_error_of_ours(file, protocol):
    raw = pickle.dumps(content(), protocol=protocol)
    for length in range(0, len(raw), 5):
        file.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"some\.pkl"):
            read_pickle(file)
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        read_any(file)


@given(st.binary(max_size=40))
@settings(max_examples=300)
def test_any_bytes_are_an_error_of_ours(tmp_path_factory, raw):
    file = tmp_path_factory.getbasetemp() / "any.pkl"
    file.write_bytes(raw)
    modules = set(sys.modules)
    read_any(file)
    assert set(sys.modules) == modules, "nothing was imported for it"
