"""Hugging Face directory -> this rank's Megatron parameters. Each rank reads only its own slices.

No Megatron here: parameters come by name, and the family's table says what each is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.families import HFTensor, head_tensor, parameter_source, tensor_axes
from nemo_minitron.checkpoint.families.table import Transform, Vocab
from nemo_minitron.checkpoint.numbers import TORCH_DTYPES, to_torch
from nemo_minitron.checkpoint.tensors import TensorReader
from nemo_minitron.errors import CheckpointError


def load_shard(parameters: Iterable[tuple[str, torch.nn.Parameter]], directory: Path, arch: ArchSpec, *,
               tp_rank: int, tp_size: int, layer_offset: int,
               read: bool = True, share: Callable[[torch.Tensor], None] | None = None) -> None:
    """Fill the named parameters of this rank's `GPTModel` chunk, in place, cast to their own type.

    Args:
        parameters: as `named_parameters()` gives them: local TP shards, layers numbered from 0 within the chunk.
        directory: a Hugging Face directory with the global tensors.
        arch: shape of the whole model.
        tp_rank: this rank within its TP group; `tp_size` ranks share each layer.
        tp_size: tensor-parallel degree.
        layer_offset: number in the whole model of the chunk's first layer.
        read: whether this rank reads; if not, `share` brings what another one read.
        share: gives every replica the tensor that the reading one has, in place; None: each reads for itself.

    Raises:
        CheckpointError: a tensor is missing, has another shape than `arch` says, or is no float tensor.
    """
    tensors = tensor_axes(arch)
    with TensorReader(directory) as reader, torch.no_grad():
        for name, parameter in parameters:
            source = parameter_source(arch, name, layer_offset)
            if read:
                local = _read(reader, source.transform, [tensors[hf] for hf in source.hf], arch, tp_rank, tp_size)
                assert local.shape == parameter.shape, f"{name}: {tuple(local.shape)} for {tuple(parameter.shape)}"
                parameter.copy_(local)
            if share is not None:
                share(parameter.data)


def read_head(directory: Path, arch: ArchSpec, *, tp_rank: int, tp_size: int) -> torch.Tensor:
    """The LM head's rows `[v, H]` of TP rank `tp_rank`, in the stored type, on the CPU.

    v = V padded up to a multiple of `tp_size`, divided by it; padding rows are zero. With tied embeddings these
    are the embedding's rows. Raises as `load_shard` does.
    """
    with TensorReader(directory) as reader:
        return _read(reader, Vocab(), [tensor_axes(arch)[head_tensor(arch)]], arch, tp_rank, tp_size)


def _read(reader: TensorReader, transform: Transform, tensors: list[HFTensor], arch: ArchSpec, tp_rank: int,
          tp_size: int) -> torch.Tensor:
    for tensor in tensors:
        if (found := reader.shape(tensor.name)) != tensor.shape:
            raise CheckpointError(f"tensor {tensor.name} in {reader.directory} does not fit config.json",
                                  expected=f"shape {tensor.shape}", found=f"shape {found}")
    dtypes = {reader.dtype(tensor.name) for tensor in tensors}
    dtype = dtypes.pop()
    if dtypes or dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{', '.join(tensor.name for tensor in tensors)} in {reader.directory}",
                              expected=f"one type of {', '.join(TORCH_DTYPES)}", found=f"{dtype} {' '.join(dtypes)}")
    return to_torch(transform.read(reader.read, tensors, arch, tp_rank=tp_rank, tp_size=tp_size), dtype)
