"""Process groups: torch.distributed and Megatron's parallel state, set up once per worker process.

NeMo's strategy finds both initialised and keeps them, so one worker can score, train and evaluate in turn.
"""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nemo_minitron.errors import LayoutError
from nemo_minitron.parallel.cpu import cuda_is_available, device
from nemo_minitron.parallel.layout import Layout


def megatron_state() -> dict[str, Any]:
    """Megatron's groups, ranks and sizes, by the private variables that hold them (megatron-core 0.15.3)."""
    return {name: value for name, value in vars(parallel_state).items()
            if name == "_global_process_group_list" or (name.startswith("_") and name.isupper())}


BLANK_STATE = megatron_state()
"""The same before any groups are formed: this module, which forms them, has just been imported."""


def start(layout: Layout, *, timeout_s: int) -> None:
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and form Megatron's groups.

    Every collective is bounded by `timeout_s` seconds. Raises `LayoutError` when the world size is another
    than the layout's.
    """
    layout.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    timeout = datetime.timedelta(seconds=timeout_s)
    if cuda_is_available():
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if torch.cuda.device_count() < local_world_size:
            raise LayoutError("too few GPUs", expected=f"{local_world_size} for tp*pp*dp processes",
                              found=str(torch.cuda.device_count()), key="parallel.tp")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda_is_available() else "gloo", timeout=timeout,
                                device_id=device() if cuda_is_available() else None)
    form(layout, timeout_s=timeout_s)


def start_alone() -> None:
    """Form the groups of one process that belongs to no job, without a network port."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda_is_available() else "gloo", store=dist.HashStore(),  # type: ignore[attr-defined]
                                rank=0, world_size=1)
    form(Layout(), timeout_s=600)


def form(layout: Layout, *, timeout_s: int) -> None:
    """Form Megatron's groups for `layout` in a running process group, replacing any formed before."""
    dissolve()
    initialize(layout, timeout_s=timeout_s)


def initialize(layout: Layout, *, timeout_s: int) -> None:
    """Form Megatron's groups where none are formed; ranks count through tp first, then dp, then pp."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        distributed_timeout_minutes=max(1, -(-timeout_s // 60)),
    )


def dissolve() -> None:
    """Leave Megatron's groups, if any are formed, and end them: Megatron would keep their threads and sockets."""
    formed = list(parallel_state._global_process_group_list or []) if dist.is_initialized() else []
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        parallel_state._global_process_group_list = None
        end_groups(formed)


def end_groups(formed: Iterable[Any]) -> None:
    """End process groups; those that are the world, not of this rank, or ended already are passed over."""
    for group in dict.fromkeys(formed):
        if group not in (None, dist.group.WORLD, dist.GroupMember.NON_GROUP_MEMBER):
            with suppress(ValueError):  # ended with another of the same ranks
                dist.destroy_process_group(group)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's tensor-parallel random streams, the same at every call."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def stop() -> None:
    """Leave all groups."""
    dissolve()
    if dist.is_initialized():
        dist.destroy_process_group()


def tp_rank() -> int:
    """Rank in the tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_rank()


def tp_size() -> int:
    """Number of ranks in the tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_world_size()


def dp_rank() -> int:
    """Rank in the data-parallel group."""
    return parallel_state.get_data_parallel_rank()


def pp_rank() -> int:
    """Rank in the pipeline-parallel group: the number of this pipeline stage."""
    return parallel_state.get_pipeline_model_parallel_rank()


def is_last_stage() -> bool:
    """Whether this rank holds the last pipeline stage, where the loss is."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def sharing(layout: Layout) -> tuple[bool, Callable[[torch.Tensor], None] | None]:
    """Whether this rank reads a checkpoint, and how the replicas get what was read (None: each reads for itself).

    The callable is one broadcast over DP, from its first rank; every rank of the group must call it with a
    contiguous tensor on its device, of the same shape and type.
    """
    if not layout.read_once or parallel_state.get_data_parallel_world_size() == 1:
        return True, None
    group, first = parallel_state.get_data_parallel_group(), parallel_state.get_data_parallel_src_rank()

    def share(tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, src=first, group=group)

    return dp_rank() == 0, share


def sum_over_replicas_from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` (any shape, meaningful on the last stage) over data parallelism, and give all ranks the result.

    One all-reduce over DP on the last stage, one broadcast over PP; every rank must call this.
    """
    if is_last_stage():
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(values, src=parallel_state.get_pipeline_model_parallel_last_rank(),
                       group=parallel_state.get_pipeline_model_parallel_group())
    return values
