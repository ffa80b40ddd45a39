"""The sbatch commands of a recipe's chain of jobs. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from pathlib import Path

from nemo_minitron.config import Config
from nemo_minitron.launch.processes import Placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One job: the stages it runs (all due ones where empty), where, and the arguments of its `minitron`."""

    stages: tuple[str, ...]
    config: Config
    place: Placement
    arguments: tuple[str, ...]


def job_name(config: Config) -> str:
    """The same for all jobs that write one run's folder, so that Slurm lets only one of them run at a time."""
    return f"{config.name}-{hashlib.sha256(str(config.run_dir.absolute()).encode()).hexdigest()[:6]}"


def log_pattern(config: Config) -> str:
    """Where a job's output goes; `%j` is its number."""
    return f"{config.run_dir}/slurm/%j.log"


def sbatch_command(job: Job, *, after: str | None, root: Path, directory: Path) -> list[str]:
    """sbatch with all options. `after` is the number of the job before, `root` the checkout."""
    cluster = job.config.cluster
    command = ["sbatch", "--parsable", f"--job-name={job_name(job.config)}", f"--nodes={job.place.nodes}",
               f"--ntasks-per-node={job.place.per_node}"]
    options = {"account": cluster.account, "partition": cluster.partition, "time": cluster.time_limit,
               "cpus-per-task": cluster.cpus_per_task, "gpus-per-node": cluster.gpus_per_node or None}
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    if cluster.time_limit is not None and cluster.grace_s:
        command.append(f"--signal=USR1@{cluster.grace_s}")  # to the ranks; B: would tell the script alone
    command.append("--requeue" if cluster.requeue else "--no-requeue")
    command.append("--dependency=" + (f"afterok:{after}," if after is not None else "") + "singleton")
    command += ["--kill-on-invalid-dep=yes", "--open-mode=append", f"--output={log_pattern(job.config)}",
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
        if number > 1:
            line = line.replace(f"'--dependency=afterok:@{number - 1},singleton'",
                                f'"--dependency=afterok:$job{number - 1},singleton"')
            line = line.replace(f"--dependency=afterok:@{number - 1},singleton",
                                f'"--dependency=afterok:$job{number - 1},singleton"')
        lines.append(f"job{number}=$({line})")
    lines.append("echo " + " ".join(f"$job{number}" for number in range(1, len(jobs) + 1)))
    return "\n".join(lines)
