"""Llama (`model_type: llama`), versions 1 to 3.

Grouped queries, tied or untied embeddings, an explicit `head_dim`, plain or Llama-3-scaled rotary embeddings.
Projection biases and other rotary scalings are refused.
"""

from __future__ import annotations

from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.families import decoder
from nemo_minitron.checkpoint.families.table import Family


def read_config(config: dict[str, Any]) -> ArchSpec:
    """The architecture that `config.json` describes; defaults are those of `transformers.LlamaConfig`.

    Raises:
        ArchError: a missing number, biases, another activation or another rotary scaling.
    """
    decoder.refuse("Llama", config, attention_bias=False, mlp_bias=False, hidden_act="silu")
    return ArchSpec(
        family="llama", **decoder.read_sizes(config), rope=decoder.read_rope(config),
        max_position_embeddings=decoder.number(config, "max_position_embeddings", 2048),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)), tied_embeddings=decoder.tied(config),
    ).check()


def write_config(arch: ArchSpec) -> dict[str, Any]:
    """The keys of `config.json` that the architecture decides."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **decoder.write_sizes(arch),
            **decoder.write_rope(arch.rope), "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "rms_norm_eps": arch.norm_eps}


FAMILY = Family(model_type="llama", embedding=decoder.EMBEDDING, head=decoder.HEAD, tensors=decoder.tensors(),
                parameters=decoder.parameters(), read_config=read_config, write_config=write_config)
