"""Headers of safetensors files, and what is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nemo_minitron.checkpoint.container import bfloat16_bits, read_header, shard_name
from nemo_minitron.errors import CheckpointError


def file_with(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def test_header_gives_absolute_positions(tmp_path):
    path = file_with(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "w": GOOD}, b"0" * 16)
    (entry,) = read_header(path).values()
    assert (entry.dtype, entry.shape) == ("F32", (2, 2))
    assert (entry.begin, entry.end) == (path.stat().st_size - 16, path.stat().st_size)


@pytest.mark.parametrize(("header", "data", "complaint"), [
    ({"w": GOOD}, b"0" * 15, "truncated"),
    ({"w": {**GOOD, "data_offsets": [0, 12]}}, b"0" * 16, "12 bytes"),
    ({"w": {**GOOD, "data_offsets": [-4, 12]}}, b"0" * 16, "before"),
    ({"w": {"dtype": "F32"}}, b"", "shape"),
    ({"w": 3}, b"", "TypeError"),
    ([1], b"", "JSON header"),
    (b"\xff\xfe nonsense", b"", "JSON header"),
])
def test_bad_files_are_refused_in_one_line(tmp_path, header, data, complaint):
    path = file_with(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0", b"\xff" * 8 + b"{}", (200).to_bytes(8, "little") + b"{}"])
def test_absurd_header_length(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_header(tmp_path / "a.safetensors")


def test_missing_file_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        read_header(tmp_path / "none.safetensors")


def test_shard_names():
    assert shard_name(0, 1) == "model.safetensors"
    assert shard_name(1, 12) == "model-00002-of-00012.safetensors"


@given(hnp.arrays(np.float32, 50, elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_bfloat16_rounds_as_torch_does(values):
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(bfloat16_bits(values), expected)
