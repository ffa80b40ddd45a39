"""Model families: `config.json` <-> `ArchSpec`, and one declarative name table each, read both ways.

Pure: no torch, no Megatron; of files it reads `config.json` only. A new family is one more module with a
`FAMILY` and one more entry in `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import read_json
from nemo_minitron.checkpoint.directory import copy_tokenizer_files
from nemo_minitron.checkpoint.families import llama, mistral, nemotron, qwen2, qwen3
from nemo_minitron.checkpoint.families.table import LAYER, HFTensor, Transform
from nemo_minitron.errors import ArchError, CheckpointError

__all__ = ["FAMILIES", "HFTensor", "ParameterSource", "copy_tokenizer_files", "head_tensor", "hf_config",
           "hf_tensors", "hf_tensors_with_axes", "parameter_source", "read_arch", "tensor_axes"]

FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, nemotron, qwen2, qwen3)}


def read_arch(directory: Path) -> ArchSpec:
    """The architecture in the `config.json` of a Hugging Face directory.

    Raises:
        CheckpointError: no such directory, or no `config.json` in it.
        ArchError: a model type or a feature that is not supported.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError("no checkpoint directory" if not path.parent.is_dir() else "no config.json",
                              expected=f"a Hugging Face directory at {directory}", found="nothing there")
    config = read_json(path)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in FAMILIES:
        raise ArchError(f"unsupported model in {path}", expected=f"model_type {' or '.join(FAMILIES)}",
                        found=repr(model_type))
    try:
        return FAMILIES[model_type].read_config(config)
    except ArchError as error:
        raise ArchError(f"{path}: {error}") from None


def hf_config(arch: ArchSpec, base: dict[str, Any]) -> dict[str, Any]:
    """`base` (the data of a `config.json`) with the architecture's numbers replaced; unknown keys are kept.

    `head_dim` is always explicit. The newer `rope_parameters` gives way to `rope_theta` and `rope_scaling`,
    which old and new `transformers` read.
    """
    config = {**base, **FAMILIES[arch.family].write_config(arch)}
    config.pop("rope_parameters", None)
    return config


def hf_tensors_with_axes(arch: ArchSpec) -> list[HFTensor]:
    """All stored Hugging Face tensors of the model, in file order; a tied LM head is not stored."""
    family = FAMILIES[arch.family]
    sizes = {"hidden": arch.hidden_size, "ffn": arch.ffn_hidden_size, "vocab": arch.vocab_size,
             "heads": arch.num_attention_heads * arch.head_dim, "groups": arch.num_query_groups * arch.head_dim,
             "head_dim": arch.head_dim}

    def tensor(name: str, axes: tuple[str | None, ...], layer: int | None) -> HFTensor:
        shape = tuple(sizes[axis] for axis in axes if axis is not None)
        return HFTensor(name.replace(LAYER, str(layer)), shape, layer, axes)

    tables = [row for row in family.tensors if not (arch.tied_embeddings and row.name == family.head)]
    first_in_layer = next(i for i, row in enumerate(tables) if LAYER in row.name)
    in_layers = [row for row in tables if LAYER in row.name]
    outside = [row for row in tables if LAYER not in row.name]
    return [
        *(tensor(row.name, row.axes, None) for row in outside[:first_in_layer]),
        *(tensor(row.name, row.axes, layer) for layer in range(arch.num_layers) for row in in_layers),
        *(tensor(row.name, row.axes, None) for row in outside[first_in_layer:]),
    ]


def hf_tensors(arch: ArchSpec) -> list[tuple[str, tuple[int, ...]]]:
    """(name, global shape) of all stored Hugging Face tensors, in file order."""
    return [(tensor.name, tensor.shape) for tensor in hf_tensors_with_axes(arch)]


def tensor_axes(arch: ArchSpec) -> dict[str, HFTensor]:
    """Each stored Hugging Face tensor by its name, in file order: what axis each of its dims is."""
    return {tensor.name: tensor for tensor in hf_tensors_with_axes(arch)}


def head_tensor(arch: ArchSpec) -> str:
    """Name of the stored tensor `[V, H]` that serves as LM head: the embedding when tied."""
    family = FAMILIES[arch.family]
    return family.embedding if arch.tied_embeddings else family.head


@dataclasses.dataclass(frozen=True)
class ParameterSource:
    """Where one Megatron parameter of the model comes from.

    `duplicate` marks the LM head of a last pipeline stage that is a copy of the tied embedding.
    """

    hf: tuple[str, ...]
    transform: Transform
    duplicate: bool = False


def parameter_source(arch: ArchSpec, name: str, layer_offset: int) -> ParameterSource:
    """Look up a parameter of a Megatron `GPTModel` chunk whose first layer is the model's `layer_offset`.

    Knows the names of Megatron's local layers and of Transformer Engine; leading `module.` are dropped. An unknown
    name is an assertion.
    """
    name = re.sub(r"^(module\.)+", "", name)
    found = re.search(r"\.layers\.(\d+)\.", name)
    pattern = name if found is None else f"{name[: found.start(1)]}{LAYER}{name[found.end(1):]}"
    layer = None if found is None else int(found[1]) + layer_offset
    family = FAMILIES[arch.family]
    row = next((row for row in family.parameters if pattern in row.megatron), None)
    assert row is not None, f"unknown Megatron parameter {name}"
    if row.hf == (family.head,):
        return ParameterSource((head_tensor(arch),), row.transform, duplicate=arch.tied_embeddings)
    return ParameterSource(tuple(hf.replace(LAYER, str(layer)) for hf in row.hf), row.transform)
