"""Prediction on generated videos and fake cameras."""

import json
import re
import resource
import sys
import types
import weakref
from pathlib import Path

import fpn_ext
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fpn_ext.__main__ import main
from fpn_ext.inference.pictures import predict
from fpn_ext.inference.predictor import load_inference_config
from fpn_ext.inference.video import predict_video
from PIL import Image

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("INPUT.MIN_SIZE_TEST", "96"),
    *("TEST.DETECTIONS_PER_IMAGE", "5"),
]
RED = (200, 20, 10)


@pytest.fixture
def cv2():
    return pytest.importorskip("cv2", reason="OpenCV, the extra video, is not installed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory, demo_images):
    torch.manual_seed(0)
    model = build_model(fpn_ext.load_config(DEMO, SMALL))
    for name, tensor in model.state_dict().items():
        if "predictor" in name:
            tensor.mul_(10)
    file = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict()}, file)
    return ["MODEL.WEIGHTS", str(file)]


def picture(number, size=(128, 96)):
    """A red square moving right, (H, W, 3) RGB."""
    image = np.full((size[1], size[0], 3), 90, dtype=np.uint8)
    image[30:70, 10 + 4 * number : 50 + 4 * number] = RED
    return image


def write_video(cv2, file, images, fps=10.0, codec="MJPG"):
    size = (images[0].shape[1], images[0].shape[0])
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*codec), fps, size)
    assert writer.isOpened()
    for image in images:
        writer.write(np.ascontiguousarray(image[:, :, ::-1]))
    writer.release()
    return file


def read_video(cv2, file):
    """Its frames, RGB, and its frame rate."""
    capture = cv2.VideoCapture(str(file))
    frames = []
    while True:
        there, frame = capture.read()
        if not there:
            return frames, capture.get(cv2.CAP_PROP_FPS)
        frames.append(frame[:, :, ::-1])


@pytest.fixture
def video(cv2, tmp_path):
    return write_video(cv2, tmp_path / "in.avi", [picture(i) for i in range(6)])


class Stub:
    """Stand-in for a predictor: detects red pixels in BGR."""

    model = None

    def __init__(self):
        self.classes = {1: "red"}
        self.frames = []
        self.most_alive = 0

    def __call__(self, frame):
        self.frames.append(weakref.ref(frame))
        self.most_alive = max(self.most_alive, sum(f() is not None for f in self.frames))
        rows, columns = ((frame[:, :, 2] > 150) & (frame[:, :, 0] < 80)).nonzero()
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else []
        found = Instances(frame.shape[:2])
        found.pred_boxes = Boxes(torch.tensor(box, dtype=torch.float32).reshape(-1, 4))
        found.scores = torch.ones(len(found.pred_boxes))
        found.pred_classes = torch.zeros(len(found.pred_boxes), dtype=torch.int64)
        found.proposal_level = 3 + found.pred_classes
        found.pooled_level = 4 + found.pred_classes
        return {"instances": found}


@pytest.fixture
def stub(monkeypatch):
    stub = Stub()
    monkeypatch.setattr("fpn_ext.inference.video.build_predictor", lambda cfg: stub)
    return stub


@pytest.fixture
def cfg(demo_images):
    return fpn_ext.load_config(DEMO, SMALL)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_from_the_command_line(cv2, video, weights, tmp_path, capsys):
    output, lines = tmp_path / "out" / "drawn.mp4", tmp_path / "lines" / "found.jsonl"
    assert main([
        "video", "--config-file", DEMO, "--input", str(video),
        "--output", str(output), "--json", str(lines),
        "--min-score", "0.0", "--label-levels", *SMALL, *weights,
    ]) == 0  # fmt: skip
    found = lines_of(lines)
    assert "30 detections on 6 frame(s), " in capsys.readouterr().out
    assert [entry["frame"] for entry in found] == list(range(6))
    assert [entry["seconds"] for entry in found] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    for entry in found:
        assert (entry["width"], entry["height"]) == (128, 96)
        assert len(entry["detections"]) == 5
        for detection in entry["detections"]:
            assert detection["category"] and detection["category_id"] in range(1, 6)
            assert 2 <= detection["pooled_level"] <= 5 and 2 <= detection["proposal_level"] <= 6
            x, y, width, height = detection["bbox"]
            assert x >= 0 and y >= 0 and x + width <= 128.001 and y + height <= 96.001
    frames, fps = read_video(cv2, output)
    assert (len(frames), fps) == (6, 10.0)
    assert frames[0].shape == (96, 128, 3)
    assert sorted(f.name for f in output.parent.iterdir()) == ["drawn.mp4"]


