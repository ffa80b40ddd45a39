"""Stage `correct`: cross-entropy training of the teacher on the recipe's own data (arXiv:2408.11796, section 2.1)."""

from __future__ import annotations

from typing import Any

from nemo_minitron.stages.context import Context
from nemo_minitron.stages.train import student_arguments, train_stage
from nemo_minitron.training.module import TrainingModule


def run(context: Context) -> dict[str, Any]:
    """Train on `correct.tokens` tokens; every rank takes part."""
    start = context.read(context.start_path())
    module = TrainingModule(**student_arguments(context, start))
    return train_stage(context, "correct", module, start=start, tokens=context.config.correct.tokens)
