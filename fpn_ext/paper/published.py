"""The figures of the paper's tables (Lin et al., CVPR 2017).

COCO minival, ResNet-50 unless noted, in percent. A row is named after its YAML file in
``configs/paper/table{n}/``.
"""

RECALL = ("AR@100", "AR@1000", "ARs@1000", "ARm@1000", "ARl@1000")
PRECISION = ("AP50", "AP", "APs", "APm", "APl")

# Reported metrics. The paper has no AR@10; in a 160 px image, a thirtieth of the paper's area, 10
# boxes are as dense as 300 there, and 1000 cover nearly everything.
METRICS: dict[int, tuple[str, ...]] = {1: ("AR@10", *RECALL), 2: PRECISION, 3: PRECISION}

# Each row's description, and its figures in the order of RECALL or PRECISION; () if none.
Rows = dict[str, tuple[str, tuple[float, ...]]]
TABLES: dict[int, Rows] = {
    1: {
        "a": ("RPN on C4", (36.1, 48.3, 32.0, 58.7, 62.2)),
        "b": ("RPN on C5", (36.3, 44.9, 25.3, 55.5, 64.2)),
        "c": ("RPN on FPN", (44.0, 56.3, 44.9, 63.4, 66.2)),
        "d": ("no top-down pathway", (37.4, 49.5, 30.5, 59.9, 68.0)),
        "e": ("no lateral connections", (34.5, 46.1, 26.5, 57.4, 64.7)),
        "f": ("P2 alone", (38.4, 51.3, 35.1, 59.7, 67.6)),
        "c_unshared": ("(c), a head for each level", ()),
        "c_unsmoothed": ("(c), no 3x3 convolutions", ()),
        "d_unshared": ("(d), a head for each level", ()),
    },
    2: {
        "a": ("Fast R-CNN on C4", (54.7, 31.9, 15.7, 36.5, 45.5)),
        "b": ("Fast R-CNN on C5", (52.9, 28.8, 11.9, 32.4, 43.4)),
        "c": ("Fast R-CNN on FPN", (56.9, 33.9, 17.8, 37.7, 45.8)),
        "d": ("no top-down pathway", (44.9, 24.9, 10.9, 24.4, 38.5)),
        "e": ("no lateral connections", (54.0, 31.3, 13.3, 35.2, 45.3)),
        "f": ("P2 alone", (56.3, 33.4, 17.3, 37.3, 45.6)),
        "c_unshared": ("(c), a head for each level", ()),
        "c_unsmoothed": ("(c), no 3x3 convolutions", ()),
    },
    3: {
        "a": ("Faster R-CNN on C4", (53.1, 31.6, 13.2, 35.6, 47.1)),
        "b": ("Faster R-CNN on C5", (51.7, 28.0, 9.6, 31.9, 43.1)),
        "c": ("Faster R-CNN on FPN", (56.9, 33.9, 17.8, 37.7, 45.8)),
    },
}


def published(table: int, row: str) -> dict[str, float]:
    """The paper's figures for a row, by metric; empty if it has none.

    >>> published(1, "c")["ARs@1000"]
    44.9
    >>> published(1, "c_unshared")
    {}
    """
    _, figures = TABLES[table][row]
    metrics = RECALL if table == 1 else PRECISION
    return dict(zip(metrics, figures, strict=True)) if figures else {}
