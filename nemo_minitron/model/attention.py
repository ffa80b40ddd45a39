"""Core attention on torch's `scaled_dot_product_attention`, for where Transformer Engine is not.

Megatron's own local attention is unfused and quadratic in memory, refuses grouped key-value heads without copying them,
and asserts against packed documents. Shape letters: S sequence, B micro-batch, D head_dim; n local query heads, g local
KV groups.

What keeps documents of one sample apart goes through Megatron as its `attention_mask`: it hands that to every layer's
core attention as it is. Rotary positions go on through a sample; only their differences count, so those inside a
document are what they would be alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
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

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """Attend causally inside each sample, or inside each document of it.

        Args:
            query: `[S, B, n, D]`.
            key: `[S, B, g, D]`.
            value: `[S, B, g, D]`.
            attention_mask: None, or what `document_mask` makes, `[B, 1, S, S]`.

        Returns:
            `[S, B, n * D]`.
        """
        heads_per_group = query.size(2) // key.size(2)
        query_BNSD, key_BGSD, value_BGSD = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if heads_per_group > 1:
            key_BGSD = key_BGSD.repeat_interleave(heads_per_group, dim=1)
            value_BGSD = value_BGSD.repeat_interleave(heads_per_group, dim=1)
        context_BNSD = torch.nn.functional.scaled_dot_product_attention(
            query_BNSD, key_BGSD, value_BGSD, attn_mask=attention_mask, is_causal=attention_mask is None,
            scale=self.softmax_scale)
        return context_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()


def document_mask(document_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores `[B, n, S, S]` so that tokens see those before them in their own document only.

    `[B, 1, S, S]` of `dtype`, that of the queries: 0 where they see, minus infinity where not. Padding is one more
    document, so every token sees at least itself. `document_ids`: `[B, S]`, as in `Batch`.
    """
    same_BSS = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
    hidden_BSS = ~same_BSS.tril()
    return torch.zeros(hidden_BSS.shape, dtype=dtype, device=hidden_BSS.device).masked_fill_(
        hidden_BSS, float("-inf")).unsqueeze(1)


def document_borders(document_ids: torch.Tensor) -> torch.Tensor:
    """Where documents start in the rows of `document_ids` `[B, S]` one after another, and their end.

    Ascending int32 `[num_documents + 1]`, from 0 to B * S; padding counts as a document. Waits for the device.
    """
    new_BS = torch.ones_like(document_ids, dtype=torch.bool)
    new_BS[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    end = torch.tensor([document_ids.numel()], device=document_ids.device)
    return torch.cat([new_BS.flatten().nonzero().squeeze(1), end]).to(torch.int32)


@cache
def transformer_engine_attention() -> type[torch.nn.Module]:
    """Transformer Engine's core attention for Megatron, which also takes `document_borders` as attention mask.

    Written after megatron-core 0.15.3; not run so far, for want of a GPU with Transformer Engine.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class DocumentAttention(TEDotProductAttention):
        """Packed ("thd") attention over the micro-batch's rows in one line, where there are documents."""

        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    attention_mask: torch.Tensor | None, attn_mask_type: AttnMaskType, attention_bias: None = None,
                    packed_seq_params: PackedSeqParams | None = None) -> torch.Tensor:
            """As `CausalAttention.forward`, with borders int32 `[num_documents + 1]` in the place of a mask."""
            if attention_mask is None:
                return super().forward(query, key, value, None, attn_mask_type, attention_bias, packed_seq_params)
            S, B = query.shape[:2]
            flat = [tensor.transpose(0, 1).reshape(B * S, *tensor.shape[2:]) for tensor in (query, key, value)]
            packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=attention_mask, cu_seqlens_kv=attention_mask,
                                     max_seqlen_q=S, max_seqlen_kv=S)
            context_TC = super().forward(*flat, None, AttnMaskType.padding_causal, packed_seq_params=packed)
            return context_TC.reshape(B, S, -1).transpose(0, 1).contiguous()

    return DocumentAttention
