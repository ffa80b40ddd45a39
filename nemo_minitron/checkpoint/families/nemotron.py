"""Nemotron-3/4 and Minitron (`model_type: nemotron`).

Squared ReLU without a gate, LayerNorm whose stored scale is around zero (it multiplies by scale + 1) with a bias,
plain rotary embeddings on a part of each head, no other biases.
"""

from __future__ import annotations

from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.families import decoder
from nemo_minitron.checkpoint.families.table import Family
from nemo_minitron.errors import ArchError


def read_config(config: dict[str, Any]) -> ArchSpec:
    """The architecture that `config.json` describes; defaults are those of `transformers.NemotronConfig`.

    Raises:
        ArchError: a missing number, biases, another activation, or rotary scaling.
    """
    decoder.refuse("Nemotron", config, hidden_act="relu2", attention_bias=False, mlp_bias=False)
    rope, parameters = decoder.read_rope(config), config.get("rope_parameters") or {}
    if rope.scaling is not None:  # `transformers` ignores it here
        raise ArchError("unsupported Nemotron", expected="no rotary scaling in config.json", found=repr(rope.scaling))
    return ArchSpec(
        family="nemotron", **decoder.read_sizes(config), rope=rope, norm="layernorm_1p",
        activation="squared_relu", norm_eps=float(config.get("norm_eps", 1e-5)),
        rotary_fraction=float(config.get("partial_rotary_factor", parameters.get("partial_rotary_factor", 0.5))),
        max_position_embeddings=decoder.number(config, "max_position_embeddings", 4096),
        tied_embeddings=decoder.tied(config),
    ).check()


def write_config(arch: ArchSpec) -> dict[str, Any]:
    """The keys of `config.json` that the architecture decides."""
    return {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron", **decoder.write_sizes(arch),
            **decoder.write_rope(arch.rope), "partial_rotary_factor": arch.rotary_fraction, "hidden_act": "relu2",
            "attention_bias": False, "mlp_bias": False, "norm_eps": arch.norm_eps}


FAMILY = Family(model_type="nemotron", embedding=decoder.EMBEDDING, head=decoder.HEAD,
                tensors=decoder.tensors(gated=False, norm_bias=True),
                parameters=decoder.parameters(gated=False, norm_bias=True), read_config=read_config,
                write_config=write_config)
