"""Reads Megatron's distributed checkpoints (`torch_dist`, that is PyTorch's DCP) without unpickling what they hold.

`.metadata` says which chunks of which tensor lie where. It is a pickle, so it is read by an unpickler that makes inert
records of the few classes that belong there and refuses every other name: nothing named in the file is imported or
called. A chunk is a tensor as `torch.save` writes it, read with `weights_only`. No process group, no Megatron.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle  # noqa: S403  only for the unpickler below, which resolves no name of the file
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.errors import CheckpointError

METADATA_FILE = ".metadata"
_RECORD_MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.", "pathlib")
_TRACKER = "latest_checkpointed_iteration.txt"
_UNREADABLE = (AttributeError, KeyError, TypeError, ValueError, IndexError, EOFError, ArithmeticError, MemoryError,
               RecursionError, pickle.UnpicklingError)  # what a stream of other bytes makes an unpickler raise
_CONVERT = "a torch_dist one (Megatron-LM converts: --ckpt-convert-format torch_dist --ckpt-convert-save DIR)"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A block of a tensor, `sizes` long from `offsets` on: bytes `[begin, begin + length)` of `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A global tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class DistributedCheckpoint:
    """The tensors of a checkpoint by their names in it; `read` gets one, or one layer of one."""

    def __init__(self, directory: Path) -> None:
        """Read the list of tensors of `directory`, a checkpoint or a folder of them that names its latest.

        Raises:
            CheckpointError: there is none, in another format, or its metadata is not what the format says.
        """
        self.directory = find_checkpoint(directory)
        try:
            self.tensors = _tensors(_read_metadata(self.directory / METADATA_FILE))
        except _UNREADABLE as error:
            raise CheckpointError(f"bad metadata {self.directory / METADATA_FILE}", key="megatron",
                                  expected="what PyTorch's distributed checkpoints have",
                                  found=f"{type(error).__name__}: {error}") from None

    def read(self, name: str, *, layer: int | None = None) -> torch.Tensor:
        """The tensor `name`; with `layer`, that row of a tensor that is stacked over layers.

        Raises:
            CheckpointError: a file that is missing or shorter than its metadata says, or chunks that leave holes.
        """
        stored = self.tensors[name]
        shape = stored.shape if layer is None else stored.shape[1:]
        result = torch.empty(shape, dtype=stored.dtype)
        filled = 0
        for chunk in stored.chunks:
            if layer is not None and not chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]:
                continue
            part, offsets = self._read_chunk(name, chunk), chunk.offsets
            if layer is not None:
                part, offsets = part[layer - chunk.offsets[0]], chunk.offsets[1:]
            result[tuple(slice(at, at + size) for at, size in zip(offsets, part.shape, strict=True))] = part
            filled += part.numel()
        if filled != result.numel():
            raise CheckpointError(f"tensor {name} in {self.directory} is not whole", key="megatron",
                                  expected=f"{result.numel()} values", found=f"{filled} in its chunks")
        return result

    def _read_chunk(self, name: str, chunk: Chunk) -> torch.Tensor:
        path = self.directory / chunk.file
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < chunk.begin + chunk.length:
                    raise CheckpointError(f"truncated file {path}", found=f"{size} bytes", key="megatron",
                                          expected=f"{chunk.length} bytes at {chunk.begin} for {name}")
                file.seek(chunk.begin)
                data = file.read(chunk.length)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}", found=error.strerror or str(error), key="megatron") from None
        try:
            part = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types
            raise CheckpointError(f"bad data in {path}", expected=f"a tensor for {name}", key="megatron",
                                  found=str(error).splitlines()[0]) from None
        if not isinstance(part, torch.Tensor) or tuple(part.shape) != chunk.sizes:
            raise CheckpointError(f"bad data in {path}", expected=f"shape {chunk.sizes} for {name}", key="megatron",
                                  found=str(getattr(part, "shape", type(part).__name__)))
        return part


def find_checkpoint(directory: Path) -> Path:
    """The folder with `.metadata`: `directory`, its `weights` (NeMo), or the iteration that its tracker file names.

    Raises:
        CheckpointError: there is none, or one of a format that is not read.
    """
    candidates = [directory, directory / "weights"]
    if (directory / _TRACKER).is_file():
        latest = (directory / _TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        candidates.append(directory / (f"iter_{int(latest):07d}" if latest.isdecimal() else Path(latest).name))
    for candidate in candidates:
        if (candidate / METADATA_FILE).is_file():
            return candidate
    for candidate in candidates:
        if any(candidate.glob("mp_rank_*")):
            raise CheckpointError("a checkpoint of the old format", found=f"mp_rank_* in {candidate}", key="megatron",
                                  expected=_CONVERT)
        if any(candidate.glob("*/.zarray")):
            raise CheckpointError("a zarr checkpoint", found=f".zarray in {candidate}", key="megatron",
                                  expected=_CONVERT)
    raise CheckpointError("no distributed checkpoint", expected=f"{METADATA_FILE} in {directory} or its weights/",
                          found="none" if directory.is_dir() else "no such folder", key="megatron")


class _Record:
    """Stands for an object of a class of the metadata: attributes as they were stored, no behaviour."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = tuple(state)


class _RecordUnpickler(pickle.Unpickler):  # noqa: S301  find_class hands out nothing that the file could name
    """Makes a `_Record` of every object; knows torch's shapes and types, and nothing that could be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if f"{module}.".startswith(_RECORD_MODULES) or module.startswith("pathlib"):
            return _Record
        if module == "torch" and name in ("strided", "contiguous_format", "preserve_format", "device"):
            return _Record
        if (module, name) in (("torch.serialization", "_get_layout"), ("builtins", "set"), ("builtins", "slice")):
            return _Record
        raise CheckpointError("metadata with something that has no place there", key="megatron",
                              expected="classes of torch.distributed.checkpoint and megatron.core.dist_checkpointing",
                              found=f"{module}.{name}")


def _read_metadata(path: Path) -> Any:
    with open(path, "rb") as file:
        return _RecordUnpickler(file).load()


def _tensors(metadata: Any) -> dict[str, StoredTensor]:
    places: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for index, info in metadata.storage_data.items():
        if getattr(index, "offset", None) is not None:  # bytes have none
            places.setdefault(index.fqn, []).append((tuple(index.offset), info))
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            continue  # bytes, such as an _extra_state
        where = dict(places.get(name, ()))
        chunks = []
        for chunk in entry.chunks:
            info = where[tuple(chunk.offsets)]
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError("a compressed checkpoint", expected="plain chunks", key="megatron",
                                      found=f"transformed ones of {name}")
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError("bad metadata", expected="plain file names", found=info.relative_path,
                                      key="megatron")
            chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, int(info.offset),
                                int(info.length)))
            _check_bounds(name, tuple(entry.size), chunks[-1])
        dtype = entry.properties.dtype if hasattr(entry.properties, "dtype") else entry.properties.values[0]
        tensors[name] = StoredTensor(tuple(entry.size), dtype, tuple(chunks))
    return tensors


def _check_bounds(name: str, shape: tuple[int, ...], chunk: Chunk) -> None:
    """Raise `ValueError` unless the chunk lies within its tensor and has a place in a file."""
    bounds = list(zip(chunk.offsets, chunk.sizes, shape, strict=True))
    if chunk.begin < 0 or chunk.length < 0 or any(at < 0 or size < 0 or at + size > end for at, size, end in bounds):
        raise ValueError(f"chunk at {chunk.offsets} of {chunk.sizes} in {name} of {shape}")
