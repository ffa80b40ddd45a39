"""What happens beside the training step: progress and meters, a look at held-out data, resume checkpoints.

All three run on every rank, because they hold collectives; only rank 0 prints and writes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.parallel.cpu import cuda_is_available
from nemo_minitron.training.module import TrainingModule, reduced_step_means


class Meters(pl.Callback):
    """Writes a JSON line a step to `metrics.jsonl` and shows a line of progress every few steps on rank 0.

    `tokens` counts valid training tokens from the start of the stage, over all replicas. `tokens_per_s` is
    over the steps since the last line, `seconds` the time in training steps over all runs of the stage, with the
    writing of resume points and without the looks at held-out data.
    """

    def __init__(self, path: Path, *, label: str, log_every_steps: int) -> None:
        """Append to `path`; `label` begins each line of progress."""
        self.path = path
        self.label = label
        self.log_every_steps = log_every_steps
        self.tokens = 0.0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Goes into the resume checkpoint."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes back from it."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget lines of steps that were done after the checkpoint this run goes on from."""
        self._mark, self._mark_tokens, self._last = time.monotonic(), self.tokens, time.monotonic()
        if trainer.is_global_zero:
            keep_lines_until(self.path, trainer.global_step)
            self._file = self.path.open("a", encoding="utf-8")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """One step is done: reduce its sums, count, write, and now and then print."""
        assert isinstance(pl_module, TrainingModule)
        means = reduced_step_means(pl_module)
        now = time.monotonic()
        self.seconds += now - self._last
        self._last = now
        self.tokens += means.pop("tokens")
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        logged = trainer.callback_metrics
        line = {"step": step, "tokens": int(self.tokens), **means, "lr": float(logged["lr"]),
                "grad_norm": float(logged["grad_norm"]), "seconds": round(self.seconds, 3)}
        if pl_module.logger is not None:
            pl_module.logger.log_metrics({f"{self.label}/{name}": value for name, value in means.items()}, step)
        if step % self.log_every_steps == 0 or step == trainer.max_steps:
            speed = (self.tokens - self._mark_tokens) / max(now - self._mark, 1e-9)
            line["tokens_per_s"] = round(speed, 1)
            self._mark, self._mark_tokens = now, self.tokens
            left = (trainer.max_steps - step) * self.tokens / max(step, 1) / max(speed, 1e-9)
            shown = "  ".join(f"{name} {means[name]:.4f}" for name in ("loss", "ce") if name in means)
            print(f"[{self.label}] step {step}/{trainer.max_steps}  {shown}  {speed:,.0f} tokens/s  "
                  f"ETA {int(left) // 60}:{int(left) % 60:02d}", flush=True)
        self.write(line)

    def leave_out(self, seconds: float) -> None:
        """Do not count the `seconds` just spent on something else as training."""
        self._last += seconds
        self._mark += seconds

    def write(self, line: dict[str, Any]) -> None:
        """Append one line (rank 0)."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the file."""
        if trainer.is_global_zero:
            self._file.close()


class HeldOut(pl.Callback):
    """Looks at part of the held-out data every few steps; the time it takes is not counted as training."""

    def __init__(self, meters: Meters, *, every_steps: int) -> None:
        """Write through `meters`; `measure` (set before `fit`) gives the held-out loss in nats/token."""
        self.meters = meters
        self.every_steps = every_steps
        self.measure: Callable[[TrainingModule], float] | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Measure when it is time, and at the last step."""
        step = trainer.global_step
        if not self.every_steps or (step % self.every_steps and step != trainer.max_steps):
            return
        assert isinstance(pl_module, TrainingModule) and self.measure is not None
        started = time.monotonic()
        loss = self.measure(pl_module)
        if trainer.is_global_zero:
            self.meters.write({"step": step, "tokens": int(self.meters.tokens), "heldout_ce": loss})
            print(f"[{self.meters.label}] step {step}  held-out {loss:.4f} nats/token", flush=True)
        self.meters.leave_out(time.monotonic() - started)


class ResumePoints(pl.Callback):
    """Writes a Megatron sharded checkpoint every few steps; the newest complete one is kept.

    A checkpoint counts only when `complete.json` names it, and that is written after every rank is done.
    """

    def __init__(self, directory: Path, *, every_steps: int) -> None:
        """Use `directory`, which is the stage's own."""
        self.directory = directory
        self.every_steps = every_steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save when it is time; not at the last step, whose result the stage itself writes."""
        step = trainer.global_step
        if step % self.every_steps or step == trainer.max_steps:
            return
        name = f"step_{step:08d}"
        if trainer.is_global_zero:
            shutil.rmtree(self.directory / name, ignore_errors=True)
            (self.directory / name).mkdir(parents=True)
        dist.barrier()
        trainer.save_checkpoint(self.directory / name)
        dist.barrier()
        if trainer.is_global_zero:
            write_json(self.directory / "complete.json", {"name": name, "step": step})
            for old in self.directory.glob("step_*"):
                if old.name != name:
                    shutil.rmtree(old, ignore_errors=True)


def newest_resume_point(directory: Path) -> Path | None:
    """The newest complete checkpoint in `directory`, or None."""
    marker = directory / "complete.json"
    if not marker.exists():
        return None
    path = directory / str(read_json(marker)["name"])
    return path if path.is_dir() else None


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of `path` that belong to later steps than `step`, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line)
    neighbour = path.with_name(f".{path.name}")
    neighbour.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    neighbour.replace(path)


def deterministic_cpu() -> None:
    """On CPU, ask torch for deterministic algorithms, so that a rerun with the same threads is bit-equal."""
    if not cuda_is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        # filling memory before it is written costs time, and nothing here reads what it has not written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
