"""Which candidate is best, how early that was to be seen, and who goes on to the next rung. Pure arithmetic.

Losses are held-out cross-entropy in nats/token, of all candidates on the same tokens. A loss that is not a number is
the worst of all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Candidate
from nemo_minitron.report.rank import spearman


def candidate_name(arch: ArchSpec) -> str:
    """Folder of a candidate, from its sizes: l6-h144-f320-a6-g2 (layers, hidden, FFN, query heads, KV groups)."""
    return (f"l{arch.num_layers}-h{arch.hidden_size}-f{arch.ffn_hidden_size}-a{arch.num_attention_heads}"
            f"-g{arch.num_query_groups}")


def rung_steps(steps: int, *, rungs: int, keep: float) -> tuple[int, ...]:
    """The step up to which candidates are trained at every rung, ascending, the last one `steps`.

    Each rung has 1 / `keep` times the steps of the one before (successive halving, arXiv:1502.07943); rungs that
    rounding makes equal become one.
    """
    return tuple(sorted({max(1, round(steps * keep**(rungs - 1 - rung))) for rung in range(rungs)}))


def num_survivors(count: int, keep: float) -> int:
    """How many of `count` candidates go on to the next rung: the fraction `keep`, at least one."""
    return max(1, math.ceil(count * keep))


def trained_steps(count: int, ends: Sequence[int], keep: float) -> tuple[int, int]:
    """Steps that `count` candidates are trained for together when rungs end at `ends`, and how many reach the last."""
    total, before = 0, 0
    for rung, end in enumerate(ends):
        if rung:
            count = num_survivors(count, keep)
        total += count * (end - before)
        before = end
    return total, count


def survivors(losses: Sequence[float], keep: float) -> list[int]:
    """Indices of the best `num_survivors` of the candidates, in their order; of equal ones the earlier stay."""
    count = num_survivors(len(losses), keep)
    return sorted(sorted(range(len(losses)), key=lambda index: (_comparable(losses[index]), index))[:count])


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best first: those trained longest come before those that were left on an earlier rung, then by last loss."""
    return sorted(candidates, key=lambda one: (-one.step, _comparable(one.loss), one.name))


def best_after_pruning(candidates: Sequence[Candidate]) -> Candidate:
    """The one that had the lowest loss before any training."""
    return min(candidates, key=lambda one: (_comparable(one.pruned_loss), one.name))


def stability(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """How the ranking at every look agrees with that at the end, over the candidates that were trained to the end.

    Each entry has `step` (0: right after pruning), `tokens`, `spearman` (rank correlation with the last losses; None
    where it is not defined) and `same_best` (whether the final winner led). Looks that not all have had are left out.
    """
    last = max(one.step for one in candidates)
    finalists = [one for one in candidates if one.step == last]
    final = np.array([_comparable(one.loss) for one in finalists])
    rows = []
    for index in range(min(len(one.curve) for one in finalists) + 1):
        looks = [(0, 0, one.pruned_loss) if index == 0 else one.curve[index - 1] for one in finalists]
        losses = np.array([_comparable(loss) for _, _, loss in looks])
        agreement = spearman(losses, final) if len(finalists) > 1 else None
        rows.append({"step": looks[0][0], "tokens": looks[0][1], "spearman": agreement,
                     "same_best": bool(np.argmin(losses) == np.argmin(final))})
    return rows


def safe_step(rows: Sequence[dict[str, Any]]) -> int | None:
    """The first look from which on the final winner always led; None where there is no look."""
    step = None
    for row in reversed(rows):
        if not row["same_best"]:
            break
        step = row["step"]
    return step


def as_dict(candidate: Candidate) -> dict[str, Any]:
    """A candidate as plain JSON data, with both numbers of parameters."""
    arch = candidate.arch
    return dataclasses.asdict(candidate) | {
        "arch": arch.to_dict(), "step": candidate.step, "loss": candidate.loss, "num_parameters": arch.num_parameters(),
        "num_non_embedding_parameters": arch.num_non_embedding_parameters()}


def _comparable(loss: float) -> float:
    return math.inf if math.isnan(loss) else min(loss, 1e30)
