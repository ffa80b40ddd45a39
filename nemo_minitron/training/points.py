"""Writes resume points while training, when it is time or a signal asks for one, and finds the one to go on from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from nemo_minitron.artifacts import write_json
from nemo_minitron.errors import UserError
from nemo_minitron.launch import signals
from nemo_minitron.parallel.cpu import device
from nemo_minitron.training import resume
from nemo_minitron.training.callbacks import is_last_step
from nemo_minitron.training.writing import Writing


class ResumePoints(pl.Callback):
    """Writes a Megatron sharded checkpoint every few steps, and before the end when a signal says so.

    The tensors are written beside the steps that follow (`train.checkpoint_async`), one point at a time. The newest two
    complete ones are kept. A point counts once `complete.json` is in it, with a checksum of every file, and that is
    written after every rank is done.
    """

    def __init__(self, directory: Path, *, every_steps: int, label: str, beside: bool = True,
                 pause_step: int | None = None) -> None:
        """Use `directory`, which is the stage's own; `label` names the stage. Also save after `pause_step`.

        `beside`: write while training goes on, which needs host memory for a copy of this rank's share.
        """
        self.pause_step = pause_step
        self.directory = directory
        self.every_steps = every_steps
        self.label = label
        self.beside = beside
        self._pending: _Pending | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on a signal waits for the end of the step. Leaves the number of steps for `minitron status`."""
        signals.hold()
        signals.listen_alone()
        if trainer.is_global_zero:
            write_json(self.directory.parent / "progress.json", {"steps": trainer.max_steps})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete what is being written; from now on there is nothing to save."""
        self._complete()
        signals.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A point on its way is given up: the other ranks may not be there to complete it.

        Signals stay held: where a rank was killed, the one that tells the others to end must not pass for a stop.
        """
        if self._pending is not None:
            self._pending.writing.wait()
            self._pending = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save when it is time; not at the last step, whose result the stage itself writes."""
        step = trainer.global_step
        if step == self.pause_step and step < trainer.max_steps:
            self._save(trainer, step)
            return
        if is_last_step(trainer):
            return
        stop, written = self._agree()
        if written:
            self._complete()
        if step % self.every_steps == 0 or stop is not None:
            self._save(trainer, step)
        if stop is not None:
            self._complete()
            raise signals.Stop(f"stopped by {stop} after step {step} of {trainer.max_steps} of {self.label}, "
                               f"with a resume point")

    def _agree(self) -> tuple[str | None, bool]:
        """The signal that any rank received, and whether every rank has written its share of the point on its way.

        All ranks get the same answer (one small all-reduce a step).
        """
        names = [number.name for number in signals.SIGNALS]
        mine = signals.requested()
        busy = self._pending is not None and not self._pending.writing.is_done()
        found = torch.tensor([names.index(mine) + 1 if mine else 0, int(busy)], dtype=torch.int32, device=device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        signal, any_busy = found.tolist()
        return names[signal - 1] if signal else None, not any_busy

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        """Begin the point of `step`, once the one before is complete."""
        self._complete()
        point = resume.point_path(self.directory, step)
        if trainer.is_global_zero:
            resume.remove(point)
            point.mkdir(parents=True)
        dist.barrier()
        with self._disk_full_is_told(point):
            trainer.save_checkpoint(point)
            strategy: Any = trainer.strategy
            self._pending = _Pending(point, step, strategy.request)
            if self.beside:
                self._pending.writing.start()
            else:
                self._pending.writing.write()
                self._complete()

    def _complete(self) -> None:
        """Wait for the point on its way, if there is one, and make it count; all ranks must call this."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._disk_full_is_told(pending.point):
            pending.writing.finish()
            rank = dist.get_rank()
            if rank == 0:
                pending.digests |= resume.digests(resume.others(pending.point))
            resume.write_digests(pending.point, rank, pending.digests)
            dist.barrier()
            if rank == 0:
                resume.seal(pending.point, pending.step, dist.get_world_size())
                resume.rotate(self.directory)

    @contextlib.contextmanager
    def _disk_full_is_told(self, point: Path) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # torch's CheckpointException is one, and no Exception
            if not resume.is_disk_full(error):
                raise
            resume.remove(point)
            newest = next(iter(resume.sealed_points(self.directory)), None)
            raise UserError("the disk is full: a resume point could not be written", key="output_dir",
                            expected="free space, then the same command goes on", found=f"none in {self.directory}; "
                            f"the last good one is {f'of step {newest.step}' if newest else 'none'}") from None


class _Pending:
    """A point on its way, and the checksums of what this rank wrote of it."""

    def __init__(self, point: Path, step: int, request: AsyncRequest) -> None:
        self.point = point
        self.step = step
        self.digests: dict[str, tuple[int, str]] = {}
        self.writing = Writing(request, after=self._hash)

    def _hash(self) -> None:
        self.digests = resume.digests(resume.shards(self.point, dist.get_rank()))


def point_to_go_on_from(directory: Path, *, label: str) -> Path | None:
    """The newest complete and undamaged point in `directory`, or None; every rank must call this.

    Ranks share the work of checking. Rank 0 says which points are passed over, and why.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    box: list[Any] = [resume.sealed_points(directory)]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu") if device().type == "cpu" else None)
    for point in box[0]:
        faults: list[str | None] = [None] * world_size
        dist.all_gather_object(faults, point.fault(sorted(point.files)[rank::world_size]))
        fault = next((found for found in faults if found is not None), None)
        if fault is None:
            return point.path
        if rank == 0:
            print(f"[{label}] resume point of step {point.step} is damaged: {fault}; the one before it is used",
                  flush=True)
    return None
