"""Pascal VOC's annotation files: one XML file per image."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

MOST_BYTES = 1 << 24  # of an XML file


class _WithoutEntities(ElementTree.TreeBuilder):
    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type (<!DOCTYPE>), which annotations do not have")


def read_voc_annotation(file: Path) -> ElementTree.Element:
    """The root element of one annotation file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not XML; it declares a document type, which is where entities that stand
            for more than they are can be declared; or it has more than 16 MiB.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"no annotation file {file}. Many tools write none for an image without objects: take "
            "it off the list, or name the folder by --data, which counts it as one without objects"
        )
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{file} has {size} bytes; at most {MOST_BYTES} of XML are read")
    try:
        parser = ElementTree.XMLParser(target=_WithoutEntities())
        return ElementTree.parse(file, parser).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # or encoding
        raise ValueError(f"{file} is not XML: {error}") from error


def voc_box(element: ElementTree.Element, file: Path) -> list[float]:
    """[xmin, ymin, xmax, ymax] of an object, as written in ``file``: 1-based and inclusive."""
    return [
        voc_number(element, f"bndbox/{corner}", file) for corner in ("xmin", "ymin", "xmax", "ymax")
    ]


def box_fault(box: Sequence[float]) -> str:
    """What is wrong with an XYXY box, or ``""``.

    >>> box_fault([504, 337, 504, 337])
    'no width and no height'
    >>> box_fault([1, 1, 2, 2])
    ''
    """
    faults = [
        f"no {side}"
        for side, low, high in (("width", box[0], box[2]), ("height", box[1], box[3]))
        if not high > low
    ]
    return " and ".join(faults)


def voc_number(element: ElementTree.Element, path: str, file: Path) -> float:
    """The number at a path of an object or annotation.

    Raises:
        ValueError: there is none, or it is not finite.
    """
    text = element.findtext(path, "")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):  # float() also parses "nan" and "inf"
        raise ValueError(f"{file}: <{path}> must be a number, got {text!r}")
    return number
