"""A second set of Megatron's process groups over the same ranks, for a frozen model of another layout.

Megatron keeps the groups it works in as private module variables of `parallel_state` (read at megatron-core 0.15.3).
Most of its code asks them at every call, so they are exchanged as a whole around everything that the second model does.
Nothing of it may be on the way to a backward pass outside of `active`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from nemo_minitron.parallel.groups import BLANK_STATE, end_groups, initialize, megatron_state
from nemo_minitron.parallel.layout import Layout


class GroupsBeside:
    """The groups of `layout`; those that were formed before stay in force outside of `active`."""

    def __init__(self, layout: Layout, *, timeout_s: int) -> None:
        """Form them; every rank must call this, in the same order as other groups are formed."""
        assert layout.world_size == dist.get_world_size(), (layout, dist.get_world_size())
        outside = megatron_state()
        _set(BLANK_STATE)
        try:
            initialize(layout, timeout_s=timeout_s)
            self._inside = megatron_state()
        finally:
            _set(outside)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Everything inside runs in these groups."""
        outside = megatron_state()
        _set(self._inside)
        try:
            yield
        finally:
            _set(outside)

    def end(self) -> None:
        """End them; their threads and sockets would stay otherwise. Every rank must call this."""
        end_groups(self._inside["_global_process_group_list"] or [])


def _set(values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(parallel_state, name, value)
