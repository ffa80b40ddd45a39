"""Which processes a job is: torchrun on this machine, or one task a rank under srun. Pure, but for what it looks up."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.config import ClusterConfig
from nemo_minitron.errors import ConfigError, LayoutError
from nemo_minitron.launch.slurm_env import in_allocation

WORKER = "nemo_minitron.worker"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """`nodes` nodes with `per_node` ranks each."""

    nodes: int
    per_node: int


def placement(cluster: ClusterConfig, world_size: int) -> Placement:
    """Where the ranks of a layout go: neighbouring ranks, so those of a tensor-parallel group, on the same node.

    Raises:
        LayoutError: nodes times ranks a node is not `world_size`.
    """
    per_node = cluster.processes_per_node or cluster.gpus_per_node or -(-world_size // (cluster.nodes or 1))
    if cluster.gpus_per_node and per_node > cluster.gpus_per_node:
        raise LayoutError("more ranks than GPUs", key="cluster.processes_per_node", found=f"{per_node} ranks",
                          expected=f"at most {cluster.gpus_per_node} on a node")
    per_node = min(per_node, world_size)
    nodes = cluster.nodes or -(-world_size // per_node)
    if nodes * per_node != world_size:
        key = "cluster.nodes" if cluster.nodes else "cluster.gpus_per_node"
        raise LayoutError("nodes and ranks do not fit the layout", key=f"{key} or parallel.dp",
                          expected=f"{world_size} ranks (tp*pp*dp)", found=f"{nodes} nodes with {per_node} each")
    return Placement(nodes=nodes, per_node=per_node)


def group_placement(cluster: ClusterConfig, world_size: int, groups: int) -> Placement:
    """Where the ranks of one of `groups` jobs side by side go that share the nodes of `world_size` ranks under srun.

    Each has nodes of its own: steps that share a node would have to be told which of its GPUs and CPUs are theirs.

    Raises:
        LayoutError: more groups than nodes, or nodes that they do not divide.
    """
    whole = placement(cluster, world_size)
    if whole.nodes % groups:
        raise LayoutError("groups of a search are whole nodes under srun", key="parallel.search_groups",
                          expected=f"a divisor of the {whole.nodes} nodes, or cluster.launcher=local on a single node",
                          found=str(groups))
    return Placement(nodes=whole.nodes // groups, per_node=whole.per_node)


def group_devices(world_size: int, groups: int, environ: Mapping[str, str] = os.environ,
                  devices: Path = Path("/dev")) -> list[dict[str, str]]:
    """What CUDA_VISIBLE_DEVICES becomes for each of `groups` jobs side by side on this machine; nothing without GPUs.

    Raises:
        LayoutError: fewer GPUs than ranks.
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    found = [path.name.removeprefix("nvidia") for path in devices.glob("nvidia[0-9]*")]
    visible = sorted(found, key=int) if listed is None else [name.strip() for name in listed.split(",") if name.strip()]
    if not visible or not found:
        return [{} for _ in range(groups)]
    if len(visible) < world_size:
        raise LayoutError("too few GPUs", expected=f"{world_size} for tp*pp*dp processes", found=str(len(visible)),
                          key="parallel.dp")
    share = world_size // groups
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[group * share : (group + 1) * share])} for group in range(groups)]


def is_srun(cluster: ClusterConfig, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether srun starts the ranks.

    Raises:
        ConfigError: it should, and there is no allocation or no srun.
    """
    if cluster.launcher == "local" or (cluster.launcher == "auto" and not in_allocation(environ)):
        return False
    if shutil.which("srun", path=environ.get("PATH")) is None:
        raise ConfigError("Slurm is not installed here", expected="srun in PATH, or cluster.launcher=local",
                          found="none", key="cluster.launcher")
    if not in_allocation(environ):
        raise ConfigError("srun outside of an allocation", expected="launchers/slurm, sbatch or salloc around it",
                          found="no SLURM_JOB_ID", key="cluster.launcher")
    return True


def local_command(processes: int, arguments: list[str]) -> list[str]:
    """torchrun on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            "-m", WORKER, *arguments]


def srun_command(cluster: ClusterConfig, place: Placement, arguments: list[str], *, output_dir: Path,
                 first_node: int | None = None) -> list[str]:
    """One task a rank. A rank that ends with an error takes the step down; a lost node ends the whole job.

    `first_node` counts from 0 in the allocation; None lets Slurm choose.
    """
    command = ["srun", f"--nodes={place.nodes}", f"--ntasks={place.nodes * place.per_node}",
               f"--ntasks-per-node={place.per_node}", "--distribution=block", "--mpi=none", "--export=ALL",
               "--kill-on-bad-exit=1", "--unbuffered"]
    if first_node is not None:
        command.append(f"--relative={first_node}")
    if cluster.cpus_per_task:
        command.append(f"--cpus-per-task={cluster.cpus_per_task}")  # srun does not take it over from sbatch
    python = sys.executable
    if cluster.container is not None:
        root = Path(__file__).resolve().parents[2]
        own = [folder for folder in (root, output_dir.resolve()) if not (folder != root and root in folder.parents)]
        mounts = [*(f"{folder}:{folder}" for folder in own), *cluster.mounts]
        command += [f"--container-image={cluster.container}", f"--container-mounts={','.join(mounts)}",
                    f"--container-workdir={Path.cwd()}", "--no-container-mount-home"]
        python = "python"
    return [*command, *cluster.srun, python, "-m", WORKER, *arguments]
