"""A Slurm job that was stopped in good order, or killed as it was restarted, goes back into the queue."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from nemo_minitron.config import ClusterConfig
from nemo_minitron.launch.slurm_env import in_allocation


def requeue(cluster: ClusterConfig, environ: Mapping[str, str] = os.environ, *, restarted: bool = False) -> None:
    """Put this job back into the queue, where it is a batch job that still runs and not one that was cancelled.

    `restarted`: only where it has been there before. Says what it did. Interactive allocations have no script to run
    again and are left alone.
    """
    job = environ.get("SLURM_JOB_ID", "")
    if not cluster.requeue or not in_allocation(environ) or "SLURM_JOB_NAME" not in environ:
        return
    restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
    if restarted and restarts == 0:
        return
    if restarts >= cluster.max_restarts:
        print(f"minitron: job {job} was restarted {restarts} times (cluster.max_restarts); not again", flush=True)
        return
    shown = _scontrol("--oneliner", "show", "job", job)
    fields = dict(part.split("=", 1) for part in shown.split() if "=" in part)
    if fields.get("JobState") != "RUNNING" or fields.get("BatchFlag") != "1":
        return  # cancelled, or being requeued by Slurm already
    print(f"minitron: job {job} goes back into the queue, restart {restarts + 1}", flush=True)
    _scontrol("requeue", job)


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"minitron: scontrol {arguments[0]}: {error}", flush=True)
        return ""
    if done.returncode:
        print(f"minitron: scontrol {' '.join(arguments)}: {done.stderr.strip()}", flush=True)
    return done.stdout
