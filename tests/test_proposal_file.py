import json
import multiprocessing
import os
import pickle
import resource
import stat
import struct

import numpy as np
import pytest
from fpn_ext.proposals.file import ProposalFile, write_proposals
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from proposals import rewrite, write_random
from safetensors.numpy import load_file
from torch.utils.data import DataLoader, Dataset

COUNTS = {7: 3, "b": 0, 12: 1, "last": 0}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "some.safetensors"


def test_what_is_written_is_read(file):
    written = write_random(file, COUNTS, dataset="a_set")
    with ProposalFile(file) as proposals:
        assert list(proposals) == proposals.image_ids == [7, "b", 12, "last"]
        assert (len(proposals), proposals.num_boxes) == (4, 4)
        assert (proposals.dataset, proposals.source) == ("a_set", "random numbers")
        for image_id, (boxes, scores) in written.items():
            own_boxes, own_scores = proposals[image_id]
            assert own_boxes.dtype == own_scores.dtype == np.float32
            assert own_boxes.shape == (len(scores), 4)
            assert own_boxes.tobytes() == boxes.tobytes()
            assert own_scores.tobytes() == scores.tobytes()
        assert proposals.damaged_tensors() == []


def test_an_entry_by_hand(file):
    """The highest score first, equal ones in their order; ids are compared as text."""
    boxes = np.array([[0, 0, 1, 1], [2, 0, 3, 1], [4, 0, 5, 1], [6, 0, 7, 1]], dtype=np.int64)
    scores = [0.5, 2.0, 0.5, -1.0]
    write_proposals(file, ["7", 8], [(boxes, scores), (boxes[:1], [3])], dataset="", source="")
    proposals = ProposalFile(file)
    assert proposals[7][0][:, 0].tolist() == [2, 0, 4, 6]
    assert proposals[7][1].tolist() == [2.0, 0.5, 0.5, -1.0]
    assert proposals["8"][1].tolist() == [3.0]
    assert 7 in proposals and "8" in proposals and 9 not in proposals
    with pytest.raises(KeyError, match=r"some\.safetensors has no entry for image id 9"):
        proposals[9]


def test_it_is_an_ordinary_safetensors_file(file):
    """Read by the library's own function, which requires all bytes to be accounted for."""
    written = write_random(file, COUNTS)
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert header % 8 == 0, "so that the tensors are aligned"
    tensors = load_file(file)
    assert tensors["offsets"].tolist() == [0, 3, 3, 4, 4]
    assert tensors["boxes"].tobytes() == b"".join(b.tobytes() for b, _ in written.values())
    assert tensors["scores"].tobytes() == b"".join(s.tobytes() for _, s in written.values())


def test_a_dataset_without_a_single_box(file):
    write_random(file, {1: 0, 2: 0})
    assert ProposalFile(file)[2][0].shape == (0, 4)
    write_random(file, {})
    assert len(ProposalFile(file)) == 0


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
ids = st.integers() | st.text(st.characters(codec="utf-8"), max_size=8)


@st.composite
def entries(draw):
    found = {}
    for image_id in draw(st.lists(ids, max_size=5, unique_by=str)):
        count = draw(st.integers(0, 4))
        boxes = draw(numpy_st.arrays(np.float32, (count, 4), elements=floats))
        scores = draw(numpy_st.arrays(np.float32, count, elements=floats))
        found[image_id] = boxes, scores[np.argsort(-scores, kind="stable")]
    return found


@given(entries(), st.text(st.characters(codec="utf-8"), max_size=8))
@settings(max_examples=50)
def test_any_boxes_and_ids_come_back_bit_for_bit(tmp_path_factory, written, text):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_proposals(file, written, written.values(), dataset=text, source=text)
    proposals = ProposalFile(file)
    assert proposals.image_ids == list(written)
    assert proposals.dataset == proposals.source == text
    for image_id, (boxes, scores) in written.items():
        assert proposals[image_id][0].tobytes() == boxes.tobytes()
        assert proposals[image_id][1].tobytes() == scores.tobytes()
    assert proposals.damaged_tensors() == []


# Reading lazily, in several processes.


