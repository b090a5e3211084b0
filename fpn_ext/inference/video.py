"""Detect objects in a video or camera stream: an annotated video, one JSON line per frame.

    fpn-ext video --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
        --input street.mp4 --output out/street.mp4 --json out/street.jsonl \\
        MODEL.WEIGHTS output/demo_R_18/model_final.pth
    fpn-ext video --config-file ... --camera 0 --show MODEL.WEIGHTS ...

OpenCV, an optional extra, reads and writes the frames; boxes are drawn as by ``fpn-ext predict``.
Only one frame is held in memory at a time.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from ..data.reading import from_rgb
from ..files.atomic import move_into_place, replacing
from ..reporting.coco_json import annotations_of
from ..reporting.drawing import ColorBy, draw_detections
from ..speed.optimize import model_for_inference
from .predictor import build_predictor, detections_of

logger = logging.getLogger(__name__)

# Formats that OpenCV's wheels can write.
CODECS = {".mp4": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
USUAL_FPS = 25.0
WINDOW = "fpn_ext: q ends"
KEYS_TO_END = (ord("q"), 27)  # and Esc


@dataclass
class Summary:
    """Statistics of :func:`predict_video`: frames, detections, time taken."""

    frames: int = 0
    detections: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.detections} detections on {self.frames} frame(s), "
            f"{self.frames / self.seconds:.1f} frames a second"
        )


def predict_video(
    cfg: CfgNode,
    source: Path | int,
    output: Path | None = None,
    json_lines: Path | None = None,
    *,
    min_score: float = 0.5,
    label_levels: bool = False,
    show: bool = False,
    num_frames: int | None = None,
    fps: float | None = None,
) -> Summary:
    """Run detection on every frame; Ctrl-C, or q in the window, stops it and keeps the output.

    So does an error after the first frame, which is raised once the files are in place.

    Each JSON line describes one frame: ``frame`` (from 0), ``seconds`` since the first, ``width``,
    ``height``, and ``detections``: as from
    :func:`fpn_ext.reporting.coco_json.annotations_of`, plus the ``category`` name; boxes are XYWH
    in pixels of the frame. Camera frames are timestamped by the clock, file frames by the frame
    rate. The video plays at the speed of the source: a camera frame is repeated until the next one
    has been processed.

    Args:
        cfg: from :func:`fpn_ext.inference.predictor.load_inference_config`.
        source: a video file, or a camera index from 0.
        output: the video to write, .mp4, .mkv or .avi; OpenCV drops the last row or column of odd
            sizes. Written atomically.
        json_lines: the JSON Lines file to write, atomically.
        min_score: of detections to draw and write.
        label_levels: write ``p3>p4`` on each box: proposed by P3, pooled from P4.
        show: display in a window; needs an OpenCV with GUI support and a screen.
        num_frames: stop after this many; None for all.
        fps: frames per second, overriding the source's.

    Raises:
        ImportError: OpenCV is not installed.
        FileNotFoundError: no such file.
        ValueError: not a video, no such camera, no frames, ``output`` cannot be written, no output
            requested, no GUI support; frames of different sizes for one ``output``.
        OSError: the video could not be written completely.
    """
    cv2 = opencv()
    _check_wishes(source, output, json_lines, show, num_frames, fps)
    with contextlib.ExitStack() as stack:
        frames = stack.enter_context(_open(cv2, source, fps))
        if show:
            stack.enter_context(_window(cv2))
        # The JSON lines are closed first, so that they survive a failure to finish the video.
        writer = stack.enter_context(_writing(cv2, output, frames.fps)) if output else None
        lines = stack.enter_context(replacing(json_lines)) if json_lines else None
        predictor = build_predictor(cfg)
        categories = predictor.classes
        predictor.model = model_for_inference(cfg, predictor.model)
        summary = Summary()
        failure: Exception | None = None
        began = time.perf_counter()
        try:
            for seconds, frame in frames:
                rgb = np.ascontiguousarray(frame[:, :, ::-1])  # OpenCV's are BGR
                found = detections_of(predictor(from_rgb(rgb, cfg.INPUT.FORMAT)))
                found = found[found.scores >= min_score]
                if lines:
                    entry = {"frame": summary.frames, "seconds": round(seconds, 6)}
                    entry |= _entry(found, categories)
                    lines.write(json.dumps(entry).encode() + b"\n")
                summary.frames += 1
                summary.detections += len(found)
                if writer or show:
                    names = list(categories.values())
                    color_by: ColorBy = "level" if label_levels else "class"
                    drawn = draw_detections(rgb, found, names, 1.0, label_levels, color_by)
                    drawn_frame = np.ascontiguousarray(np.asarray(drawn)[:, :, ::-1])
                    if writer:
                        writer.write(drawn_frame, seconds)
                    if show and not _shown(cv2, drawn_frame):
                        break
                if summary.frames == num_frames:
                    break
        except KeyboardInterrupt:
            logger.warning("ended by Ctrl-C after %d frame(s)", summary.frames)
        except Exception as error:
            if not summary.frames:
                raise
            failure = error  # what was made so far is whole, and is put into place first
            logger.error("ended by an error after %d frame(s), which are kept", summary.frames)
        summary.seconds = time.perf_counter() - began
    if failure:
        raise failure
    return summary


def opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "prediction on videos needs OpenCV (cv2): pip install -e '.[video]' in this project's "
            "folder, or pip install opencv-contrib-python-headless; for --show, which opens a "
            f"window, pip install opencv-contrib-python instead ({error})"
        ) from error
    return cv2


def _check_wishes(
    source: Path | int,
    output: Path | None,
    json_lines: Path | None,
    show: bool,
    num_frames: int | None,
    fps: float | None,
) -> None:
    if not (output or json_lines or show):
        raise ValueError("nothing to make: name --output VIDEO, --json FILE or --show")
    if output and output.suffix.lower() not in CODECS:
        raise ValueError(
            f"--output {output}: videos are written as {', '.join(CODECS)}, by the file's suffix"
        )
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"--num-frames must be at least 1, got {num_frames}")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"--fps must be a positive number of frames a second, got {fps}")
    if isinstance(source, int):
        return
    if not source.is_file():
        raise FileNotFoundError(f"--input {source}: no such file")
    for option, file in (("--output", output), ("--json", json_lines)):
        if file and file.exists() and file.samefile(source):
            raise ValueError(f"{option} {file} is the video to read; name another file")


def _entry(found: Any, categories: dict[int, str]) -> dict[str, Any]:
    """The part of a JSON line that does not depend on time."""
    height, width = found.image_size
    annotations = annotations_of(found, list(categories))
    detections = [{"category": categories[a["category_id"]], **a} for a in annotations]
    return {"width": width, "height": height, "detections": detections}


class _Frames:
    """Frames of an opened file or camera: (seconds since the first, (H, W, 3) uint8 BGR)."""

    def __init__(self, cv2: Any, capture: Any, source: Path | int, fps: float | None):
        self.capture = capture
        self.source = source
        said = capture.get(cv2.CAP_PROP_FPS)
        if fps is None and not (math.isfinite(said) and said > 0):
            logger.warning(
                "%s does not say its frame rate: %g frames a second are assumed (--fps)",
                source,
                USUAL_FPS,
            )
            said = USUAL_FPS
        self.fps = fps or said
        said_count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.said_count = int(said_count) if 0 < said_count < 2**53 else 0

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        count = 0
        began = 0.0
        while True:
            there, frame = self.capture.read()
            if not there:
                break
            now = time.perf_counter()
            began = began or now
            yield (now - began if isinstance(self.source, int) else count / self.fps), frame
            count += 1
        if count == 0:
            raise ValueError(f"{_named(self.source)}: OpenCV reads no frame from it")
        if isinstance(self.source, int):
            logger.warning("camera %d gives no more frames, after %d", self.source, count)
        elif count < self.said_count:
            logger.warning(
                "%s: %d frames could be read, %d are to be there by what the file says of itself",
                self.source,
                count,
                self.said_count,
            )


@contextlib.contextmanager
def _open(cv2: Any, source: Path | int, fps: float | None) -> Iterator[_Frames]:
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    try:
        if not capture.isOpened():
            if isinstance(source, int):
                raise ValueError(
                    f"--camera {source}: OpenCV cannot open it. There is no camera of this number "
                    "(the first is 0), another program has it, or this user may not read it"
                )
            raise ValueError(f"--input {source} is no video that OpenCV can read")
        if isinstance(source, int):
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the latest frame, not a stale one
        yield _Frames(cv2, capture, source, fps)
    finally:
        capture.release()


def _named(source: Path | int) -> str:
    return f"--camera {source}" if isinstance(source, int) else f"--input {source}"


class _Writer:
    """Writes frames of one size at a constant rate, repeating each until the next is due."""

    def __init__(self, cv2: Any, file: Path, output: Path, fps: float):
        self.cv2, self.file, self.output, self.fps = cv2, file, output, fps
        self.writer: Any = None  # opened at the first frame, for its size
        self.size = (0, 0)
        self.written = 0

    def write(self, frame: np.ndarray, seconds: float) -> None:
        size = (frame.shape[1], frame.shape[0])
        if self.writer is None:
            codec = self.cv2.VideoWriter_fourcc(*CODECS[self.output.suffix.lower()])
            self.writer = self.cv2.VideoWriter(str(self.file), codec, self.fps, size)
            self.size = size
            if not self.writer.isOpened():
                raise ValueError(
                    f"--output {self.output}: OpenCV cannot write such a file of "
                    f"{size[0]}x{size[1]} px at {self.fps:g} frames a second. Try another suffix "
                    f"({', '.join(CODECS)}), a folder that can be written, another --fps"
                )
        if size != self.size:  # OpenCV would silently drop the frame
            raise ValueError(
                f"--output {self.output}: after frames of {self.size[0]}x{self.size[1]} px comes "
                f"one of {size[0]}x{size[1]}, and a video has one size; leave --output out "
                "(--json takes them all)"
            )
        while self.written < round(seconds * self.fps) + 1:
            self.writer.write(frame)
            self.written += 1

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()


@contextlib.contextmanager
def _writing(cv2: Any, output: Path, fps: float) -> Iterator[_Writer]:
    """A writer whose file gets its final name once complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.stem}.partial{output.suffix}")  # OpenCV needs the suffix
    writer = _Writer(cv2, partial, output, fps)
    try:
        yield writer
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    writer.close()
    if not writer.written:  # ended before the first frame
        return
    if not _is_whole(cv2, partial, writer.written):
        raise OSError(
            f"--output {output}: the last of {writer.written} frames is not in the file. Is the "
            f"disk full? What could be written is in {partial}"
        )
    move_into_place(partial, output)


def _is_whole(cv2: Any, file: Path, count: int) -> bool:
    """Whether the last of ``count`` frames is readable: OpenCV does not report write failures."""
    written = cv2.VideoCapture(str(file))
    try:
        if written.get(cv2.CAP_PROP_FRAME_COUNT) < count - 1:  # .mkv stores a duration
            return False
        written.set(cv2.CAP_PROP_POS_FRAMES, count - 1)
        return written.read()[0]
    finally:
        written.release()


@contextlib.contextmanager
def _window(cv2: Any) -> Iterator[None]:
    try:
        cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    except cv2.error as error:
        raise ValueError(
            "--show: this OpenCV cannot open windows. Its headless builds have none: pip uninstall "
            "opencv-contrib-python-headless, pip install opencv-contrib-python; or leave --show "
            f"out and name --output ({str(error).strip()})"
        ) from error
    try:
        yield
    finally:
        cv2.destroyWindow(WINDOW)


def _shown(cv2: Any, frame: np.ndarray) -> bool:
    """Show a frame; False once the user quits."""
    cv2.imshow(WINDOW, frame)
    key = cv2.waitKey(1) & 0xFF
    return key not in KEYS_TO_END and cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) >= 1
