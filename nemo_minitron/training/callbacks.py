"""What happens beside the training step: progress and meters, a look at held-out data.

Both run on every rank, because they hold collectives; only rank 0 prints and writes.
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

from nemo_minitron.launch import signals, standing
from nemo_minitron.parallel.cpu import cuda_is_available
from nemo_minitron.training.module import TrainingModule, reduced_step_means
from nemo_minitron.training.throughput import peak_memory_mib
from nemo_minitron.training.trackers import Trackers, numbers


class Meters(pl.Callback):
    """Writes a JSON line a step to `metrics.jsonl` and shows a line of progress every few steps on rank 0.

    The numbers of each line also go to TensorBoard and to the recipe's trackers, as LABEL/NAME.

    `tokens` counts valid training tokens from the start of the stage, over all replicas. `tokens_per_s` is
    over the steps since the last line, `seconds` the time in training steps over all runs of the stage, with the
    writing of resume points and without the looks at held-out data. Lines with a speed also have `teacher_share` (of
    the time, rank 0's), `tflops_per_s` (model FLOPs of all ranks, as `throughput` counts them), `mfu` where the
    device's peak is known, and `peak_memory_mib` of rank 0.
    """

    def __init__(self, path: Path, *, label: str, log_every_steps: int, peak_tflops: float | None = None,
                 trackers: Trackers | None = None) -> None:
        """Append to `path`; `label` begins each line of progress; `peak_tflops` is of one device, TFLOP/s."""
        self.trackers = trackers
        self.path = path
        self.peak_tflops = peak_tflops
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
        self._flops = 0.0
        self._tensorboard = trainer.logger
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
        tokens = means.pop("tokens")
        self.tokens += tokens
        step = trainer.global_step
        shows = step % self.log_every_steps == 0 or is_last_step(trainer)
        self._flops += tokens * pl_module.flops_per_token()
        teacher_seconds = pl_module.take_teacher_seconds() if shows else 0.0
        if not trainer.is_global_zero:
            return
        logged = trainer.callback_metrics
        line = {"step": step, "tokens": int(self.tokens), **means, "lr": float(logged["lr"]),
                "grad_norm": float(logged["grad_norm"]), "seconds": round(self.seconds, 3)}
        if shows:
            elapsed = max(now - self._mark, 1e-9)
            speed = (self.tokens - self._mark_tokens) / elapsed
            line |= {"tokens_per_s": round(speed, 1), "tflops_per_s": round(self._flops / elapsed / 1e12, 4),
                     "peak_memory_mib": round(peak_memory_mib(), 1)}
            if teacher_seconds:
                line["teacher_share"] = round(teacher_seconds / elapsed, 4)
            if self.peak_tflops:
                line["mfu"] = round(self._flops / elapsed / 1e12 / self.peak_tflops / trainer.world_size, 4)
            self._mark, self._mark_tokens, self._flops = now, self.tokens, 0.0
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
        """Append one line (rank 0), whose numbers the trackers get too."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        values = numbers(line, self.label)
        if self._tensorboard is not None:
            self._tensorboard.log_metrics(values, line["step"])
        if self.trackers is not None:
            self.trackers.log(line["step"], values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the file and the trackers."""
        if trainer.is_global_zero:
            self._file.close()
        if self.trackers is not None:
            self.trackers.close("finished")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the trackers: after a signal the same training is to go on."""
        if self.trackers is not None:
            self.trackers.close("stopped" if isinstance(exception, signals.Stop) else "failed")


class Standing(pl.Callback):
    """Says that a step is at work, which must not take long; comes first, so that what others do after it may."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """The next step begins."""
        standing.begin_step(trainer.global_step + 1)

    def on_train_batch_end(self, *_: Any) -> None:
        """It is done."""
        standing.rest()


class HeldOut(pl.Callback):
    """Looks at part of the held-out data every few steps; the time it takes is not counted as training.

    With `keep_best`, the weights with the lowest held-out cross-entropy so far are written to `best/step_N`; those of
    the two best looks stay, since a run that goes on from an older resume point does not know the newest yet.
    """

    def __init__(self, meters: Meters, *, every_steps: int, measure: Callable[[TrainingModule], dict[str, float]],
                 keep_best: Callable[[TrainingModule, Path], None] | None, directory: Path,
                 stop_at: float | None = None) -> None:
        """Write through `meters`.

        Args:
            meters: where lines go.
            every_steps: steps between two looks; 0: none.
            measure: held-out means by name, nats/token, with `ce` among them; every rank calls it.
            keep_best: writes the weights to a folder; every rank calls it. None: keep none.
            directory: the stage's own.
            stop_at: a held-out cross-entropy, nats/token, at or below which the training ends.
        """
        self.meters = meters
        self.stop_at = stop_at
        self.every_steps = every_steps
        self.measure = measure
        self.keep_best = keep_best
        self.directory = directory / "best"
        self.best: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Goes into the resume checkpoint."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes back from it."""
        self.best = state_dict["best"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Measure when it is time, and at the last step."""
        step = trainer.global_step
        if not self.every_steps or (step % self.every_steps and not is_last_step(trainer)):
            return
        assert isinstance(pl_module, TrainingModule)
        started = time.monotonic()
        means = self.measure(pl_module)
        pl_module.take_teacher_seconds()  # those of the look are no part of a step
        if trainer.is_global_zero:
            self.meters.write({"step": step, "tokens": int(self.meters.tokens),
                               **{f"heldout_{name}": value for name, value in means.items()}})
            print(f"[{self.meters.label}] step {step}  held-out {means['ce']:.4f} nats/token", flush=True)
        if self.keep_best is not None and (self.best is None or means["ce"] < self.best["ce"]):
            self._keep(pl_module, step, means["ce"])
        if self.stop_at is not None and means["ce"] <= self.stop_at and not is_last_step(trainer):
            if trainer.is_global_zero:
                print(f"[{self.meters.label}] stopping at step {step}", flush=True)
            trainer.should_stop = True  # on every rank: the mean is the same everywhere
        self.meters.leave_out(time.monotonic() - started)

    def _keep(self, module: TrainingModule, step: int, loss: float) -> None:
        assert self.keep_best is not None
        folder = self.directory / f"step_{step:08d}"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        self.keep_best(module, folder)
        dist.barrier()
        before, self.best = self.best, {"step": step, "ce": loss, "folder": folder.name}
        if dist.get_rank() == 0:
            stay = {folder.name} | ({before["folder"]} if before else set())
            for old in self.directory.glob("step_*"):
                if old.name not in stay:
                    shutil.rmtree(old, ignore_errors=True)


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the step just done is the last of this training."""
    return trainer.global_step == trainer.max_steps or trainer.should_stop


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
