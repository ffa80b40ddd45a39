"""Stage `initialize`: a tokenizer trained on the train split, and random weights of the shape in `model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.arch import ArchSpec, Rope
from nemo_minitron.checkpoint.digest import read_checkpoint, write_random
from nemo_minitron.config import ModelConfig
from nemo_minitron.data.corpus import corpus_files, verify
from nemo_minitron.data.source import resolve_kind
from nemo_minitron.data.text import read_documents, split_documents
from nemo_minitron.data.tokenizer import train_bpe
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.stages.context import Context


def run(context: Context) -> dict[str, Any]:
    """Write `checkpoint/`; runs on rank 0 alone."""
    config = context.config
    directory = context.stage_dir("initialize")
    arch = initial_arch(config.model)
    pieces = train_bpe(_train_texts(context), directory / "tokenizer", vocab_size=arch.vocab_size)
    write_random(arch, directory / "checkpoint", tokenizer_directory=directory / "tokenizer", seed=config.seed)
    checkpoint = read_checkpoint(directory / "checkpoint")
    return {"weights_digest": checkpoint.weights_digest, "tokenizer_pieces": pieces, "arch": arch.to_dict()}


_TRAITS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True},
    "nemotron": {"norm": "layernorm_1p", "activation": "squared_relu"},
}
"""What a family decides."""


def initial_arch(model: ModelConfig) -> ArchSpec:
    """The model that the recipe's node `model` describes.

    Raises:
        ConfigError: an unknown family.
        ArchError: numbers that contradict each other.
    """
    if model.family not in _TRAITS:
        raise ConfigError("unknown family", expected=", ".join(_TRAITS), found=repr(model.family), key="model.family")
    return ArchSpec(
        family=model.family, num_layers=model.num_layers, hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size, num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups, head_dim=model.head_dim, vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings, rope=Rope(theta=model.rope_theta),
        rotary_fraction=model.rotary_fraction, norm_eps=model.norm_eps, tied_embeddings=model.tied_embeddings,
        **_TRAITS[model.family],
    ).check()


def _train_texts(context: Context) -> list[str]:
    """The train split of the recipe's text, of every source of a blend."""
    data = context.config.data
    texts: list[str] = []
    paths: list[str | None] = [source.path for source in data.blend]
    for path in paths or [data.path]:
        kind = resolve_kind(data.kind, path)
        if kind == "corpus":
            verify()
            texts += [file.read_text(encoding="utf-8") for file in corpus_files("train")]
            continue
        if kind in ("indexed", "chat") or path is None:
            raise DataError("a tokenizer needs text", expected="data.kind corpus or text", found=kind, key="data.kind")
        documents = split_documents(read_documents(Path(path), separator=data.separator, json_key=data.json_key),
                                    num_heldout=data.num_heldout, heldout_fraction=data.heldout_fraction)
        texts += [document.text for document in documents["train"]]
    return texts
