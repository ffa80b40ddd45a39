"""Jobs for the tests of the rank pool itself."""

import os
import time

import torch
import torch.distributed as dist


def total(rank: int, world_size: int, *, start: float) -> dict[str, float]:
    """`start` + rank, summed over all ranks."""
    value = torch.tensor(start + rank)
    dist.all_reduce(value)
    return {"rank": rank, "world_size": world_size, "total": value.item(), "pid": os.getpid()}


def raise_on(rank: int, world_size: int, *, bad: int) -> None:
    """Rank `bad` raises; the others wait for it in a barrier that it never reaches."""
    if rank == bad:
        raise ValueError(f"rank {rank} will not")
    dist.barrier()


def die_on(rank: int, world_size: int, *, bad: int) -> None:
    """Rank `bad` ends without a word."""
    if rank == bad:
        os._exit(7)


def sleep_on(rank: int, world_size: int, *, slow: int) -> None:
    """Rank `slow` is not done for a long time."""
    if rank == slow:
        time.sleep(600)


def return_tensor(rank: int, world_size: int) -> torch.Tensor:
    """Not JSON: a mistake in a job."""
    return torch.zeros(1)
