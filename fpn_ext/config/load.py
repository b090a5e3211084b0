"""Loads a config from a YAML file and command-line overrides, and reports all their mistakes."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from ..bottom_up.configured_levels import LEVELS
from ..files.shipped import find_config
from .defaults import flat, get_cfg, keys_of, leaves, mapping_of, near_keys
from .files import config_files
from .level_keys import resolve_levels
from .level_table import level_table_in_errors
from .written import WrittenKeys

MAX_ITER, EPOCHS = "SOLVER.MAX_ITER", "SOLVER.FPN_EXT.EPOCHS"
ANCHOR_SIZES_AS_LIST = "MODEL.ANCHOR_GENERATOR.SIZES"
# What yacs raises for a key or value: the last two where a text is nested as an expression.
UNFIT = (KeyError, AssertionError, ValueError, RecursionError, MemoryError)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a YAML file (and its ``_BASE_``) with ``KEY VALUE ...`` overrides, unfrozen.

    YAML is read by the safe loader: a config cannot run code. If ``MODEL.FPN_EXT.LEVELS`` is set,
    so are the keys derived from it (:func:`resolve_levels`); keys in the same file, or in later
    ones, count as explicitly set, those in its ``_BASE_`` files do not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: invalid YAML, unknown keys (with the nearest valid ones), values of the wrong
            type, an override without a value, inconsistent levels. Lists all mistakes at once.
        TypeError: the file is not a mapping of keys.
    """
    config_file = find_config(config_file)
    if not os.path.isfile(config_file):
        raise FileNotFoundError(
            f"config file {config_file!r} does not exist (--config-file); the configs that come "
            "with this project are listed in configs/README.md"
        )
    config_files(config_file)  # within bounds, before any of it is merged
    cfg = get_cfg()
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
        _check_no_none(cfg)
    except (AttributeError, TypeError) as error:
        raise TypeError(f"{config_file}: a config must be a mapping of keys ({error})") from error
    except UNFIT as error:
        values = CfgNode.load_yaml_with_base(config_file, allow_unsafe=False)
        raise _mistakes(leaves(values, get_cfg()), config_file, error) from error
    if len(opts) % 2:
        raise ValueError(
            f"overrides come in pairs KEY VALUE, got {len(opts)} words: {' '.join(opts)}"
        )
    _declare_entries(cfg, opts[::2])
    try:
        cfg.merge_from_list(list(opts))
        _check_no_none(cfg)
    except UNFIT as error:
        pairs = zip(opts[::2], opts[1::2], strict=True)
        raise _mistakes(pairs, "the command line", error) from error
    written = written_keys(config_file, opts)
    _check_length(cfg, written)
    explicitly_set = written.since(LEVELS) & set(flat(cfg))
    explicitly_set |= written.since("MODEL.FPN_EXT.ANCHOR_SIZES") & {ANCHOR_SIZES_AS_LIST}
    with level_table_in_errors(cfg):
        resolve_levels(cfg, explicitly_set)
    return cfg


def written_keys(config_file: str, opts: Sequence[str] = ()) -> WrittenKeys:
    """Every key set in a file, its ``_BASE_`` files or the overrides."""
    files = config_files(find_config(config_file))
    return WrittenKeys([*(flat(CfgNode(file.content)) for file in files), opts[::2]])


def _check_length(cfg: CfgNode, written: WrittenKeys) -> None:
    """Raise ValueError where one file, or the command line, gives iterations and epochs."""
    both = MAX_ITER in written.since(EPOCHS) and EPOCHS in written.since(MAX_ITER)
    if cfg.SOLVER.FPN_EXT.EPOCHS and both:
        raise ValueError(
            f"{MAX_ITER} {cfg.SOLVER.MAX_ITER} and {EPOCHS} {cfg.SOLVER.FPN_EXT.EPOCHS} both say "
            f"how long to train: leave one out ({EPOCHS} 0 is none)"
        )


def _declare_entries(cfg: CfgNode, keys: Iterable[str]) -> None:
    """Add the entries of overrides such as ``MODEL.FPN_EXT.ANCHOR_SIZES.p2`` to their mapping."""
    for key in keys:
        if mapping := mapping_of(key):
            parent, _, name = mapping.rpartition(".")
            node = cfg
            for part in parent.split("."):
                node = node[part]
            node[name].setdefault(key.rpartition(".")[2], [])


def _check_no_none(cfg: CfgNode) -> None:
    """Reject None, which yacs accepts for any type, unless it is the key's default."""
    defaults = flat(get_cfg())
    for key, value in flat(cfg).items():
        if value is None and defaults[key] is not None:
            raise ValueError(f"{key} is None")


def _mistakes(values: Iterable[tuple[str, Any]], source: str, error: Exception) -> ValueError:
    """All mistakes in the values of a file or of the command line, as one error.

    yacs stops at the first; here each is merged alone. ``error`` is the one yacs raised.
    """
    cfg = get_cfg()
    faults = [_fault(cfg, key, value, source) for key, value in values]
    found = [fault for fault in faults if fault]
    if not found:
        return ValueError(f"{source}: {error.args[0] if error.args else error}")
    if len(found) == 1:
        return ValueError(found[0])
    return ValueError(
        f"{len(found)} problem(s) in {source}:\n" + "\n".join(f"  - {fault}" for fault in found)
    )


def _fault(cfg: CfgNode, key: str, value: Any, source: str) -> str:
    """The mistake in one value; if there is none, it is merged into ``cfg``."""
    if source != "the command line":
        line = _line_of(key, source)
        source += f", line {line}" if line else ""
    if key not in (valid := set(keys_of(cfg))) and not mapping_of(key):
        return f"{source}: no config key {key!r}; {near_keys(key, valid)}"
    _declare_entries(cfg, [key])
    default = cfg
    for part in key.split("."):
        default = default[part]
    try:
        cfg.merge_from_list([key, value])
        _check_no_none(cfg)
    except UNFIT:
        if mapping_of(f"{key}.NAME"):
            return (
                f"{source}: {key} has entries of any names, each of which is given by itself: "
                f"{key}.NAME VALUE; got {value!r}"
            )
        if isinstance(default, CfgNode):
            return f"{source}: {key} has keys of its own ({', '.join(default)}), got {value!r}"
        kind = type(default).__name__
        return f"{source}: {key} must be of type {kind}, as {default!r} is; got {value!r}"
    return ""


def _line_of(key: str, config_file: str) -> int:
    """The line of a file that sets a key; 0 if it is set in a base."""
    text = Path(config_file).read_text(encoding="utf-8")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = 0
    for part in key.split("."):
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        found = [(name, value) for name, value in entries if name.value == part]
        if not found:
            return 0
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line
