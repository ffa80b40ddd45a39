"""Every family: its config.json and tensors are those of `transformers`, read and written."""

import json

import pytest
import torch
import transformers

from nemo_minitron.arch import Rope, RopeScaling
from nemo_minitron.checkpoint.families import FAMILIES, hf_config, hf_tensors, parameter_source, read_arch, tensor_axes
from nemo_minitron.checkpoint.tensors import TensorReader
from nemo_minitron.errors import ArchError

CONFIGS = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config,
           "qwen3": transformers.Qwen3Config, "nemotron": transformers.NemotronConfig}
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 50, "head_dim": 12}
REQUIRED = {"hidden_size": 1024, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 32,
            "vocab_size": 50}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def test_every_family_is_tested():
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_defaults_are_those_of_transformers(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **REQUIRED}))
    arch = read_arch(tmp_path)
    config = CONFIGS[family](**REQUIRED)
    assert arch.num_query_groups == (config.num_key_value_heads or 32)
    assert arch.head_dim == (getattr(config, "head_dim", None) or 1024 // 32)
    assert arch.max_position_embeddings == config.max_position_embeddings
    assert arch.norm_eps == getattr(config, "rms_norm_eps", getattr(config, "norm_eps", None))
    assert arch.rope.theta == config.rope_theta
    assert arch.rotary_fraction == getattr(config, "partial_rotary_factor", 1.0)
    assert arch.sliding_window == getattr(config, "sliding_window", None)
    assert arch.tied_embeddings == config.tie_word_embeddings


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_tensors_and_their_number_are_those_of_transformers(tmp_path, family, tied):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](**SIZES, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    arch = read_arch(tmp_path)
    with TensorReader(tmp_path) as reader:
        assert {name: tuple(reader.shape(name)) for name in reader.names} == dict(hf_tensors(arch))
    assert arch.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_written_is_read_again_by_us_and_by_transformers(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SIZES, "rope_theta": 5000.0,
                                                      "sliding_window": 32, "use_sliding_window": True}))
    arch = read_arch(tmp_path)
    written = hf_config(arch, {"bos_token_id": 7})
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_arch(tmp_path) == arch
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CONFIGS[family]
    assert (config.head_dim, config.bos_token_id, config.rope_theta) == (12, 7, 5000.0)
    with torch.device("meta"):
        (name,) = config.architectures
        assert getattr(transformers, name)(config).num_parameters() == arch.num_parameters()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", [
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
])
def test_rotary_settings_in_both_spellings(family, changes):
    arch = FAMILIES[family].read_config({**SIZES, **changes})
    assert arch.rope == Rope(theta=5e5, scaling=RopeScaling(**LLAMA3))
    assert FAMILIES[family].read_config(hf_config(arch, {})) == arch


def test_the_rotated_part_in_both_spellings():
    read = FAMILIES["nemotron"].read_config
    for changes in ({"partial_rotary_factor": 0.75}, {"rope_parameters": {"partial_rotary_factor": 0.75}}):
        arch = read({**SIZES, "head_dim": 16, **changes})
        assert arch.rotary_fraction == 0.75 and read(hf_config(arch, {})) == arch


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("changes", [
    {}, {"max_window_layers": 2}, {"max_window_layers": 3}, {"max_window_layers": 0, "use_sliding_window": False},
    {"max_window_layers": 0, "sliding_window": None}, {"layer_types": ["full_attention"] * 3, "max_window_layers": 0},
    {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
])
def test_a_window_counts_where_a_layer_of_transformers_has_one(family, changes):
    config = {**SIZES, "use_sliding_window": True, "sliding_window": 32, **changes}
    reference = CONFIGS[family](**config)
    slides = "sliding_attention" in reference.layer_types
    assert FAMILIES[family].read_config(config).sliding_window == (reference.sliding_window if slides else None)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_goes_into_exactly_one_megatron_parameter(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SIZES}))
    arch = read_arch(tmp_path)
    rows = FAMILIES[family].parameters
    for which in (0, -1):  # local names, then those of Transformer Engine
        sources = [parameter_source(arch, row.megatron[which].replace("{i}", str(layer)), 0)
                   for row in rows for layer in (range(arch.num_layers) if "{i}" in row.megatron[which] else (0,))]
        names = [name for source in sources for name in source.hf]
        assert sorted(names) == sorted(tensor_axes(arch))


@pytest.mark.parametrize(("family", "key", "value"), [
    ("llama", "attention_bias", True), ("llama", "hidden_act", "gelu"), ("qwen3", "attention_bias", True),
    ("nemotron", "hidden_act", "silu"), ("nemotron", "mlp_bias", True), ("mistral", "hidden_act", "gelu"),
    ("qwen2", "rope_scaling", {"type": "yarn", "factor": 4.0}), ("nemotron", "partial_rotary_factor", 0.3),
    ("nemotron", "rope_scaling", {"rope_type": "llama3", **LLAMA3}), ("mistral", "sliding_window", 0),
    ("qwen3", "head_dim", 0), ("nemotron", "num_key_value_heads", 3),
])
def test_what_cannot_be_built_is_refused(tmp_path, family, key, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SIZES, key: value}))
    with pytest.raises(ArchError, match="expected"):
        read_arch(tmp_path)
