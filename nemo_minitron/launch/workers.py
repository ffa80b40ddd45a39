"""Starts the ranks of a job, waits for them, passes signals on, and says what went wrong first."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.config import Config
from nemo_minitron.errors import ConfigError, UserError
from nemo_minitron.launch import locks
from nemo_minitron.launch.processes import Placement, is_srun, local_command, placement, srun_command

RECORD = "minitron-error: "
"""Begins a line on stderr that is an error record of a rank which cannot see the job's folder."""
RECORDS = ("begun", "error", "where", "signalled", "stopped")
"""What ranks leave in files `NAME_RANK.json`: that all have met (rank 0), that this one failed, ended beside one that
did, was told to stop, or stopped."""
SILENT = "ended without a word"
KILLED_AT_START, MAX_KILLED = "killed_at_start.json", 3
"""File that counts, and how many `KilledAtStart` there are in a row."""
VERDICT = "ended.json"
"""What the launcher leaves where the job ended early, for `minitron status`."""
TOKEN = "MINITRON_JOB"
"""Variable that names the job, as `job.json` does: a rank that finds another name there sees another folder."""


class WorkerError(Exception):
    """A worker process failed for a reason that is not the user's; its traceback is in the message."""


class KilledAtStart(WorkerError):
    """Ranks ended without a word before all of them had met, none of them failed, and that not often in a row.

    A Slurm job that was requeued because of a lost node can see that, when the node is back and Slurm ends there what
    is left of the job: that is a step of the same number.
    """


class Stopped(WorkerError):
    """The ranks ended because a signal told them to; the same command goes on."""


def run_workers(config: Config, stages: list[str], *, processes: int, command: str, lock: int,
                round_name: str, part: dict[str, Any] | None = None, folder: str = "") -> None:
    """Start one process a rank and wait; all `stages` of the round run in the same processes.

    One process without a process group where `processes` is 0. `part` are further entries of `job.json`; a `folder` of
    its own within the run's folder of jobs is for a job that runs beside others.

    Raises:
        UserError: found on a rank, or by what starts them.
        Stopped: a signal ended them.
        KilledAtStart: they were killed before they had met.
        WorkerError: anything else that ended them.
    """
    job_dir = config.run_dir.absolute() / "job" / folder
    wait_for_earlier_ranks(job_dir)
    token = write_job(job_dir, config, {"stages": stages, "round": round_name, "command": command,
                                        "processes": processes} | (part or {}))
    if is_srun(config.cluster):
        place = placement(config.cluster, processes) if processes else Placement(nodes=1, per_node=1)
        start = srun_command(config.cluster, place, [str(job_dir)], output_dir=Path(config.output_dir))
    else:
        place = Placement(nodes=1, per_node=max(processes, 1))
        start = local_command(place.per_node, [str(job_dir)])
    worker = subprocess.Popen(start, env=worker_environment(config, place.per_node) | {TOKEN: token}, pass_fds=(lock,),
                              preexec_fn=end_with_parent, stderr=subprocess.PIPE)
    errors = _watch(worker)
    if worker.returncode != 0 or has_stopped(job_dir):
        raise_worker_error(job_dir, errors, returncode=worker.returncode)


def log_dir(job_dir: Path) -> Path:
    """`outputs/NAME/logs`, where every rank has a log; a job beside others has a folder of its own there."""
    return job_dir.parent / "logs" if job_dir.name == "job" else job_dir.parent.parent / "logs" / job_dir.name


def num_ranks(job: dict[str, Any]) -> int:
    """Of what `job.json` says."""
    return max(int(job["processes"]), 1)


def write_job(job_dir: Path, config: Config, job: dict[str, Any], *, alive: Path | None = None) -> str:
    """Write `job.json` for the ranks and clear what earlier ones left; returns the job's token.

    `alive` is the file that ranks lock as long as they live, `.ranks` in `job_dir` where None.
    """
    job_dir.mkdir(parents=True, exist_ok=True)
    for old in (*(path for what in RECORDS for path in job_dir.glob(f"{what}_*.json")), job_dir / VERDICT):
        old.unlink(missing_ok=True)
    token = uuid.uuid4().hex
    write_json(job_dir / "job.json", {"config": config.to_dict(), **job, "token": token,
                                      "alive": str(alive or job_dir / ".ranks"),
                                      "slurm_job": os.environ.get("SLURM_JOB_ID")})
    return token


