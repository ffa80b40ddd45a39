"""The sbatch commands of a recipe's chain of jobs. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shlex
from pathlib import Path

from nemo_minitron.config import Config
from nemo_minitron.launch.processes import Placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One job: the stages it runs (all due ones where empty), where, and the arguments of its `minitron`.

    With `array` it is a job array of so many tasks (of which `limit` run at the same time; 0: all), for a `rung` of a
    search.
    """

    stages: tuple[str, ...]
    config: Config
    place: Placement
    arguments: tuple[str, ...]
    array: int | None = None
    limit: int = 0
    rung: int = 1

    @property
    def what(self) -> str:
        """For people."""
        return ", ".join(self.stages) if self.array is None else f"rung {self.rung}, {self.array} candidates"


def job_name(config: Config) -> str:
    """The same for all jobs that write one run's folder, so that Slurm lets only one of them run at a time."""
    return f"{config.name}-{hashlib.sha256(str(config.run_dir.absolute()).encode()).hexdigest()[:6]}"


def log_pattern(job: Job, number: str = "%j") -> str:
    """Where a job's output goes; `number` is its own, of a task of an array followed by the task's."""
    task = "" if job.array is None else "_%a"
    return f"{job.config.run_dir}/slurm/{'%A' if task and number == '%j' else number}{task}.log"


def sbatch_command(job: Job, *, after: str | None, root: Path, directory: Path) -> list[str]:
    """sbatch with all options. `after` is the number of the job before, `root` the checkout.

    Tasks of an array run at the same time, so they cannot be singletons; each locks its candidate's folder instead.
    """
    cluster, name = job.config.cluster, job_name(job.config)
    if job.array is not None:
        name += f"-rung{job.rung}"
    command = ["sbatch", "--parsable", f"--job-name={name}", f"--nodes={job.place.nodes}",
               f"--ntasks-per-node={job.place.per_node}"]
    options = {"account": cluster.account, "partition": cluster.partition, "time": cluster.time_limit,
               "cpus-per-task": cluster.cpus_per_task, "gpus-per-node": cluster.gpus_per_node or None}
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    if cluster.time_limit is not None and cluster.grace_s:
        command.append(f"--signal=USR1@{cluster.grace_s}")  # to the ranks; B: would tell the script alone
    command.append("--requeue" if cluster.requeue else "--no-requeue")
    if job.array is not None:
        command.append(f"--array=0-{job.array - 1}" + (f"%{job.limit}" if job.limit else ""))
    depends = [*([f"afterok:{after}"] if after is not None else []), *(["singleton"] if job.array is None else [])]
    if depends:
        command.append(f"--dependency={','.join(depends)}")
    command += ["--kill-on-invalid-dep=yes", "--open-mode=append", f"--output={log_pattern(job)}",
                f"--chdir={directory}", *cluster.sbatch]
    script = "stage.sbatch" if cluster.container is None else "stage_container.sbatch"
    return [*command, str(root / "slurm" / script), *job.arguments]


def shown(jobs: list[Job], *, root: Path, directory: Path, python: str) -> str:
    """The chain as a shell script that does what `launchers/slurm` does."""
    lines = ["#!/bin/bash", "set -euo pipefail", f"export MINITRON_PYTHON={shlex.quote(python)}",
             f"mkdir -p {shlex.quote(str(jobs[0].config.run_dir / 'slurm'))}"]
    for number, job in enumerate(jobs, 1):
        after = f"@{number - 1}" if number > 1 else None
        line = shlex.join(sbatch_command(job, after=after, root=root, directory=directory))
        line = re.sub(r"--dependency=afterok:@(\d+)(\S*)", r'"--dependency=afterok:$job\1\2"', line)
        lines.append(f"job{number}=$({line})")
    lines.append("echo " + " ".join(f"$job{number}" for number in range(1, len(jobs) + 1)))
    return "\n".join(lines)
