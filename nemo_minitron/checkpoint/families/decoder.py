"""What the decoder-only families have in common: table rows, and how numbers and rotary settings are read."""

from __future__ import annotations

import json
from typing import Any

from nemo_minitron.arch import Rope, RopeScaling
from nemo_minitron.checkpoint.families.table import QKV, Direct, GatedMLP, ParameterRow, TensorRow, Vocab
from nemo_minitron.errors import ArchError

HF = "model.layers.{i}."
MEGATRON = "decoder.layers.{i}."

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
QUERY_KEY_VALUE = tuple(f"{HF}self_attn.{which}_proj" for which in "qkv")


def tensors(*, gated: bool = True, norm_bias: bool = False, qkv_bias: bool = False,
            qk_norm: bool = False) -> tuple[TensorRow, ...]:
    """Hugging Face tensors in file order."""
    def norm(name: str) -> list[TensorRow]:
        kinds = ("weight", "bias") if norm_bias else ("weight",)
        return [TensorRow(f"{name}.{kind}", ("hidden",)) for kind in kinds]

    biases = [TensorRow(f"{name}.bias", (axis,))
              for name, axis in zip(QUERY_KEY_VALUE, ("heads", "groups", "groups"), strict=True)]
    return (
        TensorRow(EMBEDDING, ("vocab", "hidden")),
        *norm(HF + "input_layernorm"),
        *(TensorRow(f"{name}.weight", (axis, "hidden"))
          for name, axis in zip(QUERY_KEY_VALUE, ("heads", "groups", "groups"), strict=True)),
        *(biases if qkv_bias else []),
        *([TensorRow(f"{HF}self_attn.{which}_norm.weight", ("head_dim",)) for which in "qk"] if qk_norm else []),
        TensorRow(HF + "self_attn.o_proj.weight", ("hidden", "heads")),
        *norm(HF + "post_attention_layernorm"),
        *([TensorRow(HF + "mlp.gate_proj.weight", ("ffn", "hidden"))] if gated else []),
        TensorRow(HF + "mlp.up_proj.weight", ("ffn", "hidden")),
        TensorRow(HF + "mlp.down_proj.weight", ("hidden", "ffn")),
        *norm("model.norm"),
        TensorRow(HEAD, ("vocab", "hidden")),
    )


def parameters(*, gated: bool = True, norm_bias: bool = False, qkv_bias: bool = False,
               qk_norm: bool = False) -> tuple[ParameterRow, ...]:
    """Megatron's parameters: names of its local layers, then of Transformer Engine, which fuses norms into linears."""
    rows = [
        ParameterRow(("embedding.word_embeddings.weight",), (EMBEDDING,), Vocab()),
        ParameterRow((MEGATRON + "self_attention.linear_qkv.weight",),
                     tuple(f"{name}.weight" for name in QUERY_KEY_VALUE), QKV()),
        ParameterRow((MEGATRON + "self_attention.linear_proj.weight",), (HF + "self_attn.o_proj.weight",), Direct(1)),
        ParameterRow((MEGATRON + "mlp.linear_fc1.weight",),
                     (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"), GatedMLP()) if gated else
        ParameterRow((MEGATRON + "mlp.linear_fc1.weight",), (HF + "mlp.up_proj.weight",), Direct(0)),
        ParameterRow((MEGATRON + "mlp.linear_fc2.weight",), (HF + "mlp.down_proj.weight",), Direct(1)),
        ParameterRow(("output_layer.weight",), (HEAD,), Vocab()),
    ]
    for kind in ("weight", "bias") if norm_bias else ("weight",):
        rows += [
            ParameterRow((f"{MEGATRON}input_layernorm.{kind}",
                          f"{MEGATRON}self_attention.linear_qkv.layer_norm_{kind}"),
                         (f"{HF}input_layernorm.{kind}",), Direct()),
            ParameterRow((f"{MEGATRON}pre_mlp_layernorm.{kind}", f"{MEGATRON}mlp.linear_fc1.layer_norm_{kind}"),
                         (f"{HF}post_attention_layernorm.{kind}",), Direct()),
            ParameterRow((f"decoder.final_layernorm.{kind}",), (f"model.norm.{kind}",), Direct()),
        ]
    if qkv_bias:
        rows.append(ParameterRow((MEGATRON + "self_attention.linear_qkv.bias",),
                                 tuple(f"{name}.bias" for name in QUERY_KEY_VALUE), QKV()))
    if qk_norm:
        rows += [ParameterRow((f"{MEGATRON}self_attention.{which}_layernorm.weight",),
                              (f"{HF}self_attn.{which}_norm.weight",), Direct()) for which in "qk"]
    return tuple(rows)


def read_sizes(config: dict[str, Any], *, groups: int | None = None, head_dim: int | None = None) -> dict[str, Any]:
    """The sizes in a `config.json` by their names in `ArchSpec`.

    `groups` and `head_dim` are what the family's configuration class assumes where the file says nothing (null counts
    as nothing); where they are None, as many groups as heads, and hidden size / heads.

    Raises:
        ArchError: a number is missing or not positive.
    """
    num_heads, hidden_size = number(config, "num_attention_heads"), number(config, "hidden_size")
    if config.get("head_dim") is None and head_dim is None and hidden_size % num_heads:
        raise ArchError("bad config.json", expected="head_dim, as hidden_size is no multiple of num_attention_heads",
                        found=f"hidden_size {hidden_size}, num_attention_heads {num_heads}")
    if "num_key_value_heads" in config or groups is None:
        groups = num_heads
    return {
        "num_layers": number(config, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": number(config, "intermediate_size"),
        "num_attention_heads": num_heads,
        "num_query_groups": number(config, "num_key_value_heads", groups),
        "head_dim": number(config, "head_dim", head_dim or hidden_size // num_heads),
        "vocab_size": number(config, "vocab_size"),
    }


def write_sizes(arch: Any) -> dict[str, Any]:
    """Inverse of `read_sizes`; `head_dim` is always explicit."""
    return {
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "tie_word_embeddings": arch.tied_embeddings,
    }


def tied(config: dict[str, Any]) -> bool:
    """Whether the LM head is the embedding; the families' default is that it is not."""
    return bool(config.get("tie_word_embeddings", False))


def number(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of `config.json`, or `ArchError`."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArchError("bad config.json", expected=f"{key} to be a positive integer", found=repr(value))
    return value


def refuse(family: str, config: dict[str, Any], **wanted: Any) -> None:
    """Raise `ArchError` where a key that is there has another value than the only one that is supported."""
    for key, value in wanted.items():
        if key in config and config[key] != value:
            raise ArchError(f"unsupported {family}", expected=f"{key}: {json.dumps(value)} in config.json",
                            found=repr(config[key]))


def read_rope(config: dict[str, Any]) -> Rope:
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


def write_rope(rope: Rope) -> dict[str, Any]:
    """Inverse of `read_rope`, in the older spelling, which all versions of `transformers` read."""
    scaling = rope.scaling
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if scaling is None else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
    }
