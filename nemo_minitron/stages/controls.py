"""Stages `ce`, `scratch` and `scratch_until`: what tokens give without distillation, and without the pruned weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Checkpoint, held_out_looks
from nemo_minitron.checkpoint.digest import write_random
from nemo_minitron.errors import ConfigError
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.train import student_arguments, train_stage
from nemo_minitron.training.module import TrainingModule


def run_ce(context: Context) -> dict[str, Any]:
    """Train the pruned model by cross-entropy on `distill.tokens` tokens; every rank takes part."""
    student = context.student()
    module = TrainingModule(**student_arguments(context, student))
    return train_stage(context, "ce", module, start=student, tokens=context.config.distill.tokens,
                       phases=context.config.distill.phases)


def run_scratch(context: Context) -> dict[str, Any]:
    """Train the pruned architecture from random weights by cross-entropy on `distill.tokens` tokens."""
    start = _random_weights(context, "scratch")
    module = TrainingModule(**student_arguments(context, start))
    return train_stage(context, "scratch", module, start=start, tokens=context.config.distill.tokens,
                       phases=context.config.distill.phases)


def run_scratch_until(context: Context) -> dict[str, Any]:
    """Train like `scratch`, but until a look's held-out loss is that of the distilled model; every rank takes part.

    At most on `scratch_until.max_ratio` times the distillation's tokens, over which the learning rate decays. Looks are
    every `train.eval_every_steps` steps, on the same samples as the distilled model's last (or best) one.
    """
    config, own = context.config, context.config.scratch_until
    manifest = context.manifest("distill")
    assert manifest is not None, "an input of this stage"
    target = context.share(_decisive_look(context.stage_dir("distill"), best=config.train.keep_best)
                           if context.rank == 0 else None)
    context.say(f"[scratch_until] until held-out {target:.4f} nats/token, or {own.max_ratio:g} times the tokens")
    start = _random_weights(context, "scratch_until")
    module = TrainingModule(**student_arguments(context, start))
    stop = dataclasses.replace(config.train.stop, heldout_ce=target)
    facts = train_stage(
        context, "scratch_until", module, start=start, tokens=round(own.max_ratio * manifest.result["tokens"]),
        optim=own.optim(config.optim), train=dataclasses.replace(config.train, stop=stop, keep_best=False))
    found = context.share(_decisive_look(context.stage_dir("scratch_until"), best=False) if context.rank == 0 else None)
    ratio = facts["tokens"] / manifest.result["tokens"]
    context.say(f"[scratch_until] {'reached' if found <= target else 'not reached'} after {ratio:.2f} times the tokens "
                f"(held-out {found:.4f})")
    return facts | {"target": target, "heldout_ce": found, "reached": found <= target, "token_ratio": ratio}


def _decisive_look(directory: Path, *, best: bool) -> float:
    """Held-out loss of a training stage's last look, or its best, nats/token on `train.eval_samples` samples.

    Raises:
        ConfigError: it has none.
    """
    looks = [loss for _, _, loss in held_out_looks(directory)]
    if not looks:
        raise ConfigError("nothing to reach", expected="held-out looks of the distillation (1 or more)",
                          found="0: none", key="train.eval_every_steps")
    return min(looks) if best else looks[-1]


def _random_weights(context: Context, stage: str) -> Checkpoint:
    """The pruned architecture with random weights, in the stage's directory."""
    student = context.student()
    initial = context.stage_dir(stage) / "initial"
    if context.rank == 0 and not initial.exists():
        write_random(student.arch, initial, tokenizer_directory=student.path, seed=context.config.seed)
    context.barrier()
    return context.read(initial)
