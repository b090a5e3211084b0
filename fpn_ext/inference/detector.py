"""A trained detector as one object: pictures of any kind in, detections out."""

import functools
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.reading import as_rgb
from ..files.run_folder import taken_from
from .detections import Detections
from .eager import BoxFeatures, EagerModel
from .exported import SUFFIXES, ExportedDetector, check_suffix
from .inputs import Source, as_list, check_channels, is_source, picture_of
from .predictor import inference_config
from .tiles import OVERLAP, check_tiles, detect_in_tiles

BATCH_ON_GPU = 8
BATCHES_AHEAD = 4  # read and resized before the first of them is run: to find pictures of one size

logger = logging.getLogger(__name__)


class Given(NamedTuple):
    """A picture to detect on, and one's own boxes on it."""

    source: Source
    boxes: Any = None


class Detector:
    """A trained model that takes pictures of any kind and returns :class:`Detections`.

        detector = fpn_ext.Detector.load("output/mine")
        found = detector("photo.jpg", min_score=0.5)
        found.boxes, found.scores, found.class_names
        found.draw().save("photo_detections.png")

    Pictures are read, resized and normalised as in training and evaluation. Several are run in
    batches of one size after resizing, so none is padded for another; no more than
    ``4 * batch_size`` are in memory at a time. With ``batch_size`` 1, the default on a CPU, the
    results on a list are bit-identical to those one by one; in larger batches they are equal within
    rounding error, as matrix products of other shapes sum in another order.

    A detector holds no state between calls. It may be called from several threads, one at a time.

    Args:
        model: of :meth:`load`.
        batch_size: pictures run at once; None for 1 on a CPU, 8 on a GPU.

    Attributes:
        model: what runs the network.
        batch_size (int): pictures run at once.

    Raises:
        TypeError: ``batch_size`` is no int.
        ValueError: ``batch_size`` under 1.
    """

    def __init__(self, model: EagerModel | ExportedDetector, batch_size: int | None = None):
        if batch_size is not None:
            check_batch_size(batch_size)
        self.model = model
        self.batch_size = batch_size or (1 if model.device.type == "cpu" else BATCH_ON_GPU)

    @classmethod
    def load(
        cls,
        run: str | os.PathLike[str] | None = None,
        *,
        config_file: str | os.PathLike[str] | None = None,
        weights: str | os.PathLike[str] | None = None,
        opts: Sequence[str] = (),
        batch_size: int | None = None,
    ) -> "Detector":
        """A detector from the folder of a training, an exported file, or a config and a checkpoint.

        Loading executes no code from the files. What was chosen (weights, device, levels) is
        logged under ``fpn_ext.inference.detector`` at level INFO.

        Args:
            run: folder of a training (its ``OUTPUT_DIR``). Its weights are those of the best
                score, else averaged, else final, else the last checkpoint. Or an ``.onnx`` or
                ``.xml`` file of ``fpn-ext export``, run by its own runtime. Where that lies in the
                folder of a training whose weights are others by now, a warning is logged.
            config_file: a YAML config, in place of ``run``.
            weights: a checkpoint; None for that of the run, or of the config's MODEL.WEIGHTS.
            opts: ``KEY VALUE ...`` overrides, e.g. ``("MODEL.DEVICE", "cpu")``.
            batch_size: pictures run at once; None for 1 on a CPU, 8 on a GPU.

        Raises:
            FileNotFoundError: no such folder, exported file, config or checkpoint.
            ImportError: the runtime of an exported file is not installed.
            TypeError: neither ``run`` nor ``config_file``, or both; ``weights`` or ``opts`` for an
                exported file, which has its own; ``opts`` in one string; ``batch_size`` is no int.
            ValueError: what :func:`fpn_ext.prepare` finds wrong; a checkpoint that is not of this
                model; ``batch_size`` under 1.
        """
        if (run is None) == (config_file is None):
            raise TypeError(
                'Detector.load takes the folder of a training, load("output/mine"), a file of '
                'fpn-ext export, load("model.onnx"), or '
                'load(config_file="....yaml", weights="....pth")'
            )
        if isinstance(opts, str):
            raise TypeError(f"opts are words, KEY VALUE ..., in a list, got the string {opts!r}")
        if batch_size is not None:
            check_batch_size(batch_size)  # before the model is loaded
        if run is not None and _is_exported(Path(run)):
            check_suffix(Path(run))
            if weights is not None or opts:
                raise TypeError(f"{run} is an exported file: its weights and config are in it")
            return cls(ExportedDetector(Path(run)), batch_size)
        opts = [*opts, *(() if weights is None else ("MODEL.WEIGHTS", os.fspath(weights)))]
        if run is not None:
            file, opts = taken_from(Path(run), opts)
        else:
            file = os.fspath(config_file)  # type: ignore[arg-type]  # one of the two is given
        cfg, notes = inference_config(file, opts, of_run=run is not None)
        for note in notes:
            logger.info("%s", note)
        model = EagerModel(cfg)
        logger.info("weights: %s", model.weights)
        return cls(model, batch_size)

    @property
    def categories(self) -> dict[int, str]:
        """COCO category id of each class, in the order of their numbers, and its name."""
        return self.model.classes

    def __call__(
        self,
        images: Source | Sequence[Source],
        *,
        channels: str = "RGB",
        min_score: float = 0.0,
        proposals: Any = None,
    ) -> Any:
        """The detections on one picture, or on each of a list.

        Args:
            images: a path (JPEG, PNG, TIFF, ``.npy``, ...); a Pillow picture; a NumPy array,
                (H, W, C) uint8; a tensor, (C, H, W) uint8; or a list of any of these, of any
                length.
            channels: order of the channels of arrays and tensors: "RGB" (default), "BGR" (as
                OpenCV reads), "RGBA" or "L" (grey; an array may then be (H, W)). Files and Pillow
                pictures know theirs.
            min_score: from 0 to 1; detections under it are left out. The model has left out those
                under ``MODEL.ROI_HEADS.SCORE_THRESH_TEST``.
            proposals: your own boxes, which the heads score and refine in place of the RPN's:
                (R, 4), XYXY in pixels of the picture; for a list, a list of such. A Fast R-CNN
                needs them. They are clipped to the picture.

        Returns:
            :class:`Detections`; for a list, a list of them, in its order.

        Raises:
            OSError: a file that cannot be read, or not decoded; of a list all are looked for first.
            TypeError: an image of another class or dtype; proposals for a model without heads on
                boxes.
            ValueError: an image of another shape than ``channels`` has, or so long and thin that
                nothing is left of it at the model's size; boxes that are none; a model that needs
                proposals, without.
        """
        sources, is_one = as_list(images)
        missing = [path for path in sources if _is_path(path) and not os.path.isfile(path)]
        if missing:
            raise FileNotFoundError(f"no file {missing[0]} ({len(missing)} of {len(sources)})")
        if is_one and proposals is not None:
            proposals = [proposals]
        found = list(
            self.stream(sources, channels=channels, min_score=min_score, proposals=proposals)
        )
        return found[0] if is_one else found

    def stream(
        self,
        images: Iterable[Source],
        *,
        channels: str = "RGB",
        min_score: float = 0.0,
        proposals: Iterable[Any] | None = None,
    ) -> Iterator[Detections]:
        """As calling with a list, for any iterable: detections come in order, as they are made.

        Raises:
            TypeError: one picture, instead of several; and what calling raises.
            ValueError: ``proposals`` for more or fewer pictures; and what calling raises.
        """
        if is_source(images):
            raise TypeError(
                f"stream takes several pictures, got one ({type(images).__name__}): call the "
                "detector, or put it into a list"
            )
        check_channels(channels)
        check_min_score(min_score)
        self._check_takes(proposals is not None)
        if proposals is None:
            given = (Given(source) for source in images)
        else:
            given = (Given(*pair) for pair in _paired(images, proposals))
        return self._stream(given, channels, min_score)

    def features(self, image: Source, boxes: Any, *, channels: str = "RGB") -> BoxFeatures:
        """Features of boxes on one picture: pooled from the pyramid, and as the box head's vectors.

        Args:
            image: as in calling.
            boxes: (R, 4), XYXY in pixels of the picture. Clipped to it; R may be 0.
            channels: order of the channels of an array or a tensor.

        Returns:
            In the order of the boxes: ``pooled`` (R, C, h, w), ``vectors`` (R, D) and ``levels``
            (R,), the level k that each was pooled from.

        Raises:
            TypeError: no boxes; a model without a box head, or with several; an exported file; and
                what calling raises.
            ValueError: what calling raises.
        """
        check_channels(channels)
        if boxes is None:
            raise TypeError(
                "features are of boxes: (R, 4), XYXY in pixels of the picture, got None"
            )
        if isinstance(self.model, ExportedDetector):
            raise TypeError(
                "an exported file gives detections alone; features are of a Detector of the "
                "training's folder"
            )
        self._check_takes(True)
        self.model.check_has_features()
        return self.model.features(self._input(Given(image, boxes), channels))

    def tiled(
        self,
        image: Source,
        tile: int = 640,
        *,
        overlap: float = OVERLAP,
        channels: str = "RGB",
        min_score: float = 0.5,
    ) -> Detections:
        """The detections on a large picture, of its tiles and of the whole, merged by sahi.

        Args:
            image: as in calling.
            tile: side of a tile in pixels of the picture; each is resized as a picture is.
            overlap: of neighbouring tiles, as a part of their side.
            channels: order of the channels of an array or a tensor.
            min_score: detections under it are left out, before merging.

        Returns:
            Detections in pixels of the picture, without levels, masks and keypoints.

        Raises:
            ImportError: sahi is not installed; with the line that installs it.
            ValueError: a tile under 32 px; an overlap under 0 or over 0.9; a ``min_score`` outside
                of 0 to 1; a model of RGBA; and what calling raises.
        """
        check_channels(channels)
        check_min_score(min_score)
        self._check_takes(False)
        check_tiles(tile, overlap)
        rgb = as_rgb(self._picture(image, channels), self.model.pixel_format)
        return detect_in_tiles(self, rgb, tile, overlap, min_score)

    # Batches.

    def _stream(
        self, given: Iterator[Given], channels: str, min_score: float
    ) -> Iterator[Detections]:
        while ahead := list(itertools.islice(given, self.batch_size * BATCHES_AHEAD)):
            inputs = [self._input(one, channels) for one in ahead]
            found = self._infer(inputs)
            del inputs
            for one, detections in zip(ahead, found, strict=True):
                detections = detections[detections.scores >= min_score]
                yield Detections.of(detections, self.categories, self._reader(one, channels))

    def _infer(self, inputs: list[dict[str, Any]]) -> list[Any]:
        """The detections on each, run in batches of equal size."""
        of_size = defaultdict(list)
        for index, entry in enumerate(inputs):
            of_size[tuple(entry["image"].shape)].append(index)
        found: dict[int, Any] = {}
        for indices in of_size.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                detections = self.model.infer([inputs[index] for index in batch])
                found.update(zip(batch, detections, strict=True))
        return [found[index] for index in range(len(inputs))]

    def _input(self, given: Given, channels: str) -> dict[str, Any]:
        image = self._picture(given.source, channels)
        entry = self.model.network_input(image)
        if given.boxes is None:
            return entry
        boxes = checked_boxes(given.boxes, *image.shape[:2])
        return self.model.with_proposals(entry, boxes)

    def _picture(self, source: Source, channels: str) -> np.ndarray:
        image = picture_of(source, channels, self.model.pixel_format, self.model.value_range)
        self.model.check_size(image, str(source) if _is_path(source) else "the picture")
        return image

    def _reader(self, given: Given, channels: str) -> Any:
        form, values = self.model.pixel_format, self.model.value_range
        return functools.partial(_read_rgb, given.source, channels, form, values)

    def _check_takes(self, proposals: bool) -> None:
        if proposals and self.model.refuses_boxes:
            raise TypeError(f"{self.model.refuses_boxes}; call it without")
        if self.model.needs_proposals and not proposals:
            raise ValueError(
                "this model has no RPN (MODEL.LOAD_PROPOSALS): give it boxes on every picture, "
                "detector(image, proposals=boxes)"
            )


