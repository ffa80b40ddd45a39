"""Token files in Megatron's .bin/.idx format, written and read by Megatron-core's own code.

The only module of `data/` that imports megatron, and only inside functions: the import costs seconds. It
needs no process group and no GPU. Files made by Megatron's `preprocess_data.py` can be read as well.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

TokenDtype = type[np.uint8] | type[np.uint16] | type[np.int32]

# Start of an .idx file (megatron-core 0.15.3, `_IndexWriter`): magic, version 1, dtype code, then the number of
# sequences (int32 length and int64 pointer each) and the number of document ends (int64 each).
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES: dict[TokenDtype, int] = {np.uint8: 1, np.int32: 4, np.uint16: 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRange:
    """A split: `num_tokens` tokens of the files at `prefix`, from token `start` on."""

    prefix: Path
    start: int
    num_tokens: int


class IndexedTokens:
    """Documents of token files as one stream of tokens, in order; `num_tokens` says how long it is."""

    def __init__(self, dataset: IndexedDataset, start: int, num_tokens: int) -> None:
        self._dataset = dataset
        self._start = start
        self.num_tokens = num_tokens

    def __len__(self) -> int:
        return self.num_tokens

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens `[start, start + count)` of the stream as a new int64 array `[count]`, across document ends."""
        assert start >= 0 and count >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        dtype = self._dataset.index.dtype
        offset = (self._start + start) * np.dtype(dtype).itemsize
        stored = self._dataset.bin_reader.read(dtype=dtype, count=count, offset=offset)
        return np.array(stored, dtype=np.int64)

    def document_offsets(self) -> NDArray[np.int64]:
        """Where documents start in the stream, in tokens: ascending int64 `[num_documents + 1]`, from 0 to its end."""
        starts = _document_offsets(self._dataset) - self._start
        inside = starts[(starts > 0) & (starts < self.num_tokens)]
        return np.concatenate(([0], inside, [self.num_tokens]))


def bin_path(prefix: Path) -> Path:
    """The token file; prefixes may contain dots, so nothing is taken for a suffix."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The index of sequences and documents."""
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> TokenDtype:
    """The dtype in which Megatron stores tokens of such a vocabulary: uint16 below 65,500, else int32."""
    from megatron.core.datasets.indexed_dataset import DType

    dtype: TokenDtype = DType.optimal_dtype(vocab_size)
    return dtype


def build(prefix: Path, documents: Iterable[NDArray[Any]], dtype: TokenDtype) -> int:
    """Write `documents` (integers `[num_tokens]` each) to `prefix`.bin and `prefix`.idx; return the number of tokens.

    Both are written under temporary names in the same folder and then renamed, .idx last.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = prefix.with_name(f".{prefix.name}.{os.getpid()}")
    num_tokens, largest = 0, np.iinfo(dtype).max
    try:
        builder = IndexedDatasetBuilder(str(bin_path(temporary)), dtype=dtype)
        for tokens in documents:
            if not len(tokens):
                continue
            assert tokens.min() >= 0 and tokens.max() <= largest, f"token does not fit {dtype}"
            builder.add_document(tokens, [len(tokens)])
            num_tokens += len(tokens)
        builder.finalize(str(idx_path(temporary)))
        for path in (bin_path, idx_path):
            with open(path(temporary), "rb") as file:
                os.fsync(file.fileno())
            os.replace(path(temporary), path(prefix))
    finally:
        bin_path(temporary).unlink(missing_ok=True)
        idx_path(temporary).unlink(missing_ok=True)
    return num_tokens


def write_index(path: Path, lengths: NDArray[np.int32], dtype: TokenDtype) -> None:
    """Write the .idx file of documents of `lengths` tokens (int32 `[num_documents]`), each one sequence.

    The same bytes as Megatron's own writer, without a Python list of the documents.
    """
    pointers = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)[:-1])) * np.dtype(dtype).itemsize
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype], len(lengths), len(lengths) + 1))
        for part in (lengths, pointers, np.arange(len(lengths) + 1, dtype=np.int64)):
            file.write(part.tobytes())
        file.flush()
        os.fsync(file.fileno())


def open_tokens(prefix: Path, *, start: int = 0, num_tokens: int | None = None) -> IndexedTokens:
    """Open tokens `[start, start + num_tokens)` of the files at `prefix` (all from `start` where None).

    Raises:
        DataError: A file is missing, empty, truncated, or not of this format, or the range exceeds it.
    """
    dataset = _open(prefix)
    total = int(dataset.sequence_lengths.sum(dtype=np.int64))
    end = total if num_tokens is None else start + num_tokens
    if end > total:
        raise DataError("token file too short", expected=f"at least {end} tokens in {bin_path(prefix)}",
                        found=f"{total}", key="data.path")
    return IndexedTokens(dataset, start, end - start)


def document_offsets(prefix: Path) -> NDArray[np.int64]:
    """Where documents start in the stream, in tokens: ascending int64 `[num_documents + 1]`, from 0 to the total.

    Raises `DataError` like `open_tokens`.
    """
    return _document_offsets(_open(prefix))


def _document_offsets(dataset: IndexedDataset) -> NDArray[np.int64]:
    starts = np.concatenate(([0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)))
    offsets: NDArray[np.int64] = starts[dataset.document_indices]
    return offsets


def _open(prefix: Path) -> IndexedDataset:
    """Megatron's dataset, after checks that its own assertions do not make or do not explain."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise DataError("token file not found", expected=f"a file {path}", found="none", key="data.path")
    _check_index(idx_path(prefix))
    if not bin_path(prefix).stat().st_size:
        raise DataError("token file is empty", expected=f"tokens in {bin_path(prefix)}", found="none", key="data.path")
    dataset = IndexedDataset(str(prefix))
    expected = int(dataset.sequence_lengths.sum(dtype=np.int64)) * np.dtype(dataset.index.dtype).itemsize
    if (found := bin_path(prefix).stat().st_size) != expected:
        raise DataError("token file is truncated or of another index", found=f"{found} bytes", key="data.path",
                        expected=f"{expected} bytes in {bin_path(prefix)}")
    return dataset


def _check_index(path: Path) -> None:
    """Raise `DataError` unless `path` starts like an index and is as long as its header says."""
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError("not an index of token files", expected=f"a Megatron .idx header in {path}", found="none",
                        key="data.path")
    _, _, _, num_sequences, num_document_ends = _HEADER.unpack(header)
    expected = _HEADER.size + 12 * num_sequences + 8 * num_document_ends
    if (found := path.stat().st_size) < expected:
        raise DataError("index of token files is truncated", expected=f"{expected} bytes in {path}",
                        found=f"{found} bytes", key="data.path")
