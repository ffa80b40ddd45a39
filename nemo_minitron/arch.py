"""`ArchSpec`: the shape of a decoder-only transformer, and arithmetic on it.

Pure: imports nothing but the standard library. Reading it from and writing it to a Hugging Face
`config.json` is in `checkpoint/families`, building a model from it in `model/`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_minitron.errors import ArchError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3 frequency scaling (`rope_type: llama3` in Hugging Face configs)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: base period `theta` and, where used, Llama-3 scaling."""

    theta: float = 10000.0
    scaling: RopeScaling | None = None


NORMS = ("rmsnorm", "layernorm_1p")
ACTIVATIONS = ("swiglu", "squared_relu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """A model's shape.

    `head_dim` is explicit and is never changed by pruning, so `num_attention_heads * head_dim` may
    differ from `hidden_size`. `vocab_size` is the unpadded number of embedding rows. `rotary_fraction` is the part of
    each head that is rotated, its first dims. norm: rmsnorm, or layernorm_1p (LayerNorm with a bias whose stored scale
    is around zero). activation: swiglu (gated), or squared_relu. `qkv_bias`: biases on the query, key and value
    projections; `qk_norm`: an RMS norm on each query and key head. `sliding_window`: tokens that some layers attend
    to; None: all.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 2048
    rope: Rope = dataclasses.field(default_factory=Rope)
    rotary_fraction: float = 1.0
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    activation: str = "swiglu"
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    tied_embeddings: bool = False

    def check(self) -> ArchSpec:
        """Return self, or raise `ArchError` when the numbers contradict each other."""
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                     "num_query_groups", "head_dim", "vocab_size", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ArchError("bad architecture", expected=f"{name} to be a positive integer", found=repr(value))
        if self.num_attention_heads % self.num_query_groups:
            raise ArchError(
                "bad architecture",
                expected="num_attention_heads to be a multiple of num_query_groups",
                found=f"{self.num_attention_heads} heads and {self.num_query_groups} groups",
            )
        rotated = self.head_dim * self.rotary_fraction
        if not 0 < self.rotary_fraction <= 1 or rotated % 2:
            raise ArchError("bad architecture", expected="an even number of rotated dims of each head (rotary pairs)",
                            found=f"head_dim {self.head_dim} * rotary fraction {self.rotary_fraction}")
        for name, choices in (("norm", NORMS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                raise ArchError("bad architecture", expected=f"{name} to be one of {', '.join(choices)}",
                                found=repr(getattr(self, name)))
        return self

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def num_mlp_matrices(self) -> int:
        """3 with a gated MLP (gate, up, down), 2 without."""
        return 3 if self.activation == "swiglu" else 2

    def num_embedding_parameters(self) -> int:
        """Parameters of the stored embedding matrices: one if tied, else two."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    def num_non_embedding_parameters(self) -> int:
        """Parameters without both embedding matrices (the papers' "non-embedding")."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_query_groups)
        if self.qkv_bias:
            attention += self.head_dim * (self.num_attention_heads + 2 * self.num_query_groups)
        if self.qk_norm:
            attention += 2 * self.head_dim
        mlp = self.num_mlp_matrices * self.hidden_size * self.ffn_hidden_size
        norm = self.hidden_size * (2 if self.norm == "layernorm_1p" else 1)
        return self.num_layers * (attention + mlp + 2 * norm) + norm

    def num_parameters(self) -> int:
        """All stored parameters; a tied embedding counts once."""
        return self.num_embedding_parameters() + self.num_non_embedding_parameters()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ArchSpec:
        """Inverse of `to_dict`."""
        rope = dict(data["rope"])
        if rope.get("scaling") is not None:
            rope["scaling"] = RopeScaling(**rope["scaling"])
        return cls(**{**data, "rope": Rope(**rope)}).check()
