"""`config.json` of Llamas: what is read, against `transformers`, and what is refused."""

import dataclasses

import pytest
import transformers

from nemo_minitron.arch import Rope, RopeScaling
from nemo_minitron.checkpoint.families.llama import read_config, write_config
from nemo_minitron.errors import ArchError
from tests.support.checkpoints import UNTIED, llama_config

CONFIG = llama_config(UNTIED)
LLAMA3 = {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def test_defaults_are_those_of_transformers():
    minimal = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
               "num_attention_heads": 4, "vocab_size": 50}
    arch, reference = read_config(minimal), transformers.LlamaConfig(**minimal)
    assert arch.num_query_groups == reference.num_key_value_heads == 4
    assert arch.head_dim == reference.head_dim == 16
    assert arch.norm_eps == reference.rms_norm_eps
    assert arch.max_position_embeddings == reference.max_position_embeddings
    assert arch.rope == Rope(theta=reference.rope_theta)
    assert arch.tied_embeddings is reference.tie_word_embeddings


@pytest.mark.parametrize("changes", [
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    {"rope_theta": 1.0, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
])
def test_llama3_scaling_in_its_spellings(changes):
    rope = Rope(theta=5e5, scaling=RopeScaling(**LLAMA3))
    assert read_config({**CONFIG, **changes}).rope == rope


@pytest.mark.parametrize("changes", [
    {"rope_scaling": None}, {"rope_scaling": {"rope_type": "default"}}, {"rope_parameters": {"rope_theta": 10000.0}}])
def test_no_scaling_in_its_spellings(changes):
    assert read_config({**CONFIG, **changes}).rope == UNTIED.rope


@pytest.mark.parametrize("rope", [Rope(theta=7.0), Rope(theta=5e5, scaling=RopeScaling(**LLAMA3))])
@pytest.mark.parametrize("tied", [False, True])
def test_written_config_reads_back_also_in_transformers(rope, tied):
    arch = dataclasses.replace(UNTIED, rope=rope, tied_embeddings=tied)
    written = write_config(arch)
    assert read_config(written) == arch
    assert read_config(transformers.LlamaConfig(**written).to_dict()) == arch


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "silu.*gelu"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "llama3.*linear"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_hidden_layers": "4"}, "num_hidden_layers.*'4'"),
    ({"num_key_value_heads": 3}, "num_query_groups"),
    ({"head_dim": None, "hidden_size": 25}, "head_dim"),
])
def test_what_is_refused(changes, complaint):
    with pytest.raises(ArchError, match=complaint):
        read_config({**CONFIG, **changes})
