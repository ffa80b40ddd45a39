"""A forward-only pass of micro-batches through the pipeline, for scoring, evaluation and the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_minitron.data.batch import Batch
from nemo_minitron.launch import standing
from nemo_minitron.model.build import HiddenStateGPT
from nemo_minitron.model.forward import forward_batch

Result = TypeVar("Result")


def forward_only(
    model: HiddenStateGPT,
    batches: Iterable[Batch],
    *,
    num_microbatches: int,
    consume: Callable[[torch.Tensor, Batch], Result],
    around: Callable[[Batch], AbstractContextManager[Any]] | None = None,
) -> list[Result]:
    """Run `model` without gradients over equally large micro-batches in Megatron's schedule.

    Args:
        model: this rank's shard; put into eval mode for the pass and back.
        batches: this replica's micro-batches, the same on every pipeline stage and TP rank.
        num_microbatches: how many of them; the same on every rank of the replica.
        consume: called on the last pipeline stage with the final hidden state `[S, B, H]` (after the final
            norm; `[S/tp, B, H]` with sequence parallelism) and its batch.
        around: a context for the forward pass of each micro-batch, on every stage.

    Returns:
        What `consume` returned, in order, on the last stage; an empty list on the others.
    """
    if num_microbatches == 0:
        return []
    iterator = iter(batches)
    first = next(iterator)
    was_training = model.training
    model.eval()

    def step(data: Iterator[Batch], stage: HiddenStateGPT) -> tuple[torch.Tensor, Callable[..., Result]]:
        batch = next(data)
        standing.alive()

        def finish(hidden: torch.Tensor, non_loss_data: bool = True) -> Result:
            return consume(hidden, batch)

        with around(batch) if around is not None else nullcontext():
            return forward_batch(stage, batch), finish

    def rejoined() -> Iterator[Batch]:
        yield first
        yield from iterator

    try:
        with torch.no_grad(), standing.busy():
            results = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=rejoined(),
                model=[model],
                num_microbatches=num_microbatches,
                seq_length=first.tokens.size(1),
                micro_batch_size=first.tokens.size(0),
                forward_only=True,
                collect_non_loss_data=True,
            )
    finally:
        model.train(was_training)
    return list(results)
