"""Keys and values of the tokens so far, so that the next token costs one position and not all of them.

`cached` swaps two kinds of modules of a live model for as long as it generates: each layer's core attention (Megatron's
own, Transformer Engine's or ours) for one that keeps keys and values, and the rotary embedding for one that gives each
row its own positions, since prompts of different lengths are padded on the left. Megatron's inference contexts are not
used: the static one masks by length alone, which left padding is not, and the dynamic one needs FlashAttention.

Shape letters: S new positions, T positions so far, B rows, n local query heads, G local KV groups,
R = n / G, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_minitron.model.build import HiddenStateGPT


class Cache:
    """What one micro-batch has attended to: `real` says which of its positions hold a token, bool `[B, T]`."""

    def __init__(self, real_BS: torch.Tensor, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.real = real_BS
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._mask: torch.Tensor | None = None

    def begin(self, num_new: int) -> None:
        """Start a pass over `num_new` more positions: the prompt's, padding included, then one at a time."""
        before = self.length
        self.length += num_new
        assert self.length <= self.capacity
        if before:
            grown = torch.ones(self.real.size(0), num_new, dtype=torch.bool, device=self.real.device)
            self.real = torch.cat([self.real, grown], dim=1)
        new = torch.arange(before, self.length, device=self.real.device)
        old = torch.arange(self.length, device=self.real.device)
        causal_ST = old <= new[:, None]
        # padding attends to itself: a softmax over nothing would be NaN, and NaN times a weight of zero is NaN too
        self._mask = (causal_ST & self.real[:, None, :]) | (old == new[:, None])

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scale: float | None) -> torch.Tensor:
        """Add `key` and `value` `[S, B, G, D]` of the new positions, and attend from `query` `[S, B, n, D]` to all.

        One new position: the R queries of a group take the place of positions, so that no key is copied for them.
        Returns `[S, B, n * D]`.
        """
        assert self._mask is not None
        num_new, rows, heads, dim = query.shape
        groups = key.size(2)
        if layer not in self.layers:
            shape = (rows, groups, self.capacity, dim)
            self.layers[layer] = (key.new_empty(shape), value.new_empty(shape))
        memory = self.layers[layer]
        for part, new in zip(memory, (key, value), strict=True):
            part[:, :, self.length - num_new : self.length] = new.permute(1, 2, 0, 3)
        keys, values = (part[:, :, : self.length] for part in memory)
        query_BnSD, mask_B1ST = query.permute(1, 2, 0, 3), self._mask[:, None]
        if num_new == 1:
            query_BnSD = query_BnSD.reshape(rows, groups, heads // groups, dim)
        elif heads > groups:
            keys, values = (part.repeat_interleave(heads // groups, dim=1) for part in (keys, values))
        context = torch.nn.functional.scaled_dot_product_attention(query_BnSD, keys, values, attn_mask=mask_B1ST,
                                                                   scale=scale)
        return context.reshape(rows, heads, num_new, dim).permute(2, 0, 1, 3).reshape(num_new, rows, heads * dim)


class _Turns:
    """The caches of a step's micro-batches; every stage passes them in the same order."""

    def __init__(self, caches: list[Cache]) -> None:
        self.caches = caches
        self.turn = -1
        self.position_ids = torch.zeros(0)

    def begin(self, _module: Any, arguments: tuple[Any, ...]) -> None:
        """Called before the model is, with its arguments: tokens and position ids `[B, S]`, and no mask."""
        self.turn = (self.turn + 1) % len(self.caches)
        self.position_ids = arguments[1]
        self.now.begin(self.position_ids.size(1))

    @property
    def now(self) -> Cache:
        """The cache of the micro-batch that is in the model."""
        return self.caches[self.turn]


class _CachedAttention(torch.nn.Module):
    """A core attention that remembers."""

    def __init__(self, turns: _Turns, layer: int, scale: float | None) -> None:
        super().__init__()
        self.turns, self.layer, self.scale = turns, layer, scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None = None,
                **_: Any) -> torch.Tensor:
        """Called by Megatron's `SelfAttention` after the rotary embedding."""
        assert attention_mask is None
        return self.turns.now.attend(self.layer, query, key, value, self.scale)


class _RowPositions(torch.nn.Module):
    """Rotary angles of each row's own positions, `[S, B, 1, rotated dims]`; Megatron's are `[S, 1, 1, ...]`."""

    def __init__(self, turns: _Turns, frequencies: torch.Tensor) -> None:
        super().__init__()
        self.turns, self.frequencies = turns, frequencies

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        """Asked for by `GPTModel`; `forward` does not need it."""
        return 0

    def forward(self, _length: int, **_: Any) -> torch.Tensor:
        """Angles in radians, each twice, as rotary embeddings that are not interleaved want them."""
        angles = self.turns.position_ids.t()[..., None].float() * self.frequencies
        return torch.cat([angles, angles], dim=-1)[:, :, None, :]


@contextmanager
def cached(model: HiddenStateGPT, caches: list[Cache]) -> Iterator[None]:
    """While this is open, each pass over `len(caches)` micro-batches goes on from where the last one ended."""
    assert not model.config.sequence_parallel, "a single position cannot be cut over TP ranks"
    turns = _Turns(caches)
    rotary, fused = model.rotary_pos_emb, model.config.apply_rope_fusion
    attentions = [layer.self_attention for layer in model.decoder.layers]
    cores = [attention.core_attention for attention in attentions]
    hook = model.register_forward_pre_hook(turns.begin)
    try:
        model.rotary_pos_emb = _RowPositions(turns, rotary.inv_freq)
        model.config.apply_rope_fusion = False  # the fused kernel knows one position for all rows
        for number, (attention, core) in enumerate(zip(attentions, cores, strict=True)):
            attention.core_attention = _CachedAttention(turns, number, getattr(core, "softmax_scale", None))
        yield
    finally:
        hook.remove()
        model.rotary_pos_emb, model.config.apply_rope_fusion = rotary, fused
        for attention, core in zip(attentions, cores, strict=True):
            attention.core_attention = core
