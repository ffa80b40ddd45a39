"""This rank's Megatron parameters -> a Hugging Face directory. Every pipeline stage streams out its own shard file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.checkpoint.container import shard_name
from nemo_minitron.checkpoint.directory import (
    copy_tokenizer_files,
    partial_directory,
    prepare_partial,
    publish_partial,
)
from nemo_minitron.checkpoint.families import ParameterSource, hf_config, parameter_source, tensor_axes
from nemo_minitron.checkpoint.numbers import SAFETENSORS_DTYPES, TORCH_DTYPES, to_numpy
from nemo_minitron.checkpoint.tensors import ShardWriter, write_index


def save_checkpoint(parameters: Iterable[tuple[str, torch.nn.Parameter]], arch: ArchSpec, directory: Path, *,
                    base_directory: Path, tp_group: dist.ProcessGroup | None, tp_rank: int, tp_size: int,
                    pp_rank: int, pp_size: int, dp_rank: int, layer_offset: int, dtype: str | None,
                    barrier: Callable[[], None]) -> None:
    """Write the model that all ranks hold together as the Hugging Face directory `directory`.

    Every rank must call this: `barrier` is called three times by each. Of the ranks with `dp_rank` 0, each TP
    group gathers one parameter at a time to its first rank (one gather over TP each; peak memory is the largest
    full tensor, a few times over), which writes the stage's shard file. Files are put together in
    `<directory>.partial` and appear under `directory` at once; an earlier `directory` is replaced.

    Args:
        parameters: local TP shards by Megatron name, layers numbered from 0 within the stage.
        arch: shape of the whole model.
        directory: what to write; a file system that all writing ranks share.
        base_directory: Hugging Face directory that gives the other keys of `config.json`, and the tokenizer.
        tp_group: this rank's TP group; may be None where `tp_size` is 1.
        tp_rank: rank within that group.
        tp_size: tensor-parallel degree.
        pp_rank: pipeline stage.
        pp_size: pipeline-parallel degree.
        dp_rank: replica; only replica 0 writes.
        layer_offset: number in the whole model of the stage's first layer.
        dtype: safetensors type to store (`F32`, `BF16`, `F16`); None keeps each parameter's own.
        barrier: waits for all ranks.
    """
    directory = Path(directory)
    coordinator = pp_rank == tp_rank == dp_rank == 0
    if coordinator:
        prepare_partial(directory)
    barrier()
    partial = partial_directory(directory)
    if dp_rank == 0:
        sources = [(parameter, parameter_source(arch, name, layer_offset)) for name, parameter in parameters]
        sources = [(parameter, source) for parameter, source in sources if not source.duplicate]
        stored = [parameter.dtype if dtype is None else TORCH_DTYPES[dtype] for parameter, _ in sources]
        writer = _stage_writer(partial / shard_name(pp_rank, pp_size), sources, stored, arch) if tp_rank == 0 else None
        _write_stage(writer, sources, stored, arch, tp_group, tp_size)
        if coordinator:
            config = hf_config(arch, read_json(Path(base_directory) / "config.json"))
            config.pop("dtype", None)  # the newer spelling would win over torch_dtype
            config["torch_dtype"] = str(stored[0]).removeprefix("torch.")
            write_json(partial / "config.json", config)
            copy_tokenizer_files(base_directory, partial)
    barrier()
    if coordinator:
        if pp_size > 1:
            write_index(partial, [shard_name(stage, pp_size) for stage in range(pp_size)])
        publish_partial(directory)
    barrier()


Sources = list[tuple[torch.nn.Parameter, ParameterSource]]


def _stage_writer(path: Path, sources: Sources, stored: list[torch.dtype], arch: ArchSpec) -> ShardWriter:
    """Plan this stage's file: its Hugging Face tensors in file order."""
    tensors = tensor_axes(arch)
    dtypes = {hf: SAFETENSORS_DTYPES[kind] for (_, source), kind in zip(sources, stored, strict=True)
              for hf in source.hf}
    planned = [(name, dtypes[name], tensor.shape) for name, tensor in tensors.items() if name in dtypes]
    return ShardWriter(path, planned, metadata={"format": "pt"})


def _write_stage(writer: ShardWriter | None, sources: Sources, stored: list[torch.dtype], arch: ArchSpec,
                 tp_group: dist.ProcessGroup | None, tp_size: int) -> None:
    """Gather parameter after parameter over TP; on the first TP rank (which has the writer) un-fuse and write."""
    try:
        for (parameter, source), kind in zip(sources, stored, strict=True):
            shards = _gather(parameter.detach().to(kind), tp_group, tp_size)
            if writer is None:
                continue
            arrays = source.transform.merge([to_numpy(shard) for shard in shards], arch)
            for name, array in zip(source.hf, arrays, strict=True):
                writer.write(name, array)
        if writer is not None:
            writer.finish()
            writer.publish()
    except BaseException:
        if writer is not None:
            writer.abort()
        raise


def _gather(shard: torch.Tensor, tp_group: dist.ProcessGroup | None, tp_size: int) -> list[torch.Tensor]:
    """All TP ranks' `shard`s in rank order on the first, nothing on the others: one gather over TP."""
    if tp_size == 1:
        return [shard]
    assert tp_group is not None, "a TP group for tp_size > 1"
    raw = shard.contiguous().view(torch.uint8)  # bytes: gloo does not know every type
    first = dist.get_rank(tp_group) == 0
    gathered = [torch.empty_like(raw) for _ in range(tp_size)] if first else None
    dist.gather(raw, gathered, dst=dist.get_global_rank(tp_group, 0), group=tp_group)
    return [part.view(shard.dtype) for part in gathered or []]
