"""Steps for a budget of tokens. Pure, so that a recipe can be checked before anything starts."""

from __future__ import annotations

import math

from nemo_minitron.errors import ConfigError


def num_steps(tokens: int, *, global_batch_size: int, seq_length: int) -> int:
    """Steps of `global_batch_size` samples for a budget of `tokens`, rounded up."""
    return math.ceil(tokens / (global_batch_size * seq_length))


def check_warmup(warmup_steps: int, steps: int) -> None:
    """Raise `ConfigError` unless the warm-up is shorter than the run of `steps` steps."""
    if warmup_steps >= steps:
        raise ConfigError("the warm-up is longer than the training", expected=f"fewer than {steps} steps",
                          found=str(warmup_steps), key="optim.warmup_steps")
