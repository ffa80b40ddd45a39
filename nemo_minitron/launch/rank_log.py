"""One file a rank and stage with all that the rank and its libraries print; rank 0's own lines also reach the terminal.

The file descriptors themselves are turned to the file, so that what NCCL, gloo or a crash of the interpreter writes is
in it too. `outputs/NAME/logs/STAGE/rank_N.log`, and under `start` what comes before the first stage; a later run of the
same name appends.
"""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

START = "start"
"""Stands for the stage before a rank has entered one."""


def log_path(folder: Path, stage: str, rank: int) -> Path:
    """`folder` is `outputs/NAME/logs`; `stage` has slashes where a round or a candidate has a folder of its own."""
    return folder / stage / f"rank_{rank}.log"


class RankLog:
    """The log of this process; it stays open until the process ends."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Turn standard output and error of this process to its file in `folder`, under `START`."""
        self._folder = folder
        self._rank = rank
        self._launcher = os.dup(2)
        terminal = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
        self.stage = ""
        self.turn_to(START)
        log = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
        sys.stdout = _Both(log, terminal) if rank == 0 else log

    def turn_to(self, stage: str) -> None:
        """From now on everything goes to the file of `stage`, after a line that says when, and which process."""
        if stage == self.stage:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        path = log_path(self._folder, stage, self._rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(file)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        os.write(2, f"--- {now} rank {self._rank}, process {os.getpid()} on {os.uname().nodename}\n".encode())
        self.stage = stage

    def tell_launcher(self, text: str) -> None:
        """Write a line to the standard error that this process was started with."""
        os.write(self._launcher, (text + "\n").encode())


class _Both(io.TextIOBase):
    """Writes to the log and to the terminal; only the log has a descriptor."""

    def __init__(self, log: TextIO, terminal: TextIO) -> None:
        self._log = log
        self._terminal = terminal

    def write(self, text: str) -> int:
        self._terminal.write(text)
        with suppress(OSError):  # a full disk is to be met where it matters
            self._log.write(text)
        return len(text)

    def flush(self) -> None:
        self._terminal.flush()
        with suppress(OSError):
            self._log.flush()

    def fileno(self) -> int:
        return self._log.fileno()

    def writable(self) -> bool:
        return True
