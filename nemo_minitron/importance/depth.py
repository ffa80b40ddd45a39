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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_minitron.data.batch import Batch, Samples
from nemo_minitron.distill.terms import METERS, loss_terms, tokens_first
from nemo_minitron.evaluate.choices import Option, option_batch
from nemo_minitron.evaluate.likelihood import row_nats
from nemo_minitron.evaluate.loss import padded_batch
from nemo_minitron.evaluate.questions import Question, accuracy
from nemo_minitron.importance.prefix import Dropped, Measure, Progress, sweep_prefixes
from nemo_minitron.importance.scores import DEPTH_METRICS, REMOVAL_ORDER
from nemo_minitron.model.build import HiddenStateGPT
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.parallel.schedule import forward_only

RATIOS = {"loss": (0, 1), "logit_mse": (2, 3)}
"""Which of `_Scan.sums` is over which."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthScan:
    """`tensors` as `Scores` names them, and layers run on a micro-batch, really and with one whole pass each."""

    tensors: dict[str, npt.NDArray[np.float64]]
    layer_forwards: int
    naive_layer_forwards: int


def scan_depth(model: HiddenStateGPT, samples: Samples, sample_ids: npt.NDArray[np.int64], *, layout: Layout,
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
    assert set(metrics) <= set(DEPTH_METRICS) and ("accuracy" not in metrics or questions)
    assert not metrics or all(1 <= length < model.arch.num_layers for length in block_lengths)
    assert len(options) == sum(len(question.options) for question in questions)
    scan = _Scan(model, layout, chunk_tokens, say)
    tensors: dict[str, npt.NDArray[np.float64]] = {}
    blocks: dict[int, list[Dropped]] = {0: [()]}
    blocks |= {length: [tuple(range(start, start + length)) for start in range(model.arch.num_layers - length + 1)]
               for length in block_lengths}
    batches = _turns(samples, sample_ids, micro_batch_size, layout)
    of_samples = [metric for metric in RATIOS if metric in metrics]
    if of_samples:
        measured = blocks if "loss" in metrics else {length: blocks[length] for length in block_lengths}
        sums = scan.sums(batches, _flat(measured), of_samples)
        for metric in of_samples:
            above, below = RATIOS[metric]
            _store(tensors, metric, sums[:, above] / sums[:, below], measured)
    if "accuracy" in metrics:
        nats = scan.option_nats(options, _flat(blocks), micro_batch_size)
        _store(tensors, "accuracy", np.array([accuracy(questions, row) for row in nats]), blocks)
    if iterative:
        tensors[REMOVAL_ORDER] = scan.removal_order(batches)
    tensors.pop("layers.logit_mse.0", None)
    return DepthScan(tensors=tensors, layer_forwards=scan.layer_forwards,
                     naive_layer_forwards=scan.naive_layer_forwards)


def _flat(blocks: dict[int, list[Dropped]]) -> list[Dropped]:
    return [block for group in blocks.values() for block in group]


def _store(tensors: dict[str, npt.NDArray[np.float64]], metric: str, values: npt.NDArray[np.float64],
           blocks: dict[int, list[Dropped]]) -> None:
    """Cut `values`, in the order of `blocks`, into one tensor a block length."""
    first = 0
    for length, group in blocks.items():
        tensors[f"layers.{metric}.{length}"] = values[first : first + len(group)]
        first += len(group)


def _turns(samples: Samples, ids: npt.NDArray[np.int64], size: int, layout: Layout) -> list[Batch]:
    """This replica's micro-batches, as many on every replica, the last ones filled up with masked samples."""
    turns = -(-len(ids) // (size * layout.dp))
    starts = [(turn * layout.dp + groups.dp_rank()) * size for turn in range(turns)]
    return [padded_batch(samples, ids[start : start + size], size) for start in starts]


class _Scan:
    """Runs candidates and keeps count."""

    def __init__(self, model: HiddenStateGPT, layout: Layout, chunk_tokens: int, say: Callable[[str], None]) -> None:
        self.model, self.layout, self.chunk_tokens, self.say = model, layout, chunk_tokens, say
        self.layer_forwards = self.naive_layer_forwards = 0

    def sums(self, batches: list[Batch], candidates: list[Dropped], metrics: Collection[str], *,
             base: Dropped = ()) -> npt.NDArray[np.float64]:
        """Sums over all replicas' micro-batches for each candidate, zero where not in `metrics`: [candidates, 4].

        Cross-entropy in nats, and its tokens; squared differences from the whole model's logits, and its squares.
        """
        rows = self._run(batches, candidates, partial(self._sums_of_batch, metrics), base, "logit_mse" in metrics)
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
        rows = self._run(batches, candidates, self._nats_of_batch, (), False)
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
            sums = self.sums(batches, candidates, ("logit_mse",), base=tuple(sorted(order)))
            order.append(left[int(np.argmin(sums[:, 2] / sums[:, 3]))])
            self.say(f"[score] {len(order)}/{num_layers - 1} layers removed, last layer {order[-1]}")
        positions = np.full(num_layers, num_layers - 1.0)
        positions[order] = np.arange(len(order))
        return positions

    def _run(self, batches: list[Batch], candidates: list[Dropped], measure: Measure, base: Dropped,
             reference: bool) -> list[list[torch.Tensor]]:
        """Per candidate and micro-batch what `measure` gives; empty lists but on the last stage.

        `reference`: whether `measure` needs the whole model's final hidden state.
        """
        num_layers = self.model.arch.num_layers
        self.naive_layer_forwards += self.layout.dp * len(batches) * (
            sum(num_layers - len(dropped) for dropped in candidates)
            + (num_layers if reference and () not in candidates else 0))
        progress = Progress(len(candidates), len(batches), self.say)
        if self.layout.pp == 1:
            rows, forwards = sweep_prefixes(self.model, (batch.to(device()) for batch in batches), candidates, measure,
                                            base=base, reference=reference, progress=progress)
        else:
            rows, forwards = self._whole_passes(batches, candidates, measure, reference, progress)
        self.layer_forwards += self.layout.dp * forwards
        return rows

    def _whole_passes(self, batches: list[Batch], candidates: list[Dropped], measure: Measure, reference: bool,
                      progress: Progress) -> tuple[list[list[torch.Tensor]], int]:
        """One pass through the pipeline for each candidate, in which its layers pass their input on."""
        forwards = 0

        def each(dropped: Dropped, consume: Callable[[torch.Tensor, Batch], torch.Tensor]) -> list[torch.Tensor]:
            nonlocal forwards
            forwards += len(batches) * (self.model.arch.num_layers - len(dropped))
            with _left_out(self.model, dropped):
                return forward_only(self.model, (batch.to(device()) for batch in batches),
                                    num_microbatches=len(batches), consume=consume)

        whole = each((), lambda hidden, batch: hidden) if reference else []  # empty but on the last stage
        rows = []
        for dropped in candidates:
            if reference and not dropped:
                with torch.no_grad():
                    rows.append([measure(hidden, batch.to(device()), hidden)
                                 for hidden, batch in zip(whole, batches, strict=False)])
            else:
                rows.append(each(dropped, _with_whole(measure, whole)))
            progress.add(len(batches))
        return rows, forwards

    def _sums_of_batch(self, metrics: Collection[str], hidden: torch.Tensor, batch: Batch,
                       whole: torch.Tensor | None) -> torch.Tensor:
        sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)
        if "loss" in metrics:
            terms = loss_terms(self.model, hidden, batch, chunk_tokens=self.chunk_tokens)
            sums[0], sums[1] = terms.sums[METERS.index("ce")], terms.sums[METERS.index("tokens")]
        if "logit_mse" in metrics:
            assert whole is not None
            sums[2:] = logit_errors(self.model, hidden, whole, batch, chunk_tokens=self.chunk_tokens)
        return sums

    def _nats_of_batch(self, hidden: torch.Tensor, batch: Batch, whole: torch.Tensor | None) -> torch.Tensor:
        return row_nats(self.model, hidden, batch, chunk_tokens=self.chunk_tokens)


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
