"""Stage `correct`: cross-entropy training of the teacher on the recipe's own data (arXiv:2408.11796, section 2.1)."""

from __future__ import annotations

from typing import Any

from nemo_minitron.stages.context import Context
from nemo_minitron.stages.train import exporter, student_arguments, train_stage
from nemo_minitron.training.module import TrainingModule
from nemo_minitron.training.snapshots import Snapshots


def run(context: Context) -> dict[str, Any]:
    """Train on `correct.tokens` tokens; every rank takes part."""
    start, correct = context.read(context.start_path()), context.config.correct
    module = TrainingModule(**student_arguments(context, start))
    callbacks = []
    if correct.snapshot_every_steps is not None:
        callbacks.append(Snapshots(context.stage_dir("correct") / "snapshots", keep=exporter(context, start),
                                   every_steps=correct.snapshot_every_steps))
    return train_stage(context, "correct", module, start=start, tokens=correct.tokens, callbacks=callbacks,
                       optim=correct.optim(context.config.optim))
