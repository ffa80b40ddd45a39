"""The exchanges of a teacher in its own layout: micro-batches to where it runs, states to where they are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.routing import Transfer
from nemo_minitron.parallel.cpu import device


def gather_batches(batches: Sequence[Batch]) -> list[Batch]:
    """The micro-batches of all replicas, in order of replicas: one all-gather over DP for each field.

    Every rank must call this with equally many micro-batches of equal shape.
    """
    replicas = parallel_state.get_data_parallel_world_size()
    if replicas == 1:
        return list(batches)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(Batch):
        values = [getattr(batch, field.name) for batch in batches]
        if values[0] is None:
            fields[field.name] = None
            continue
        own = torch.stack(values)
        gathered = [torch.empty_like(own) for _ in range(replicas)]
        dist.all_gather(gathered, own, group=parallel_state.get_data_parallel_group())
        fields[field.name] = torch.cat(gathered)
    total = replicas * len(batches)
    each: list[dict[str, Any]] = [{name: None if value is None else value[number] for name, value in fields.items()}
                                  for number in range(total)]
    return [Batch(**values) for values in each]


def deliver(plan: Sequence[Transfer], found: Mapping[tuple[Hashable, int], torch.Tensor],
            shapes: Mapping[Hashable, tuple[int, ...]], *, dtype: torch.dtype
            ) -> dict[tuple[Hashable, int], torch.Tensor]:
    """Carry out `plan` and return what came to this rank, by item and micro-batch.

    Args:
        plan: the same on every rank; every rank must call this.
        found: what this rank computed, by item and micro-batch.
        shapes: shape of each item.
        dtype: of all items.

    Sends and receives are posted together, point to point over the world's group, in the plan's order.
    """
    rank = dist.get_rank()
    got: dict[tuple[Hashable, int], torch.Tensor] = {}
    posted = []
    for transfer in plan:
        key = transfer.item, transfer.number
        if transfer.source == transfer.destination == rank:
            got[key] = found[key]
        elif transfer.source == rank:
            posted.append(dist.P2POp(dist.isend, found[key].contiguous(), transfer.destination))
        elif transfer.destination == rank:
            got[key] = torch.empty(shapes[transfer.item], dtype=dtype, device=device())
            posted.append(dist.P2POp(dist.irecv, got[key], transfer.source))
    for work in dist.batch_isend_irecv(posted) if posted else []:
        work.wait()
    return got
