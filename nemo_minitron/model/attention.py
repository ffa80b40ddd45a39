"""Core attention on torch's `scaled_dot_product_attention`, for where Transformer Engine is not.

Megatron's own local attention is unfused and quadratic in memory, and refuses grouped key-value heads
without copying them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class CausalAttention(MegatronModule):
    """Causal attention of this TP rank's heads; a drop-in for Megatron's `DotProductAttention`."""

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None,
                 **_: Any) -> None:
        """Take what Megatron's spec builder passes; dropout is not supported (pruning and distillation use none)."""
        super().__init__(config=config)
        assert config.attention_dropout == 0.0
        self.softmax_scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None = None,
                **_: Any) -> torch.Tensor:
        """Attend causally inside each sample.

        Args:
            query: `[S, B, n, D]`, n = local query heads.
            key: `[S, B, g, D]`, g = local KV groups.
            value: `[S, B, g, D]`.
            attention_mask: must be None; causality is built in.

        Returns:
            `[S, B, n * D]`.
        """
        assert attention_mask is None
        heads_per_group = query.size(2) // key.size(2)
        query_BNSD, key_BGSD, value_BGSD = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if heads_per_group > 1:
            key_BGSD = key_BGSD.repeat_interleave(heads_per_group, dim=1)
            value_BGSD = value_BGSD.repeat_interleave(heads_per_group, dim=1)
        context_BNSD = torch.nn.functional.scaled_dot_product_attention(
            query_BNSD, key_BGSD, value_BGSD, is_causal=True, scale=self.softmax_scale)
        return context_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()
