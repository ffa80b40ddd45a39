"""Megatron's and NeMo's distributed checkpoints <-> Hugging Face directories, so a team can start from what it trained.

Reading needs no Megatron and no process group and goes tensor by tensor; the family's table undoes Megatron's fusions.
Writing loads the model in one process and saves it with Megatron-core.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.checkpoint.directory import (
    copy_tokenizer_files,
    partial_directory,
    prepare_partial,
    publish_partial,
)
from nemo_minitron.checkpoint.distributed import DistributedCheckpoint
from nemo_minitron.checkpoint.families import FAMILIES, HFTensor, hf_config, read_arch, tensor_axes
from nemo_minitron.checkpoint.families.table import LAYER, ParameterRow, Vocab
from nemo_minitron.checkpoint.numbers import SAFETENSORS_DTYPES, TORCH_DTYPES, to_numpy
from nemo_minitron.checkpoint.tensors import TensorReader, TensorWriter
from nemo_minitron.errors import CheckpointError

_MODEL = ("embedding.", "decoder.", "output_layer.")
_PREFIX = re.compile(r"^(?:(?:module|model|state_dict)\.)+")


def import_megatron(directory: Path, config_dir: Path, output: Path) -> ArchSpec:
    """Write the weights of the distributed checkpoint in `directory` as the Hugging Face directory `output`.

    `config_dir` gives `config.json` (the architecture: a checkpoint does not say it in a form that is safe to read)
    and the tokenizer. Tensors keep their stored type. Memory: the largest parameter or stored chunk, a few times over.

    Raises:
        ArchError, CheckpointError: a configuration or checkpoint that cannot be read, or one that is not of the other.
    """
    arch = read_arch(config_dir)
    if output.exists():
        raise CheckpointError("the output exists", expected="a new folder", found=str(output), key="output")
    source = _Source(DistributedCheckpoint(directory), arch)
    wanted = tensor_axes(arch)
    source.check(wanted)
    dtypes = {name: source.dtype(row, tensor) for row, layer in _rows(arch)
              for name, tensor in _made(row, layer, wanted).items()}
    planned = [(name, dtypes[name], tensor.shape) for name, tensor in wanted.items()]
    with _published(output) as partial:
        with TensorWriter(partial, planned) as writer:
            for row, layer in _rows(arch):
                arrays = row.transform.merge([to_numpy(source.read(row, layer))], arch)
                for name, array in zip(_made(row, layer, wanted), arrays, strict=True):
                    writer.write(name, array)
        config = hf_config(arch, read_json(config_dir / "config.json"))
        config.pop("dtype", None)
        config["torch_dtype"] = str(TORCH_DTYPES[planned[0][1]]).removeprefix("torch.")
        write_json(partial / "config.json", config)
        copy_tokenizer_files(config_dir, partial)
    return arch


@contextmanager
def _published(output: Path) -> Iterator[Path]:
    """The partial directory of `output`, renamed to it at the end; removed after an exception."""
    try:
        partial = prepare_partial(output)
        yield partial
        publish_partial(output)
    except OSError as error:
        shutil.rmtree(partial_directory(output), ignore_errors=True)
        raise CheckpointError("the checkpoint cannot be written", found=error.strerror or str(error),
                              expected=f"room to write in {output.parent}", key="output") from None
    except BaseException:
        shutil.rmtree(partial_directory(output), ignore_errors=True)
        raise


def _rows(arch: ArchSpec) -> list[tuple[ParameterRow, int | None]]:
    """Every Megatron parameter of the whole model: its row of the table and its layer."""
    family = FAMILIES[arch.family]
    rows = [row for row in family.parameters if not (arch.tied_embeddings and row.hf == (family.head,))]
    return [(row, layer) for row in rows for layer in (range(arch.num_layers) if LAYER in row.megatron[0] else [None])]


def _made(row: ParameterRow, layer: int | None, wanted: dict[str, HFTensor]) -> dict[str, HFTensor]:
    return {name: wanted[name] for name in (hf.replace(LAYER, str(layer)) for hf in row.hf)}


class _Source:
    """The parameters of a checkpoint by their rows of the table: under either spelling, per layer or stacked."""

    def __init__(self, checkpoint: DistributedCheckpoint, arch: ArchSpec) -> None:
        self.checkpoint = checkpoint
        self.arch = arch
        self._names = {_PREFIX.sub("", name): name for name in checkpoint.tensors if not name.startswith("optimizer.")}

    def find(self, row: ParameterRow, layer: int | None) -> tuple[str, int | None]:
        """The name in the checkpoint, and the layer to take of it where it is stacked over layers.

        Raises `CheckpointError` where there is none.
        """
        for spelled in row.megatron:
            if (name := self._names.get(spelled.replace(LAYER, str(layer)))) is not None:
                return name, None
            if layer is not None and (name := self._names.get(spelled.replace(f"{LAYER}.", ""))) is not None:
                return name, layer
        raise CheckpointError(f"parameter missing from {self.checkpoint.directory}", key="config or megatron",
                              expected=row.megatron[0].replace(LAYER, str(layer)), found=f"{len(self._names)} others")

    def dtype(self, row: ParameterRow, tensor: HFTensor) -> str:
        """The safetensors type of what is stored."""
        name, _ = self.find(row, tensor.layer)
        dtype = self.checkpoint.tensors[name].dtype
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{name} in {self.checkpoint.directory} has an unsupported type",
                                  expected=", ".join(SAFETENSORS_DTYPES.values()), found=str(dtype), key="megatron")
        return SAFETENSORS_DTYPES[dtype]

    def read(self, row: ParameterRow, layer: int | None) -> torch.Tensor:
        """The global parameter; `check` comes first."""
        name, stacked = self.find(row, layer)
        return self.checkpoint.read(name, layer=stacked)

    def check(self, wanted: dict[str, HFTensor]) -> None:
        """Raise `CheckpointError` unless the checkpoint has the architecture's parameters in their shapes, and no more.

        One more, such as a bias that `config.json` does not know of, would be another model.
        """
        used: set[str] = set()
        shapes: dict[str, tuple[int, ...]] = {}
        for row, layer in _rows(self.arch):
            name, stacked = self.find(row, layer)
            if row.megatron[0] not in shapes:
                shapes[row.megatron[0]] = self._shape(row, list(_made(row, layer, wanted).values()))
            expected, found = shapes[row.megatron[0]], self.checkpoint.tensors[name].shape
            if stacked is not None:
                expected = (self.arch.num_layers, *expected)
            padded = isinstance(row.transform, Vocab) and found[1:] == expected[1:] and found > expected
            if found != expected and not padded:
                raise CheckpointError(f"{name} in {self.checkpoint.directory} does not fit config.json", key="config",
                                      expected=f"shape {expected}", found=f"shape {found}")
            used.add(name)
        others = [name for plain, name in self._names.items()
                  if plain.startswith(_MODEL) and "_extra_state" not in plain and name not in used]
        if others:
            raise CheckpointError(f"{self.checkpoint.directory} has parameters that config.json does not know of",
                                  expected=f"a {self.arch.family} of {self.arch.num_layers} layers", key="config",
                                  found=", ".join(sorted(others)[:3]) + (", ..." if len(others) > 3 else ""))

    def _shape(self, row: ParameterRow, tensors: list[HFTensor]) -> tuple[int, ...]:
        """Global shape of a parameter of Megatron's, from those of its Hugging Face tensors."""
        shapes = {tensor.name: tensor.shape for tensor in tensors}

        def fetch(name: str, *, rows: slice | None = None, cols: slice | None = None) -> NDArray[Any]:
            return np.broadcast_to(np.uint8(0), shapes[name])[rows or slice(None)]

        return row.transform.read(fetch, tensors, self.arch, tp_rank=0, tp_size=1).shape


