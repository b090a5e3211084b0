"""Read YAML as data, bounded in size, depth, count and expansion before anything is built.

An alias (``*name``) repeats what an anchor (``&name``) holds, which may itself hold aliases: a few
lines can stand for billions of values.
"""

import re
from typing import Any

import yaml

MOST_CHARACTERS = 1 << 19  # a dump of a whole config has a fiftieth
MOST_VALUES = 100_000  # keys and values, with those that aliases repeat
MOST_TEXT = 1 << 22  # characters of all values, with those that aliases repeat
MOST_LEVELS = 40
MOST_DIGITS = 400

_LONG_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FoxX_:.]*")


def load_yaml(text: str, name: str) -> Any:
    """The value of a YAML text: plain values, lists and mappings.

    Args:
        text: one document.
        name: of the file, for messages.

    Raises:
        yaml.YAMLError: it is not YAML, or asks for an object of Python.
        ValueError: it exceeds one of the limits above, refers to itself, or has a value that its
            type does not allow, such as a date in a 13th month; names file and line.

    Example:
        >>> load_yaml("a: &x [1, 2]\\nb: *x", "an example")
        {'a': [1, 2], 'b': [1, 2]}
    """
    check_yaml(text, name)
    try:
        return yaml.safe_load(text)
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} has a value that YAML does not allow: {error}") from error


def check_yaml(text: str, name: str) -> None:
    """Raise unless a text stays within the limits of :func:`load_yaml`. Builds nothing.

    Raises:
        yaml.YAMLError, ValueError: as :func:`load_yaml`.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"{name} has {len(text)} characters; at most {MOST_CHARACTERS} of YAML are read"
        )
    sizes: dict[str, tuple[int, int]] = {}  # by anchor: values and characters
    open_nodes: list[tuple[str | None, int, int]] = []  # anchor, and both counts at its start
    values = characters = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, values, characters))
            if event.anchor:
                sizes.pop(event.anchor, None)
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, *before = open_nodes.pop()
            if anchor:
                sizes[anchor] = values - before[0], characters - before[1]
        elif isinstance(event, yaml.ScalarEvent):
            values, characters = values + 1, characters + len(event.value)
            if event.anchor:
                sizes[event.anchor] = 1, len(event.value)
            if len(event.value) > MOST_DIGITS and _LONG_NUMBER.fullmatch(event.value):
                raise ValueError(f"{name}, line {line}: a number of {len(event.value)} characters")
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, *_ in open_nodes):
                raise ValueError(f"{name}, line {line}: *{event.anchor} is a part of itself")
            more = sizes.get(event.anchor, (1, 0))  # or an error, when it is built
            values, characters = values + more[0], characters + more[1]
        if len(open_nodes) > MOST_LEVELS:
            raise ValueError(f"{name}, line {line}: nested more than {MOST_LEVELS} levels deep")
        if values > MOST_VALUES or characters > MOST_TEXT:
            raise ValueError(
                f"{name}, line {line}: with what its aliases (*) repeat, it has more than "
                f"{MOST_VALUES} values or {MOST_TEXT} characters"
            )
