"""In each rank, a thread that ends it where it cannot go on, after it has said where it stood.

That is when a step or forward pass makes no progress for too long, and when another rank has failed: waiting for it in
a collective would last until the collective's own time limit. What ranks leave for each other and for the launcher are
files in the job's folder: `error_N.json` of a rank that failed or stalled, `where_N.json` of one that ended with it,
`signalled_N.json` and `stopped_N.json` of one that a signal reached and that ended for it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.launch import standing
from nemo_minitron.launch.workers import TOKEN

POLL_S = 1.0
"""Seconds between two looks at the clock and at what other ranks have left."""
GRACE_S = 5.0
"""Seconds that a rank which has failed waits for the others to say where they stood."""
ALONE_S = 2.0
"""Seconds that a rank has to end by itself after another has failed."""


class Watch(threading.Thread):
    """Looks after the main thread of rank `rank` until `leave`."""

    def __init__(self, job_dir: Path, *, rank: int, world_size: int, stall_s: float) -> None:
        """`stall_s`: longest time without progress where `standing` expects some, seconds."""
        super().__init__(name="watch", daemon=True)
        self.job_dir = job_dir
        self.rank = rank
        self.world_size = world_size
        self.stall_s = stall_s
        self.failed: list[int] = []
        """Ranks that were seen to have failed: a signal that comes after that is what their end brings about."""
        self._left = threading.Event()

    def leave(self) -> None:
        """The main thread ends by itself."""
        self._left.set()
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        """Poll; ends the process, not only the thread."""
        while not self._left.wait(POLL_S):
            # for a call that keeps the interpreter to itself, this thread too: stacks alone, and the job goes on
            faulthandler.dump_traceback_later(self.stall_s + 60, file=2)
            if standing.idle_s() > self.stall_s:
                why = f"no progress for {self.stall_s:g} s (parallel.stall_s)"
                self._say_where(why, "error", kind="stall")
                wait_for_others(self.job_dir, self.world_size)
            elif failed := [rank for rank in ranks_of(self.job_dir, "error") if rank != self.rank]:
                self.failed = failed
                if self._left.wait(ALONE_S / 4):  # it fails by itself, at the same moment
                    return
                self._say_where(f"rank {failed[0]} has failed", "where", kind="beside")
                if self._left.wait(ALONE_S):
                    return
            else:
                continue
            os._exit(1)

    def _say_where(self, why: str, what: str, *, kind: str) -> None:
        """Leave a line for the launcher, and every thread's stack in this rank's log, as far as that can be done."""
        text = standing.line(self.rank, standing.of_main_thread())
        with suppress(OSError):
            os.write(2, f"\n{why}; {text}\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        with suppress(OSError):
            leave_record(self.job_dir, what, {"kind": kind, "rank": self.rank, "message": why, "where": text})


def leave_record(job_dir: Path, what: str, record: dict[str, Any]) -> None:
    """Write a record of this kind of the rank that it names, for the launcher and the other ranks."""
    write_json(job_dir / f"{what}_{record['rank']}.json", record | {"time": time.time(),
                                                                    "token": os.environ.get(TOKEN)})


def ranks_of(job_dir: Path, what: str) -> list[int]:
    """Ranks of this job that have left a record of this kind, in order.

    A node may still see, for a while, what an earlier job of this folder left: it has another token.
    """
    found = []
    with suppress(OSError):
        for name in os.listdir(job_dir):
            if match := re.fullmatch(rf"{what}_(\d+)\.json", name):
                with suppress(OSError, ValueError):
                    if read_json(job_dir / name).get("token") == os.environ.get(TOKEN):
                        found.append(int(match[1]))
    return sorted(found)


def wait_for_others(job_dir: Path, world_size: int) -> None:
    """Give the other ranks the time to say where they stood, before the end of this one ends them."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        if len({*ranks_of(job_dir, "error"), *ranks_of(job_dir, "where")}) >= world_size:
            return
        time.sleep(0.1)
