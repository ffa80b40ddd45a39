"""What the training stages `correct`, `distill`, `ce` and `scratch` have in common: data in, checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Checkpoint
from nemo_minitron.evaluate.loss import heldout_loss
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import prepared_data, split_samples
from nemo_minitron.training.module import TrainingModule
from nemo_minitron.training.trainer import export, fit


def student_arguments(context: Context, student: Checkpoint) -> dict[str, Any]:
    """Keyword arguments of a training module for `student`; `LayoutError` where it cannot be cut so."""
    context.layout.check(student.arch, name="student", seq_length=context.config.data.seq_length)
    train = context.config.train
    return {"arch": student.arch, "checkpoint": student.path, "layout": context.layout,
            "chunk_tokens": train.chunk_tokens, "bf16": train.precision == "bf16-mixed"}


def train_stage(context: Context, stage: str, module: TrainingModule, *, start: Checkpoint,
                tokens: int) -> dict[str, Any]:
    """Train `module`, which starts from `start`, and write `checkpoint/` in the stage's directory."""
    config, layout = context.config, context.layout
    directory: Path = context.stage_dir(stage)
    prepared = prepared_data(context, start.path, start.arch)
    heldout = split_samples(context, prepared, "heldout", start.arch)

    def measure(trained: TrainingModule) -> float:
        return heldout_loss(trained.student, heldout, layout=layout, micro_batch_size=config.evaluate.micro_batch_size,
                            max_samples=config.train.eval_samples).loss

    trained = fit(
        module, split_samples(context, prepared, "train", start.arch), label=stage, directory=directory, tokens=tokens,
        layout=layout, train=config.train, optim=config.optim, seed=config.seed,
        distributed_optimizer=config.parallel.distributed_optimizer, measure=measure,
    )
    export(module, directory / "checkpoint", base=start, layout=layout)
    context.barrier()
    result = context.read(directory / "checkpoint")
    return {"weights_digest": result.weights_digest, "start_digest": start.weights_digest, "arch": start.arch.to_dict(),
            "data_digest": prepared.digest, "tokens": trained.tokens, "steps": trained.steps,
            "seconds": round(trained.seconds, 3), "tokens_per_s": round(trained.tokens_per_s, 1)}
