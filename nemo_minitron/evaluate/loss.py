"""Exact held-out loss of a live, sharded model: token-weighted, every token once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from nemo_minitron.data.batch import Batch, Samples
from nemo_minitron.distill.terms import METERS, loss_terms
from nemo_minitron.errors import DataError
from nemo_minitron.model.build import HiddenStateGPT
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device
from nemo_minitron.parallel.layout import Layout
from nemo_minitron.parallel.schedule import forward_only


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """`nats` summed over `num_tokens` predicted tokens."""

    nats: float
    num_tokens: int

    @property
    def loss(self) -> float:
        """Nats per token; the denominator is every predicted held-out token."""
        return self.nats / max(self.num_tokens, 1)


def heldout_loss(model: HiddenStateGPT, samples: Samples, *, layout: Layout, micro_batch_size: int,
                 max_samples: int | None = None, chunk_tokens: int = 256) -> HeldOutLoss:
    """Cross-entropy of `model` on `samples` (all of them, or `max_samples` spread evenly over them).

    Replicas take turns at micro-batches; each gets the same number, the last ones filled up with masked
    samples. Every rank must call this, and every rank gets the result.
    """
    sums = heldout_sums(
        model, samples, layout=layout, micro_batch_size=micro_batch_size, max_samples=max_samples,
        sums_of=lambda hidden, batch: loss_terms(model, hidden, batch, chunk_tokens=chunk_tokens).sums)
    return HeldOutLoss(nats=float(sums[METERS.index("ce")]), num_tokens=int(sums[METERS.index("tokens")]))


def heldout_sums(model: HiddenStateGPT, samples: Samples, *, layout: Layout, micro_batch_size: int,
                 max_samples: int | None, sums_of: Callable[[torch.Tensor, Batch], torch.Tensor],
                 prepare: Callable[[list[Batch]], None] | None = None,
                 around: Callable[[Batch], AbstractContextManager[Any]] | None = None) -> torch.Tensor:
    """Sums over held-out tokens, fp64 `[len(METERS)]`, the same on every rank; every rank must call this.

    Args:
        model: this rank's shard.
        samples: all of them are measured, or `max_samples` spread evenly over them.
        layout: the layout whose groups are formed.
        micro_batch_size: samples a forward pass.
        max_samples: None: all.
        sums_of: final hidden state and batch -> the sums of `METERS` (last stage).
        prepare: called on every rank with this replica's micro-batches first.
        around: as of `forward_only`.
    """
    total = samples.num_evaluation_samples
    if not total:
        raise DataError("no held-out text", expected="at least two tokens", found="fewer",
                        key="data.num_heldout")
    count = total if max_samples is None else min(total, max_samples)
    ids = np.linspace(0, total - 1, count).astype(np.int64)
    size = min(micro_batch_size, -(-count // layout.dp))
    rounds = -(-count // (size * layout.dp))
    mine = [ids[first : first + size]
            for first in ((turn * layout.dp + groups.dp_rank()) * size for turn in range(rounds))]
    batches: Iterable[Batch] = (padded_batch(samples, ids, size).to(device()) for ids in mine)
    if prepare is not None:
        batches = list(batches)
        prepare(batches)
    results = forward_only(model, batches, num_microbatches=rounds, consume=sums_of, around=around)
    sums = torch.stack(results).sum(0) if results else torch.zeros(len(METERS), dtype=torch.float64)
    return groups.sum_over_replicas_from_last_stage(sums.to(device()))


def padded_batch(samples: Samples, ids: np.ndarray, size: int) -> Batch:
    """The samples `ids`, filled up to `size` with masked copies of sample 0: the pipeline wants equal shapes."""
    batch = samples.batch([*ids.tolist(), *[0] * (size - len(ids))])
    batch.loss_mask[len(ids):] = 0.0
    return batch
