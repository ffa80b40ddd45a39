"""One rank: joins the process groups once, then runs the stages of the job one after another."""

from __future__ import annotations

import ctypes
import datetime
import faulthandler
import fcntl
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import read_json
from nemo_minitron.errors import ConfigError, UserError
from nemo_minitron.launch import signals, standing
from nemo_minitron.launch.rank_log import RankLog
from nemo_minitron.launch.slurm_env import torch_variables
from nemo_minitron.launch.watch import Watch, leave_record, wait_for_others
from nemo_minitron.launch.workers import KILLED_AT_START, RECORD, check_token, log_dir, num_ranks
from nemo_minitron.training.resume import is_disk_full


def main() -> int:
    """Run `job.json` in the folder given as the only argument; leave `error_RANK.json` there when it fails.

    A rank that a signal reaches leaves `signalled_RANK.json`, and `stopped_RANK.json` once it ends for it. torchrun or
    srun starts one process a rank.
    """
    job_dir = Path(sys.argv[1])
    os.umask(os.umask(0o077) | 0o022)  # results are not to be changed by others
    _take_rank()
    rank = int(os.environ.get("RANK", "0"))
    signals.listen()
    faulthandler.enable()
    signals.dump_on_request()
    job: dict[str, Any] | None = None
    log: RankLog | None = None
    watch: Watch | None = None
    try:
        job = read_json(job_dir / "job.json") if (job_dir / "job.json").exists() else None
        check_token(job, job_dir, rank)
        assert job is not None
        with open(job["alive"]) as alive:  # held until this process ends; the next run waits for that
            fcntl.flock(alive, fcntl.LOCK_SH)
            log = RankLog(log_dir(job_dir), rank)
            watch = Watch(job_dir, rank=rank, world_size=num_ranks(job), stall_s=_stall_s(job))
            watch.start()
            signals.tell_at_once(lambda name: _leave_signal(job_dir, "signalled", rank, f"stopped by {name}"))
            try:
                _run(job, job_dir, rank, log)
            except BaseException:
                signals.hold()  # what ends the others, or a second signal, must not keep this one from saying why
                raise
    except UserError as error:
        _leave(job_dir, job, log, {"kind": "user", "rank": rank, "message": str(error)})
        return 2
    except signals.Stop as stop:
        if watch is not None and watch.failed:
            return 1  # torchrun or srun sent the signal, and nobody who wants the job to go on later
        _leave_signal(job_dir, "stopped", rank, str(stop))
        return 0
    except BaseException as error:
        if is_disk_full(error):
            full = UserError("the disk is full", expected="free space, then the same command goes on",
                             found=str(error), key="output_dir")
            _leave(job_dir, job, log, {"kind": "user", "rank": rank, "message": str(full)})
            return 2
        _leave(job_dir, job, log, {"kind": "failure", "rank": rank, "traceback": traceback.format_exc(),
                                   "where": standing.line(rank, standing.of_error(error))})
        faulthandler.dump_traceback(file=2, all_threads=True)
        traceback.print_exc()
        if watch is not None:
            watch.leave()
            wait_for_others(job_dir, watch.world_size)
        return 1  # not by way of the interpreter's end, which waits for gloo's threads
    finally:
        if watch is not None:
            watch.leave()
    return 0


def _stall_s(job: dict[str, Any]) -> float:
    parallel = job["config"]["parallel"]
    return float(parallel["stall_s"] or parallel["timeout_s"])


def _take_rank() -> None:
    """Learn this process's place among the ranks, and end with what started it."""
    if os.environ.get("SLURM_PROCID") is not None and "RANK" not in os.environ:
        os.environ.update(torch_variables(os.environ))
        return  # slurmd ends the tasks of a step itself
    # torchrun puts each rank into a session of its own; one that outlived a killed torchrun would write into the next
    # run of the same name
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    if os.getppid() == 1:  # it had died before
        os._exit(1)


def _leave_begun(job_dir: Path) -> None:
    """In rank 0: write that all ranks have met."""
    leave_record(job_dir, "begun", {"rank": 0})
    (job_dir / KILLED_AT_START).unlink(missing_ok=True)


def _leave_signal(job_dir: Path, what: str, rank: int, message: str) -> None:
    """Write that a signal has reached this rank, or that it ends for it."""
    with suppress(OSError):
        leave_record(job_dir, what, {"rank": rank, "message": message})


def _leave(job_dir: Path, job: dict[str, Any] | None, log: RankLog | None, record: dict[str, Any]) -> None:
    """Write an error where the launcher looks for it: the job's folder, or stderr for a rank that does not see that."""
    try:
        check_token(job, job_dir, record["rank"])
        leave_record(job_dir, "error", record)
    except (ConfigError, OSError):
        if log is not None:
            log.tell_launcher(RECORD + json.dumps(record | {"time": time.time()}))
        else:
            print(RECORD + json.dumps(record | {"time": time.time()}), file=sys.stderr, flush=True)


def _run(job: dict[str, Any], job_dir: Path, rank: int, log: RankLog) -> None:
    from nemo_minitron.parallel.cpu import open_cpu_door

    open_cpu_door()
    _quieten()
    import torch
    import torch.distributed as dist

    from nemo_minitron.compose import config_from_dict
    from nemo_minitron.parallel import groups
    from nemo_minitron.stages.context import Context
    from nemo_minitron.stages.execute import execute
    from nemo_minitron.stages.rounds import round_context

    @contextmanager
    def inside(stage: str) -> Iterator[None]:
        outer = log.stage
        log.turn_to(stage)
        standing.enter(stage)
        yield  # what is raised inside is that stage's, and told in its log
        log.turn_to(outer)
        standing.enter(outer)

    config = config_from_dict(job["config"])
    if job["processes"] == 0:  # stages that one process does alone
        _leave_begun(job_dir)
        context = Context(config=config, command=job["command"], inside=inside)
        execute(round_context(context, job["round"]), job["stages"])
        return
    layout = Context(config=config).layout
    groups.start(layout, timeout_s=config.parallel.timeout_s)
    if rank == 0:
        _leave_begun(job_dir)
    groups.seed_everything(config.seed)
    # rank 0 may tokenize or hash for long while the others wait: not within the bounds of a model's collectives
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=24))

    def share(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=patient, device=torch.device("cpu"))
        return box[0]

    context = Context(config=config, rank=rank, share=share, command=job["command"], inside=inside,
                      barrier=lambda: dist.barrier(group=patient))
    context = round_context(context, job["round"])
    if "candidates" in job:  # a part of a search
        from nemo_minitron.stages.search import train

        train(context, job["candidates"], job["rung"])
    else:
        execute(context, job["stages"])
    groups.stop()


def _quieten() -> None:
    """NeMo, Megatron and Lightning announce themselves at length; our own lines are the ones to read."""
    warnings.filterwarnings("ignore")
    for name in ("nemo_logger", "lightning.pytorch", "lightning", "megatron", "torch.distributed", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # gloo's threads can hold up an ordinary exit after a failure on another rank