def wait_for_earlier_ranks(job_dir: Path) -> None:
    """Ranks hold a shared lock as long as they live: those of a run whose launcher was killed may need a while."""
    job_dir.mkdir(parents=True, exist_ok=True)
    with open(job_dir / ".ranks", "w") as file:
        locks.take(file, UserError("ranks of an earlier run of this name are still there", key="name",
                                   expected="them to end", found=f"a held lock in {job_dir}"))


def worker_environment(config: Config, processes: int) -> dict[str, str]:
    """Environment of the ranks, of which `processes` share a node.

    Thread counts are fixed: without that, sums on CPU are not the same twice.
    """
    threads = config.parallel.num_threads or max(1, len(os.sched_getaffinity(0)) // processes)
    fixed = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "MKL_DYNAMIC": "FALSE",
             "MKL_CBWR": "AUTO,STRICT", "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": _offline(config),
             "TQDM_DISABLE": "1", "HF_ALLOW_CODE_EVAL": "1" if config.evaluate.allow_code else "0",
             "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore",
             "NEMO_EXPM_VERSION": "", "ONE_LOGGER_JOB_CATEGORY": "test"}
    return {**os.environ, **fixed, **config.cluster.environment}


def _offline(config: Config) -> str:
    """The hub is asked for the data of tasks that are not local files, unless the environment forbids it."""
    hub = "evaluate" in config.stages and any(task.path is None for task in config.evaluate.tasks)
    return os.environ.get("HF_HUB_OFFLINE", "0") if hub else "1"


def end_with_parent() -> None:
    """In the child: be told to end when the parent is killed (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


@contextmanager
def passing_on(*workers: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand SIGTERM and SIGUSR1 to the ranks as SIGTERM, which torchrun and srun pass on, and keep waiting for them."""
    def hand_on(number: int, frame: Any) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)

    try:
        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    except ValueError:  # not the main thread, where signals do not arrive
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(worker: subprocess.Popen[bytes]) -> list[str]:
    """Wait for the worker, keeping the last lines of its stderr; an interrupt is passed on and waited for."""
    lines: list[str] = []
    assert worker.stderr is not None
    try:
        with passing_on(worker):
            for raw in worker.stderr:
                lines = keep_line(lines, raw)
            worker.wait()
    except KeyboardInterrupt:
        worker.send_signal(signal.SIGINT)
        worker.wait()
        raise
    return lines


def keep_line(lines: list[str], raw: bytes) -> list[str]:
    """The last lines of a worker's stderr with one more; an error record stays, at the front."""
    line = raw.decode(errors="replace")
    if line.startswith(RECORD):
        return [line, *lines]
    return [*lines[-199:], line] if len(lines) < 200 else [*lines[:1], *lines[-198:], line]


def has_stopped(job_dir: Path) -> bool:
    """Whether a rank ended for a signal, before it was done."""
    return bool(_records(job_dir, "stopped"))


def raise_worker_error(job_dir: Path, stderr: list[str], *, returncode: int) -> None:
    """Raise what the ranks wrote down: a user's mistake first, then a stop by signal, then the first traceback.

    Where they wrote nothing down, their stderr is shown. `returncode` is of what started them.
    """
    records = _records(job_dir, "error")
    records += [json.loads(line.removeprefix(RECORD)) for line in stderr if line.startswith(RECORD)]
    for record in records:
        if record["kind"] == "user":
            raise UserError(record["message"])
    stop = _stop(job_dir, records, returncode)
    if stop is not None:
        _leave_verdict(job_dir, stop)
        raise Stopped(f"minitron: {stop}; the same command goes on from here")
    standings = _standings(job_dir, records)
    if records:
        first = min(records, key=lambda record: float(record["time"]))
        told = f"rank {first['rank']} failed:\n{(first.get('traceback') or first['message']).rstrip()}"
        raise WorkerError("\n".join([told, *standings]))
    _leave_verdict(job_dir, next((line for line in standings if SILENT in line), "the ranks ended without a word"))
    killed = not _records(job_dir, "begun") and _count(job_dir / KILLED_AT_START) <= MAX_KILLED
    told = "\n".join(["a worker ended without saying why:", "".join(stderr).rstrip(), *standings])
    raise KilledAtStart(told) if killed else WorkerError(told)