def test_opening_reads_neither_boxes_nor_scores(file):
    """8 GB of boxes, all of them a hole in the file: reading them would show in the memory."""
    count = 400_000_000
    write_random(file, {i: 1 for i in range(4)})
    with open(file, "rb") as opened:
        (room,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(room))
    header["boxes"] |= {"shape": [count, 4], "data_offsets": [40, 40 + 16 * count]}
    end = 40 + 16 * count
    header["scores"] |= {"shape": [count], "data_offsets": [end, end + 4 * count]}
    text = json.dumps(header).encode().ljust(room + 64)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.write(np.array([0, 2, count - 3, count - 1, count], dtype="<i8").tobytes())
        opened.truncate(8 + len(text) + end + 4 * count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    proposals = ProposalFile(file)
    assert proposals[0][0].shape == (2, 4) and proposals[3][0].tolist() == [[0, 0, 0, 0]]
    assert proposals[2][1].shape == (2,)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_pickled_one_opens_the_file_again(file):
    written = write_random(file, COUNTS)
    content = pickle.dumps(ProposalFile(file))
    assert len(content) < 500
    assert pickle.loads(content)[7][0].tobytes() == written[7][0].tobytes()


class Sums(Dataset):
    def __init__(self, proposals):
        self.proposals = proposals

    def __len__(self):
        return len(self.proposals)

    def __getitem__(self, i):
        boxes, scores = self.proposals[self.proposals.image_ids[i]]
        return os.getpid(), float(boxes.sum() + scores.sum())


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_worker_processes_read_it(file, method, workers):
    written = write_random(file, COUNTS)
    loader = DataLoader(
        Sums(ProposalFile(file)),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    processes, sums = zip(*loader, strict=True)
    assert len({*processes, os.getpid()}) == workers + 1
    assert sums == tuple(float(b.sum() + s.sum()) for b, s in written.values())


def test_a_closed_one_says_so(file):
    write_random(file, COUNTS)
    with ProposalFile(file) as proposals:
        pass
    with pytest.raises(ValueError, match=r"some\.safetensors was closed"):
        proposals[7]


# Writing.


def test_a_file_is_replaced_when_the_new_one_is_complete(file):
    write_random(file, {1: 2})
    before = file.read_bytes()

    def failing():
        yield np.zeros((1, 4)), np.zeros(1)
        raise RuntimeError("the second image")

    with pytest.raises(RuntimeError, match="the second image"):
        write_proposals(file, [1, 2], failing(), dataset="", source="")
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name], "nothing is left over"


def test_others_may_read_it_as_any_new_file(file):
    write_random(file, COUNTS)
    (file.parent / "plain").touch()
    mode = stat.S_IMODE((file.parent / "plain").stat().st_mode)
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_its_folder_is_made(tmp_path):
    write_random(tmp_path / "new" / "folder" / "x.safetensors", COUNTS)
    assert len(ProposalFile(tmp_path / "new" / "folder" / "x.safetensors")) == 4


NAN = float("nan")


@pytest.mark.parametrize(
    ("image_ids", "entry", "message"),
    [
        ([1, "1"], ([[0, 0, 1, 1]], [1]), r"1 image ids occur more than once: image ids '1'"),
        ([1.5], ([[0, 0, 1, 1]], [1]), r"integers or strings, got 1\.5"),
        ([True], ([[0, 0, 1, 1]], [1]), r"integers or strings, got True"),
        (["a"], ([[0, 0, 1]], [1]), r"'a': boxes must be \(R, 4\) .*got \(1, 3\) and \(1,\)"),
        (["a"], ([[0, 0, 1, 1]], [1, 2]), r"'a': .*got \(1, 4\) and \(2,\)"),
        (["a"], ([[0, 0, 1, 1], [0, 0, NAN, 1]], [1, 1]), r"'a': 1 of 2 boxes .*NaN or infinite"),
        (["a"], ([[0, 0, 1, 1]], [1e300]), r"'a': 1 of 1 boxes .*NaN or infinite"),
    ],
)
def test_what_cannot_be_written(file, image_ids, entry, message):
    with pytest.raises(ValueError, match=message):
        write_proposals(file, image_ids, [entry] * len(image_ids), dataset="", source="")
    assert not file.exists()


def test_numpys_integers_are_ids(file):
    write_proposals(file, np.arange(2), [([[0, 0, 1, 1]], [1])] * 2, dataset="", source="")
    assert ProposalFile(file).image_ids == [0, 1]


# Files that are not what they should be.


def test_no_file(tmp_path):
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file of proposals"):
            ProposalFile(missing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"format": "weights"}}, r"format is 'weights', not 'fpn_ext\.proposals'"),
        ({"drop": ["format"]}, r"its format is None"),
        ({"metadata": {"version": "2"}}, r"version is '2'; this fpn_ext reads '1'"),
        ({"drop": ["source"]}, r"no source in its header"),
        ({"drop": ["image_ids"]}, r"image_ids in its header is no JSON list"),
        ({"metadata": {"image_ids": "[1, 2"}}, r"image_ids in its header is no JSON list"),
        ({"metadata": {"image_ids": "[" * 100_000}}, r"image_ids in its header is no JSON list"),
        ({"metadata": {"image_ids": "[1, 2, 3, null]"}}, r"image_ids in its header is no JSON"),
        ({"metadata": {"crc32": "7"}}, r"crc32 in its header is no JSON object"),
        ({"metadata": {"image_ids": '[7, 8, "7", 9]'}}, r"1 image ids occur more .*image ids '7'$"),
        ({"metadata": {"image_ids": "[7, 8]"}}, r"2 image ids need 3 offsets, there are 5"),
        ({"drop": ["scores"]}, r"no tensor 'scores'"),
        ({"boxes": np.zeros((4, 5), np.float32)}, r"boxes is F32 of shape \[4, 5\]"),
        ({"boxes": np.zeros((4, 4), np.float64)}, r"boxes is F64 of shape \[4, 4\]"),
        ({"scores": np.zeros((4, 1), np.float32)}, r"scores is F32 of shape \[4, 1\]"),
        ({"scores": np.zeros(3, np.float32)}, r"4 boxes and 3 scores"),
        ({"offsets": np.array([0, 3, 1, 4, 4])}, r"offsets fall 1 times, image ids 'b'"),
        ({"offsets": np.array([0, 3, 3, 4, 5])}, r"from 0 to the 4 boxes, their ends are \[0, 5\]"),
        ({"offsets": np.array([1, 3, 3, 4, 4])}, r"from 0 to the 4 boxes, their ends are \[1, 4\]"),
        ({"offsets": np.zeros(0, np.int64)}, r"is no safetensors file|there are 0"),
    ],
)
def test_parts_that_do_not_fit(file, changes, message):
    write_random(file, COUNTS)
    rewrite(file, **changes)
    with pytest.raises(ValueError, match=r"some\.safetensors") as error:
        ProposalFile(file)
    assert error.match(message)


