"""Detect objects in images: an annotated copy of each, and all detections as COCO-format JSON.

    fpn-ext predict --run output/demo photo.jpg folder/

Nothing that is an input is written to, nor what another has written. A picture that cannot be read
is named and left out. What was found is kept, whatever ends the command.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import Instances

from ..data.formats.layout import OURS, detected_in
from ..data.reading import PICTURE_SUFFIXES, as_rgb, num_pages
from ..files.earlier import earlier_kept
from ..reporting.coco_json import annotations_of
from ..reporting.drawing import ColorBy, draw_detections
from ..reporting.drawn import is_drawing, write_picture
from ..speed.optimize import model_for_inference
from .detector import Detector
from .eager import EagerModel
from .kept import KeptResult
from .predictor import Predictor, build_predictor, detections_of
from .tiles import check_size, check_tiles, detect_in_tiles

DETECTIONS = "detections.json"


@dataclass(frozen=True)
class Picture:
    """A picture to read: a file, and with several pages the number of one, from 0."""

    file: Path
    page: int | None = None

    def __str__(self) -> str:
        return str(self.file) if self.page is None else f"{self.file}, page {self.page}"

    @property
    def stem(self) -> str:
        """A name for what is made of it: the file's without its suffix, and the page."""
        return self.file.stem if self.page is None else f"{self.file.stem}_page{self.page}"

    def as_json(self) -> dict[str, Any]:
        page = {} if self.page is None else {"page": self.page}
        return {"file_name": str(self.file), **page}


def find_pictures(inputs: Iterable[str | Path], option: str = "--input") -> list[Path]:
    """The image files among files and folders (one level deep), sorted by name per folder.

    What this project has drawn into a folder is no input; it is said how many were left out.

    Args:
        inputs: files and folders.
        option: that names them, for the message.

    Raises:
        FileNotFoundError: an input does not exist, or a folder holds no image.
    """
    pictures = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(f for f in path.iterdir() if f.suffix.lower() in PICTURE_SUFFIXES)
            drawn = [file for file in found if is_drawing(file)]
            if drawn:
                print(f"{path}: {len(drawn)} drawing(s) of fpn-ext left out, such as {drawn[0]}")
                found = sorted({*found} - {*drawn})
            if not found:
                raise FileNotFoundError(
                    f"{option} {path}: no picture in this folder ({', '.join(PICTURE_SUFFIXES)})"
                )
            pictures += found
        elif path.is_file():
            pictures.append(path)
        else:
            raise FileNotFoundError(
                f"{option} {path}: no such file or folder (KEY VALUE overrides go last, after "
                "another option)"
            )
    return pictures


def pages_of(files: Iterable[Path]) -> list[Picture]:
    """Every picture in these files, each page of a TIFF being one."""
    pictures = []
    for file in files:
        pages = 1
        with contextlib.suppress(Exception):  # damaged: said when it is read
            pages = num_pages(file)
        numbers = [None] if pages == 1 else range(pages)
        pictures += [Picture(file, number) for number in numbers]
    return pictures


def names_of(pictures: Sequence[Picture]) -> list[str]:
    """A name for what is made of each, its stem; of several with the same, ``_2``, ``_3``, ...

    Names that differ in upper and lower case alone are the same to many file systems.

    >>> names_of([Picture(Path(name)) for name in ("a.jpg", "x/a.jpg", "a_2.jpg", "A.png")])
    ['a', 'a_3', 'a_2', 'A_4']
    """
    stems = [picture.stem for picture in pictures]
    taken = {stem.lower() for stem in stems}
    seen: set[str] = set()
    names = []
    for stem in stems:
        name, number = stem, 1
        while name.lower() in seen or (number > 1 and name.lower() in taken):
            number += 1
            name = f"{stem}_{number}"
        seen.add(name.lower())
        names.append(name)
    return names


