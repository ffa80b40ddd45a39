"""The safetensors container: header layout, number types, file names. No tensor data is read here.

File format (safetensors 0.4 documentation): 8 bytes little-endian header length, a JSON header
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}` with offsets relative to the end of the header,
then the data in C order without gaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library itself

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
    }.items()
}


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` (from 0) of `count`, as `transformers` spells it."""
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def bfloat16_bits(values: NDArray[Any]) -> NDArray[Any]:
    """Finite float32 `values` rounded to BF16 (nearest, ties to even), as raw `uint16`."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored `values` of a safetensors float type as float32; BF16 comes as raw `uint16`."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """`values` rounded to a safetensors float type, in numpy's type for it."""
    return bfloat16_bits(values) if dtype == "BF16" else values.astype(NUMPY_DTYPES[dtype])


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: absolute byte range `[begin, end)` of its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, in the order of its header.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is not what the format says.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"bad safetensors file {path}", expected="a header within the file",
                                      found=f"a header of {length} bytes in a file of {size} bytes (truncated?)")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {
            name: Entry(str(item["dtype"]), tuple(int(n) for n in item["shape"]),
                         8 + length + int(item["data_offsets"][0]), 8 + length + int(item["data_offsets"][1]))
            for name, item in header.items()
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", found=error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"bad safetensors file {path}", expected="a JSON header of tensors",
                              found=f"{type(error).__name__}: {error}") from None
    for name, entry in entries.items():
        if entry.end > size:
            raise CheckpointError(f"truncated safetensors file {path}", found=f"{size} bytes",
                                  expected=f"at least {entry.end} bytes for tensor {name}")
        if entry.begin < 8 + length:
            raise CheckpointError(f"bad safetensors file {path}", expected="offsets within the data",
                                  found=f"{name} before it")
        kind = NUMPY_DTYPES.get(entry.dtype)
        if kind is not None and entry.end - entry.begin != math.prod(entry.shape) * kind.itemsize:
            raise CheckpointError(f"bad safetensors file {path}", expected=f"{entry.dtype} {entry.shape} in {name}",
                                  found=f"{entry.end - entry.begin} bytes")
    return entries