def test_all_that_does_not_fit_is_listed(file):
    write_random(file, COUNTS)
    rewrite(file, {"image_ids": "[1, 1]"}, scores=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"more than once.*need 3 offsets.*4 boxes and 3 scores"):
        ProposalFile(file)


def test_a_changed_byte_is_found(file):
    write_random(file, COUNTS)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert ProposalFile(file).damaged_tensors() == ["scores"]
    content[-20] ^= 1  # 4 scores are 16 bytes
    file.write_bytes(content)
    assert ProposalFile(file).damaged_tensors() == ["boxes", "scores"]


def read_all(file):
    """Read everything; return whether a damaged file got that far."""
    try:
        with ProposalFile(file) as proposals:
            for image_id in proposals:
                boxes, scores = proposals[image_id]
                assert boxes.shape == (len(scores), 4)
            proposals.damaged_tensors()
    except ValueError as error:
        assert str(file) in str(error)
        return False
    return True


def test_a_truncated_file_is_an_error_of_ours(file):
    write_random(file, {7: 3, "b": 0})
    content = file.read_bytes()
    assert read_all(file)
    for length in range(len(content)):
        file.write_bytes(content[:length])
        assert not read_all(file), length
    file.write_bytes(content + b"\0")
    assert not read_all(file)


@given(st.lists(st.tuples(st.integers(0), st.integers(0, 7)), min_size=1, max_size=4))
@settings(max_examples=300)
def test_flipped_bits_are_an_error_of_ours_or_other_values(tmp_path_factory, flips):
    file = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    write_random(file, {7: 3, "b": 0})
    content = bytearray(file.read_bytes())
    for position, bit in flips:
        content[position % len(content)] ^= 1 << bit
    file.write_bytes(content)
    read_all(file)


def test_damage_at_every_byte(file):
    write_random(file, {7: 1})
    content = file.read_bytes()
    for position in range(len(content)):
        for bit in (0, 5):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            read_all(file)