def _count(path: Path) -> int:
    """One more than the file says, written into it; ranks that meet remove it."""
    count = 1 + (int(read_json(path)["in_a_row"]) if path.exists() else 0)
    with suppress(OSError):  # a full disk is not to hide why the job ended
        write_json(path, {"in_a_row": count})
    return count


def _records(job_dir: Path, what: str) -> list[dict[str, Any]]:
    """What ranks of this job left in files of this name, in the ranks' order."""
    token = read_json(job_dir / "job.json").get("token") if (job_dir / "job.json").exists() else None
    found = [json.loads(path.read_text()) for path in job_dir.glob(f"{what}_*.json")]
    return sorted([record for record in found if record.get("token") == token], key=lambda record: int(record["rank"]))


def _stop(job_dir: Path, errors: list[dict[str, Any]], returncode: int) -> str | None:
    """What the signal's ranks say where it is the signal that ended the job, else None.

    srun and torchrun send SIGTERM to the ranks that are left when one has died, so a signal on some ranks tells
    nothing. It ended the job where all ranks ended well for it, or where it was the first that any rank knew of, and
    none ended without a word. A rank that failed has written that down before its end brings others a signal.
    """
    stopped, signalled = _records(job_dir, "stopped"), _records(job_dir, "signalled")
    told = stopped + signalled
    if not told or (errors and not stopped):
        return None
    message = str(told[0]["message"])
    if returncode == 0:
        return message
    others = errors + _records(job_dir, "where")
    first = min(float(record["time"]) for record in told)
    known = {int(record["rank"]) for record in told + others}
    by_signal = all(first <= float(record["time"]) for record in others)
    return message if by_signal and len(known) >= num_ranks(read_json(job_dir / "job.json")) else None


def _leave_verdict(job_dir: Path, message: str) -> None:
    with suppress(OSError):
        write_json(job_dir / VERDICT, {"message": message})


def _standings(job_dir: Path, records: list[dict[str, Any]]) -> list[str]:
    """A line for every rank, where it stood when the job failed, and where the ranks' logs are."""
    if not (job_dir / "job.json").exists() or not log_dir(job_dir).exists():
        return []  # they came to nothing
    told = records + _records(job_dir, "where")
    lines = {int(record["rank"]): f"rank {record['rank']}: {record['message']}"
             for what in ("signalled", "stopped") for record in _records(job_dir, what)}
    lines |= {int(record["rank"]): str(record["where"]) for record in told[::-1] if "where" in record}
    for rank in range(num_ranks(read_json(job_dir / "job.json"))):
        if rank not in lines:
            lines[rank] = f"rank {rank}: {SILENT} ({_last_words(job_dir, rank)})"
    return [*(lines[rank] for rank in sorted(lines)), f"logs of the ranks: {log_dir(job_dir)}"]


def _last_words(job_dir: Path, rank: int) -> str:
    """Why a rank ended that left no record: the interpreter's own word of it in its newest log, or a guess."""
    logs = sorted(log_dir(job_dir).rglob(f"rank_{rank}.log"), key=lambda path: path.stat().st_mtime)
    text = logs[-1].read_text(encoding="utf-8", errors="replace") if logs else ""
    _, fatal, why = text.rpartition("\n--- ")[2].rpartition("Fatal Python error: ")
    return why.splitlines()[0] if fatal else "killed, or out of memory?"


def check_token(job: dict[str, Any] | None, job_dir: Path, rank: int) -> None:
    """In a rank: raise `ConfigError` unless `job.json` is the one that the launcher wrote."""
    wanted = os.environ.get(TOKEN)
    if wanted is not None and (job is None or job.get("token") != wanted):
        raise ConfigError("the results' folder is not on a file system that all nodes share", key="output_dir",
                          expected=f"the job's job.json in {job_dir} on every node",
                          found=f"{'nothing' if job is None else 'another one'} on {os.uname().nodename}, rank {rank}")
