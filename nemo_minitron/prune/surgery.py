"""Carry out a `Plan`: a Hugging Face directory in, a smaller one out. Decides nothing.

Streams tensor by tensor in blocks of rows, without torch and without a process group, so memory does not grow
with the model and parallel layouts cannot matter. Numbers are copied bit for bit in the type they are stored in.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Plan, read_json, write_json
from nemo_minitron.checkpoint import families
from nemo_minitron.checkpoint.container import NUMPY_DTYPES, from_float32, to_float32
from nemo_minitron.checkpoint.directory import copy_tokenizer_files, prepare_partial, publish_partial
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
        CheckpointError: `source_dir` is broken, is not of shape `plan.source`, holds tensors that its family does
            not know, or lies in `output_dir`; or the disk is full.
    """
    if source_dir.resolve().is_relative_to(output_dir.resolve()):
        raise CheckpointError("the output directory would replace the source", found=str(output_dir),
                              expected=f"another output directory than {source_dir}")
    _check_arch(source_dir, plan.source)
    pairs = list(_source_and_target_tensors(plan))
    with TensorReader(source_dir) as reader:
        _check_tensors(reader, plan.source)
        partial = prepare_partial(output_dir)
        try:
            planned = [(target.name, reader.dtype(source.name), target.shape) for source, target in pairs]
            with TensorWriter(partial, planned, shard_bytes=shard_bytes) as writer:
                for source, target in pairs:
                    queries = plan.head_pairs and source.axes[0] == "heads"
                    (_copy_queries if queries else _copy)(reader, writer, plan, source, target)
            config = families.hf_config(plan.target, read_json(source_dir / "config.json"))
            write_json(partial / "config.json", {**config, **(extra_config or {})})
            copy_tokenizer_files(source_dir, partial)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError("the pruned checkpoint cannot be written", found=error.strerror or str(error),
                                  expected=f"room to write in {output_dir.parent}", key="output_dir") from None
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    publish_partial(output_dir)


def _source_and_target_tensors(plan: Plan) -> Iterator[tuple[HFTensor, HFTensor]]:
    """Each tensor of the target, in file order, with the source tensor it is cut from.

    Both come from the same family, so within a layer (and outside the layers) they are listed alike.
    """
    by_layer: dict[int | None, list[HFTensor]] = {}
    for source in families.hf_tensors_with_axes(plan.source):
        by_layer.setdefault(source.layer, []).append(source)
    remaining: dict[int | None, Iterator[HFTensor]] = {None: iter(by_layer[None])}
    remaining.update((layer, iter(by_layer[source_layer])) for layer, source_layer in enumerate(plan.layers))
    for target in families.hf_tensors_with_axes(plan.target):
        yield next(remaining[target.layer]), target


def _check_arch(source_dir: Path, expected: ArchSpec) -> None:
    found = families.read_arch(source_dir).to_dict()
    differing = {name: value for name, value in expected.to_dict().items() if found[name] != value}
    if differing:
        raise CheckpointError(f"{source_dir} is not the model that the plan is for",
                              expected=", ".join(f"{name} {value}" for name, value in differing.items()),
                              found=", ".join(f"{name} {found[name]}" for name in differing))


def _check_tensors(reader: TensorReader, arch: ArchSpec) -> None:
    """Check names, shapes and types before anything is written; what the family does not know would be lost."""
    expected = dict(families.hf_tensors(arch))
    for name, shape in expected.items():
        found, dtype = reader.shape(name), reader.dtype(name)
        if found != shape:
            raise CheckpointError(f"tensor {name} in {reader.directory} does not fit its config.json",
                                  expected=f"shape {shape}", found=f"shape {found}")
        if dtype not in NUMPY_DTYPES:
            raise CheckpointError(f"tensor {name} in {reader.directory} has an unsupported type",
                                  expected=", ".join(NUMPY_DTYPES), found=dtype)
    # Old files hold rotary frequencies, which config.json decides, and a copy of a tied embedding as LM head.
    derived = {families.FAMILIES[arch.family].head} if arch.tied_embeddings else set()
    unknown = [name for name in reader.names
               if name not in expected and name not in derived and not name.endswith(".rotary_emb.inv_freq")]
    if unknown:
        raise CheckpointError(f"unknown tensors in {reader.directory}", found=", ".join(unknown[:3]),
                              expected=f"only those of family '{arch.family}'")


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


def _copy_queries(reader: TensorReader, writer: TensorWriter, plan: Plan, source: HFTensor, target: HFTensor) -> None:
    """Copy the kept heads' query rows; of a paired head write kept + c (kept - pruned), computed in fp32."""
    assert source.layer is not None
    position, head_dim, dtype = plan.layers.index(source.layer), plan.source.head_dim, reader.dtype(source.name)
    _, columns = rows_and_columns(plan, source)
    partner = dict(plan.head_pairs[position])

    def rows_of(head: int) -> NDArray[Any]:
        return reader.read(source.name, rows=slice(head * head_dim, (head + 1) * head_dim), cols=columns)

    for place, head in enumerate(plan.heads[position]):
        rows = rows_of(head)
        if head in partner:
            kept, pruned = to_float32(rows, dtype), to_float32(rows_of(partner[head]), dtype)
            rows = from_float32(kept + np.float32(plan.head_residual) * (kept - pruned), dtype)
        writer.write_rows(target.name, place * head_dim, rows)
