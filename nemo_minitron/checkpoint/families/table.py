"""What a model family's table is made of: Hugging Face tensors with their axes, and the transforms to Megatron's.

A table is read both ways: `read` takes this TP rank's part out of the Hugging Face tensors, `merge` puts the
parts of all TP ranks together again. Both only move numbers (bit-exact in any numeric type), so arrays may hold
BF16 as raw `uint16`. Numpy only; knows nothing of files.

Letters: H hidden, D head_dim, G query groups, F ffn, V vocabulary; lower-case `v` = padded V / tp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.arch import ArchSpec

LAYER = "{i}"
"""Stands for the layer number in the names of a table."""


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """A Hugging Face tensor: global `shape`, its `layer` (None outside the layers) and the axis of each dim.

    Axes are `hidden`, `ffn`, `heads`, `groups`, `vocab`, `head_dim`. A `heads` (`groups`) dim is num * head_dim long,
    head by head.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    axes: tuple[str | None, ...]


class Fetch(Protocol):
    """Reads rows (dim 0) and columns (dim 1) of the tensor `name`; None means all. `TensorReader.read` is one."""

    def __call__(self, name: str, *, rows: slice | None = None, cols: slice | None = None) -> NDArray[Any]: ...


class Transform(Protocol):
    """How one Megatron parameter is made of the Hugging Face tensors of its table entry."""

    def read(self, fetch: Fetch, tensors: Sequence[HFTensor], arch: ArchSpec, *, tp_rank: int,
             tp_size: int) -> NDArray[Any]:
        """The parameter of TP rank `tp_rank`, in Megatron's local layout."""
        ...

    def merge(self, shards: Sequence[NDArray[Any]], arch: ArchSpec) -> list[NDArray[Any]]:
        """The global Hugging Face tensors, from the parameters of all TP ranks in rank order."""
        ...


@dataclasses.dataclass(frozen=True)
class Direct:
    """The same tensor; `tp_dim` is sharded over TP in equal contiguous parts, None is replicated."""

    tp_dim: int | None = None

    def read(self, fetch: Fetch, tensors: Sequence[HFTensor], arch: ArchSpec, *, tp_rank: int,
             tp_size: int) -> NDArray[Any]:
        """See `Transform`."""
        (tensor,) = tensors
        if self.tp_dim is None or tp_size == 1:
            return fetch(tensor.name)
        part = _part(tensor.shape[self.tp_dim], tp_rank, tp_size)
        return fetch(tensor.name, rows=part) if self.tp_dim == 0 else fetch(tensor.name, cols=part)

    def merge(self, shards: Sequence[NDArray[Any]], arch: ArchSpec) -> list[NDArray[Any]]:
        """See `Transform`; of a replicated tensor the first rank's counts."""
        return [shards[0] if self.tp_dim is None else np.concatenate(shards, axis=self.tp_dim)]


@dataclasses.dataclass(frozen=True)
class QKV:
    """Megatron's fused attention input `[(N + 2 G) D / tp, H]` from q `[N D, H]`, k and v `[G D, H]`; biases likewise.

    Rows go group by group: the group's query heads, its key head, its value head. Groups are sharded over TP
    in contiguous parts (megatron-core `SelfAttention.get_query_key_value_tensors`, read at 0.15.3).
    """

    def read(self, fetch: Fetch, tensors: Sequence[HFTensor], arch: ArchSpec, *, tp_rank: int,
             tp_size: int) -> NDArray[Any]:
        """See `Transform`."""
        groups = _part(arch.num_query_groups, tp_rank, tp_size)
        num_groups = groups.stop - groups.start
        parts = []
        for tensor in tensors:
            group_rows = tensor.shape[0] // arch.num_query_groups
            rows = fetch(tensor.name, rows=slice(groups.start * group_rows, groups.stop * group_rows))
            parts.append(rows.reshape(num_groups, group_rows, *tensor.shape[1:]))
        fused: NDArray[Any] = np.concatenate(parts, axis=1)
        return fused.reshape(-1, *fused.shape[2:])

    def merge(self, shards: Sequence[NDArray[Any]], arch: ArchSpec) -> list[NDArray[Any]]:
        """See `Transform`."""
        width = shards[0].shape[1:]
        fused = np.concatenate(shards).reshape(arch.num_query_groups, -1, *width)
        query_rows = arch.heads_per_group * arch.head_dim
        parts = np.split(fused, [query_rows, query_rows + arch.head_dim], axis=1)
        return [part.reshape(-1, *width) for part in parts]


@dataclasses.dataclass(frozen=True)
class GatedMLP:
    """Megatron's fused gated input `[2 F / tp, H]` = this rank's rows of gate `[F, H]`, then those of up `[F, H]`."""

    def read(self, fetch: Fetch, tensors: Sequence[HFTensor], arch: ArchSpec, *, tp_rank: int,
             tp_size: int) -> NDArray[Any]:
        """See `Transform`."""
        return np.concatenate([fetch(tensor.name, rows=_part(tensor.shape[0], tp_rank, tp_size))
                               for tensor in tensors])

    def merge(self, shards: Sequence[NDArray[Any]], arch: ArchSpec) -> list[NDArray[Any]]:
        """See `Transform`."""
        halves = [np.split(shard, 2) for shard in shards]
        return [np.concatenate([half[which] for half in halves]) for which in (0, 1)]


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Rows `[v, H]` of a `[V, H]` embedding or LM head: V is padded with zero rows up to a multiple of tp."""

    def read(self, fetch: Fetch, tensors: Sequence[HFTensor], arch: ArchSpec, *, tp_rank: int,
             tp_size: int) -> NDArray[Any]:
        """See `Transform`."""
        (tensor,) = tensors
        num_rows = math.ceil(tensor.shape[0] / tp_size)
        start, stop = (min(rank * num_rows, tensor.shape[0]) for rank in (tp_rank, tp_rank + 1))
        rows = fetch(tensor.name, rows=slice(start, stop))
        padding = num_rows - len(rows)
        return np.concatenate([rows, np.zeros((padding, *rows.shape[1:]), rows.dtype)]) if padding else rows

    def merge(self, shards: Sequence[NDArray[Any]], arch: ArchSpec) -> list[NDArray[Any]]:
        """See `Transform`; the padding is dropped."""
        return [np.concatenate(shards)[: arch.vocab_size]]


def _part(size: int, rank: int, count: int) -> slice:
    """Part `rank` of `count` equal contiguous parts of `size`."""
    assert size % count == 0, f"{size} does not divide into {count} parts"
    return slice(rank * (size // count), (rank + 1) * (size // count))


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """One Hugging Face tensor of the table, for every layer where its name has `{i}`."""

    name: str
    axes: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """One Megatron parameter: its names (local layers first, then Transformer Engine) and what it is made of."""

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    transform: Transform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its table, and its `config.json` read and written.

    `embedding` and `head` name the Hugging Face tensors that are one and the same when embeddings are tied;
    `head` is then not stored. `tensors` is in file order.
    """

    model_type: str
    embedding: str
    head: str
    tensors: tuple[TensorRow, ...]
    parameters: tuple[ParameterRow, ...]
    read_config: Callable[[dict[str, Any]], ArchSpec]
    write_config: Callable[[ArchSpec], dict[str, Any]]
