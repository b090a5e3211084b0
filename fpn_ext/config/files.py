"""The files that a config consists of: one, and those that ``_BASE_`` names, theirs included."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from detectron2.utils.file_io import PathManager

from ..files.safe_yaml import load_yaml
from ..files.weight_files import check_address

BASE = "_BASE_"
MOST_FILES = 30


class ConfigFile(NamedTuple):
    """One file of a config: where it is, its text, and the keys in it without ``_BASE_``."""

    path: str
    text: str
    content: dict[str, Any]


def config_files(config_file: str) -> list[ConfigFile]:
    """A config's files in the order in which they are merged, bases first. Builds no config.

    ``_BASE_`` names a file, or a list of them, relative to the file that has it, as in Detectron2.

    Raises:
        FileNotFoundError: a base is not there.
        TypeError: a file is not a mapping of keys.
        ValueError: not YAML in UTF-8, or more than :mod:`fpn_ext.files.safe_yaml` reads; a base
            that is fetched unencrypted, or based on itself; more than 30 files.
    """
    files: list[ConfigFile] = []
    _add(files, config_file, ())
    return files


def _add(files: list[ConfigFile], path: str, within: tuple[str, ...]) -> None:
    whose = f"{within[-1]}: {BASE} names {path}, which" if within else f"{path}"
    try:
        file = PathManager.get_local_path(path) if "://" in path else path
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{whose} is not text in UTF-8: {error}") from error
    except OSError as error:
        why = error.strerror or error
        raise FileNotFoundError(f"{whose} cannot be read ({why})") from error
    try:
        content = load_yaml(text, path)
    except yaml.YAMLError as error:
        raise ValueError(f"{whose} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise TypeError(f"{whose} must be a mapping of keys, got {type(content).__name__}")
    bases = content.pop(BASE, [])
    if not isinstance(bases, str | list) or not all(isinstance(base, str) for base in bases):
        raise TypeError(f"{path}: {BASE} must name a file, or a list of files; got {bases!r:.60}")
    within = (*within, path)
    for base in [bases] if isinstance(bases, str) else bases:
        base = os.path.expanduser(base)
        check_address(base, f"{path}: {BASE}")
        if not base.startswith("https://"):
            base = os.path.join(os.path.dirname(path), base)
        if os.path.realpath(base) in map(os.path.realpath, within):
            raise ValueError(f"{path}: {BASE} names {base}, which is based on this file itself")
        if len(within) + len(files) >= MOST_FILES:
            raise ValueError(
                f"{within[0]}: with the files that {BASE} names, more than {MOST_FILES} files"
            )
        _add(files, base, within)
    files.append(ConfigFile(path, text, content))
