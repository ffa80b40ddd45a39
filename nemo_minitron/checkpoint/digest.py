"""What identifies a Hugging Face directory, and a new one with random weights. No torch."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Checkpoint, digest_files, write_json
from nemo_minitron.checkpoint.container import NUMPY_DTYPES, bfloat16_bits
from nemo_minitron.checkpoint.directory import (
    copy_tokenizer_files,
    prepare_partial,
    publish_partial,
    tokenizer_files,
)
from nemo_minitron.checkpoint.families import HFTensor, hf_config, hf_tensors_with_axes, read_arch
from nemo_minitron.checkpoint.tensors import TensorReader, TensorWriter

BLOCK_VALUES = 2**23
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_checkpoint(directory: Path) -> Checkpoint:
    """The architecture and the digests of a Hugging Face directory; `tokens_seen` stays None.

    Reads every byte of the weights once. Raises `CheckpointError` or `ArchError` for a directory that is missing,
    broken or not supported.
    """
    directory = Path(directory)
    arch = read_arch(directory)
    with TensorReader(directory) as reader:
        files = reader.files
    return Checkpoint(path=directory, arch=arch, tokenizer_digest=digest_files(tokenizer_files(directory)),
                      weights_digest=digest_files(files))


def write_random(arch: ArchSpec, directory: Path, *, tokenizer_directory: Path, seed: int, dtype: str = "F32",
                 std: float = 0.02) -> None:
    """Write a randomly initialised Hugging Face directory with the tokenizer of `tokenizer_directory`.

    Weights are normal with `std`, those of the projections onto the residual stream (o_proj, down_proj) with
    std / sqrt(2 L) (GPT-2, section 2.3; Megatron's scaled initialisation), norms multiply by one,
    biases are zero. Each tensor has a generator of its own, seeded by `seed` and its name, so nothing depends on order
    or threads.
    """
    partial = prepare_partial(directory)
    planned = hf_tensors_with_axes(arch)
    with TensorWriter(partial, [(tensor.name, dtype, tensor.shape) for tensor in planned]) as writer:
        for tensor in planned:
            _write_random_tensor(writer, tensor, arch, seed=seed, dtype=dtype, std=std)
    base = {"attention_dropout": 0.0, "initializer_range": std, "use_cache": True, "torch_dtype": TORCH_NAMES[dtype],
            **{f"{kind}_token_id": _special_token_id(tokenizer_directory, kind) for kind in ("bos", "eos")}}
    write_json(partial / "config.json", hf_config(arch, base))
    copy_tokenizer_files(tokenizer_directory, partial)
    publish_partial(directory)


def _write_random_tensor(writer: TensorWriter, tensor: HFTensor, arch: ArchSpec, *, seed: int, dtype: str,
                         std: float) -> None:
    """Fill one tensor in blocks of rows of at most `BLOCK_VALUES` numbers (or one row)."""
    name_words = np.frombuffer(hashlib.sha256(tensor.name.encode()).digest(), "<u4")
    generator = np.random.default_rng([seed, *name_words.tolist()])
    # Onto the residual stream: hidden is the output, some other axis the input.
    if tensor.axes[0] == "hidden" and len(tensor.axes) == 2:
        std /= math.sqrt(2 * arch.num_layers)
    row_shape = tensor.shape[1:]
    block_rows = max(1, BLOCK_VALUES // math.prod(row_shape))
    for start in range(0, tensor.shape[0], block_rows):
        shape = (min(block_rows, tensor.shape[0] - start), *row_shape)
        if len(shape) == 1:
            zero = tensor.name.endswith(".bias") or (arch.norm == "layernorm_1p" and tensor.axes == ("hidden",))
            values = np.full(shape, 0.0 if zero else 1.0, np.float32)
        else:
            values = generator.standard_normal(shape, np.float32) * np.float32(std)
        writer.write_rows(tensor.name, start,
                          bfloat16_bits(values) if dtype == "BF16" else values.astype(NUMPY_DTYPES[dtype]))


def _special_token_id(tokenizer_directory: Path, kind: str) -> int | None:
    """Id of the `bos` or `eos` token that tokenizer_config.json names, looked up in tokenizer.json; else None."""
    settings = _optional_json(tokenizer_directory / "tokenizer_config.json")
    tokenizer = _optional_json(tokenizer_directory / "tokenizer.json")
    token = settings.get(f"{kind}_token")
    if isinstance(token, dict):
        token = token.get("content")
    added = {item["content"]: item["id"] for item in tokenizer.get("added_tokens", ())}
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    return added.get(token, vocabulary.get(token) if isinstance(vocabulary, dict) else None)


def _optional_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
