"""Several jobs at the same time, each with ranks, a process group and a rendezvous of its own.

On one machine torchrun starts each, on GPUs of its own; in a Slurm allocation srun does, on nodes of its own.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from nemo_minitron.config import Config
from nemo_minitron.launch.processes import (
    Placement,
    group_devices,
    group_placement,
    is_srun,
    local_command,
    srun_command,
)
from nemo_minitron.launch.workers import (
    TOKEN,
    VERDICT,
    end_with_parent,
    has_stopped,
    keep_line,
    passing_on,
    raise_worker_error,
    wait_for_earlier_ranks,
    worker_environment,
    write_job,
)


@dataclasses.dataclass
class _Group:
    """A job under way: what its ranks said on stderr last, and whether they ended otherwise than done."""

    directory: Path
    process: subprocess.Popen[bytes]
    errors: list[str]
    readers: list[threading.Thread]

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not with everything done."""
        code = self.process.poll()
        return code is not None and (code != 0 or has_stopped(self.directory))


def check_groups(config: Config) -> None:
    """Raise `LayoutError` where the groups of `parallel.search_groups` do not fit nodes or GPUs."""
    parallel = config.parallel
    _places(config, parallel.tp * parallel.pp * parallel.dp, parallel.search_groups)


def run_side_by_side(config: Config, jobs: list[dict[str, Any]], *, command: str, lock: int, round_name: str) -> None:
    """Start a job for each of `jobs`, with the ranks of one of the recipe's `parallel.search_groups`, and wait for all.

    `jobs` are further entries of their `job.json`; no more than there are groups. Where one does not end well, the
    others are told to stop, and write resume points.

    Raises:
        UserError, Stopped, WorkerError: as `run_workers`, of the job that did not end well first.
    """
    parallel, job_dir = config.parallel, config.run_dir.absolute() / "job"
    whole, groups = parallel.tp * parallel.pp * parallel.dp, parallel.search_groups
    place, devices = _places(config, whole, groups)
    own = dataclasses.replace(config, parallel=dataclasses.replace(parallel, dp=parallel.dp // groups, search_groups=1))
    shared = {"round": round_name, "command": command, "stages": ["search"]}
    wait_for_earlier_ranks(job_dir)
    write_job(job_dir, config, shared | {"processes": whole})  # for `minitron status`
    per_node = place.per_node if is_srun(config.cluster) else whole  # of all groups: they share the CPUs
    environment = worker_environment(config, per_node)
    environment.pop("MASTER_ADDR", None)  # every group meets on its own first node
    running: list[_Group] = []
    for number, job in enumerate(jobs):
        directory = job_dir / f"group{number + 1}"
        token = write_job(directory, own, shared | {"processes": whole // groups} | job, alive=job_dir / ".ranks")
        if is_srun(config.cluster):
            start = srun_command(config.cluster, place, [str(directory)], output_dir=Path(config.output_dir),
                                 first_node=number * place.nodes)
        else:
            start = local_command(place.per_node, [str(directory)])
        running.append(_start(start, environment | devices[number] | {TOKEN: token}, directory, number, lock))
    _wait(running, job_dir)


def _places(config: Config, world_size: int, groups: int) -> tuple[Placement, list[dict[str, str]]]:
    """Nodes and ranks of each group, and what is special in the environment of each."""
    if is_srun(config.cluster):
        return group_placement(config.cluster, world_size, groups), [{} for _ in range(groups)]
    return Placement(nodes=1, per_node=world_size // groups), group_devices(world_size, groups)


def _start(start: list[str], environment: dict[str, str], directory: Path, number: int, lock: int) -> _Group:
    process = subprocess.Popen(start, env=environment, pass_fds=(lock,), preexec_fn=end_with_parent,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    group = _Group(directory=directory, process=process, errors=[], readers=[])

    def show() -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            print(f"{number + 1}| {raw.decode(errors='replace')}", end="", flush=True)

    def keep() -> None:
        assert process.stderr is not None
        for raw in process.stderr:
            group.errors = keep_line(group.errors, raw)

    group.readers = [threading.Thread(target=target, daemon=True) for target in (show, keep)]
    for reader in group.readers:
        reader.start()
    return group


def _wait(running: list[_Group], job_dir: Path) -> None:
    """Until all have ended; raises the error of the first that did not end well."""
    first: _Group | None = None
    try:
        with passing_on(*(group.process for group in running)):
            while any(group.process.poll() is None for group in running):
                if first is None and (first := next((group for group in running if group.failed), None)) is not None:
                    _tell(running, signal.SIGTERM)
                time.sleep(0.1)
    except BaseException as error:
        _tell(running, signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
        for group in running:
            group.process.wait()
        raise
    for group in running:
        for reader in group.readers:
            reader.join()
    first = first or next((group for group in running if group.failed), None)
    if first is not None:
        try:
            raise_worker_error(first.directory, first.errors, returncode=first.process.returncode)
        finally:
            for record in (*first.directory.glob("error_*.json"), *first.directory.glob(VERDICT)):
                shutil.copy(record, job_dir / record.name)  # where `minitron status` looks


def _tell(running: list[_Group], number: signal.Signals) -> None:
    for group in running:
        if group.process.poll() is None:
            group.process.send_signal(number)
