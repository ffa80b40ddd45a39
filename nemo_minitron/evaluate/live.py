"""A live, sharded model that scores and continues tokens, directed by rank 0.

lm-evaluation-harness runs on rank 0 alone: it decides what is asked, and each request is handed to all ranks before any
of them starts on it. The ranks cannot come to differ over what is due, whatever the harness draws at random, and its
data sets and statistics exist once. The other ranks are in `follow` until rank 0 has left `directing`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from nemo_minitron.data.batch import Batch
from nemo_minitron.evaluate.choices import Option
from nemo_minitron.evaluate.likelihood import token_scores
from nemo_minitron.generate.decode import generate
from nemo_minitron.generate.sampling import Sampling
from nemo_minitron.generate.stopping import StopAt
from nemo_minitron.model.build import HiddenStateGPT
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.parallel.schedule import forward_only

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class _Row:
    """One input; `targets` are (number of the option, position, the token that follows it)."""

    inputs: tuple[int, ...]
    targets: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveModel:
    """This rank's shard, built without sequence parallelism, and how its ranks are told what to do.

    `share` gives every rank what rank 0 passes to it; `rank` is the global rank.
    """

    model: HiddenStateGPT
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    rank: int
    share: Callable[[Any], Any]
    micro_batch_size: int
    chunk_tokens: int = 256

    @property
    def max_length(self) -> int:
        """Tokens of context: positions that the model was made for, or its sliding window if that is shorter."""
        arch = self.model.arch
        return min(arch.max_position_embeddings, arch.sliding_window or arch.max_position_embeddings)

    @contextmanager
    def directing(self) -> Iterator[None]:
        """On rank 0: what the other ranks `follow`, however it ends."""
        assert self.rank == 0
        try:
            yield
        finally:
            self.share(None)

    def follow(self) -> None:
        """On every other rank: take part in what rank 0 asks for, until it is done."""
        assert self.rank != 0
        while (order := self.share(None)) is not None:
            method, arguments = order
            getattr(self, method)(**arguments)

    def ask_scores(self, options: Sequence[Option]) -> list[tuple[float, bool]]:
        """On rank 0: what `_scores` says."""
        return list(self._everywhere("_scores", options=list(options)))

    def ask_continuations(self, prompts: list[list[int]], sampling: Sampling, until: list[str]) -> list[list[int]]:
        """On rank 0: what `_continuations` says."""
        return list(self._everywhere("_continuations", prompts=prompts, sampling=sampling, until=until))

    def _everywhere(self, method: str, **arguments: Any) -> Any:
        self.share((method, arguments))
        return getattr(self, method)(**arguments)

    def _scores(self, options: list[Option]) -> list[tuple[float, bool]]:
        """Log-likelihood of each option's continuation, nats, and whether greedy decoding would give it.

        Options with the same input (answers of one token to one question) share one row. Rows of similar length go
        into a pass together, so that little of it is padding. That is on the right, where no token that counts sees it.
        """
        found = torch.zeros(len(options), 2, dtype=torch.float64, device=device())
        size = min(self.micro_batch_size, len(options))
        for length, group in groupby(_batches(_rows(options), size), key=lambda batch: batch[0]):
            batches = [rows for _, rows in group]
            turns = -(-len(batches) // self.layout.dp)
            mine = batches[groups.dp_rank() :: self.layout.dp]
            self._score_rows([*mine, *[[]] * (turns - len(mine))], (size, length), found)
        found = groups.sum_over_replicas_from_last_stage(found).cpu()
        return [(log_prob, missed == 0) for log_prob, missed in found.tolist()]

    def _score_rows(self, batches: list[list[_Row]], shape: tuple[int, int], found: torch.Tensor) -> None:
        """Add each option's log-probabilities to `found[:, 0]`, and its tokens that are not greedy to `found[:, 1]`."""

        def consume(hidden: torch.Tensor, batch: Batch) -> None:
            rows = batches[int(batch.sample_ids[0])]
            targets = [(row, *target) for row, of_row in enumerate(rows) for target in of_row.targets]
            columns = torch.tensor(targets, dtype=torch.int64, device=hidden.device).reshape(-1, 4).t()
            scores = token_scores(self.model, hidden, columns[0], columns[2], columns[3],
                                  chunk_tokens=self.chunk_tokens)
            found[:, 0].index_add_(0, columns[1], scores.log_probs)
            found[:, 1].index_add_(0, columns[1], (~scores.greedy).double())

        passes = (_batch(rows, shape, number).to(device()) for number, rows in enumerate(batches))
        forward_only(self.model, passes, num_microbatches=len(batches), consume=consume)

    def _continuations(self, prompts: list[list[int]], sampling: Sampling, until: list[str]) -> list[list[int]]:
        """Tokens after each prompt; longest first, so that neighbours are of similar length and memory shows early."""
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        made = generate(self.model, [prompts[number] for number in order], sampling, StopAt(self.tokenizer, until),
                        layout=self.layout, micro_batch_size=self.micro_batch_size, row_ids=order)
        by_number = dict(zip(order, made, strict=True))
        return [by_number[number] for number in range(len(prompts))]


def _rows(options: Sequence[Option]) -> list[_Row]:
    """One row for each different input, longest first."""
    rows: dict[tuple[int, ...], _Row] = {}
    for number, option in enumerate(options):
        inputs = option.tokens[:-1]
        row = rows.setdefault(inputs, _Row(inputs))
        row.targets.extend((number, place - 1, option.tokens[place])
                           for place in range(len(option.tokens) - option.num_continuation, len(option.tokens)))
    return sorted(rows.values(), key=lambda row: -len(row.inputs))


def _batches(rows: list[_Row], size: int) -> Iterator[tuple[int, list[_Row]]]:
    """Neighbours, `size` at a time, each with the length that its schedule has, a multiple of 8."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield -(-len(part[0].inputs) // 8) * 8, part


def _batch(rows: list[_Row], shape: tuple[int, int], number: int) -> Batch:
    """The rows of batch `number`, which its sample ids all say, filled up with zeros to `shape` `[B, S]`."""
    tokens = torch.zeros(shape, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row.inputs)] = torch.tensor(row.inputs)
    return Batch(tokens=tokens, labels=tokens, position_ids=torch.arange(shape[1]).repeat(shape[0], 1),
                 loss_mask=torch.zeros(shape), sample_ids=torch.full(shape[:1], number))
