"""Being told to stop: SIGTERM (preemption, scancel, docker stop) and SIGUSR1 (sbatch --signal, before the time limit).

Slurm tells every rank. A training stage asks `requested` after each step, writes a resume point and raises `Stop` on
all ranks; anything else has nothing to save, and ends at once.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop(BaseException):
    """This process was told to stop, and has left what it did in order.

    Not an `Exception`: nothing on the way out is to take it for a failure.
    """


_received: str | None = None
_held = False
_listening = False


def listen() -> None:
    """Take notice of `SIGNALS` from now on (main thread)."""
    global _listening
    _listening = True
    for number in SIGNALS:
        signal.signal(number, _notice)


def tell_at_once(told: Callable[[str], None]) -> None:
    """Call `told` in a thread with the name of the first signal, whatever the main thread is in (main thread).

    A handler has to wait for the main thread's next line of Python, and that may be behind a collective which the rank
    on the other side has left. What is forked from this process does not speak for it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    names = {int(number): number.name for number in SIGNALS}

    def read() -> None:
        while (number := os.read(reading, 1)[0]) not in names:
            pass
        told(names[number])

    threading.Thread(target=read, name="signals", daemon=True).start()


def listen_alone() -> None:
    """Take SIGTERM back from Lightning, whose handler ends a training at a place of its own, without a resume point."""
    if _listening:
        signal.signal(signal.SIGTERM, _notice)


def dump_on_request() -> None:
    """Let SIGUSR2 write the stacks of all threads to stderr; again after a training, since Lightning takes it away.

    Its teardown puts back the handlers that Python knows of, and that is none for this one: the signal would kill.
    """
    faulthandler.unregister(signal.SIGUSR2)  # else it takes itself for registered
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def requested() -> str | None:
    """The name of the signal that told this process to stop, or None."""
    return _received


def hold() -> None:
    """From now on a signal only makes `requested` answer: the caller asks for it and raises `Stop` itself."""
    global _held
    _held = True


def release() -> None:
    """From now on a signal raises `Stop` at once again."""
    global _held
    _held = False


def _notice(number: int, frame: Any) -> None:
    global _received
    _received = signal.Signals(number).name
    if not _held:
        raise Stop(f"stopped by {_received}")
