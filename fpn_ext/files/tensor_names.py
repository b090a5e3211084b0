"""Where the tensors of a network stand in a file of weights, by name."""

import re
from collections.abc import Iterable


def names_in_file(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Our name of each tensor that is in a file, and its name there.

    Names are equal, or equal behind one prefix that all of them have in the file (``"module."``,
    ``"backbone."``), or those that timm gives in the whole network.

    >>> names_in_file(["conv.weight", "bn.bias"], ["module.conv.weight", "module.fc.bias"])
    {'conv.weight': 'module.conv.weight'}
    """
    theirs = set(theirs)
    spellings = {name: _spellings(name) for name in ours}
    prefixes = {
        name.removesuffix(spelling)
        for first in list(spellings.values())[:1]
        for spelling in first
        for name in theirs
        if name.endswith(spelling)
    }
    best: dict[str, str] = {}
    for prefix in sorted(prefixes):
        found = {
            name: prefix + spelling
            for name, spelled in spellings.items()
            for spelling in reversed(spelled)
            if prefix + spelling in theirs
        }
        best = max(best, found, key=len)
    return best


def _spellings(name: str) -> list[str]:
    """A tensor's name, and what timm calls it before it takes a network apart for its maps.

    >>> _spellings("stages_0.blocks.1.weight")
    ['stages_0.blocks.1.weight', 'stages.0.blocks.1.weight']
    >>> _spellings("model.blocks.1.weight")
    ['model.blocks.1.weight', 'blocks.1.weight']
    """
    whole = re.sub(r"^(model|body)\.", "", name)
    whole = re.sub(r"^(\w+)_(\d+)\.", r"\1.\2.", whole)
    return list(dict.fromkeys((name, whole)))
