"""Steps for a budget of tokens, and the phases of a training. Pure: a recipe is checked before anything starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from nemo_minitron.config import PhaseConfig, TrainConfig
from nemo_minitron.errors import ConfigError


def num_steps(tokens: int, *, global_batch_size: int, seq_length: int) -> int:
    """Steps of `global_batch_size` samples for a budget of `tokens`, rounded up."""
    return math.ceil(tokens / (global_batch_size * seq_length))


def check_warmup(warmup_steps: int, steps: int) -> None:
    """Raise `ConfigError` unless the warm-up is shorter than the run of `steps` steps."""
    if warmup_steps >= steps:
        raise ConfigError("the warm-up is longer than the training", expected=f"fewer than {steps} steps",
                          found=str(warmup_steps), key="optim.warmup_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a training with constant sizes: `steps` steps that come after `first_step` others.

    `samples` is the number that count; where the last step would have more, those beyond are masked.
    """

    first_step: int
    steps: int
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    samples: int

    def num_microbatches(self, dp: int) -> int:
        """Micro-batches of one replica in a step."""
        return self.global_batch_size // (self.micro_batch_size * dp)


def plan_phases(tokens: int, phases: Sequence[PhaseConfig], train: TrainConfig, *, seq_length: int,
                dp: int) -> tuple[Phase, ...]:
    """The phases of a training on `tokens` tokens, or of `phases` where there are any.

    Raises:
        ConfigError: sizes that are not positive, or a global batch that is no multiple of micro-batch x `dp`.
    """
    planned: list[Phase] = []
    for phase in phases or [PhaseConfig(tokens=tokens)]:
        sizes = {"seq_length": phase.seq_length or seq_length,
                 "global_batch_size": phase.global_batch_size or train.global_batch_size,
                 "micro_batch_size": phase.micro_batch_size or train.micro_batch_size}
        if phase.tokens < 1 or min(sizes.values()) < 1:
            raise ConfigError("bad size of a phase", expected="positive numbers",
                              found=f"tokens {phase.tokens}, {sizes}", key="distill.phases")
        if sizes["global_batch_size"] % (sizes["micro_batch_size"] * dp):
            raise ConfigError(
                "batch sizes do not divide", expected="global_batch_size to be a multiple of micro_batch_size * dp",
                found=f"{sizes['global_batch_size']} and {sizes['micro_batch_size']} * {dp}",
                key="train.global_batch_size" if not phases else "distill.phases")
        steps = num_steps(phase.tokens, global_batch_size=sizes["global_batch_size"], seq_length=sizes["seq_length"])
        asked = math.ceil(phase.tokens / sizes["seq_length"])
        planned.append(Phase(first_step=sum(done.steps for done in planned), steps=steps, **sizes,
                             samples=asked if train.last_batch == "partial" else steps * sizes["global_batch_size"]))
    return tuple(planned)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of `step` (from 0); the last one for any step beyond."""
    return next((phase for phase in phases if step < phase.first_step + phase.steps), phases[-1])
