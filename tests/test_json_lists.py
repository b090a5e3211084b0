"""JSON read entry by entry: what json.loads gives, and its errors."""

import json

import pytest
from fpn_ext.files import json_lists
from fpn_ext.files.json_lists import ListInFile, read_json
from hypothesis import given, settings
from hypothesis import strategies as st

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from(["kept", "other", "images"]), values)
pieces = st.integers(1, 40)  # characters


def read(function, *arguments):
    """What it gives, as text since NaN equals nothing, or what it raises."""
    try:
        return repr(function(*arguments))
    except (ValueError, RecursionError) as error:
        return type(error), str(error)


def whole(file, kept):
    data = read_json(file, kept)
    if not isinstance(data, dict):
        return data
    return {k: list(v) if isinstance(v, ListInFile) else v for k, v in data.items()}


@st.composite
def contents(draw):
    """JSON of an object or a list, some of it damaged."""
    indent = draw(st.sampled_from([None, 1]))
    value = draw(objects | st.lists(values, max_size=5))
    text = json.dumps(value, indent=indent, ensure_ascii=draw(st.booleans()))
    content = bytearray(text.encode(draw(st.sampled_from(["utf-8", "utf-16"])), "surrogatepass"))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(content) - 1)) if content else 0
        put = draw(st.sampled_from([*(mark.encode() for mark in '{}[],:"0 e'), b"", b"\xff"]))
        content[place : place + draw(st.integers(0, 2))] = put
    return bytes(content)


@settings(max_examples=250)
@given(contents(), pieces)
def test_as_by_json(tmp_path_factory, content, piece):
    file = tmp_path_factory.getbasetemp() / "a.json"
    file.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "PIECE", piece)
        expected = read(json.loads, content)
        assert read(whole, file, ["kept", "images"]) == expected
        in_file = read(lambda: list(ListInFile(file)))
    if str(expected)[0] == "[" or isinstance(expected, tuple):
        assert in_file == expected
    else:
        assert in_file[0] is ValueError and "holds no list" in in_file[1]


def test_a_list_is_read_as_often_as_it_is_iterated_over(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"kept": [1, {"a": 2}], "empty": []}')
    data = read_json(file, ["kept", "empty"])
    assert list(data["kept"]) == list(data["kept"]) == [1, {"a": 2}]
    assert data["empty"] == []  # which is false
    file.write_text('{"kept": [1, {"a": 3, "b": 4}], "empty": []}')
    with pytest.raises(ValueError, match="was changed while it was in use"):
        list(data["kept"])
