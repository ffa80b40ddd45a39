"""Locks between the jobs that share a run's folder (`flock`, which ends with the process that holds it)."""

from __future__ import annotations

import fcntl
import time
from typing import IO

from nemo_minitron.errors import UserError

PATIENCE_S = 60.0
"""Processes of a job that was killed may need a while to end."""


def take(file: IO[str] | int, refusal: UserError, *, shared: bool = False) -> None:
    """Lock an open file; `shared` lets others in that are shared too.

    Raises:
        UserError: `refusal`, where another process has kept the lock for `PATIENCE_S` seconds.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise refusal from None
            time.sleep(0.5)
