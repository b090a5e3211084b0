"""Whatever stands in the files of a dataset: it is read, or one error says what is wrong."""

import json

import photographs
import yaml
from fpn_ext.__main__ import is_users
from fpn_ext.data.canonical import coco_json, complete
from fpn_ext.data.data_file import FORMATS, KEYS, YOLO_KEYS, open_data
from fpn_ext.data.formats import read_dataset
from fuzzing import corrupted, fuzz
from hypothesis import strategies as st
from test_data_check import anything
from voc import write_voc


def read_or_refuse(path):
    """Either JSON that can be written, or an error raised on purpose."""
    try:
        data = open_data(path)
        dataset = complete(read_dataset(data), data.classes)
        for split in dataset.splits:
            json.dumps(coco_json(dataset, split), allow_nan=False).encode("ascii")
    except (ValueError, FileNotFoundError) as error:
        assert is_users(error), repr(error)
        assert str(error).encode("utf-8", "backslashreplace")


def like(entries):
    """Right entries, with some of their values replaced by anything."""
    keys = sorted({key for entry in entries for key in entry} | {"segmentation", "keypoints"})
    return st.lists(
        st.tuples(
            st.sampled_from(entries),
            st.dictionaries(st.sampled_from(keys), anything, max_size=2),
        ).map(lambda pair: {**pair[0], **pair[1]}),
        max_size=6,
    )


CONTENT = photographs.coco_content()
like_coco = st.fixed_dictionaries(
    {key: like(CONTENT[key]) | st.just(CONTENT[key]) for key in CONTENT},
    optional={"info": anything},
)


@fuzz(content=like_coco | anything)
def test_fuzz_coco(tmp_path, content):
    photographs.write_pictures(tmp_path)
    (tmp_path / "all.json").write_text(json.dumps(content))
    (tmp_path / "data.yaml").write_text("format: coco\ntrain: {annotations: all.json}\n")
    read_or_refuse(tmp_path)


@fuzz(text=corrupted("\n".join(photographs.yolo_lines("a")).encode()) | st.binary(max_size=80))
def test_fuzz_labels(tmp_path, text):
    if not (tmp_path / "labels").exists():
        photographs.write_yolo(tmp_path)
    (tmp_path / "labels" / "a.txt").write_bytes(text)
    read_or_refuse(tmp_path)


@fuzz(text=corrupted(b"<annotation><size><width>80</width><height>60</height></size><object>"
                     b"<name>cat</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>9</xmax>"
                     b"<ymax>9</ymax></bndbox></object></annotation>"))  # fmt: skip
def test_fuzz_voc(tmp_path, text):
    write_voc(tmp_path, {"a": [], "b": [("cat", 2, 2, 9, 9)]})
    (tmp_path / "Annotations" / "a.xml").write_bytes(text)
    read_or_refuse(tmp_path)


@fuzz(
    content=st.dictionaries(
        st.sampled_from([*KEYS, *YOLO_KEYS, "x"]),
        anything | st.sampled_from([*FORMATS, ".", "all.json", "images", {"images": "."}]),
        max_size=5,
    )
)
def test_fuzz_data_file(tmp_path, content):
    if not (tmp_path / "all.json").exists():
        photographs.write_coco(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content), errors="replace")
    read_or_refuse(tmp_path / "mine.yaml")
