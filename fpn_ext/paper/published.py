"""The figures of the paper's tables (Lin et al., CVPR 2017).

COCO minival, or in Table 6 the first 5000 images of COCO val; ResNet-50 unless noted, in percent. A
row is named after its YAML file in ``configs/paper/table{n}/``.
"""

RECALL = ("AR@100", "AR@1000", "ARs@1000", "ARm@1000", "ARl@1000")
PRECISION = ("AP50", "AP", "APs", "APm", "APl")

# Reported metrics. The paper has no AR@10; in a 160 px image, a thirtieth of the paper's area, 10
# boxes are as dense as 300 there, and 1000 cover nearly everything.
METRICS: dict[int, tuple[str, ...]] = {
    1: ("AR@10", *RECALL),
    2: PRECISION,
    3: PRECISION,
    6: ("AR@10", *RECALL),
}
# Of these, those that the paper has.
PUBLISHED: dict[int, tuple[str, ...]] = {1: RECALL, 2: PRECISION, 3: PRECISION, 6: RECALL[1:]}
# The row that others are compared with: the FPN; in Table 6 its smallest.
BASELINES = {1: "c", 2: "c", 3: "c", 6: "5x5"}

# Each row's description, and its figures in the order of PUBLISHED; () if none. Table 6 has three
# more rows, of other methods.
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
    6: {
        "5x5": ("windows of 5x5", (43.4, 32.5, 49.2, 53.7)),
        "7x7": ("windows of 7x7", (43.5, 30.0, 49.6, 57.8)),
        "dual": ("both", (45.7, 31.9, 51.5, 60.8)),
        "dual28": ("both, masks of 28x28", (46.7, 31.7, 53.1, 63.2)),
        "dual28_2x": ("the same, twice the iterations", (48.1, 32.6, 54.2, 65.6)),
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
    return dict(zip(PUBLISHED[table], figures, strict=True)) if figures else {}
