"""How the next token is chosen: greedily, or by temperature and top-p with random numbers that no layout changes.

Plain torch. A choice depends on the seed, the row's own number and the step, and on nothing else: not on which other
rows are in the batch, nor on tensor, pipeline or data parallelism.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """`temperature` 0 is greedy; `top_p` keeps the fewest likeliest tokens whose probabilities add up to it."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1234


def uniforms(seed: int, rows: Sequence[int], step: int) -> torch.Tensor:
    """One number in [0, 1) for each row number at `step`, fp64 `[B]`, by a counter-based generator (Philox)."""
    return torch.tensor([np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, row])).random()
                         for row in rows], dtype=torch.float64)


def choose(logits_BV: torch.Tensor, sampling: Sampling, draws_B: torch.Tensor) -> torch.Tensor:
    """The next token of each row, int64 `[B]`.

    Args:
        logits_BV: over the whole vocabulary, without padding.
        sampling: how.
        draws_B: one number in [0, 1) a row, fp64; not looked at where it is greedy.

    The distribution is inverted in the order of token ids, not of probabilities: rounding that swaps two almost equal
    probabilities then moves no boundary between tokens by more than itself.
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(-1)
    probabilities = (logits_BV.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1.0:
        falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
        dropped = falling.cumsum(-1) - falling >= sampling.top_p
        probabilities = probabilities.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
    reached = probabilities.cumsum(-1)
    # of (0, total], so that a token of probability 0 is never reached
    wanted = (1.0 - draws_B[:, None]) * reached[:, -1:]
    return torch.searchsorted(reached, wanted).squeeze(-1)
