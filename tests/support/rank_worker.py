"""One rank of a `RankPool`: joins its gloo group, then runs the jobs that come as JSON lines on stdin."""

import datetime
import faulthandler
import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any

faulthandler.register(signal.SIGUSR1, all_threads=True)


def read_commands(commands: "queue.Queue[dict[str, Any]]") -> None:
    """Queue the commands; the end of stdin means that the tests are over, also if they were killed."""
    for line in sys.stdin:
        commands.put(json.loads(line))
    os._exit(0)  # the main thread may be in a collective that nobody will ever join


def outcome(command: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Run one job; whatever it raises becomes text for the test's report."""
    try:
        module, _, name = command["job"].partition(":")
        job = getattr(importlib.import_module(module), name)
        result = job(rank, world_size, **command["kwargs"])
        json.dumps(result)  # what cannot be sent back is the job's mistake too
        return {"ok": True, "result": result}
    except BaseException:
        return {"ok": False, "error": traceback.format_exc()}


def main() -> None:
    """Connect, say so, and serve jobs for ever."""
    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=read_commands, args=[commands], daemon=True).start()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with os.fdopen(int(sys.argv[1]), "w") as replies:

        def reply(value: dict[str, Any]) -> None:
            replies.write(json.dumps(value) + "\n")
            replies.flush()

        import torch
        import torch.distributed as dist

        from nemo_minitron.parallel.cpu import open_cpu_door

        open_cpu_door()  # here, so that a module of jobs may import Megatron at its top
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{os.environ['RANK_POOL_STORE']}", rank=rank, world_size=world_size,
            timeout=datetime.timedelta(seconds=120),
        )
        reply({"ok": True, "result": None})
        while True:
            reply(outcome(commands.get(), rank, world_size))


if __name__ == "__main__":
    main()