def test_the_model_sees_what_it_sees_of_a_picture(cv2, video, weights, tmp_path):
    """A frame and a PNG of it give the same detections; with red and blue exchanged, others."""
    cfg = load_inference_config(DEMO, [*SMALL, *weights])
    predict_video(cfg, video, json_lines=tmp_path / "found.jsonl", min_score=0.0)
    frame = read_video(cv2, video)[0][2]
    assert np.abs(frame[50, 40].astype(int) - RED).max() < 20
    Image.fromarray(np.ascontiguousarray(frame)).save(tmp_path / "same.png")
    Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1])).save(tmp_path / "blue.png")
    pictures = [tmp_path / "same.png", tmp_path / "blue.png"]
    annotations = predict(cfg, pictures, tmp_path / "out", min_score=0.0)["annotations"]
    same, blue = (
        [(a["bbox"], a["score"], a["category_id"]) for a in annotations if a["image_id"] == i]
        for i in (1, 2)
    )
    of_video = lines_of(tmp_path / "found.jsonl")[2]["detections"]
    assert [(d["bbox"], d["score"], d["category_id"]) for d in of_video] == same != blue


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
def test_red_is_found_and_stays_red(cv2, cfg, stub, video, tmp_path, suffix):
    output, lines = tmp_path / f"drawn{suffix}", tmp_path / "found.jsonl"
    summary = predict_video(cfg, video, output, lines)
    assert (summary.frames, summary.detections) == (6, 6)
    for i, entry in enumerate(lines_of(lines)):
        (detection,) = entry["detections"]
        np.testing.assert_allclose(detection["bbox"], [10 + 4 * i, 30, 40, 40], atol=2)
        assert (detection["proposal_level"], detection["pooled_level"]) == (3, 4)
    frames, fps = read_video(cv2, output)
    assert (len(frames), fps) == (6, 10.0)
    for i, frame in enumerate(frames):
        assert np.abs(frame[55, 30 + 4 * i].astype(int) - RED).max() < 30
    red, _, blue = frames[0][17:27, 12:40].reshape(-1, 3).mean(axis=0)  # the label on P4's colour
    assert blue > red + 40


def test_memory_does_not_grow_with_the_video(cv2, cfg, stub, tmp_path):
    file = write_video(cv2, tmp_path / "long.avi", [picture(i % 6, (64, 80)) for i in range(120)])
    summary = predict_video(cfg, file, tmp_path / "out.avi", tmp_path / "found.jsonl")
    assert summary.frames == len(stub.frames) == 120
    assert stub.most_alive <= 2


def test_without_detections(cv2, cfg, stub, tmp_path):
    file = write_video(cv2, tmp_path / "grey.avi", [np.full((96, 128, 3), 90, np.uint8)] * 2)
    summary = predict_video(cfg, file, tmp_path / "out.avi", tmp_path / "found.jsonl")
    assert (summary.frames, summary.detections) == (2, 0)
    assert [entry["detections"] for entry in lines_of(tmp_path / "found.jsonl")] == [[], []]


def test_so_many_frames_at_another_rate(cv2, cfg, stub, video, tmp_path):
    output, lines = tmp_path / "out.avi", tmp_path / "found.jsonl"
    assert predict_video(cfg, video, output, lines, num_frames=3, fps=4).frames == 3
    assert [entry["seconds"] for entry in lines_of(lines)] == [0.0, 0.25, 0.5]
    frames, fps = read_video(cv2, output)
    assert (len(frames), fps) == (3, 4.0)


def test_ctrl_c_keeps_what_was_made(cv2, cfg, stub, video, tmp_path, monkeypatch, caplog):
    def interrupted(self, frame):
        if len(self.frames) == 2:
            raise KeyboardInterrupt
        return original(self, frame)

    original = Stub.__call__
    monkeypatch.setattr(Stub, "__call__", interrupted)
    summary = predict_video(cfg, video, tmp_path / "out.avi", tmp_path / "found.jsonl")
    assert summary.frames == 2 and "ended by Ctrl-C after 2 frame(s)" in caplog.text
    assert len(read_video(cv2, tmp_path / "out.avi")[0]) == 2
    assert len(lines_of(tmp_path / "found.jsonl")) == 2


