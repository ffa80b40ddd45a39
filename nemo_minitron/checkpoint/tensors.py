"""Streaming safetensors: read row and column selections, write tensors piece by piece.

Numpy only, and always `pread`/`pwrite`, never `mmap`: mapped pages would count in the peak memory of the
process, and the point of streaming is that peak memory does not grow with the checkpoint. BF16 has no numpy
type and travels as raw `uint16`, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.artifacts import write_json
from nemo_minitron.checkpoint.container import INDEX_FILE, NUMPY_DTYPES, SINGLE_FILE, Entry, read_header, shard_name
from nemo_minitron.errors import CheckpointError

BLOCK_BYTES = 4 * 2**20  # rows are read in blocks of this size where only some of their columns are wanted

Selection = slice | Sequence[int] | None


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Maximal stretches `[start, stop)` of consecutive ascending values, in the order given."""
    start = previous = None
    for index in indices:
        if previous is not None and index == previous + 1:
            previous = index
            continue
        if start is not None and previous is not None:
            yield start, previous + 1
        start = previous = index
    if start is not None and previous is not None:
        yield start, previous + 1


def _row_runs(selection: Selection, size: int) -> list[tuple[int, int]]:
    if selection is None:
        return [(0, size)] if size else []
    if isinstance(selection, slice):
        start, stop, step = selection.indices(size)
        if step == 1:
            return [(start, stop)] if stop > start else []
        selection = range(start, stop, step)
    runs = list(_runs([int(index) for index in selection]))
    assert all(start >= 0 and stop <= size for start, stop in runs), f"rows outside 0..{size}: {runs}"
    return runs


