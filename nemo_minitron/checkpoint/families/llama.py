"""Llama (`model_type: llama`): the name table, and its `config.json`.

Covers Llama 1 to 3: grouped queries, tied or untied embeddings, an explicit `head_dim`, plain or Llama-3-scaled
rotary embeddings. Projection biases and other rotary scalings are refused.
"""

from __future__ import annotations

from typing import Any

from nemo_minitron.arch import ArchSpec, Rope, RopeScaling
from nemo_minitron.checkpoint.families.table import QKV, Direct, Family, GatedMLP, ParameterRow, TensorRow, Vocab
from nemo_minitron.errors import ArchError

_HF = "model.layers.{i}."
_MEGATRON = "decoder.layers.{i}."

TENSORS = (
    TensorRow("model.embed_tokens.weight", ("vocab", "hidden")),
    TensorRow(_HF + "input_layernorm.weight", ("hidden",)),
    TensorRow(_HF + "self_attn.q_proj.weight", ("heads", "hidden")),
    TensorRow(_HF + "self_attn.k_proj.weight", ("groups", "hidden")),
    TensorRow(_HF + "self_attn.v_proj.weight", ("groups", "hidden")),
    TensorRow(_HF + "self_attn.o_proj.weight", ("hidden", "heads")),
    TensorRow(_HF + "post_attention_layernorm.weight", ("hidden",)),
    TensorRow(_HF + "mlp.gate_proj.weight", ("ffn", "hidden")),
    TensorRow(_HF + "mlp.up_proj.weight", ("ffn", "hidden")),
    TensorRow(_HF + "mlp.down_proj.weight", ("hidden", "ffn")),
    TensorRow("model.norm.weight", ("hidden",)),
    TensorRow("lm_head.weight", ("vocab", "hidden")),
)

PARAMETERS = (
    ParameterRow(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Vocab()),
    ParameterRow((_MEGATRON + "input_layernorm.weight", _MEGATRON + "self_attention.linear_qkv.layer_norm_weight"),
                 (_HF + "input_layernorm.weight",), Direct()),
    ParameterRow((_MEGATRON + "self_attention.linear_qkv.weight",),
                 (_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
                 QKV()),
    ParameterRow((_MEGATRON + "self_attention.linear_proj.weight",), (_HF + "self_attn.o_proj.weight",), Direct(1)),
    ParameterRow((_MEGATRON + "pre_mlp_layernorm.weight", _MEGATRON + "mlp.linear_fc1.layer_norm_weight"),
                 (_HF + "post_attention_layernorm.weight",), Direct()),
    ParameterRow((_MEGATRON + "mlp.linear_fc1.weight",), (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
                 GatedMLP()),
    ParameterRow((_MEGATRON + "mlp.linear_fc2.weight",), (_HF + "mlp.down_proj.weight",), Direct(1)),
    ParameterRow(("decoder.final_layernorm.weight",), ("model.norm.weight",), Direct()),
    ParameterRow(("output_layer.weight",), ("lm_head.weight",), Vocab()),
)


def read_config(config: dict[str, Any]) -> ArchSpec:
    """The architecture that `config.json` describes; defaults are those of `transformers.LlamaConfig`.

    Raises:
        ArchError: a missing number, biases, another activation or another rotary scaling.
    """
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ArchError("unsupported Llama", expected="layers without biases", found=f"{key}: true in config.json")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ArchError("unsupported Llama", expected="hidden_act: silu in config.json", found=repr(activation))
    num_heads, hidden_size = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise ArchError("bad config.json", expected="head_dim, as hidden_size is no multiple of num_attention_heads",
                        found=f"hidden_size {hidden_size}, num_attention_heads {num_heads}")
    return ArchSpec(
        family="llama",
        num_layers=_number(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=_number(config, "intermediate_size"),
        num_attention_heads=num_heads,
        num_query_groups=_number(config, "num_key_value_heads", num_heads),
        head_dim=_number(config, "head_dim", hidden_size // num_heads),
        vocab_size=_number(config, "vocab_size"),
        max_position_embeddings=_number(config, "max_position_embeddings", 2048),
        rope=_read_rope(config),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    ).check()


def _number(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise ArchError("bad config.json", expected=f"{key} to be a positive integer", found=repr(value))
    return value


def _read_rope(config: dict[str, Any]) -> Rope:
    """Rotary settings: `rope_theta` and `rope_scaling`, or both in the newer `rope_parameters`."""
    parameters = config.get("rope_parameters") or {}
    scaling = parameters or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(theta=theta)
    if kind != "llama3":
        raise ArchError("unsupported rotary scaling", expected="rope_scaling null or of type llama3 in config.json",
                        found=repr(kind))
    try:
        return Rope(theta=theta, scaling=RopeScaling(
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        ))
    except (KeyError, TypeError, ValueError) as error:
        raise ArchError("bad llama3 rotary scaling in config.json", found=f"{type(error).__name__}: {error}",
                        expected="factor, low_freq_factor, high_freq_factor and original_max_position_embeddings"
                        ) from None


def write_config(arch: ArchSpec) -> dict[str, Any]:
    """The keys of `config.json` that the architecture decides."""
    scaling = arch.rope.scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope.theta,
        "rope_scaling": None if scaling is None else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
        "tie_word_embeddings": arch.tied_embeddings,
    }


FAMILY = Family(model_type="llama", embedding="model.embed_tokens.weight", head="lm_head.weight",
                tensors=TENSORS, parameters=PARAMETERS, read_config=read_config, write_config=write_config)