@pytest.mark.parametrize("done", [0, 2])
def test_an_error_keeps_what_was_made(cv2, cfg, stub, video, tmp_path, monkeypatch, caplog, done):
    """Whole files of two frames; none at all where the first one fails."""

    def failing(self, frame):
        if len(self.frames) == done:
            raise RuntimeError("out of memory")
        return original(self, frame)

    original = Stub.__call__
    monkeypatch.setattr(Stub, "__call__", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_video(cfg, video, tmp_path / "out.avi", tmp_path / "found.jsonl")
    if not done:
        assert [f.name for f in tmp_path.iterdir()] == ["in.avi"]
        return
    assert "ended by an error after 2 frame(s), which are kept" in caplog.text
    assert len(read_video(cv2, tmp_path / "out.avi")[0]) == 2
    assert len(lines_of(tmp_path / "found.jsonl")) == 2


def test_a_video_cut_short_is_said(cv2, cfg, stub, tmp_path, caplog):
    whole = write_video(cv2, tmp_path / "whole.avi", [picture(i % 6) for i in range(20)])
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    summary = predict_video(cfg, cut, json_lines=tmp_path / "found.jsonl")
    assert 5 < summary.frames < 20
    assert f"cut.avi: {summary.frames} frames could be read, 20 are to be there" in caplog.text


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
def test_a_full_disk_is_said(cv2, cfg, stub, tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, size=(12, 96, 128, 3), dtype=np.uint8)
    file = write_video(cv2, tmp_path / "in.avi", list(noise))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(OSError, match=r"the last of 12 frames is not in the file.*disk full"):
            predict_video(cfg, file, tmp_path / f"out{suffix}", tmp_path / "found.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    partial = f"out.partial{suffix}"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["found.jsonl", "in.avi", partial]
    assert len(lines_of(tmp_path / "found.jsonl")) == 12, "they are whole"


# What cannot be read or made


@pytest.mark.parametrize("content", [b"", b"not a video", b"RIFF\x00\x00\x00\x00AVI LIST"])
def test_a_file_that_is_no_video(cv2, cfg, stub, tmp_path, content):
    (tmp_path / "in.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"--input .*in\.mp4 is no video that OpenCV can read"):
        predict_video(cfg, tmp_path / "in.mp4", json_lines=tmp_path / "found.jsonl")
    assert not (tmp_path / "found.jsonl").exists()


def test_a_video_without_frames(cv2, cfg, stub, video, tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: Camera([], cv2))
    with pytest.raises(ValueError, match=r"in\.avi: OpenCV reads no frame from it"):
        predict_video(cfg, video, tmp_path / "out.avi", tmp_path / "found.jsonl")
    assert [f.name for f in tmp_path.iterdir()] == ["in.avi"]


def test_an_unknown_camera(cv2, cfg, stub, tmp_path):
    with pytest.raises(ValueError, match=r"--camera 77: .*There is no camera of this number"):
        predict_video(cfg, 77, json_lines=tmp_path / "found.jsonl")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, r"nothing to make: name --output VIDEO, --json FILE or --show"),
        ({"output": Path("a.gif")}, r"--output a\.gif: .*\.mp4, \.mkv, \.avi"),
        ({"json_lines": Path("a"), "num_frames": 0}, r"--num-frames must be at least 1, got 0"),
        ({"json_lines": Path("a"), "fps": 0.0}, r"--fps must be a positive number .* got 0\.0"),
        ({"json_lines": Path("a"), "fps": float("nan")}, r"--fps must be .* got nan"),
    ],
)
def test_wishes_that_make_no_sense(cv2, cfg, stub, video, more, message):
    with pytest.raises(ValueError, match=message):
        predict_video(cfg, video, **more)


def test_the_video_to_read_is_not_written_over(cv2, cfg, stub, video, tmp_path):
    content = video.read_bytes()
    (tmp_path / "link.avi").symlink_to(video)
    for wishes in ({"output": tmp_path / "link.avi"}, {"json_lines": video}):
        with pytest.raises(ValueError, match="is the video to read; name another file"):
            predict_video(cfg, video, **wishes)
    assert video.read_bytes() == content


