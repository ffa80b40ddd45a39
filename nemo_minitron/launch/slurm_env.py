"""From Slurm's variables to torch's: rank, world size and rendezvous of a process that srun started. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from nemo_minitron.errors import LayoutError

FIRST_PORT, NUM_PORTS = 12000, 20000
"""Rendezvous ports, by job id: below what Linux gives out by itself (32768 and up)."""


def in_allocation(environ: Mapping[str, str]) -> bool:
    """Whether this process is in a Slurm allocation and not itself a task of one of its steps."""
    # "4294967291" (SLURM_BATCH_SCRIPT) and "4294967290" (an interactive salloc step) stand for the script and the shell
    return "SLURM_JOB_ID" in environ and int(environ.get("SLURM_STEP_ID", "4294967291")) >= 4294967290


def torch_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of an srun step.

    Empty where torchrun has set them, or srun did not start this process. MASTER_ADDR and MASTER_PORT that are set
    are kept. The port follows from the job's id, so that two jobs on a node do not meet.

    Raises:
        LayoutError: Slurm's variables are incomplete.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return {}
    try:
        nodes = expand_hostlist(environ["SLURM_STEP_NODELIST"])
        tasks = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
        node = int(environ["SLURM_NODEID"])
        return {
            "RANK": environ["SLURM_PROCID"],
            "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environ["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks[node]),
            "MASTER_ADDR": environ.get("MASTER_ADDR", nodes[0]),
            "MASTER_PORT": environ.get("MASTER_PORT", str(FIRST_PORT + int(environ["SLURM_JOB_ID"]) % NUM_PORTS)),
        }
    except (KeyError, IndexError, ValueError) as error:
        raise LayoutError("a process of an srun step without its place among the ranks", key="cluster.launcher",
                          expected="SLURM_PROCID, SLURM_STEP_NODELIST and their like", found=repr(error)) from None


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node from Slurm's form: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"not a list of tasks: {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hostlist(text: str) -> list[str]:
    """Host names from Slurm's form, in order: "a[1-2,07]b,c" is a1b, a2b, a07b, c."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        heads = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            endings = [plain] if plain else _numbers(ranges)
            heads = [head + ending for head in heads for ending in endings]
        names += heads
    return names


def _numbers(ranges: str) -> list[str]:
    """The numbers of "1-3,07", with as many leading zeros as the first of each range."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers
