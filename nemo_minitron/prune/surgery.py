"""Carry out a `Plan`: a Hugging Face directory in, a smaller one out. Decides nothing.

Streams tensor by tensor in blocks of rows, without torch and without a process group, so memory does not grow
with the model and parallel layouts cannot matter. Numbers are copied bit for bit in the type they are stored in.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron import artifacts
from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Plan
from nemo_minitron.checkpoint import families
from nemo_minitron.checkpoint.container import NUMPY_DTYPES
from nemo_minitron.checkpoint.families import HFTensor
from nemo_minitron.checkpoint.tensors import TensorReader, TensorWriter
from nemo_minitron.errors import CheckpointError
from nemo_minitron.prune.slices import rows_and_columns

BLOCK_BYTES = 32 * 2**20
"""Rows are copied in blocks of about this size."""


def prune_checkpoint(source_dir: Path, plan: Plan, output_dir: Path, *, shard_bytes: int = 5 * 2**30,
                     extra_config: Mapping[str, Any] | None = None) -> None:
    """Write the part of `source_dir` that `plan` keeps as a Hugging Face directory `output_dir`.

    Kept layers are renumbered from 0. Everything is written to `<output_dir>.partial` and renamed when whole, so
    `output_dir` never holds half a model; an earlier `output_dir` is replaced.

    Args:
        source_dir: Hugging Face directory of a model of shape `plan.source`.
        plan: what to keep.
        output_dir: made here, with config.json, safetensors and the source's tokenizer files.
        shard_bytes: largest size of one safetensors file (or one tensor).
        extra_config: further keys for config.json.

    Raises:
        CheckpointError: `source_dir` is broken or its tensors are not those of `plan.source`.
    """
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pairs = list(_source_and_target_tensors(plan))
    try:
        with TensorReader(source_dir) as reader:
            for source, _ in pairs:
                _check(reader, source)
            planned = [(target.name, reader.dtype(source.name), target.shape) for source, target in pairs]
            with TensorWriter(partial, planned, shard_bytes=shard_bytes) as writer:
                for source, target in pairs:
                    _copy(reader, writer, plan, source, target)
        base = artifacts.read_json(source_dir / "config.json")
        artifacts.write_json(partial / "config.json",
                             {**families.hf_config(plan.target, base), **(extra_config or {})})
        families.copy_tokenizer_files(source_dir, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(output_dir, ignore_errors=True)
    os.replace(partial, output_dir)


def _source_and_target_tensors(plan: Plan) -> Iterator[tuple[HFTensor, HFTensor]]:
    """Each tensor of the target with the source tensor it is cut from, in the target's order.

    Both come from the same family, so within a layer (and outside the layers) they are listed alike.
    """
    by_source_layer = _by_layer(plan.source)
    for layer, targets in _by_layer(plan.target).items():
        source_layer = None if layer is None else plan.layers[layer]
        yield from zip(by_source_layer[source_layer], targets, strict=True)


def _by_layer(arch: ArchSpec) -> dict[int | None, list[HFTensor]]:
    tensors: dict[int | None, list[HFTensor]] = {}
    for tensor in families.hf_tensors_with_axes(arch):
        tensors.setdefault(tensor.layer, []).append(tensor)
    return tensors


def _check(reader: TensorReader, source: HFTensor) -> None:
    found, dtype = reader.shape(source.name), reader.dtype(source.name)
    if found != source.shape:
        raise CheckpointError(f"tensor {source.name} in {reader.directory} is not that of the plan's source",
                              expected=f"shape {source.shape}", found=f"shape {found}")
    if dtype not in NUMPY_DTYPES:
        raise CheckpointError(f"tensor {source.name} in {reader.directory} has an unsupported type",
                              expected=", ".join(NUMPY_DTYPES), found=dtype)


def _copy(reader: TensorReader, writer: TensorWriter, plan: Plan, source: HFTensor, target: HFTensor) -> None:
    """Copy the kept rows and columns of one tensor, block by block."""
    rows, columns = rows_and_columns(plan, source)
    num_rows = source.shape[0] if rows is None else len(rows)
    kept_shape = (num_rows, *source.shape[1:]) if columns is None else (num_rows, len(columns))
    assert kept_shape == target.shape, f"{target.name}: the plan keeps {kept_shape}, the target has {target.shape}"
    row_bytes = math.prod(target.shape[1:]) * NUMPY_DTYPES[reader.dtype(source.name)].itemsize
    block_rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, num_rows, block_rows):
        stop = min(start + block_rows, num_rows)
        block = reader.read(source.name, rows=slice(start, stop) if rows is None else rows[start:stop], cols=columns)
        writer.write_rows(target.name, start, block)
