"""Continuations of prompts from a live model under any layout: prefill, then a token at a time.

Shape letters: S positions, B rows of a micro-batch, R rows of a wave, V vocabulary, v its local part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from nemo_minitron.data.batch import Batch
from nemo_minitron.generate.cache import Cache, cached
from nemo_minitron.generate.sampling import Sampling, choose, uniforms
from nemo_minitron.model.build import HiddenStateGPT
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.parallel.schedule import forward_only

Tokens = Sequence[int]
Stop = Callable[[list[int]], bool]
"""Whether a continuation is complete, of its tokens so far, the newest one included; the same on every rank."""


def generate(model: HiddenStateGPT, prompts: Sequence[Tokens], sampling: Sampling, stop: Stop, *, layout: Layout,
             micro_batch_size: int, row_ids: Sequence[int] | None = None) -> list[list[int]]:
    """The tokens that follow each prompt, at most `sampling.max_new_tokens`, ending with the one at which it stopped.

    Prompts are taken in order in waves of pp micro-batches, padded on the left to the longest of a wave; replicas take
    turns at waves. Put prompts of similar length side by side. Every rank must call this with the same arguments, and
    every rank gets the result. A wave is on its own: it may be generated again without the others, to the same bits.

    Args:
        model: this rank's shard, built without sequence parallelism.
        prompts: token ids, at least one each.
        sampling: how many tokens, and how they are chosen.
        stop: when a continuation is complete.
        layout: the layout whose groups are formed.
        micro_batch_size: prompts in a forward pass.
        row_ids: numbers that random draws depend on; by default 0, 1, ...
    """
    assert all(prompts), "a prompt has at least one token"
    ids = list(range(len(prompts))) if row_ids is None else list(row_ids)
    size = wave_size(layout, micro_batch_size)
    found = torch.full((len(prompts), sampling.max_new_tokens + 1), 0, dtype=torch.int64, device=device())
    for number, first in enumerate(range(0, len(prompts), size)):
        if number % layout.dp != groups.dp_rank():
            continue
        wave = _Wave(model, prompts[first : first + size], ids[first : first + size], sampling, stop, layout,
                     micro_batch_size)
        for row, tokens in enumerate(wave.run(), first):
            found[row, 0] = len(tokens)
            found[row, 1 : 1 + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    found = groups.sum_over_replicas_from_last_stage(found).cpu()
    return [row[1 : 1 + row[0]] for row in found.tolist()]


def wave_size(layout: Layout, micro_batch_size: int) -> int:
    """Prompts that are decoded together: a micro-batch for every pipeline stage to be busy with."""
    return micro_batch_size * layout.pp


class _Wave:
    """Rows that are decoded together on one replica."""

    def __init__(self, model: HiddenStateGPT, prompts: Sequence[Tokens], row_ids: Sequence[int], sampling: Sampling,
                 stop: Stop, layout: Layout, micro_batch_size: int) -> None:
        self.model, self.row_ids, self.sampling, self.stop = model, row_ids, sampling, stop
        self.num_prompts = len(prompts)
        per_pass = min(micro_batch_size, -(-self.num_prompts // layout.pp))
        self.num_microbatches = -(-self.num_prompts // per_pass)
        self.num_rows = per_pass * self.num_microbatches
        longest = max(len(prompt) for prompt in prompts)
        self.tokens = torch.zeros(self.num_rows, longest, dtype=torch.int64)
        real = torch.zeros(self.num_rows, longest, dtype=torch.bool)
        real[self.num_prompts :, -1] = True  # rows that only fill up: one token
        for row, prompt in enumerate(prompts):
            self.tokens[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            real[row, longest - len(prompt) :] = True
        self.positions = (real.long().cumsum(1) - 1).clamp(min=0)
        capacity = longest + sampling.max_new_tokens - 1
        self.caches = [Cache(part, capacity) for part in real.to(device()).chunk(self.num_microbatches)]

    def run(self) -> list[list[int]]:
        """The continuations of the prompts, the same on every rank of the replica."""
        continuations: list[list[int]] = [[] for _ in range(self.num_prompts)]
        going = [True] * self.num_prompts
        tokens, positions = self.tokens, self.positions
        with cached(self.model, self.caches):
            for step in range(self.sampling.max_new_tokens):
                tokens, positions = self._step(tokens, positions, step)[:, None], positions[:, -1:] + 1
                for row, token in enumerate(tokens[: self.num_prompts, 0].tolist()):
                    if going[row]:
                        continuations[row].append(token)
                        going[row] = not self.stop(continuations[row])
                if not any(going):
                    break
        return continuations

    def _step(self, tokens: torch.Tensor, positions: torch.Tensor, step: int) -> torch.Tensor:
        """One pass of all rows: `[R, S]` in, the next tokens `[R]` out, on every rank of the replica."""
        numbers = torch.arange(self.num_rows)
        batches = [Batch(tokens=part, labels=part, position_ids=place, loss_mask=torch.zeros(part.shape),
                         sample_ids=rows).to(device())
                   for part, place, rows in zip(*(whole.chunk(self.num_microbatches)
                                                  for whole in (tokens, positions, numbers)), strict=True)]

        def consume(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
            return self._choose(hidden[-1], batch.sample_ids.tolist(), step)

        chosen = forward_only(self.model, batches, num_microbatches=len(batches), consume=consume)
        following = torch.cat(chosen) if chosen else torch.zeros(self.num_rows, dtype=torch.int64, device=device())
        return _to_all_ranks(following).cpu()

    def _choose(self, hidden_BH: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
        """On the last stage: the next tokens `[B]` of the `rows` of the wave."""
        head_vH = self.model.head()
        logits_BV = gather_from_tensor_model_parallel_region(hidden_BH.to(head_vH.dtype) @ head_vH.t())
        logits_BV = logits_BV[:, : self.model.arch.vocab_size].float()
        ids = [self.row_ids[row] if row < self.num_prompts else 0 for row in rows]
        draws = uniforms(self.sampling.seed, ids, step) if self.sampling.temperature else torch.zeros(len(rows))
        return choose(logits_BV, self.sampling, draws.to(logits_BV.device))


def _to_all_ranks(tokens: torch.Tensor) -> torch.Tensor:
    """The last stage's tokens, as its TP rank 0 chose them, on every rank of the replica."""
    if groups.is_last_stage() and parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.broadcast(tokens, src=parallel_state.get_tensor_model_parallel_src_rank(),
                       group=parallel_state.get_tensor_model_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(tokens, src=parallel_state.get_pipeline_model_parallel_last_rank(),
                       group=parallel_state.get_pipeline_model_parallel_group())
    return tokens