def checked_boxes(boxes: Any, height: int, width: int) -> np.ndarray:
    """Boxes as a (R, 4) float64 array.

    Args:
        boxes: (R, 4) array, tensor or nested list; XYXY in pixels of the picture.
        height, width: of the picture.

    Raises:
        ValueError: no numbers; another shape; a box that is not finite, has no area, or lies
            outside of the picture.
    """
    if isinstance(boxes, torch.Tensor):
        boxes = boxes.detach().cpu().numpy()
    try:
        array = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError) as error:  # rows of several lengths, words
        raise ValueError(
            f"boxes must be numbers, (R, 4), XYXY in pixels of the picture: {error}"
        ) from error
    if array.size == 0:
        array = array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes must be (R, 4), XYXY in pixels of the picture, got {array.shape}")
    x0, y0, x1, y1 = array.T
    good = np.isfinite(array).all(axis=1) & (x0 < x1) & (y0 < y1)
    good &= (x0 < width) & (y0 < height) & (x1 > 0) & (y1 > 0)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"box {row}, {array[row].tolist()}, is none on a picture of {width} x {height}: boxes "
            "are XYXY in its pixels, x0 < x1 and y0 < y1, at least in part on it"
        )
    return array


def _is_exported(path: Path) -> bool:
    """Whether it is meant as an exported file, and not as the folder of a training."""
    return path.is_file() or (path.suffix in SUFFIXES and not path.is_dir())