def test_no_such_file(cv2, cfg, stub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--input .*none\.mp4: no such file"):
        predict_video(cfg, tmp_path / "none.mp4", tmp_path / "out.avi")


def test_a_rate_that_cannot_be_written(cv2, cfg, stub, video, tmp_path):
    with pytest.raises(ValueError, match=r"cannot write such a file of 128x96 px.*another --fps"):
        predict_video(cfg, video, tmp_path / "out.mp4", fps=1e9)


def test_windows_need_an_opencv_that_has_them(cv2, cfg, stub, video):
    if "GUI:                           NONE" not in cv2.getBuildInformation():
        pytest.skip("this OpenCV has windows")
    with pytest.raises(ValueError, match=r"--show: .*pip install opencv-contrib-python; or leave"):
        predict_video(cfg, video, show=True)


def test_without_opencv(monkeypatch, cfg, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    message = r"needs OpenCV \(cv2\): pip install -e '\.\[video\]'"
    with pytest.raises(ImportError, match=message):
        predict_video(cfg, tmp_path / "in.mp4", tmp_path / "out.mp4")
    assert main(["video", "--config-file", "no.yaml", "--camera", "0", "--show"]) == 2
    assert re.search(message, capsys.readouterr().err)


# Cameras


class Camera:
    """Stand-in for cv2.VideoCapture: a camera with these frames and no frame rate."""

    def __init__(self, images, cv2, fps=0.0):
        self.images = list(images)
        self.values = {cv2.CAP_PROP_FPS: fps, cv2.CAP_PROP_FRAME_COUNT: -1.0}
        self.released = False

    def isOpened(self):
        return True

    def get(self, key):
        return self.values[key]

    def set(self, key, value):
        self.values[key] = value

    def read(self):
        if not self.images:
            return False, None
        return True, np.ascontiguousarray(self.images.pop(0)[:, :, ::-1])

    def release(self):
        self.released = True


@pytest.fixture
def camera(cv2, monkeypatch):
    """Camera 0, with a frame every half second on a fake clock."""
    camera = Camera([picture(i) for i in range(4)], cv2)
    original = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda s: camera if s == 0 else original(s))
    clock = iter(np.arange(100.0, 200.0, 0.5).tolist())
    monkeypatch.setattr(
        "fpn_ext.inference.video.time", types.SimpleNamespace(perf_counter=lambda: next(clock))
    )
    return camera


def test_a_cameras_video_plays_as_fast_as_it_was_filmed(cv2, cfg, stub, camera, tmp_path, caplog):
    summary = predict_video(cfg, 0, tmp_path / "out.avi", tmp_path / "found.jsonl", fps=8)
    assert summary.frames == 4 and camera.released
    assert [e["seconds"] for e in lines_of(tmp_path / "found.jsonl")] == [0.0, 0.5, 1.0, 1.5]
    frames, fps = read_video(cv2, tmp_path / "out.avi")
    assert (len(frames), fps) == (13, 8.0), "1.5 seconds, and the last"
    assert "camera 0 gives no more frames, after 4" in caplog.text


def test_a_rate_that_is_not_known_is_said(cv2, cfg, stub, camera, tmp_path, caplog):
    predict_video(cfg, 0, json_lines=tmp_path / "found.jsonl", num_frames=2)
    assert "0 does not say its frame rate: 25 frames a second are assumed (--fps)" in caplog.text


def test_frames_of_several_sizes(cv2, cfg, stub, camera, tmp_path):
    camera.images[2] = picture(0, (64, 80))
    with pytest.raises(ValueError, match=r"after frames of 128x96 px comes one of 64x80"):
        predict_video(cfg, 0, tmp_path / "out.avi")
    frames, _ = read_video(cv2, tmp_path / "out.avi")
    assert len(frames) >= 1 and all(frame.shape == (96, 128, 3) for frame in frames)


@pytest.mark.parametrize("way", ["q", "Esc", "closed", "end"])
def test_a_window(cv2, cfg, stub, camera, monkeypatch, way):
    """Stand-in for the window: receives BGR frames until q, Esc, or the user closes it."""
    shown, closed = [], []
    keys = {"q": ord("q"), "Esc": 27}
    monkeypatch.setattr(cv2, "namedWindow", lambda *arguments: None)
    monkeypatch.setattr(cv2, "imshow", lambda name, frame: shown.append(frame))
    monkeypatch.setattr(cv2, "waitKey", lambda wait: keys.get(way, -1) if len(shown) == 2 else -1)
    monkeypatch.setattr(
        cv2, "getWindowProperty", lambda *a: 0.0 if way == "closed" and len(shown) == 2 else 1.0
    )
    monkeypatch.setattr(cv2, "destroyWindow", closed.append)
    summary = predict_video(cfg, 0, show=True)
    assert summary.frames == len(shown) == (4 if way == "end" else 2)
    assert len(closed) == 1 and camera.released
    assert shown[0][55, 30].tolist() == list(RED[::-1])
