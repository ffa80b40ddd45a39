"""A pruned Llama whose head_dim is not hidden / heads goes through llama.cpp's own GGUF package and back.

The file is written as llama.cpp's `convert_hf_to_gguf.py` does for Llamas: from `config.json` and the tensors alone,
query and key rows of each head regrouped by rotary halves. `transformers` has a GGUF reader of its own.
"""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers

from nemo_minitron.checkpoint.families import hf_tensors, read_arch
from nemo_minitron.importance.scores import Scores, tensor_shapes
from nemo_minitron.prune.plan import make_plan
from nemo_minitron.prune.surgery import prune_checkpoint
from tests.support.checkpoints import read_llama
from tests.support.tiny_llama import TIED, UNTIED, write_model

TARGET = {"hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 2, "num_layers": 3}


def regroup(rows, num_heads):
    """Rows of each head: from first halves then second halves of the rotary pairs to pair by pair."""
    return rows.reshape(num_heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(directory, path):
    config = json.loads((directory / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in read_llama(directory).items():
        new_name = names.get_name(name, try_suffixes=(".weight",))
        assert new_name is not None, name
        array = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = regroup(array, heads if "q_proj" in name else groups)
        writer.add_tensor(new_name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("source", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_pruned_checkpoint_converts(tmp_path, source):
    rng = np.random.default_rng(0)
    tensors = {name: rng.random(shape) for name, shape in tensor_shapes(source).items()}
    scores = Scores(source=source, num_samples=3, samples_digest="", source_digest="", measures={}, tensors=tensors)
    pruned = tmp_path / "pruned"
    prune_checkpoint(write_model(source, tmp_path / "source"), make_plan(source, TARGET, scores), pruned)
    arch = read_arch(pruned)
    assert arch.head_dim * arch.num_attention_heads != arch.hidden_size
    write_gguf(pruned, tmp_path / "model.gguf")

    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {key: reader.get_field(f"llama.{key}").contents() for key in (
        "embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
        "attention.key_length", "attention.value_length", "rope.dimension_count")}
    assert list(fields.values()) == [24, 3, 40, 2, 2, 16, 16, 16]
    stored = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, arch.num_layers)
    assert stored == {names.get_name(name, (".weight",)): shape for name, shape in hf_tensors(arch)}
    assert sum(tensor.n_elements for tensor in reader.tensors) == arch.num_parameters()

    expected = transformers.AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert expected.num_parameters() == found.num_parameters() == arch.num_parameters()
    tokens = torch.arange(60).remainder(arch.vocab_size).view(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, expected(tokens).logits, rtol=0, atol=0)
