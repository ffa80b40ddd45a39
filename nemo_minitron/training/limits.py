"""Ends a training early, when a budget of tokens, steps or seconds is spent; traces a few of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from nemo_minitron.config import ProfileConfig, StopConfig
from nemo_minitron.parallel.cpu import cuda_is_available, device
from nemo_minitron.training.callbacks import Meters, is_last_step


class StopEarly(pl.Callback):
    """Sets `trainer.should_stop` on every rank after the step that reaches a limit; comes right after the meters."""

    def __init__(self, stop: StopConfig, meters: Meters) -> None:
        """Tokens and seconds are those that `meters` counts."""
        self.stop = stop
        self.meters = meters

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Rank 0 decides, since seconds are not the same everywhere: one broadcast where seconds are limited."""
        stop = self.stop
        spent = (stop.tokens is not None and self.meters.tokens >= stop.tokens) or (
            stop.steps is not None and trainer.global_step >= stop.steps)
        if stop.seconds is not None:
            decision = torch.tensor(int(spent or self.meters.seconds >= stop.seconds), device=device())
            dist.broadcast(decision, src=0)
            spent = bool(decision)
        if spent and trainer.global_step < trainer.max_steps:
            if trainer.is_global_zero:
                print(f"[{self.meters.label}] stopping at step {trainer.global_step}", flush=True)
            trainer.should_stop = True


class Profiler(pl.Callback):
    """Writes `rank_N.json`, a trace of `num_steps` steps from `first_step` on (counted from 1), for Perfetto."""

    def __init__(self, profile: ProfileConfig, directory: Path) -> None:
        """Write to `directory`."""
        self.profile = profile
        self.directory = directory
        self._running: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begin with the first step asked for."""
        if self._running is None and trainer.global_step + 1 == self.profile.first_step:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if cuda_is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._running = torch.profiler.profile(activities=activities, record_shapes=True)
            self._running.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Write after the last one, or the training's last."""
        first = self.profile.first_step
        if self._running is not None and first is not None and (
                trainer.global_step >= first + self.profile.num_steps - 1 or is_last_step(trainer)):
            self._running.__exit__(None, None, None)
            self.directory.mkdir(parents=True, exist_ok=True)
            self._running.export_chrome_trace(str(self.directory / f"rank_{dist.get_rank()}.json"))
            self._running = None
