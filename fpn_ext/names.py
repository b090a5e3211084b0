"""Suggestions for unknown names, and aligned text tables."""

import difflib
from collections.abc import Iterable, Sequence

MOST_NAMES = 30  # listed if none is near


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The valid names nearest to an unknown one, to end an error message.

    >>> did_you_mean("FeaturePyramide", ["FeaturePyramid", "build_resnet_backbone"])
    "nearest valid: 'FeaturePyramid'"
    >>> did_you_mean("x", ["FeaturePyramid", "build_resnet_backbone"])
    "valid: 'FeaturePyramid', 'build_resnet_backbone'"
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    label = "nearest valid" if near else "valid"
    shown = near or names[:MOST_NAMES]
    more = f", ... ({len(names)} in all)" if len(shown) < len(names) and not near else ""
    return f"{label}: {', '.join(map(repr, shown)) or '(none)'}{more}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as indented text, one line per row, columns aligned.

    >>> print(aligned([["level", "stride"], ["p2", "4"]]))
      level  stride
      p2     4
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
