"""What is read is bounded before anything is built. The limits are lowered here: no input of these
tests is large."""

import itertools

import fpn_ext
import pytest
import yaml
from detectron2.utils.file_io import PathManager
from fpn_ext.config import files as config_files
from fpn_ext.data.data_file import open_data
from fpn_ext.files import safe_yaml

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


@pytest.mark.parametrize("depth", [40, 400])
def test_a_value_that_is_nested_as_an_expression(depth):
    """What yacs takes for an expression of Python, whose parser has a limit of its own."""
    for text in ("[" * depth + "]" * depth, "-" * depth + "1"):
        with pytest.raises(ValueError, match=r"the command line: SEED must be of type int"):
            fpn_ext.load_config("configs/Base-FPN.yaml", ["SEED", f"[{text}]"])


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
