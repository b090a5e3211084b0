"""Pickles of arrays are read; no code in any pickle is executed."""

import pickle
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from fpn_ext.files.safe_pickle import load_pickle
from unsafe import touches

CONTENT = {
    "model": OrderedDict(weight=np.arange(6, dtype=np.float32).reshape(2, 3)),
    "scalars": [np.float32(2.5), np.int64(-3), True, None, 1.5, 10**30],
    "arrays": (
        np.arange(3, dtype=">i2"),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
        np.zeros((0, 4)),
        np.array(7.0),
        np.array([True, False]),
        np.array(["ab", "c"]),
        np.array([b"ab", b"c"]),
    ),
    "bytes": [b"\x00\xff", b""],
    "sets": [{1, 2}, frozenset("a")],
    "text": "é",
}


def written(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_plain_containers_come_back(tmp_path, protocol):
    found = load_pickle(written(tmp_path / "a.pkl", CONTENT, protocol))
    assert {k: v for k, v in found.items() if k != "arrays"}.keys() < CONTENT.keys()
    for key in ("scalars", "bytes", "sets", "text"):
        assert found[key] == CONTENT[key]
        assert list(map(type, found[key])) == list(map(type, CONTENT[key]))
    arrays = (*found["arrays"], found["model"]["weight"])
    for array, expected in zip(
        arrays, (*CONTENT["arrays"], CONTENT["model"]["weight"]), strict=True
    ):
        assert type(array) is np.ndarray and array.flags.writeable
        assert array.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(array, expected)


def test_a_file_of_python_2(tmp_path):
    """As Caffe2 wrote them: protocol 2, arrays of Python 2's str, read as Latin-1."""
    array = np.array([1.5, -2.0], dtype=np.float32)
    raw = array.tobytes()
    text = (
        b"\x80\x02}U\x07fc.biascnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        b"U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff"
        b"\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U" + bytes([len(raw)]) + raw + b"tbs."
    )
    (tmp_path / "c2.pkl").write_bytes(text)
    assert np.array_equal(pickle.loads(text, encoding="latin1")["fc.bias"], array)
    assert np.array_equal(load_pickle(tmp_path / "c2.pkl")["fc.bias"], array)


def test_arrays_of_objects_are_lists(tmp_path):
    objects = np.empty(2, dtype=object)
    objects[:] = [np.arange(3), "b"]
    first, second = load_pickle(written(tmp_path / "a.pkl", {"boxes": objects}))["boxes"]
    assert first.tolist() == [0, 1, 2] and second == "b"


def test_shared_objects_stay_so_and_cyclic_ones_are_refused(tmp_path):
    shared = [np.arange(2)]
    content = {"a": shared, "b": shared}
    found = load_pickle(written(tmp_path / "a.pkl", content))
    assert found["a"] is found["b"]
    content["self"] = content
    with pytest.raises(ValueError, match=r"a\.pkl is not read: a value that contains itself"):
        load_pickle(written(tmp_path / "a.pkl", content))


def opcodes(body):
    return b"\x80\x02" + body + b"."


def attacks(canary):
    touch = f"open({str(canary)!r}, 'w')"
    quoted = f"V{touch}\n".encode()
    nested = {"model": [{"w": (np.zeros(2), touches(canary))}]}
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n"
    return {
        "reduce": (pickle.dumps(touches(canary)), "builtins.eval"),
        "os.system": (b"cos\nsystem\n(S'touch " + bytes(canary) + b"'\ntR.", "os.system"),
        "nested": (pickle.dumps(nested), "builtins.eval"),
        "instance": (b"(S'x'\nios\nsystem\n.", "os.system"),
        "object opcode": (opcodes(b"(c__builtin__\neval\n" + quoted + b"o"), "__builtin__.eval"),
        "object array": (pickle.dumps(np.array([touches(canary)])), "builtins.eval"),
        "objects in rows": (pickle.dumps(np.array([[None]])), "objects of 2 dimensions"),
        "structured": (pickle.dumps(np.zeros(2, "f4,i4")), "dtype 'V8'"),
        "dotted name": (
            b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
            "numpy.dtype.__init__",
        ),
        "state of a container": (opcodes(b"}}U\x08__name__U\x01xsb"), "the state of a dict"),
        "a call of ndarray": (opcodes(b"cnumpy\nndarray\nK\x09\x85R"), "a call of numpy.ndarray"),
        "state of a function": (
            opcodes(reconstruct + b"}U\x08__name__U\x01xsb"),
            "changes to an admitted name",
        ),
        "function as a value": (opcodes(reconstruct), "a class or function"),
        "codec": (opcodes(b"c_codecs\nencode\nU\x00U\x03zip\x86R"), "_codecs.encode to 'zip'"),
        "tensor": (opcodes(b"ctorch._utils\n_rebuild_tensor\n"), "torch._utils._rebuild_tensor"),
    }  # fmt: skip


@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_nothing_is_run(tmp_path, attack):
    canary = tmp_path / "canary"
    text, asked = attacks(canary)[attack]
    (tmp_path / "evil.pkl").write_bytes(text)
    with pytest.raises(ValueError, match=r"evil\.pkl asks for .*not read") as error:
        load_pickle(tmp_path / "evil.pkl")
    assert asked in str(error.value)
    assert not canary.exists()


def test_the_attacks_are_real(tmp_path):
    for attack in ("reduce", "nested", "object array"):
        canary = tmp_path / attack
        pickle.loads(attacks(canary)[attack][0])
        assert canary.exists()


@pytest.mark.parametrize(
    "state",
    [
        "(K\x01(J\x00\x00\x00\x7ftK\x00t",  # too few fields
        "fewer bytes than the shape needs",
        "a dtype without references that claims them",
    ],
)
def test_crafted_arrays_do_not_reach_foreign_memory(tmp_path, state):
    dtype = (
        b"cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK"
    )
    if state.startswith("(K"):
        body = state.encode("latin1") + b"b"
    elif state.startswith("fewer"):
        body = b"(K\x01K\x09\x85" + dtype + b"\x00tb\x89U\x08" + b"A" * 8 + b"tb"
    else:  # 0x3f: the flags of object arrays, on raw bytes
        body = b"(K\x01K\x01\x85" + dtype + b"\x3ftb\x89U\x08" + b"A" * 8 + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    (tmp_path / "a.pkl").write_bytes(opcodes(array + body))
    if state.startswith("a dtype"):
        assert load_pickle(tmp_path / "a.pkl").tolist() == [0x4141414141414141]
    else:
        with pytest.raises(ValueError, match=r"a\.pkl is damaged"):
            load_pickle(tmp_path / "a.pkl")


def test_a_cut_file_is_damaged(tmp_path):
    text = pickle.dumps(CONTENT, protocol=2)
    for length in range(0, len(text), 37):
        (tmp_path / "a.pkl").write_bytes(text[:length])
        with pytest.raises(ValueError, match=r"a\.pkl is damaged"):
            load_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "made_up",
    [
        b"K\x00r" + struct.pack("<I", 1 << 24),  # the number of a remembered value
        b"\x96" + struct.pack("<Q", 1 << 28),  # the length of a bytearray
        b"\x8e" + struct.pack("<Q", 1 << 28),  # of bytes
    ],
)
def test_made_up_numbers_fill_no_memory(tmp_path, made_up):
    file = tmp_path / "a.pkl"
    file.write_bytes(opcodes(made_up)[:-1])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a\.pkl is damaged"):
            load_pickle(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_more_names_can_be_admitted(tmp_path):
    from detectron2.structures import BoxMode

    file = written(tmp_path / "a.pkl", {"bbox_mode": BoxMode.XYWH_ABS})
    with pytest.raises(ValueError, match=r"asks for detectron2\.structures\.boxes\.BoxMode"):
        load_pickle(file)
    assert load_pickle(file, {"detectron2.structures.boxes.BoxMode": int}) == {"bbox_mode": 1}