def export_megatron(checkpoint: Path, output: Path, *, nemo: bool = False) -> None:
    """Save the Hugging Face directory `checkpoint` as a Megatron-core distributed checkpoint, the new folder `output`.

    With `nemo` as NeMo lays it out: in `output/weights`, names starting with `module.`; NeMo's `context`, Python
    objects of its own model classes, is not written. BF16 where all stored tensors are, else float32. Loads the whole
    model in this process, which must be alone.

    Raises:
        ArchError, CheckpointError: `checkpoint` cannot be read, or `output` exists.
    """
    arch = read_arch(checkpoint)
    if output.exists():
        raise CheckpointError("the output exists", expected="a new folder", found=str(output), key="output")
    from nemo_minitron.parallel.cpu import open_cpu_door, write_checkpoints_in_process

    open_cpu_door()
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    from nemo_minitron.model.build import load_model, transformer_config
    from nemo_minitron.parallel import groups
    from nemo_minitron.parallel.layout import Layout

    with TensorReader(checkpoint) as reader:
        bf16 = all(reader.dtype(name) == "BF16" for name in tensor_axes(arch))
    groups.start_alone()
    try:
        groups.seed_everything(0)
        write_checkpoints_in_process()
        model = load_model(arch, checkpoint, transformer_config(arch, Layout(), bf16=bf16))
        with _published(output) as partial:
            weights = partial / "weights" if nemo else partial
            weights.mkdir(exist_ok=True)
            try:
                dist_checkpointing.save(model.sharded_state_dict(prefix="module." if nemo else ""), str(weights))
            except CheckpointException as error:  # a BaseException, whatever the reason: the reasons are in it
                raise OSError("; ".join(str(reason) for reason, _ in error.failures.values())) from None
            except RuntimeError as error:  # torch.save's for a full disk
                raise OSError(str(error).splitlines()[0]) from None
    finally:
        groups.stop()
