"""A teacher that is corrected while a student learns from it: snapshots on one side, exchanges on the other.

arXiv:2408.11796, section 4 and Figure 5: pruning the original teacher and distilling from one that is corrected
meanwhile is on par with correcting first. The two are separate runs that share a folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.families import read_arch
from nemo_minitron.errors import CheckpointError
from nemo_minitron.parallel.cpu import device
from nemo_minitron.training.callbacks import is_last_step
from nemo_minitron.training.module import TrainingModule


class Snapshots(pl.Callback):
    """Writes the model as a Hugging Face directory `step_N` every few steps and after the last; whole ones only."""

    def __init__(self, folder: Path, *, every_steps: int, keep: Callable[[TrainingModule, Path], None]) -> None:
        """`keep` writes the weights to a folder; every rank calls it. All stay: a resumed student may need one."""
        self.folder = folder
        self.every_steps = every_steps
        self.keep = keep

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Write when it is time."""
        step = trainer.global_step
        if step % self.every_steps and not is_last_step(trainer):
            return
        assert isinstance(pl_module, TrainingModule)
        partial, final = self.folder / f"partial_{step:08d}", self.folder / f"step_{step:08d}"
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)  # of a run that was killed and goes on from before it
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        self.keep(pl_module, partial)
        dist.barrier()
        if trainer.is_global_zero:
            partial.rename(final)


def newest_snapshot(folder: Path) -> str | None:
    """Name of the newest whole snapshot in `folder`, or None."""
    return max((path.name for path in folder.glob("step_*") if path.is_dir()), default=None)


class Exchangeable(Protocol):
    """A teacher whose weights can be exchanged."""

    arch: ArchSpec

    def load_weights(self, path: Path) -> None:
        """Read another checkpoint of the same architecture; every rank calls it."""


class Taught(Protocol):
    """A training module with a teacher. (The trainer copies its callbacks deeply, so they hold none themselves.)"""

    teacher: Exchangeable


class ExchangeTeacher(pl.Callback):
    """Every few steps, and before the first, gives the teacher the newest snapshot's weights.

    Which one was taken at which step goes to `teachers.jsonl` first. A run that is killed and goes on loads the
    snapshot that was in use, and takes at each step what it took before, so its result is the same.
    """

    def __init__(self, folder: Path, *, every_steps: int, record: Path, label: str) -> None:
        """`folder` is where `Snapshots` writes; it may be empty or not there yet."""
        self.folder = folder
        self.every_steps = every_steps
        self.record = record
        self.label = label
        self.in_use: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Goes into the resume checkpoint."""
        return {"in_use": self.in_use}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes back from it."""
        self.in_use = state_dict["in_use"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a resume: the snapshot that was in use."""
        if self.in_use is not None:
            self._load(self.in_use, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Exchange when it is time; rank 0 looks and tells the others (one broadcast)."""
        step = trainer.global_step
        if step % self.every_steps:
            return
        box = [self._choice(step) if trainer.is_global_zero else None]
        dist.broadcast_object_list(box, src=0, device=device() if device().type == "cuda" else torch.device("cpu"))
        if box[0] is not None and box[0] != self.in_use:
            self.in_use = box[0]
            self._load(self.in_use, pl_module)
            if trainer.is_global_zero:
                print(f"[{self.label}] step {step}: teacher is now {self.folder / self.in_use}", flush=True)

    def _choice(self, step: int) -> str | None:
        known = {}
        if self.record.exists():
            for line in self.record.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # torn by a kill
                    continue
                known[entry["step"]] = entry["snapshot"]
        if step in known:
            choice: str | None = known[step]
            return choice
        choice = newest_snapshot(self.folder)
        self.record.parent.mkdir(parents=True, exist_ok=True)
        with self.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "snapshot": choice}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return choice

    def _load(self, name: str, module: Any) -> None:
        taught: Taught = module
        path = self.folder / name
        if not path.is_dir():
            raise CheckpointError("a snapshot of the teacher is gone", expected=f"{path}, which was in use",
                                  found="nothing", key="distill.teacher.snapshots")
        if (found := read_arch(path)) != taught.teacher.arch:
            raise CheckpointError("a snapshot of another architecture than the teacher's", found=str(found),
                                  expected=str(taught.teacher.arch), key="distill.teacher.snapshots")
        taught.teacher.load_weights(path)