def _read_rgb(
    source: Source, channels: str, pixel_format: str, values: Sequence[float]
) -> np.ndarray:
    """The picture to draw on: of names and numbers alone, so that detections can be pickled."""
    return as_rgb(picture_of(source, channels, pixel_format, values), pixel_format)


def check_batch_size(batch_size: Any) -> None:
    """Raise unless it is an integer from 1."""
    if not isinstance(batch_size, int | np.integer) or isinstance(batch_size, bool):
        raise TypeError(f"batch_size must be an int, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def check_min_score(min_score: Any) -> None:
    """Raise ValueError unless it is a number from 0 to 1; NaN would leave out everything."""
    if not isinstance(min_score, int | float | np.number) or not 0 <= min_score <= 1:
        raise ValueError(f"min_score must be a number from 0 to 1, got {min_score!r}")


def _is_path(source: Any) -> bool:
    return isinstance(source, str | os.PathLike)


def _paired(images: Iterable[Source], proposals: Iterable[Any]) -> Iterator[tuple[Source, Any]]:
    end: Any = object()
    for image, boxes in itertools.zip_longest(images, proposals, fillvalue=end):
        if image is end or boxes is end or boxes is None:
            raise ValueError("proposals must be a list with the boxes of each picture, in order")
        yield image, boxes
