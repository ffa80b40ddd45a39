"""Qwen2 and Qwen2.5 (`model_type: qwen2`): Llama with biases on the query, key and value projections.

Attention to a sliding window is not built: samples longer than the window, where it is used, are refused.
"""

from __future__ import annotations

from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.families import decoder
from nemo_minitron.checkpoint.families.table import Family


def read_config(config: dict[str, Any]) -> ArchSpec:
    """The architecture that `config.json` describes; defaults are those of `transformers.Qwen2Config`.

    Raises:
        ArchError: a missing number, another activation or rotary scaling.
    """
    decoder.refuse("Qwen2", config, hidden_act="silu")
    return ArchSpec(
        family="qwen2", **decoder.read_sizes(config, groups=32), rope=decoder.read_rope(config), qkv_bias=True,
        max_position_embeddings=decoder.number(config, "max_position_embeddings", 32768),
        sliding_window=read_window(config), norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_embeddings=decoder.tied(config),
    ).check()


def read_window(config: dict[str, Any]) -> int | None:
    """The window that some layers attend to, or None: it counts only with `use_sliding_window`.

    Which layers it applies to is in `layer_types`, or it is those from `max_window_layers` on.
    """
    if not config.get("use_sliding_window", False) or config.get("sliding_window", 4096) is None:
        return None
    kinds = config.get("layer_types")
    if kinds is None:
        slides = config.get("max_window_layers", 28) < decoder.number(config, "num_hidden_layers")
    else:
        slides = "sliding_attention" in kinds
    return decoder.number(config, "sliding_window", 4096) if slides else None


def write_window(arch: ArchSpec) -> dict[str, Any]:
    """Inverse of `read_window`, with every layer's kind: those that were kept may be of either."""
    kind = "full_attention" if arch.sliding_window is None else "sliding_attention"
    return {"use_sliding_window": arch.sliding_window is not None, "sliding_window": arch.sliding_window,
            "max_window_layers": 0 if arch.sliding_window else arch.num_layers, "layer_types": [kind] * arch.num_layers}


def write_config(arch: ArchSpec) -> dict[str, Any]:
    """The keys of `config.json` that the architecture decides."""
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **decoder.write_sizes(arch),
            **decoder.write_rope(arch.rope), **write_window(arch), "hidden_act": "silu", "rms_norm_eps": arch.norm_eps}


FAMILY = Family(model_type="qwen2", embedding=decoder.EMBEDDING, head=decoder.HEAD,
                tensors=decoder.tensors(qkv_bias=True), parameters=decoder.parameters(qkv_bias=True),
                read_config=read_config, write_config=write_config)
