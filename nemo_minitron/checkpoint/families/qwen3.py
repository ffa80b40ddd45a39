"""Qwen3 (`model_type: qwen3`), dense: Llama with an RMS norm on every query and key head and its own `head_dim`."""

from __future__ import annotations

from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.families import decoder
from nemo_minitron.checkpoint.families.qwen2 import read_window, write_window
from nemo_minitron.checkpoint.families.table import Family


def read_config(config: dict[str, Any]) -> ArchSpec:
    """The architecture that `config.json` describes; defaults are those of `transformers.Qwen3Config`.

    Raises:
        ArchError: a missing number, biases, another activation or rotary scaling.
    """
    decoder.refuse("Qwen3", config, hidden_act="silu", attention_bias=False)
    return ArchSpec(
        family="qwen3", **decoder.read_sizes(config, groups=32, head_dim=128), rope=decoder.read_rope(config),
        qk_norm=True, max_position_embeddings=decoder.number(config, "max_position_embeddings", 32768),
        sliding_window=read_window(config), norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_embeddings=decoder.tied(config),
    ).check()


def write_config(arch: ArchSpec) -> dict[str, Any]:
    """The keys of `config.json` that the architecture decides."""
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **decoder.write_sizes(arch),
            **decoder.write_rope(arch.rope), **write_window(arch), "hidden_act": "silu", "attention_bias": False,
            "rms_norm_eps": arch.norm_eps}


FAMILY = Family(model_type="qwen3", embedding=decoder.EMBEDDING, head=decoder.HEAD,
                tensors=decoder.tensors(qk_norm=True), parameters=decoder.parameters(qk_norm=True),
                read_config=read_config, write_config=write_config)
