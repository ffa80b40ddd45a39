"""What the training stages `correct`, `distill` and the controls have in common: data in, checkpoint out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Checkpoint
from nemo_minitron.config import OptimConfig, PhaseConfig, TrainConfig
from nemo_minitron.data.batch import Samples
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import prepared_data, split_samples
from nemo_minitron.training.budget import plan_phases
from nemo_minitron.training.module import TrainingModule
from nemo_minitron.training.trainer import export, fit


def student_arguments(context: Context, student: Checkpoint) -> dict[str, Any]:
    """Keyword arguments of a training module for `student`; `LayoutError` where it cannot be cut so."""
    context.layout.check(student.arch, name="student", seq_length=context.config.data.seq_length)
    train = context.config.train
    return {"arch": student.arch, "checkpoint": student.path, "layout": context.layout,
            "chunk_tokens": train.chunk_tokens, "bf16": train.precision == "bf16-mixed", "recompute": train.recompute}


def exporter(context: Context, base: Checkpoint) -> Callable[[TrainingModule, Path], None]:
    """Writes a training module's weights as a Hugging Face directory like `base`; every rank must call it."""
    return lambda module, directory: export(module, directory, base=base, layout=context.layout)


def train_stage(context: Context, stage: str, module: TrainingModule, *, start: Checkpoint, tokens: int,
                phases: Sequence[PhaseConfig] = (), callbacks: Sequence[Any] = (),
                optim: OptimConfig | None = None, train: TrainConfig | None = None) -> dict[str, Any]:
    """Train `module`, which starts from `start`, and write `checkpoint/` in the stage's directory.

    Args:
        context: the recipe and the ranks.
        stage: its name.
        module: model, loss and teacher.
        start: where its weights come from.
        tokens: training tokens, unless there are phases.
        phases: parts with sizes of their own.
        callbacks: Lightning's, of the stage.
        optim: the recipe's, where None.
        train: the recipe's, where None.
    """
    config, layout = context.config, context.layout
    train = train or config.train
    directory: Path = context.stage_dir(stage)
    prepared = prepared_data(context, start.path, start.arch)
    heldout = split_samples(context, prepared, "heldout", start.arch)
    write = exporter(context, start)

    def samples(seq_length: int) -> Samples:
        return split_samples(context, prepared, "train", start.arch, seq_length=seq_length)

    def measure(trained: TrainingModule) -> dict[str, float]:
        return trained.measure(heldout, micro_batch_size=config.evaluate.micro_batch_size,
                               max_samples=config.train.eval_samples)

    planned = plan_phases(tokens, phases, train, seq_length=config.data.seq_length, dp=layout.dp)
    trained = fit(
        module, samples, label=stage, directory=directory,
        title=directory.relative_to(config.run_dir.parent).as_posix(), phases=planned, layout=layout,
        train=train, optim=optim or config.optim, seed=config.seed,
        distributed_optimizer=config.parallel.distributed_optimizer,
        measure=measure, keep=write, callbacks=callbacks, pause_step=context.pause_step,
    )
    if trained.steps == context.pause_step and trained.steps < sum(phase.steps for phase in planned):
        context.barrier()
        return {"paused": trained.steps}
    best = context.share(trained.best_folder is not None and trained.best_folder.is_dir())
    if best:
        assert trained.best_folder is not None
        if context.rank == 0:  # a copy: killed now, the stage needs the folder again
            shutil.rmtree(directory / "checkpoint", ignore_errors=True)
            shutil.copytree(trained.best_folder, directory / "checkpoint")
        context.say(f"[{stage}] the result is that of step {trained.best_step}: held-out {trained.best_loss:.4f}")
    else:
        write(module, directory / "checkpoint")
    context.barrier()
    result = context.read(directory / "checkpoint")
    facts = {"best_step": trained.best_step, "best_heldout_ce": trained.best_loss} if best else {}
    return {"weights_digest": result.weights_digest, "start_digest": start.weights_digest, "arch": start.arch.to_dict(),
            "data_digest": prepared.digest, "tokens": trained.tokens, "steps": trained.steps, **facts,
            "seconds": round(trained.seconds, 3), "tokens_per_s": round(trained.tokens_per_s, 1)}
