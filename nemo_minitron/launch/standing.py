"""Where this process stands: which stage and step, and by its stack which call, in words that fit on a line.

A part of the work that must not take long says so with `busy` and `alive`; the rest (reading, tokenizing on rank 0
while the others wait, writing a checkpoint) may take as long as it takes.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Call(NamedTuple):
    """A frame of a stack."""

    file: str
    line: int
    function: str


_stage = "start"
_step: int | None = None
_alive: float | None = None


def enter(stage: str) -> None:
    """From now on the work is that of `stage`."""
    global _stage, _step, _alive
    _stage, _step, _alive = stage, None, None


def begin_step(step: int) -> None:
    """Step `step`, from 1, begins: from now on `idle_s` counts."""
    global _step
    _step = step
    alive()


def alive() -> None:
    """Progress is made, one micro-batch of it."""
    global _alive
    _alive = time.monotonic()


def rest() -> None:
    """From now on nothing is expected soon."""
    global _alive
    _alive = None


@contextmanager
def busy() -> Iterator[None]:
    """What is inside must not take long, unless it calls `alive` on the way; a step may go on after it."""
    before = _alive
    alive()
    yield
    if before is None:
        rest()
    else:
        alive()


def idle_s() -> float:
    """Seconds since the last sign of progress; 0 where none is expected."""
    last = _alive
    return 0.0 if last is None else time.monotonic() - last


def line(rank: int, calls: list[Call]) -> str:
    """Where a rank stands, in a line: "rank 3: step 120 of distill, in all_reduce at nemo_minitron/a.py:7"."""
    step = "" if _step is None else f"step {_step} of "
    doing, at = what_it_does(calls)
    return f"rank {rank}: {step}{_stage}, in {doing} at {at}"


def what_it_does(calls: list[Call]) -> tuple[str, str]:
    """(what is called, where): the innermost place outside of torch and the standard library, and torch's part in it.

    `calls` are from the outermost to the innermost.
    """
    own = [number for number, call in enumerate(calls) if not _is_library(call.file)]
    if not own:
        return (calls[-1].function, f"{calls[-1].file}:{calls[-1].line}") if calls else ("nothing", "nowhere")
    inner = calls[own[-1]]
    torch = [call.function for call in calls[own[-1] + 1 :] if "/torch/" in call.file]
    named = [name for name in torch if name.lstrip("_") not in _WRAPPERS]
    return named[0] if named else inner.function, f"{shown_path(inner.file)}:{inner.line}"


_WRAPPERS = ("wrapper", "decorate_context", "wrapped_call_impl", "call_impl", "fn", "inner")


def _is_library(file: str) -> bool:
    return "/torch/" in file or file.startswith("<") or ("/site-packages/" not in file and "/lib/python3" in file)


def shown_path(file: str) -> str:
    """A path from the folder of its package on."""
    if "/site-packages/" in file:
        return file.rpartition("/site-packages/")[2]
    path = Path(file)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else file


def of_main_thread() -> list[Call]:
    """The stack of the main thread now, from any thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return _calls(traceback.walk_stack(frame))[::-1] if frame is not None else []


def of_error(error: BaseException) -> list[Call]:
    """The stack on which `error` was raised."""
    return _calls(traceback.walk_tb(error.__traceback__))


def _calls(frames: Iterable[tuple[FrameType, int]]) -> list[Call]:
    return [Call(frame.f_code.co_filename, number, frame.f_code.co_name) for frame, number in frames]
