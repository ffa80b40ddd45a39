"""Being told to stop: SIGTERM (preemption, scancel, docker stop) and SIGUSR1 (sbatch --signal, before the time limit).

Slurm tells every rank. A training stage asks `requested` after each step, writes a resume point and raises `Stop` on
all ranks; anything else has nothing to save, and ends at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop(BaseException):
    """This process was told to stop, and has left what it did in order.

    Not an `Exception`: nothing on the way out is to take it for a failure.
    """


_received: str | None = None
_saves = False


def listen() -> None:
    """Take notice of `SIGNALS` from now on (main thread)."""
    for number in SIGNALS:
        signal.signal(number, _notice)


def requested() -> str | None:
    """The name of the signal that told this process to stop, or None."""
    return _received


@contextmanager
def saving_first() -> Iterator[None]:
    """Within, a signal only makes `requested` answer: the caller asks for it and raises `Stop` itself."""
    global _saves
    _saves = True
    try:
        yield
    finally:
        _saves = False


def _notice(number: int, frame: Any) -> None:
    global _received
    _received = signal.Signals(number).name
    if not _saves:
        raise Stop(f"stopped by {_received}")
