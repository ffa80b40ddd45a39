"""Tiny models of every family with a tokenizer, a tiny stream of tokens, and the parallel layouts to try them under.

Nothing here divides conveniently: the vocabulary is no multiple of 2, the heads are not hidden / head_dim, the
last sample is partial, the norms are not one.
"""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from nemo_minitron.arch import ArchSpec, Rope, RopeScaling
from nemo_minitron.checkpoint.digest import write_random
from nemo_minitron.parallel.layout import Layout

SEQ_LENGTH = 16
NUM_TOKENS = 40 * SEQ_LENGTH + 6  # 40 full samples, and one of 5 predicted tokens
TIED = ArchSpec(family="llama", num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
                num_query_groups=2, head_dim=16, vocab_size=101, max_position_embeddings=64, tied_embeddings=True)
UNTIED = dataclasses.replace(TIED, tied_embeddings=False)
LARGE_THETA = dataclasses.replace(UNTIED, rope=Rope(theta=500000.0))
# Not Llama 3.1's own four numbers: at 64 positions of head_dim 16 they keep, blend and stretch frequencies.
SCALED_ROPE = dataclasses.replace(TIED, rope=Rope(theta=10000.0, scaling=RopeScaling(
    factor=5.0, low_freq_factor=0.5, high_freq_factor=3.0, original_max_position_embeddings=32)))

UNEVEN = dataclasses.replace(UNTIED, num_layers=3)  # no multiple of two pipeline stages
MISTRAL = dataclasses.replace(UNTIED, family="mistral", sliding_window=48)
QWEN2 = dataclasses.replace(UNTIED, family="qwen2", qkv_bias=True, tied_embeddings=True)
QWEN3 = dataclasses.replace(UNTIED, family="qwen3", qk_norm=True)
NEMOTRON = dataclasses.replace(UNTIED, family="nemotron", norm="layernorm_1p", activation="squared_relu",
                               rotary_fraction=0.5, num_layers=3)
FAMILIES = {"mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "nemotron": NEMOTRON}

LAYOUTS = {
    "1x1": Layout(),
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "tp2 pp2": Layout(tp=2, pp=2),
    "tp2 sp": Layout(tp=2, sequence_parallel=True),
    "dp2": Layout(dp=2),
}
MORE_LAYOUTS = {**LAYOUTS, "tp2 dp2": Layout(tp=2, dp=2), "pp2 dp2": Layout(pp=2, dp=2)}


def write_model(arch, directory, *, seed=1):
    """Random weights large enough for predictions that differ, with norms that scale each channel differently."""
    tokenizer = directory.with_name(directory.name + ".tokenizer")
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    write_random(arch, directory, tokenizer_directory=tokenizer, seed=seed, std=0.2)
    generator = torch.Generator().manual_seed(seed)
    for path in directory.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        for name, tensor in tensors.items():
            if "norm" in name or name.endswith(".bias"):
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return directory


def write_tokens(prefix, *, vocab_size=TIED.vocab_size, num_tokens=NUM_TOKENS):
    """A stream in which the next token can be learnt: each is the last one's square plus a little noise."""
    from nemo_minitron.data import indexed

    generator = np.random.default_rng(3)
    tokens = [1]
    while len(tokens) < num_tokens:
        tokens.append((tokens[-1] ** 2 + 7 + int(generator.integers(3))) % vocab_size)
    indexed.build(prefix, np.array_split(np.array(tokens), 5), np.uint16)
    return prefix


def open_samples(prefix, *, seq_length=SEQ_LENGTH):
    """The samples of what `write_tokens` wrote."""
    from nemo_minitron.data.batch import TokenSamples
    from nemo_minitron.data.indexed import open_tokens

    return TokenSamples(open_tokens(Path(prefix)), seq_length, vocab_size=TIED.vocab_size)


DOCUMENT_LENGTHS = (3, 33, 12, 7, 50, 2, 21, 9, 14, 5)
"""Tokens; the longest is longer than a sample of 32."""


def write_documents(prefix):
    """Random documents of `DOCUMENT_LENGTHS`."""
    from nemo_minitron.data import indexed

    generator = np.random.default_rng(5)
    indexed.build(prefix, [generator.integers(TIED.vocab_size, size=length) for length in DOCUMENT_LENGTHS], np.uint16)
    return prefix


def open_documents(prefix, *, seq_length=SEQ_LENGTH, packed=True):
    """Samples of what `write_documents` wrote."""
    from nemo_minitron.data.documents import DocumentSamples
    from nemo_minitron.data.indexed import open_tokens

    return DocumentSamples(open_tokens(Path(prefix)), seq_length, packed=packed, vocab_size=TIED.vocab_size)


@contextlib.contextmanager
def formed(layout):
    """Megatron's groups for the name of a layout, gone again at the end; yields the `Layout`."""
    from nemo_minitron.parallel import groups

    groups.form(MORE_LAYOUTS[layout], timeout_s=60)
    groups.seed_everything(1)
    yield MORE_LAYOUTS[layout]
    groups.dissolve()
