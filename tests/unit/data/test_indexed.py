import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_minitron.data.indexed import bin_path, build, document_offsets, idx_path, open_tokens, token_dtype
from nemo_minitron.errors import DataError

DOCUMENTS = [np.array([5, 6, 7]), np.array([], dtype=np.int64), np.array([8]), np.arange(65000, 65100)]
STREAM = np.concatenate(DOCUMENTS)


@pytest.fixture
def prefix(tmp_path):
    prefix = tmp_path / "v1.5" / "train"
    assert build(prefix, iter(DOCUMENTS), np.uint16) == len(STREAM)
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_round_trip_across_documents(tmp_path, dtype):
    build(tmp_path / "x.y", DOCUMENTS, dtype)
    tokens = open_tokens(tmp_path / "x.y")
    assert len(tokens) == tokens.num_tokens == len(STREAM)
    assert tokens.read(0, len(tokens)).dtype == np.int64
    for start, count in [(0, len(STREAM)), (2, 3), (103, 1), (4, 0)]:
        np.testing.assert_array_equal(tokens.read(start, count), STREAM[start : start + count])


def test_a_range_of_the_stream(prefix):
    tokens = open_tokens(prefix, start=3, num_tokens=10)
    assert len(tokens) == 10
    np.testing.assert_array_equal(tokens.read(1, 9), STREAM[4:13])
    with pytest.raises(AssertionError):
        tokens.read(1, 10)
    with pytest.raises(DataError, match="at least 105 tokens"):
        open_tokens(prefix, start=5, num_tokens=100)


def test_megatron_reads_the_same_documents(prefix):
    dataset = IndexedDataset(str(prefix))
    documents = [document for document in DOCUMENTS if len(document)]
    assert len(dataset) == len(documents)
    for read, document in zip(dataset[:], documents, strict=True):
        np.testing.assert_array_equal(read, document)
    assert document_offsets(prefix).tolist() == [0, 3, 4, 104]


def test_nothing_but_the_two_files_is_left(prefix):
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["train.bin", "train.idx"]


def test_an_interrupted_build_leaves_the_old_files(prefix):
    def documents():
        yield np.array([1, 2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(prefix, documents(), np.uint16)
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["train.bin", "train.idx"]
    assert len(open_tokens(prefix)) == len(STREAM)


def test_a_token_that_does_not_fit_is_a_defect(tmp_path):
    with pytest.raises(AssertionError, match="does not fit"):
        build(tmp_path / "x", [np.array([1 << 16])], np.uint16)
    assert token_dtype(2048) is np.uint16 and token_dtype(128256) is np.int32


def _truncate(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("spoil", "message"), [
    (lambda prefix: idx_path(prefix).unlink(), r"not found.*train\.idx"),
    (lambda prefix: bin_path(prefix).unlink(), r"not found.*train\.bin"),
    (lambda prefix: _truncate(bin_path(prefix), 100), "208 bytes in .*; found 100 bytes"),
    (lambda prefix: _truncate(bin_path(prefix), 0), "empty"),
    (lambda prefix: _truncate(idx_path(prefix), 60), "truncated.*found 60 bytes"),
    (lambda prefix: _truncate(idx_path(prefix), 20), "not an index"),
    (lambda prefix: idx_path(prefix).write_text("text " * 20), "not an index"),
])
def test_damaged_files_are_refused(prefix, spoil, message):
    spoil(prefix)
    with pytest.raises(DataError, match=message) as error:
        open_tokens(prefix)
    assert "data.path" in str(error.value)
