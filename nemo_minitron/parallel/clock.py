"""How long a part of a step takes, on a GPU without making it wait."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch

from nemo_minitron.parallel.cpu import cuda_is_available


class Stopwatch:
    """Adds up the time spent in its `with` blocks: of the device on a GPU, by the wall clock elsewhere."""

    def __init__(self) -> None:
        """Start at zero."""
        self._seconds = 0.0
        self._pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if cuda_is_available():
            self._pairs.append((self._started, self._now()))
        else:
            self._seconds += self._now() - self._started

    def _now(self) -> Any:
        if not cuda_is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Seconds since the last call; on a GPU this waits for what was measured to be done."""
        seconds, self._seconds = self._seconds, 0.0
        for started, ended in self._pairs:
            ended.synchronize()
            seconds += started.elapsed_time(ended) / 1000.0
        self._pairs.clear()
        return seconds
