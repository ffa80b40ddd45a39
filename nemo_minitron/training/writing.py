"""Writes one sharded checkpoint, in a thread beside the training or at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest


class Writing:
    """A checkpoint whose tensors a thread of this process writes while training goes on.

    `start` copies what this rank writes to host memory (as many bytes as its share of the checkpoint), so the steps
    that follow change nothing of it. The thread holds no collective: those, which complete the checkpoint, are in
    `finish`, for the training's own thread. A thread, not a process as Megatron's own callers start: forking out of a
    process that has threads of gloo, NCCL, CUDA or OpenMP can hang, and a process started anew takes seconds.
    """

    def __init__(self, request: AsyncRequest, *, after: Callable[[], None]) -> None:
        """`request` is of `dist_checkpointing.save(..., async_sharded_save=True)`; `after` follows the tensors."""
        self._request = request
        self._after = after
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Copy, and begin to write."""
        self._thread = threading.Thread(target=self._write, args=(self._staged(copy=True),), name="checkpoint",
                                        daemon=True)
        self._thread.start()

    def write(self) -> None:
        """Write now, in this thread, without another copy of what is in host memory."""
        self._write(self._staged(copy=False))

    def is_done(self) -> bool:
        """Whether this rank has written its share, or failed to."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> None:
        """Wait, then write the metadata; all ranks must call this.

        Raises what went wrong in the thread, and `CheckpointException` where a rank could not write its tensors.
        """
        self.wait()
        try:
            for function in self._request.finalize_fns:
                function()
        except BaseException as error:  # CheckpointException is no Exception
            raise error from self._error
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait for this rank's share alone."""
        if self._thread is not None:
            self._thread.join()

    def _staged(self, *, copy: bool) -> list[Any]:
        """The request's arguments with its tensors in host memory; `copy` also those that are there already."""
        arguments = list(self._request.async_fn_args)
        if self._request.preload_fn is None:
            return arguments
        arguments[1] = self._request.preload_fn()
        if copy:
            on_host = {id(tensor) for _, _, (_, tensors) in self._request.async_fn_args[1] for _, tensor in tensors
                       if tensor.device.type == "cpu"}
            arguments[1] = [(path, key, (data, [(item, tensor.clone() if id(tensor) in on_host else tensor)
                                                for item, tensor in tensors]))
                            for path, key, (data, tensors) in arguments[1]]
        return arguments

    def _write(self, arguments: list[Any]) -> None:
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*arguments, **self._request.async_fn_kwargs)
            self._after()
        except BaseException as error:
            self._error = error
