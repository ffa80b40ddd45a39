"""Reading selections and writing in pieces, against the safetensors library and plain numpy indexing."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_minitron.checkpoint import tensors
from nemo_minitron.checkpoint.tensors import TensorReader, TensorWriter
from nemo_minitron.errors import CheckpointError

TABLE = np.arange(30 * 17, dtype=np.float32).reshape(30, 17)
INDICES = st.one_of(
    st.none(), st.lists(st.integers(0, 16), max_size=12),
    st.builds(slice, st.none() | st.integers(0, 17), st.none() | st.integers(0, 17), st.sampled_from([None, 1, 2, -1])),
)


@pytest.fixture(scope="module")
def table_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("table")
    safetensors.numpy.save_file({"first": np.zeros(3, np.float32), "table": TABLE}, directory / "model.safetensors")
    return directory


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=INDICES, cols=INDICES, block_rows=st.integers(0, 5))
def test_selections_are_those_of_numpy(table_directory, rows, cols, block_rows):
    with TensorReader(table_directory) as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "BLOCK_BYTES", block_rows * 17 * 4)
        found = reader.read("table", rows=rows, cols=cols)
    expected = TABLE
    if rows is not None:
        expected = expected[rows if isinstance(rows, slice) else np.array(rows, int)]
    if cols is not None:
        expected = expected[:, cols if isinstance(cols, slice) else np.array(cols, int)]
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.array_equal(found, expected)


def test_only_wanted_rows_are_read_in_merged_runs(table_directory, monkeypatch):
    calls = []
    preadv = tensors.os.preadv
    monkeypatch.setattr(tensors.os, "preadv", lambda *args: calls.append(args) or preadv(*args))
    with TensorReader(table_directory) as reader:
        reader.read("table", rows=slice(4, 9))
        assert (len(calls), reader.bytes_read) == (1, 5 * 17 * 4)
        reader.read("table", rows=[1, 2, 3, 10, 11, 29])
        assert (len(calls), reader.bytes_read) == (1 + 3, (5 + 6) * 17 * 4)


def test_types_come_back_bit_for_bit(tmp_path):
    stored = {f"{dtype}": torch.randn(5, 3).to(dtype)
              for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
    stored["scalar"] = torch.tensor(1.5)
    stored["empty"] = torch.zeros(0, 3)
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    with TensorReader(tmp_path) as reader:
        assert reader.dtype("torch.bfloat16") == "BF16"
        assert reader.shape("torch.bfloat16") == (5, 3)
        for name, tensor in stored.items():
            expected = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
            found = reader.read(name)
            assert found.dtype == expected.numpy().dtype
            assert np.array_equal(found, expected.numpy())


def test_missing_tensor_is_named(table_directory):
    with TensorReader(table_directory) as reader, pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        reader.read("lm_head.weight")


def test_unsupported_type_is_refused(tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with TensorReader(tmp_path) as reader, pytest.raises(CheckpointError, match="F8_E4M3"):
        reader.read("w")


@pytest.mark.parametrize("prepare", ["no directory", "a file", "empty"])
def test_where_there_is_no_checkpoint(tmp_path, prepare):
    directory = tmp_path / "model"
    if prepare == "a file":
        directory.write_text("x")
    elif prepare == "empty":
        directory.mkdir()
    with pytest.raises(CheckpointError, match=str(directory)):
        TensorReader(directory)


def write_two_shards(directory):
    with TensorWriter(directory, [("a", "F32", (4, 3)), ("b", "F32", (4, 3))], shard_bytes=50) as writer:
        writer.write("b", TABLE[:4, 3:6])
        writer.write("a", TABLE[:4, :3])


def test_several_shards(tmp_path):
    write_two_shards(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 4 * 3 * 4
    with TensorReader(tmp_path) as reader:
        assert reader.names == ("a", "b")
        assert [path.name for path in reader.files] == sorted(set(index["weight_map"].values()))
        assert np.array_equal(reader.read("b"), TABLE[:4, 3:6])


def test_missing_truncated_and_wrong_shards(tmp_path):
    write_two_shards(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"truncated.*00002-of-00002"):
        TensorReader(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"missing.*00002-of-00002"):
        TensorReader(tmp_path)
    second.write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"tensor b is not in .*00002-of-00002"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../model.safetensors"}}'])
def test_bad_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"bad index .*index\.json"):
        TensorReader(tmp_path)


def test_file_that_shrinks_while_open(table_directory, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((table_directory / "model.safetensors").read_bytes())
    with TensorReader(tmp_path) as reader:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 8)
        with pytest.raises(CheckpointError, match="truncated"):
            reader.read("table")


def test_written_in_any_order_and_readable_by_the_library(tmp_path):
    rows = torch.randn(6, 5).to(torch.bfloat16)
    with TensorWriter(tmp_path, [("rows", "BF16", (6, 5)), ("s", "F64", ()), ("n", "F16", (3,))]) as writer:
        writer.write("n", np.array([1, 2, 3], np.float16))
        writer.write_rows("rows", 4, rows[4:].view(torch.uint16).numpy())
        writer.write_rows("rows", 0, rows[:4].view(torch.uint16).numpy())
        writer.write("s", np.array(0.1))
        assert not (tmp_path / "model.safetensors").exists()
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["rows"], rows)
    assert found["s"].item() == 0.1
    assert found["n"].tolist() == [1, 2, 3]
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_was_not_fully_written_does_not_appear(tmp_path):
    writer = TensorWriter(tmp_path, [("a", "F32", (4, 3))])
    writer.write_rows("a", 0, TABLE[:3, :3])
    with pytest.raises(AssertionError, match="not fully written"):
        writer.close()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), TensorWriter(tmp_path, [("a", "F32", (4, 3))]):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("start", "array"), [
    (0, TABLE[:2, :3].astype(np.float64)), (0, TABLE[:2, :4]), (3, TABLE[:2, :3]), (1, TABLE[:1, :3])])
def test_wrong_pieces_are_refused(tmp_path, start, array):
    writer = TensorWriter(tmp_path, [("a", "F32", (4, 3))])
    writer.write_rows("a", 1, TABLE[1:2, :3])
    with pytest.raises(AssertionError):
        writer.write_rows("a", start, array)
    writer.abort()
