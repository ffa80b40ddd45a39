"""One rank of a `RankPool`: joins its gloo group, then runs the jobs that come as JSON lines on stdin."""

import datetime
import faulthandler
import gc
import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

MAX_THREADS = 60


def read_commands(commands: "queue.Queue[dict[str, Any]]") -> None:
    """Queue the commands; the end of stdin means that the tests are over, also if they were killed.

    Not read through `sys.stdin`: its lock would be held by this thread for good, and a forked child (Megatron
    forks to write checkpoints) waits for that lock when it closes its `sys.stdin`.
    """
    with open(os.dup(sys.stdin.fileno())) as stdin:
        for line in stdin:
            commands.put(json.loads(line))
    os._exit(0)  # the main thread may be in a collective that nobody will ever join


def connect(rank: int, world_size: int) -> None:
    """Join the gloo group of the pool, and open the CPU door so that a module of jobs may import Megatron."""
    import torch
    import torch.distributed as dist

    from nemo_minitron.parallel.cpu import open_cpu_door

    open_cpu_door()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['RANK_POOL_STORE']}", rank=rank, world_size=world_size,
        timeout=datetime.timedelta(seconds=120),
    )


def call(job: str, rank: int, world_size: int, kwargs: dict[str, Any]) -> Any:
    """Import the function that `job` names ("module:function") and run it."""
    module, _, name = job.partition(":")
    return getattr(importlib.import_module(module), name)(rank, world_size, **kwargs)


def outcome(function: Callable[..., Any], *args: Any) -> str:
    """One line of JSON: what `function` returned, or the traceback of what it raised, for the test's report."""
    try:
        return json.dumps({"ok": True, "result": function(*args)})
    except BaseException:
        return json.dumps({"ok": False, "error": traceback.format_exc()})


def collect_ended_groups() -> None:
    """Free what a job left behind: cycles of a model or a trainer keep the threads of ended process groups alive.

    A job leaves up to 50 threads, and hundreds of them slow every collective down; a collection takes 0.5 s.
    """
    if len(os.listdir("/proc/self/task")) > MAX_THREADS:
        gc.collect()


def main() -> None:
    """Connect, say so, and serve jobs for ever."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=read_commands, args=[commands], daemon=True).start()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as replies:
        replies.write(outcome(connect, rank, world_size) + "\n")
        while True:
            command = commands.get()
            faulthandler.unregister(signal.SIGUSR1)  # a training before took it away, as Lightning does
            faulthandler.register(signal.SIGUSR1, all_threads=True)
            replies.write(outcome(call, command["job"], rank, world_size, command["kwargs"]) + "\n")
            collect_ended_groups()


if __name__ == "__main__":
    main()
