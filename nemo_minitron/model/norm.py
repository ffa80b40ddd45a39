"""Norms for where Transformer Engine is not: Megatron spec modules that know sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dim (arXiv:1910.07467).

    With sequence parallelism each TP rank normalises its own tokens, so the weight's gradient is partial:
    the attribute `sequence_parallel` on the weight makes Megatron sum it over the TP group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Take what Megatron's spec builder passes; everything else it passes is for other norms."""
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise `hidden` `[S, B, H]` (`[S/tp, B, H]` with sequence parallelism)."""
        return torch.nn.functional.rms_norm(hidden, (hidden.size(-1),), self.weight, self.eps)


class LayerNorm1P(torch.nn.Module):
    """LayerNorm over the last dim with a bias; the stored scale is around zero, what multiplies is scale + 1.

    Sequence parallelism as in `RMSNorm`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Take what Megatron's spec builder passes; everything else it passes is for other norms."""
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise `hidden` `[S, B, H]` (`[S/tp, B, H]` with sequence parallelism)."""
        return torch.nn.functional.layer_norm(hidden, (hidden.size(-1),), self.weight + 1, self.bias, self.eps)
