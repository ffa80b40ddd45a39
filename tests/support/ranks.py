"""Runs jobs on several ranks: a pool of processes that stay up, because importing Megatron costs seconds.

A job is a plain function `def job(rank, world_size, **kwargs)` in an importable module, named
`"tests.multirank.jobs_x:job"`. Its keyword arguments and its result are JSON. The ranks are connected by
gloo before the first job; a job that needs Megatron's process groups sets them up and destroys them itself.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
GRACE_S = 3.0  # for the other ranks to fail too, once one has


class RankFailure(AssertionError):
    """A job raised or ran out of time; the message holds every rank's traceback."""


class RankPool:
    """`world_size` worker processes; started by the first job, and started afresh after a job that failed."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: list[_Rank] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def run(self, job: str, *, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Run `job` on every rank and return what each rank returned, in order of ranks.

        Raises:
            RankFailure: if a rank raised, died, or was not done after `timeout` seconds.
        """
        try:
            if not self._ranks:
                self._start()
            for rank in self._ranks:
                rank.send({"job": job, "kwargs": kwargs})
            self._collect(job, timeout)
            return [rank.reply["result"] for rank in self._ranks]
        except BaseException:  # also pytest's own timeout: ranks may be anywhere in a collective
            self.close()
            raise

    def close(self) -> None:
        """Kill the ranks; a later `run` starts new ones."""
        for rank in self._ranks:
            rank.kill()
        self._ranks = []
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _start(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks_")
        with socket.socket() as probe:  # only for code that reads MASTER_PORT; the ranks meet in a file
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for index in range(self.world_size):
            env = os.environ | {
                "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(self.world_size),
                "LOCAL_WORLD_SIZE": str(self.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
                "RANK_POOL_STORE": str(Path(self._scratch.name, "store")),
            }
            self._ranks.append(_Rank(index, env, Path(self._scratch.name, f"rank{index}.log")))
        self._collect("start of the ranks", START_TIMEOUT_S)

    def _collect(self, job: str, timeout: float) -> None:
        """Wait for one reply per rank; raise with every rank's traceback if one is bad, missing or late."""
        deadline = time.monotonic() + timeout
        late = f"not done after {timeout:g} s"
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                rank.reply = {}
                selector.register(rank.replies, selectors.EVENT_READ, rank)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    rank = key.data
                    selector.unregister(rank.replies)
                    rank.receive()
                    if not rank.reply["ok"] and deadline > time.monotonic() + GRACE_S:
                        deadline = time.monotonic() + GRACE_S
                        late = f"still running {GRACE_S:g} s after another rank failed"
        if all(rank.reply.get("ok") for rank in self._ranks):
            return
        parts = [f"{job} failed on {self.world_size} ranks"]
        for rank in self._ranks:
            printed = rank.log_tail()
            if not rank.reply:
                rank.reply = {"error": f"{late}; it was here:\n{rank.dump_stack()}"}
            parts.append(f"--- rank {rank.index} ---\n{rank.reply.get('error', 'done').rstrip()}\n{printed}".rstrip())
        raise RankFailure("\n".join(parts))


class _Rank:
    """One worker process: commands go to its stdin, replies come back on a pipe, the rest goes to a log file."""

    def __init__(self, index: int, env: dict[str, str], log: Path) -> None:
        self.index = index
        self.log = log
        self.reply: dict[str, Any] = {}
        reading, writing = os.pipe()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.rank_worker", str(writing)], cwd=ROOT, env=env,
                stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=[writing], start_new_session=True,
            )
        os.close(writing)
        self.replies = os.fdopen(reading, "rb")

    def send(self, command: dict[str, Any]) -> None:
        """Hand over one command (a line of JSON); a dead rank shows when its reply is read."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self) -> None:
        """Read one reply; end of file means that the process died."""
        line = self.replies.readline()
        if line:
            self.reply = json.loads(line)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)  # for its exit code and the last of its log
        self.reply = {"ok": False, "error": f"the process died (exit code {self.process.poll()})"}

    def dump_stack(self) -> str:
        """Where every thread of the process is now (faulthandler writes it to the log)."""
        before = self.log.stat().st_size
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 10.0
        size, unchanged = before, 0
        while time.monotonic() < deadline and (size == before or unchanged < 10):
            time.sleep(0.1)
            size, last = self.log.stat().st_size, size
            unchanged = unchanged + 1 if size == last else 0  # on a busy machine the writer pauses between lines
        return self.log.read_bytes()[before:].decode(errors="replace")

    def log_tail(self, num_chars: int = 2000) -> str:
        """The last of what the process printed."""
        text = self.log.read_text(errors="replace").strip()
        return f"[last output]\n{text[-num_chars:]}" if text else ""

    def kill(self) -> None:
        """End the process and those it started, whatever they are doing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.replies.close()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