def check_harmless(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raise unless no file that is to be written is one to be read, under whatever name.

    Raises:
        ValueError: one is; names both.
    """
    read = {os.path.realpath(file): file for file in inputs}
    identities = {
        (status.st_dev, status.st_ino): file
        for file in read.values()
        if file.exists()  # or a link to nothing, which is skipped when it is read
        for status in [file.stat()]
    }
    for output in outputs:
        same = read.get(os.path.realpath(output))
        if same is None and output.exists():  # a hard link, or another case of the same name
            status = output.stat()
            same = identities.get((status.st_dev, status.st_ino))
        if same is not None:
            raise ValueError(
                f"{output}, which this command would write, is the input {same}: name another "
                "--output. Nothing was written"
            )


def _check_ours(output: Path, written: Iterable[Path]) -> None:
    """Raise unless each file that is to be replaced was written by an earlier such command.

    Raises:
        ValueError: one is somebody's photograph or annotations; names it.
    """
    if (output / OURS).exists():
        return
    for file in written:
        if file.exists() and not (is_drawing(file) or file.name in detected_in(file)):
            raise ValueError(
                f"{file} is there already, and this command has not drawn it: name another "
                "--output. Nothing was written"
            )


def predict(
    cfg: CfgNode,
    pictures: Sequence[Path],
    output: Path,
    min_score: float = 0.5,
    label_levels: bool = False,
    tiles: int | None = None,
) -> dict[str, Any]:
    """Run detection on every image; writes drawings and ``detections.json`` into ``output``.

    A drawing is written with its picture. The JSON is whole at any moment, and has everything that
    was found, whatever ends the command (:class:`fpn_ext.inference.kept.KeptResult`). That of an
    earlier command stays beside it (:mod:`fpn_ext.files.earlier`).

    Returns what the JSON holds: COCO's ``images``, ``categories`` and ``annotations``, the latter
    as :func:`fpn_ext.reporting.coco_json.annotations_of` makes them, in pixels of the picture file.
    COCO's tools read it as ground truth and, its annotations, as results. ``info`` has the
    ``weights`` that found them, and how far their training was. Besides, each image has
    the name of its ``drawing``; ``skipped`` are the pictures that could not be read, with the
    ``error``; ``complete`` is whether all pictures were tried.

    Args:
        label_levels: write ``p3>p4`` on each box, proposed by P3 and pooled from P4.
        tiles: side of tiles to detect on, in pixels of the picture
            (:func:`fpn_ext.inference.tiles.detect_in_tiles`); None for whole pictures.

    Raises:
        ImportError: ``tiles`` without sahi.
        ValueError: an output is an input, or a file that no such command has written; what is asked
            for of tiles cannot be. Nothing was written.
        OSError: the disk is full; what was found before is in the JSON.
    """
    wanted = pages_of(pictures)
    drawings = [f"{name}.png" for name in names_of(wanted)]
    written = [output / name for name in (*drawings, DETECTIONS)]
    check_harmless([picture.file for picture in wanted], written)
    _check_ours(output, written)
    if tiles is None:
        predictor, detect = _of_the_whole(cfg)
    else:
        check_tiles(tiles)
        predictor, detect = _of_tiles(cfg, tiles, min_score)
    about = {"weights": predictor.weights}
    output.mkdir(parents=True, exist_ok=True)
    if not any(output.iterdir()):
        (output / OURS).touch()  # not to be read as data, should it lie among photographs
    with (
        earlier_kept([output / DETECTIONS], print),
        KeptResult(output / DETECTIONS, _categories(predictor), len(wanted), about) as kept,
    ):
        image_ids, annotation_ids = itertools.count(1), itertools.count(1)
        reading = _read_ahead(lambda p: _checked(predictor, tiles, p), wanted)
        for picture, drawing, being_read in zip(wanted, drawings, reading, strict=True):
            try:
                image = being_read.result()
            except Exception as error:  # decoders raise what they like
                reason = f"{type(error).__name__}: {error}"
                print(f"skipped {picture}: {reason}", file=sys.stderr)
                kept.skip({**picture.as_json(), "error": reason})
                continue
            detections = detect(image)
            detections = detections[detections.scores >= min_score]
            height, width = image.shape[:2]
            entry = {"id": next(image_ids), **picture.as_json(), "drawing": drawing}
            entry |= {"height": height, "width": width}
            annotations = list(annotations_of(detections, list(predictor.classes)))
            for annotation in annotations:
                annotation |= {"id": next(annotation_ids), "image_id": entry["id"]}
            with kept.room_for(entry, annotations):
                names = list(predictor.classes.values())
                rgb = as_rgb(image, predictor.pixel_format)
                color_by: ColorBy = "level" if label_levels else "class"
                drawn = draw_detections(rgb, detections, names, 1.0, label_levels, color_by)
                # Encoding for the smallest file takes longer than reading the picture.
                write_picture(drawn, output / drawing, compress_level=1)
    return kept.result


def _read_ahead(
    read: Callable[[Picture], np.ndarray], pictures: Sequence[Picture]
) -> "Iterator[Future[np.ndarray]]":
    """Every picture; the next is read by a thread meanwhile, and no more than one, for its size."""
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(read, picture) for picture in pictures[:1]]
        for following in [*pictures[1:], None]:
            being_read = coming.pop()
            if following is not None:
                coming.append(reader.submit(read, following))
            yield being_read


def _checked(predictor: Predictor, tiles: int | None, picture: Picture) -> np.ndarray:
    """A picture that can be detected on, read.

    Raises:
        ValueError: it is too thin to be resized, or too small for tiles; and what reading raises.
    """
    image = predictor.read(picture.file, picture.page)
    if tiles is not None:
        check_size(image)
    return image


Detect: TypeAlias = Callable[[np.ndarray], Instances]


def _of_the_whole(cfg: CfgNode) -> tuple[Predictor, Detect]:
    predictor = build_predictor(cfg)
    predictor.model = model_for_inference(cfg, predictor.model)
    return predictor, lambda image: detections_of(predictor(image))


def _of_tiles(cfg: CfgNode, tile: int, min_score: float) -> tuple[Predictor, Detect]:
    model = EagerModel(cfg)
    print(f"weights: {model.weights}")
    if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
        print("--tiles: boxes alone are merged; masks and keypoints are left out")
    detector = Detector(model)

    def detect(image: np.ndarray) -> Instances:
        rgb = as_rgb(image, model.pixel_format)
        return detect_in_tiles(detector, rgb, tile, min_score=min_score).to_instances()

    return model, detect


def _categories(predictor: Predictor) -> list[dict[str, Any]]:
    record = predictor.trained_on
    keypoints = {"keypoints": record.keypoint_names} if record and record.keypoint_names else {}
    return [{"id": i, "name": name, **keypoints} for i, name in predictor.classes.items()]
