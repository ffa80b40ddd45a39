"""Mistral (`model_type: mistral`), among them Mistral-NeMo with its own `head_dim`: Llama's tensors.

Attention to a sliding window is not built: samples longer than the window are refused.
"""

from __future__ import annotations

from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.families import decoder
from nemo_minitron.checkpoint.families.table import Family


def read_config(config: dict[str, Any]) -> ArchSpec:
    """The architecture that `config.json` describes; defaults are those of `transformers.MistralConfig`.

    Raises:
        ArchError: a missing number, another activation or rotary scaling.
    """
    decoder.refuse("Mistral", config, hidden_act="silu")
    window = config.get("sliding_window", 4096)
    return ArchSpec(
        family="mistral", **decoder.read_sizes(config, groups=8), rope=decoder.read_rope(config),
        max_position_embeddings=decoder.number(config, "max_position_embeddings", 4096 * 32),
        sliding_window=None if window is None else decoder.number({"sliding_window": window}, "sliding_window"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)), tied_embeddings=decoder.tied(config),
    ).check()


def write_config(arch: ArchSpec) -> dict[str, Any]:
    """The keys of `config.json` that the architecture decides."""
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **decoder.write_sizes(arch),
            **decoder.write_rope(arch.rope), "hidden_act": "silu", "sliding_window": arch.sliding_window,
            "rms_norm_eps": arch.norm_eps}


FAMILY = Family(model_type="mistral", embedding=decoder.EMBEDDING, head=decoder.HEAD, tensors=decoder.tensors(),
                parameters=decoder.parameters(), read_config=read_config, write_config=write_config)
