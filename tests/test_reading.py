"""Pictures of every depth and kind, each with values worked out by hand."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from fpn_ext.data import reading
from fpn_ext.data.mapper import PictureMapper
from fpn_ext.data.picture_files import look_at
from fpn_ext.data.reading import num_pages, read_picture, value_range
from PIL import Image
from unsafe import touches


def test_a_picture_of_8_bits_is_what_detectron2_reads(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    for name, mode in (("a.png", "RGBA"), ("b.png", "RGB"), ("c.png", "L"), ("d.tif", "RGB")):
        Image.fromarray(pixels).convert(mode).save(tmp_path / name)
        for pixel_format in ("BGR", "RGB", "L", "RGBA"):
            read = read_picture(tmp_path / name, pixel_format)
            np.testing.assert_array_equal(read, read_image(str(tmp_path / name), pixel_format))
            assert read.dtype == np.uint8


@pytest.mark.parametrize("at_a_time", [1, 20, 70, 10**9])  # pixels: a row, two, the whole
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_large_picture_read_by_rows_is_the_same(tmp_path, monkeypatch, orientation, at_a_time):
    """The rows of the picture as it is turned, in every mode and format."""
    monkeypatch.setattr(reading, "PIXELS_AT_A_TIME", at_a_time)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ("RGBA", "RGB", "L", "P", "1", "LA"):
        file = tmp_path / f"{mode}.png"
        Image.fromarray(pixels).convert(mode).save(file, exif=exif)
        for pixel_format in ("BGR", "RGB", "L", "RGBA", "YUV-BT.601"):
            expected = read_image(str(file), pixel_format)
            np.testing.assert_array_equal(read_picture(file, pixel_format), expected)


@pytest.mark.parametrize(
    ("array", "values", "expected"),
    [
        (np.array([[0, 255]], np.uint8), (), [[0, 255]]),
        (np.array([[0, 65535, 257 * 3]], np.uint16), (), [[0, 255, 3]]),
        (np.array([[100, 355, 101]], np.uint16), (100, 355), [[0, 255, 1]]),
        (np.array([[0.0, 1.0, 0.2]], np.float32), (0, 1), [[0, 255, 51]]),
        (np.array([[-1.0, 1.0, 0.0]], np.float64), (-1, 1), [[0, 255, 128]]),  # 127.5, to even
    ],
)
def test_an_array_is_scaled_to_the_range(tmp_path, array, values, expected):
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.npy", "L", values)[:, :, 0], expected)
    rgb = read_picture(tmp_path / "a.npy", "RGB", values)
    assert rgb.shape == (1, array.shape[1], 3)
    np.testing.assert_array_equal(rgb[:, :, 1], expected)


def test_channels_of_an_array_are_rgb(tmp_path):
    pixels = np.array([[[1, 2, 3]]], np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    assert read_picture(tmp_path / "a.npy", "BGR").tolist() == [[[3, 2, 1]]]
    np.save(tmp_path / "b.npy", np.dstack([pixels, [[9]]]).astype(np.uint8))
    assert read_picture(tmp_path / "b.npy", "RGBA").tolist() == [[[1, 2, 3, 9]]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_file_of_16_bits_is_scaled_not_clipped(tmp_path, name, caplog):
    pixels = np.array([[0, 300, 65535]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / name)
    assert read_picture(tmp_path / name, "L")[0, :, 0].tolist() == [0, 1, 255]
    assert read_picture(tmp_path / name, "L", (0, 65535))[0, :, 0].tolist() == [0, 1, 255]
    with pytest.raises(ValueError, match=r"go from 0 to 65535, outside of 0 to 300; .*VALUE_RANGE"):
        read_picture(tmp_path / name, "L", (0, 300))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0.5]], np.float32), r"set INPUT\.FPN_EXT\.VALUE_RANGE"),
        (np.zeros((2, 2, 5), np.uint8), r"5 channels in \(H, W, C\) \(2, 2, 5\)"),
        (np.zeros(4, np.uint8), r"a picture is \(H, W\) or \(H, W, C\), got \(4,\)"),
        (np.zeros((0, 4), np.uint8), r"got \(0, 4\)"),
        (np.array([["a"]]), r"values of type <U1"),
    ],
)
def test_an_array_that_is_no_picture_is_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        read_picture(tmp_path / "a.npy", "L")


def test_nan_is_outside_of_every_range(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="its values go from nan to nan"):
        read_picture(tmp_path / "a.npy", "L", (0, 1))


def test_a_pickled_array_is_not_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[touches(tmp_path / "canary")]], dtype=object))
    with pytest.raises(ValueError, match="Arrays are read as data alone"):
        read_picture(tmp_path / "a.npy", "L")
    assert not (tmp_path / "canary").exists()
    assert look_at(str(tmp_path / "a.npy")).kind == "unreadable-image"


def test_every_page_of_a_tiff_is_a_picture(tmp_path):
    pages = [Image.new("L", (4 + i, 3), 10 * i) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert num_pages(tmp_path / "a.tif") == 3
    for i in range(3):
        read = read_picture(tmp_path / "a.tif", "L", page=i)
        assert read.shape == (3, 4 + i, 1) and (read == 10 * i).all()


def test_the_check_of_a_dataset_knows_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 3), np.uint8))
    assert look_at(str(tmp_path / "a.npy")).size == (4, 3)


@pytest.mark.parametrize("given", [[1], [1, 1], [2, 1], [0, float("inf")]])
def test_a_range_has_a_low_and_a_high_end(small_cfg, given):
    small_cfg.INPUT.FPN_EXT.VALUE_RANGE = given
    with pytest.raises(ValueError, match=r"must be \[\] or \[low, high\] with low < high"):
        value_range(small_cfg)


# Training


def record_of(file, height, width):
    box = {"bbox": [1, 1, 9, 7], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return {
        "file_name": str(file), "height": height, "width": width, "image_id": 1,
        "annotations": [box],
    }  # fmt: skip


@pytest.mark.parametrize("is_train", [True, False])
def test_a_model_is_given_what_detectron2_gives_it(small_cfg, tmp_path, is_train):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    record = record_of(tmp_path / "a.png", 20, 30)
    given = []
    for kind in (PictureMapper, DatasetMapper):
        np.random.seed(0)
        given.append(kind(small_cfg, is_train)(record))
    ours, theirs = given
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"])
    if is_train:
        boxes = [m["instances"].gt_boxes.tensor for m in given]
        assert torch.equal(*boxes) and len(boxes[0]) == 1


def test_a_tiff_of_too_many_pages(tmp_path, monkeypatch):
    pages = [Image.new("L", (4, 3), 10 * i) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(reading, "MOST_PAGES", 3)
    assert num_pages(tmp_path / "a.tif") == 3
    monkeypatch.setattr(reading, "MOST_PAGES", 2)
    for read in (num_pages, lambda file: read_picture(file, "L")):
        with pytest.raises(ValueError, match=r"a\.tif has more than 2 pages: split it"):
            read(tmp_path / "a.tif")


def test_training_reads_16_bits_and_pages(small_cfg, tmp_path):
    small_cfg.INPUT.FORMAT = "L"
    small_cfg.INPUT.FPN_EXT.VALUE_RANGE = [0, 4095]
    small_cfg.INPUT.MIN_SIZE_TRAIN, small_cfg.INPUT.RANDOM_FLIP = (20,), "none"
    pages = [Image.fromarray(np.full((20, 30), v, np.uint16)) for v in (0, 4095)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    record = record_of(tmp_path / "a.tif", 20, 30)
    for page, value in ((0, 0), (1, 255)):
        mapped = PictureMapper(small_cfg, True)({**record, "page": page})
        assert mapped["image"].shape == (1, 20, 30) and (mapped["image"] == value).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colours_of_16_bits_are_read_by_their_upper_half(suffix, tmp_path):
    cv2 = pytest.importorskip("cv2")
    pixels = np.array([[[0, 255, 256], [65535, 25600, 12345]]], np.uint16)  # BGR
    file = tmp_path / f"deep.{suffix}"
    assert cv2.imwrite(str(file), pixels)
    assert np.array_equal(read_picture(file, "BGR"), pixels // 256)
    with pytest.raises(ValueError, match="VALUE_RANGE would have no effect"):
        read_picture(file, "BGR", (0, 4095))
