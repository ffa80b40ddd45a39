"""What Lightning is told of the processes, which torchrun or srun have started and `parallel.groups` has joined."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment


class JoinedRanks(TorchElasticEnvironment):
    """The ranks of the process group as it is.

    Without it Lightning would find Slurm's variables and count the tasks of the job, which may be others.
    """

    @staticmethod
    def detect() -> bool:
        """Used only where it is named."""
        return False

    def world_size(self) -> int:
        """Ranks in all."""
        return dist.get_world_size()

    def global_rank(self) -> int:
        """This rank."""
        return dist.get_rank()

    def local_rank(self) -> int:
        """This rank among those of its node."""
        return int(os.environ.get("LOCAL_RANK", dist.get_rank()))

    def node_rank(self) -> int:
        """This node, where every node has as many ranks."""
        return dist.get_rank() // ranks_per_node()


def ranks_per_node() -> int:
    """Ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def processes() -> dict[str, Any]:
    """Keyword arguments `devices` and `num_nodes` of a trainer."""
    return {"devices": ranks_per_node(), "num_nodes": dist.get_world_size() // ranks_per_node()}
