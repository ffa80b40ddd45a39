"""Digests, and random checkpoints."""

import dataclasses
import json

import pytest
import torch
import transformers

from nemo_minitron.checkpoint import digest
from nemo_minitron.checkpoint.digest import read_checkpoint, write_random
from nemo_minitron.errors import CheckpointError
from tests.support.checkpoints import UNTIED, llama_tensors, read_llama, write_llama
from tests.support.tiny_llama import FAMILIES

TOKENIZER = {"added_tokens": [{"id": 3, "content": "<s>"}], "model": {"vocab": {"a": 0, "</s>": 9}}}


@pytest.fixture
def tokenizer_directory(tmp_path):
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    return directory


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it(tmp_path, tokenizer_directory, tied):
    arch = dataclasses.replace(UNTIED, tied_embeddings=tied)
    write_random(arch, tmp_path / "model", tokenizer_directory=tokenizer_directory, seed=1)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (model.config.bos_token_id, model.config.eos_token_id) == (3, 9)
    assert model.config.head_dim == arch.head_dim
    assert sum(parameter.numel() for parameter in model.parameters()) == arch.num_parameters()
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.shape == (1, 8, arch.vocab_size)


def test_names_shapes_and_spread(tmp_path, tokenizer_directory):
    arch = dataclasses.replace(UNTIED, hidden_size=128, ffn_hidden_size=256)
    write_random(arch, tmp_path / "model", tokenizer_directory=tokenizer_directory, seed=1, std=0.05)
    written = read_llama(tmp_path / "model")
    assert {name: t.shape for name, t in written.items()} == {n: t.shape for n, t in llama_tensors(arch).items()}
    for name, tensor in written.items():
        if "norm" in name:
            assert torch.all(tensor == 1)
        else:
            std = 0.05 / (2 * arch.num_layers) ** 0.5 if "o_proj" in name or "down_proj" in name else 0.05
            # At least 3,072 numbers: the standard error of a standard deviation is std / sqrt(2 n) < 1.3 %.
            assert abs(tensor.std() / std - 1) < 0.06, name
            assert abs(tensor.mean()) < 5 * std / tensor.numel() ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_multiply_by_one_and_biases_are_zero(tmp_path, tokenizer_directory, family):
    arch = FAMILIES[family]
    write_random(arch, tmp_path / "model", tokenizer_directory=tokenizer_directory, seed=1)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert len(vectors) == {"mistral": 2, "qwen2": 5, "qwen3": 4, "nemotron": 4}[family] * arch.num_layers \
        + (2 if family == "nemotron" else 1)
    for name, vector in vectors.items():
        assert torch.all(vector == (0 if name.endswith("bias") or family == "nemotron" else 1)), name
    values = 5 + 3 * torch.randn(7, arch.hidden_size)
    centred = values - values.mean(-1, keepdim=True) if family == "nemotron" else values
    normed = centred / (centred.square().mean(-1, keepdim=True) + arch.norm_eps).sqrt()
    torch.testing.assert_close(model.model.norm(values), normed)


def test_the_seed_decides_alone(tmp_path, tokenizer_directory, monkeypatch):
    digests = {}
    for name, seed, block in (("a", 1, 2**23), ("b", 1, 50), ("c", 2, 2**23)):
        monkeypatch.setattr(digest, "BLOCK_VALUES", block)
        write_random(UNTIED, tmp_path / name, tokenizer_directory=tokenizer_directory, seed=seed)
        digests[name] = read_checkpoint(tmp_path / name).weights_digest
    assert digests["a"] == digests["b"] != digests["c"]
    # A tensor of its own generator does not depend on what other tensors there are.
    write_random(dataclasses.replace(UNTIED, num_query_groups=2), tmp_path / "d",
                 tokenizer_directory=tokenizer_directory, seed=1)
    a, d = read_llama(tmp_path / "a"), read_llama(tmp_path / "d")
    assert torch.equal(a["lm_head.weight"], d["lm_head.weight"])


def test_bfloat16_is_float32_rounded(tmp_path, tokenizer_directory):
    for dtype in ("F32", "BF16"):
        write_random(UNTIED, tmp_path / dtype, tokenizer_directory=tokenizer_directory, seed=1, dtype=dtype)
    exact, rounded = read_llama(tmp_path / "F32"), read_llama(tmp_path / "BF16")
    assert all(torch.equal(tensor.to(torch.bfloat16), rounded[name]) for name, tensor in exact.items())
    assert json.loads((tmp_path / "BF16/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_unknown_special_tokens_stay_null(tmp_path):
    (tmp_path / "none").mkdir()
    write_random(UNTIED, tmp_path / "model", tokenizer_directory=tmp_path / "none", seed=1)
    assert json.loads((tmp_path / "model/config.json").read_text())["bos_token_id"] is None


def test_read_checkpoint(tmp_path):
    write_llama(UNTIED, tmp_path / "a", num_files=2)
    (tmp_path / "a/tokenizer.json").write_text("{}")
    first = read_checkpoint(tmp_path / "a")
    assert (first.arch, first.path, first.tokens_seen) == (UNTIED, tmp_path / "a", None)
    (tmp_path / "a/tokenizer.json").write_text("[]")
    second = read_checkpoint(tmp_path / "a")
    assert (second.weights_digest, second.tokenizer_digest != first.tokenizer_digest) == (first.weights_digest, True)
    write_llama(UNTIED, tmp_path / "a", num_files=2, seed=9)
    assert read_checkpoint(tmp_path / "a").weights_digest != first.weights_digest


def test_broken_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        read_checkpoint(tmp_path / "none")
    write_llama(UNTIED, tmp_path / "a")
    path = tmp_path / "a/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(tmp_path / "a")
