"""What a model loses when layers are left out: loss, logits, answers. At any parallel layout.

arXiv:2407.14679, section 2.2 (perplexity without a layer), arXiv:2408.11796 (loss and task accuracy without blocks
of neighbours), arXiv:2511.16664 (normalised logit MSE, layers removed one after another).

With one pipeline stage the hidden state that enters each layer is computed once for every micro-batch, and a block
that starts at layer i costs only the layers after it: L + sum_i (L - i - k) layer forwards a micro-batch for all
blocks of length k, about half of the (L - k + 1) (L - k) + L of one whole pass each. It holds L + 2 hidden states of
one micro-batch. With several stages every candidate is a whole pass in which its layers pass their input on: no work
is saved, and the last stage holds the whole model's final hidden states of this replica's samples where logits are
compared.

Shape letters: S sequence, B micro-batch, H hidden, T tokens, L layers, v local vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_minitron.data.batch import Batch, TokenSamples
from nemo_minitron.distill.terms import METERS, loss_terms, tokens_first
from nemo_minitron.evaluate.choices import Option, option_batch
from nemo_minitron.evaluate.loss import padded_batch
from nemo_minitron.evaluate.questions import Question, accuracy
from nemo_minitron.importance.prefix import sweep_prefixes
from nemo_minitron.importance.scores import REMOVAL_ORDER
from nemo_minitron.model.build import HiddenStateGPT
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.parallel.schedule import forward_only

Dropped = tuple[int, ...]
Measure = Callable[[torch.Tensor, Batch, torch.Tensor | None], torch.Tensor]
"""(final hidden state, batch, the whole model's final hidden state) -> numbers, fp64 `[n]`; on the last stage."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthScan:
    """`tensors` as `Scores` names them, and layers run on a micro-batch, really and with one whole pass each."""

    tensors: dict[str, npt.NDArray[np.float64]]
    layer_forwards: int
    naive_layer_forwards: int


def scan_depth(model: HiddenStateGPT, samples: TokenSamples, sample_ids: npt.NDArray[np.int64], *, layout: Layout,
               micro_batch_size: int, metrics: Sequence[str], block_lengths: Sequence[int] = (1,),
               iterative: bool = False, questions: Sequence[Question] = (), options: Sequence[Option] = (),
               chunk_tokens: int = 256, say: Callable[[str], None] = lambda text: None) -> DepthScan:
    """Measure the model without each layer, and without each block of neighbours. Every rank must call this.

    Args:
        model: this rank's shard.
        samples: the calibration split.
        sample_ids: which samples loss and logit_mse are measured on; replicas take turns at micro-batches.
        layout: the layout whose groups are formed.
        micro_batch_size: samples (or options of questions) a forward pass.
        metrics: of loss (nats/token over all predicted tokens of the samples), logit_mse (sum over tokens and
            vocabulary of squared differences from the whole model's logits, over the sum of its squares), accuracy
            (fraction of `questions`).
        block_lengths: how many neighbours are left out together, from 1 to L - 1.
        iterative: also remove layer after layer, each time the one with the smallest logit_mse against the whole
            model; of equal ones the first.
        questions, options: for accuracy; the options in tokens, of all questions in order.
        chunk_tokens: tokens whose logits exist at a time.
        say: prints a line of progress.
    """
    scan = _Scan(model, layout, chunk_tokens, say)
    tensors: dict[str, npt.NDArray[np.float64]] = {}
    blocks = {length: [tuple(range(start, start + length)) for start in range(model.arch.num_layers - length + 1)]
              for length in block_lengths}
    candidates = [(), *(block for group in blocks.values() for block in group)]
    of_samples = [metric for metric in ("loss", "logit_mse") if metric in metrics]
    if of_samples:
        batches = _turns(samples, sample_ids, micro_batch_size, layout)
        sums = scan.sums(batches, candidates, scan.losses_and_errors if "logit_mse" in metrics else scan.losses)
        values = {"loss": sums[:, 0] / sums[:, 1], "logit_mse": sums[:, 2] / sums[:, 3]}
        for metric in of_samples:
            _store(tensors, metric, values[metric], blocks)
    if "accuracy" in metrics:
        nats = scan.option_nats(options, candidates, micro_batch_size)
        _store(tensors, "accuracy", np.array([accuracy(questions, row) for row in nats]), blocks)
    if iterative:
        tensors[REMOVAL_ORDER] = scan.removal_order(_turns(samples, sample_ids, micro_batch_size, layout))
    tensors.pop("layers.logit_mse.0", None)
    return DepthScan(tensors=tensors, layer_forwards=scan.layer_forwards,
                     naive_layer_forwards=scan.naive_layer_forwards)


def _store(tensors: dict[str, npt.NDArray[np.float64]], metric: str, values: npt.NDArray[np.float64],
           blocks: dict[int, list[Dropped]]) -> None:
    """Cut `values` (the whole model's, then those of all blocks) into one tensor a block length."""
    tensors[f"layers.{metric}.0"], first = values[:1], 1
    for length, group in blocks.items():
        tensors[f"layers.{metric}.{length}"] = values[first : first + len(group)]
        first += len(group)


def _turns(samples: TokenSamples, ids: npt.NDArray[np.int64], size: int, layout: Layout) -> list[Batch]:
    """This replica's micro-batches, as many on every replica, the last ones filled up with masked samples."""
    turns = -(-len(ids) // (size * layout.dp))
    starts = [(turn * layout.dp + groups.dp_rank()) * size for turn in range(turns)]
    return [padded_batch(samples, ids[start : start + size], size) for start in starts]


class _Scan:
    """Runs candidates and keeps count."""

    def __init__(self, model: HiddenStateGPT, layout: Layout, chunk_tokens: int, say: Callable[[str], None]) -> None:
        self.model, self.layout, self.chunk_tokens, self.say = model, layout, chunk_tokens, say
        self.layer_forwards = self.naive_layer_forwards = 0

    def sums(self, batches: list[Batch], candidates: list[Dropped], measure: Measure, *,
             base: Dropped = ()) -> npt.NDArray[np.float64]:
        """What `measure` gives for each candidate, summed over the micro-batches of all replicas: [candidates, n]."""
        rows = self._run(batches, candidates, measure, base)
        total = torch.stack([torch.stack(row).sum(0) for row in rows]) if rows[0] \
            else torch.zeros(len(candidates), 4, dtype=torch.float64)
        found: npt.NDArray[np.float64] = groups.sum_over_replicas_from_last_stage(total.to(device())).cpu().numpy()
        return found

    def option_nats(self, options: Sequence[Option], candidates: list[Dropped],
                    size: int) -> npt.NDArray[np.float64]:
        """Nats of each option's continuation under each candidate: [candidates, options]."""
        multiple = 8 * self.layout.tp
        length = -(-max(len(option.tokens) - 1 for option in options) // multiple) * multiple
        turns = -(-len(options) // (size * self.layout.dp))
        starts = [(turn * self.layout.dp + groups.dp_rank()) * size for turn in range(turns)]
        batches = [option_batch(options[start : start + size], size, length) for start in starts]
        rows = self._run(batches, candidates, self.nats_of_rows, ())
        nats = torch.zeros(len(candidates), turns * size * self.layout.dp, dtype=torch.float64)
        for candidate, of_batches in enumerate(rows):
            for start, of_rows in zip(starts, of_batches):  # noqa: B905 - empty but on the last stage
                nats[candidate, start : start + size] = of_rows.cpu()
        found: npt.NDArray[np.float64] = groups.sum_over_replicas_from_last_stage(nats.to(device())).cpu().numpy()
        return found[:, : len(options)]

    def removal_order(self, batches: list[Batch]) -> npt.NDArray[np.float64]:
        """Position [L] at which each layer goes, from 0; the one that stays last has L - 1."""
        num_layers = self.model.arch.num_layers
        order: list[int] = []
        while len(order) < num_layers - 1:
            left = [layer for layer in range(num_layers) if layer not in order]
            candidates = [tuple(sorted((*order, layer))) for layer in left]
            sums = self.sums(batches, candidates, self.losses_and_errors, base=tuple(sorted(order)))
            order.append(left[int(np.argmin(sums[:, 2] / sums[:, 3]))])
            self.say(f"[score] {len(order)}/{num_layers - 1} layers removed, last layer {order[-1]}")
        positions = np.full(num_layers, num_layers - 1.0)
        positions[order] = np.arange(len(order))
        return positions

    def _run(self, batches: list[Batch], candidates: list[Dropped], measure: Measure,
             base: Dropped) -> list[list[torch.Tensor]]:
        """Per candidate and micro-batch what `measure` gives; empty lists but on the last stage."""
        num_layers = self.model.arch.num_layers
        reference = measure == self.losses_and_errors
        self.naive_layer_forwards += self.layout.dp * len(batches) * (
            sum(num_layers - len(dropped) for dropped in candidates) + (num_layers if () not in candidates else 0))
        if self.layout.pp == 1:
            rows, forwards = sweep_prefixes(self.model, (batch.to(device()) for batch in batches), candidates, measure,
                                            base=base, reference=reference, num_batches=len(batches), say=self.say)
        else:
            rows, forwards = self._whole_passes(batches, candidates, measure, reference)
        self.layer_forwards += self.layout.dp * forwards
        return rows

    def _whole_passes(self, batches: list[Batch], candidates: list[Dropped], measure: Measure,
                      reference: bool) -> tuple[list[list[torch.Tensor]], int]:
        """One pass through the pipeline for each candidate, in which its layers pass their input on."""
        whole: list[torch.Tensor] = []
        if reference:
            whole = forward_only(self.model, (batch.to(device()) for batch in batches), num_microbatches=len(batches),
                                 consume=lambda hidden, batch: hidden)
        forwards = len(batches) * self.model.arch.num_layers if reference else 0
        rows = []
        for number, dropped in enumerate(candidates, 1):
            with _left_out(self.model, dropped):
                rows.append(forward_only(self.model, (batch.to(device()) for batch in batches),
                                         num_microbatches=len(batches), consume=_with_whole(measure, whole)))
            forwards += len(batches) * (self.model.arch.num_layers - len(dropped))
            if number % 10 == 0 or number == len(candidates):
                self.say(f"[score] {number}/{len(candidates)} models without layers measured")
        return rows, forwards

    def losses(self, hidden: torch.Tensor, batch: Batch, whole: torch.Tensor | None) -> torch.Tensor:
        """Cross-entropy in nats, and its tokens; two zeros."""
        sums = loss_terms(self.model, hidden, batch, chunk_tokens=self.chunk_tokens).sums
        none = torch.zeros_like(sums[0])
        return torch.stack([sums[METERS.index("ce")], sums[METERS.index("tokens")], none, none])

    def losses_and_errors(self, hidden: torch.Tensor, batch: Batch, whole: torch.Tensor | None) -> torch.Tensor:
        """`losses`, and sums of squared differences of the logits and of the whole model's logits' squares."""
        assert whole is not None
        values = self.losses(hidden, batch, whole)
        values[2:] = logit_errors(self.model, hidden, whole, batch, chunk_tokens=self.chunk_tokens)
        return values

    def nats_of_rows(self, hidden: torch.Tensor, batch: Batch, whole: torch.Tensor | None) -> torch.Tensor:
        """Nats of each row's unmasked tokens, `[B]`."""
        rows = []
        for row in range(batch.tokens.size(0)):
            part = Batch(**{field.name: getattr(batch, field.name)[row : row + 1]
                            for field in dataclasses.fields(batch)})
            terms = loss_terms(self.model, hidden[:, row : row + 1], part, chunk_tokens=self.chunk_tokens)
            rows.append(terms.sums[METERS.index("ce")])
        return torch.stack(rows)


def logit_errors(model: HiddenStateGPT, hidden: torch.Tensor, whole: torch.Tensor, batch: Batch, *,
                 chunk_tokens: int) -> torch.Tensor:
    """`[sum (z - z_whole)^2, sum z_whole^2]` over unmasked tokens and the vocabulary, fp64.

    `hidden` and `whole` are final hidden states `[S, B, H]` (`[S/tp, B, H]` with sequence parallelism). Logits exist
    for `chunk_tokens` tokens and the local vocabulary at a time; one all-reduce over TP.
    """
    head = model.head()
    first = parallel_state.get_tensor_model_parallel_rank() * head.size(0)
    head = head[: max(0, model.arch.vocab_size - first)]  # without padding rows
    states = [tokens_first(state.to(head.dtype), sequence_parallel=model.config.sequence_parallel)
              for state in (hidden, whole)]
    mask = batch.loss_mask.t().reshape(-1) != 0
    wide = torch.float64 if head.dtype == torch.float64 else torch.float32
    sums = torch.zeros(2, dtype=torch.float64, device=head.device)
    for start in range(0, mask.numel(), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        kept = mask[rows]
        pruned, full = ((state[rows][kept] @ head.t()).to(wide) for state in states)
        sums[1] += full.square().sum(dtype=torch.float64)
        sums[0] += pruned.sub_(full).square_().sum(dtype=torch.float64)
    dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
    return sums


def _with_whole(measure: Measure, whole: list[torch.Tensor]) -> Callable[[torch.Tensor, Batch], torch.Tensor]:
    """`measure` with the whole model's hidden state of the same micro-batch, in turn."""
    remaining = iter(whole)
    return lambda hidden, batch: measure(hidden, batch, next(remaining, None))


@contextmanager
def _left_out(model: HiddenStateGPT, dropped: Dropped) -> Iterator[None]:
    """Let the layers of this stage that are in `dropped` pass their input on."""
    layers = [model.decoder.layers[layer - model.layer_offset] for layer in dropped
              if 0 <= layer - model.layer_offset < len(model.decoder.layers)]
    for layer in layers:
        layer.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