class TensorReader:
    """The tensors of a Hugging Face directory, read by selection.

    Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names (the order in which
    `transformers` looks). Headers are read and checked at once, data only by `read`.

    Raises:
        CheckpointError: directory, index or shard missing; truncated or malformed file; a tensor that the
            index places in a shard that lacks it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._files: dict[str, int] = {}
        self._where: dict[str, tuple[str, Entry]] = {}
        if not self.directory.is_dir():
            raise CheckpointError("no checkpoint directory", expected=f"a Hugging Face directory at {self.directory}",
                                  found="nothing" if not self.directory.exists() else "a file")
        if (self.directory / SINGLE_FILE).exists():
            entries = read_header(self.directory / SINGLE_FILE)
            self._where = {name: (SINGLE_FILE, entry) for name, entry in entries.items()}
        else:
            self._read_index()
        self.names: tuple[str, ...] = tuple(self._where)

    @property
    def files(self) -> list[Path]:
        """The safetensors files that hold the tensors."""
        return [self.directory / shard for shard in dict.fromkeys(shard for shard, _ in self._where.values())]

    def _read_index(self) -> None:
        path = self.directory / INDEX_FILE
        if not path.exists():
            raise CheckpointError(f"no weights in {self.directory}", found="neither",
                                  expected=f"{SINGLE_FILE} or {INDEX_FILE}")
        try:
            weight_map = {str(name): str(shard) for name, shard in
                          json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"bad index {path}", expected="JSON with a weight_map",
                                  found=f"{type(error).__name__}: {error}") from None
        headers: dict[str, dict[str, Entry]] = {}
        for name, shard in weight_map.items():
            if Path(shard).name != shard:
                raise CheckpointError(f"bad index {path}", expected="plain file names", found=shard)
            if shard not in headers:
                if not (self.directory / shard).exists():
                    raise CheckpointError(f"shard missing: {self.directory / shard}",
                                          expected=f"the file that {INDEX_FILE} names", found="nothing")
                headers[shard] = read_header(self.directory / shard)
            if name not in headers[shard]:
                raise CheckpointError(f"tensor {name} is not in {self.directory / shard}",
                                      expected=f"it there, as {INDEX_FILE} says")
            self._where[name] = (shard, headers[shard][name])

    def _entry(self, name: str) -> tuple[str, Entry]:
        if name not in self._where:
            raise CheckpointError(f"tensor missing from {self.directory}", expected=name,
                                  found=f"{len(self.names)} others")
        return self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`; a `CheckpointError` where there is none."""
        return self._entry(name)[1].shape

    def dtype(self, name: str) -> str:
        """Type of tensor `name` in the spelling of safetensors (`F32`, `BF16`, ...)."""
        return self._entry(name)[1].dtype

    def read(self, name: str, *, rows: Selection = None, cols: Selection = None) -> NDArray[Any]:
        """Tensor `name`, or the `rows` (dim 0) and `cols` (dim 1, 2-D tensors only) selected, in the order given.

        Only the byte ranges of the wanted rows are read, one `pread` per contiguous run. Where columns are
        selected the rows pass through a block of at most `BLOCK_BYTES` (or one row), so the extra memory is
        bounded. Returns a fresh C-contiguous array; BF16 as raw `uint16`.

        Raises:
            CheckpointError: no such tensor, a type this module cannot read, or a file that shrank meanwhile.
        """
        shard, entry = self._entry(name)
        if entry.dtype not in NUMPY_DTYPES:
            raise CheckpointError(f"tensor {name} in {self.directory / shard} has an unsupported type",
                                  expected=", ".join(NUMPY_DTYPES), found=entry.dtype)
        kind = NUMPY_DTYPES[entry.dtype]
        if not entry.shape:
            assert rows is None and cols is None, "a scalar has no rows"
            scalar = np.empty(1, kind)
            self._pread(shard, scalar, entry.begin)
            return scalar.reshape(())
        runs = _row_runs(rows, entry.shape[0])
        num_rows = sum(stop - start for start, stop in runs)
        row_shape = entry.shape[1:]
        row_bytes = math.prod(row_shape) * kind.itemsize
        if cols is None:
            out = np.empty((num_rows, *row_shape), kind)
            done = 0
            for start, stop in runs:
                self._pread(shard, out[done : done + stop - start], entry.begin + start * row_bytes)
                done += stop - start
            return out
        assert len(entry.shape) == 2, f"columns of {name} with shape {entry.shape}"
        columns = cols if isinstance(cols, slice) else np.asarray(cols, dtype=np.int64)
        return self._read_columns(shard, entry, runs, columns, kind)

    def _read_columns(self, shard: str, entry: Entry, runs: list[tuple[int, int]], columns: slice | NDArray[Any],
                      kind: np.dtype[Any]) -> NDArray[Any]:
        width = entry.shape[1]
        num_columns = np.empty(width, np.bool_)[columns].size
        out = np.empty((sum(stop - start for start, stop in runs), num_columns), kind)
        block_rows = max(1, BLOCK_BYTES // max(1, width * kind.itemsize))
        block = np.empty((min(block_rows, max((stop - start for start, stop in runs), default=0)), width), kind)
        done = 0
        for start, stop in runs:
            for first in range(start, stop, block_rows):
                part = block[: min(block_rows, stop - first)]
                self._pread(shard, part, entry.begin + first * width * kind.itemsize)
                out[done : done + len(part)] = part[:, columns]
                done += len(part)
        return out

    def _pread(self, shard: str, out: NDArray[Any], offset: int) -> None:
        """Fill the C-contiguous `out` from byte `offset` of `shard`."""
        if not out.size:
            return
        if shard not in self._files:
            self._files[shard] = os.open(self.directory / shard, os.O_RDONLY)
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            count = os.preadv(self._files[shard], [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"truncated safetensors file {self.directory / shard}",
                                      expected=f"{len(view)} bytes at {offset}", found=f"{done}")
            done += count
        self.bytes_read += done

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


TensorPlan = tuple[str, str, tuple[int, ...]]
"""(name, safetensors dtype, shape) of a tensor to be written."""


class ShardWriter:
    """One safetensors file, written in any order under a temporary name.

    The header is complete before the first tensor arrives, so nothing is held back in memory. As a context
    manager: `finish` and `publish` on success, `abort` on an exception.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorPlan], *, metadata: Mapping[str, str]) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        position = 0
        for name, dtype, shape in tensors:
            assert name not in header, f"two tensors named {name}"
            size = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts aligned to 8 bytes
        begin = 8 + len(text)
        self._entries = {
            name: Entry(dtype, tuple(shape), begin + header[name]["data_offsets"][0],
                         begin + header[name]["data_offsets"][1])
            for name, dtype, shape in tensors
        }
        # One flag per row: what is still missing, and that nothing is written twice.
        self._written = {name: np.zeros(entry.shape[0] if entry.shape else 1, np.bool_)
                         for name, entry in self._entries.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: int | None = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._pwrite(len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(self._file, begin + position)

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write the whole tensor `name`; `array` has its planned shape and numpy type (BF16: raw `uint16`)."""
        assert array.shape == self._entries[name].shape, f"{name}: {array.shape}, planned {self._entries[name].shape}"
        self.write_rows(name, 0, array if array.shape else array.reshape(1))

    def write_rows(self, name: str, start_row: int, array: NDArray[Any]) -> None:
        """Write rows `start_row ..` (dim 0) of tensor `name`; the other dims are whole."""
        entry, written = self._entries[name], self._written[name]
        rows = slice(start_row, start_row + len(array))
        assert array.dtype == NUMPY_DTYPES[entry.dtype], f"{name}: {array.dtype} into {entry.dtype}"
        assert array.shape[1:] == entry.shape[1:] and rows.stop <= len(written), f"{name}: {array.shape} at {start_row}"
        assert not written[rows].any(), f"{name}: rows {rows} written twice"
        row_bytes = (entry.end - entry.begin) // max(1, len(written))
        data = np.ascontiguousarray(array)
        if data.size:
            self._pwrite(data.reshape(-1).view(np.uint8).data, entry.begin + start_row * row_bytes)
        written[rows] = True

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        assert self._file is not None, f"{self.path} is closed"
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], offset + done)

    def finish(self) -> None:
        """Check that every tensor is whole and flush to disk; the file keeps its temporary name."""
        missing = [name for name, written in self._written.items() if not written.all()]
        assert not missing, f"not fully written: {missing[:5]}"
        assert self._file is not None, f"{self.path} is closed"
        os.fsync(self._file)
        os.close(self._file)
        self._file = None

    def publish(self) -> None:
        """Rename to the final name; `finish` comes first."""
        assert self._file is None, "finish comes before publish"
        os.replace(self._partial, self.path)

    def abort(self) -> None:
        """Remove the temporary file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
            self.publish()
        else:
            self.abort()


class TensorWriter:
    """A set of safetensors files for `transformers`, planned up front and written in any order.

    Tensors are laid out in the given order, in shards of at most `shard_bytes` of data (or one tensor).
    Nothing appears under a final name before `close`. As a context manager: `close` on success, `abort` on
    an exception.
    """

    def __init__(self, directory: Path, tensors: Sequence[TensorPlan], *, shard_bytes: int = 5 * 2**30,
                 metadata: Mapping[str, str] | None = None) -> None:
        self.directory = Path(directory)
        shards: list[list[TensorPlan]] = [[]]
        used = 0
        for tensor in tensors:
            size = math.prod(tensor[2]) * NUMPY_DTYPES[tensor[1]].itemsize
            if shards[-1] and used + size > shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(tensor)
            used += size
        self._shards = [
            ShardWriter(self.directory / shard_name(i, len(shards)), shard, metadata=metadata or {"format": "pt"})
            for i, shard in enumerate(shards)
        ]
        self._of = {name: writer for writer, shard in zip(self._shards, shards, strict=True) for name, _, _ in shard}
        assert len(self._of) == len(tensors), "two tensors of one name"

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write the whole tensor `name`; see `ShardWriter.write`."""
        self._of[name].write(name, array)

    def write_rows(self, name: str, start_row: int, array: NDArray[Any]) -> None:
        """Write some rows of tensor `name`; see `ShardWriter.write_rows`."""
        self._of[name].write_rows(name, start_row, array)

    def close(self) -> None:
        """Check that all is written, flush, give the files their final names, and write the index if several."""
        for shard in self._shards:
            shard.finish()
        for shard in self._shards:
            shard.publish()
        if len(self._shards) > 1:
            write_index(self.directory, [shard.path.name for shard in self._shards])

    def abort(self) -> None:
        """Remove what was written so far."""
        for shard in self._shards:
            shard.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def write_index(directory: Path, shard_names: Sequence[str]) -> None:
    """Write `model.safetensors.index.json` over the finished shards `shard_names` of `directory`."""
    headers = {shard: read_header(directory / shard) for shard in shard_names}
    weight_map = {name: shard for shard, header in headers.items() for name in header}
    total = sum(entry.end - entry.begin for header in headers.values() for entry in header.values())
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
