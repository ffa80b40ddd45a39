"""Choosing the family, listing its tensors, and looking up Megatron's parameters."""

import dataclasses
import json

import pytest

from nemo_minitron.checkpoint.families import (
    head_tensor,
    hf_config,
    hf_tensors,
    parameter_source,
    read_arch,
    tensor_axes,
)
from nemo_minitron.errors import ArchError, CheckpointError
from tests.support.checkpoints import UNTIED, llama_config, llama_tensors, megatron_parameters, write_llama

TIED = dataclasses.replace(UNTIED, tied_embeddings=True)


@pytest.mark.parametrize("arch", [UNTIED, TIED], ids=["untied", "tied"])
def test_read_arch_and_tensor_list(tmp_path, arch):
    tensors = write_llama(arch, tmp_path)
    assert read_arch(tmp_path) == arch
    listed = hf_tensors(arch)
    assert dict(listed) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert len(listed) == len(tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == arch.num_parameters()


def test_file_order_and_axes():
    axes = tensor_axes(UNTIED)
    names = list(axes)
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert [axes[name].layer for name in names[1:-2]] == [layer for layer in range(4) for _ in range(9)]
    assert axes["model.layers.3.self_attn.k_proj.weight"].axes == ("groups", "hidden")
    assert axes["model.layers.3.self_attn.o_proj.weight"].axes == ("hidden", "heads")
    assert axes["model.layers.3.mlp.down_proj.weight"].axes == ("hidden", "ffn")
    assert axes["lm_head.weight"].axes == ("vocab", "hidden")


@pytest.mark.parametrize("arch", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("transformer_engine", [False, True])
def test_every_stored_tensor_has_exactly_one_parameter(arch, transformer_engine):
    tensors = llama_tensors(arch)
    used = []
    for first, layers in ((True, [0, 1]), (False, [2, 3])):
        names = megatron_parameters(tensors, arch, tp_rank=0, tp_size=1, layers=layers, first=first, last=not first,
                                    transformer_engine=transformer_engine)
        sources = [parameter_source(arch, name, layers[0]) for name in names]
        used += [hf for source in sources if not source.duplicate for hf in source.hf]
        assert [source.duplicate for source in sources].count(True) == (arch.tied_embeddings and not first)
    assert sorted(used) == sorted(tensors)


def test_head():
    assert head_tensor(UNTIED) == "lm_head.weight"
    assert head_tensor(TIED) == "model.embed_tokens.weight"


def test_config_round_trip_keeps_unknown_keys():
    base = {**llama_config(UNTIED), "my_key": [1], "rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}}
    arch = dataclasses.replace(UNTIED, num_layers=2, hidden_size=16)
    config = hf_config(arch, base)
    assert config["my_key"] == [1]
    assert (config["num_hidden_layers"], config["hidden_size"], config["head_dim"]) == (2, 16, 6)
    assert config["rope_theta"] == arch.rope.theta
    assert "rope_parameters" not in config
    assert base["num_hidden_layers"] == 4


@pytest.mark.parametrize("content", ['{"model_type": "gpt2"}', "{}", "[]"])
def test_other_models_are_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArchError, match="llama"):
        read_arch(tmp_path)


def test_where_there_is_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_arch(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        read_arch(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps(llama_config(UNTIED)))
    assert read_arch(tmp_path) == UNTIED
