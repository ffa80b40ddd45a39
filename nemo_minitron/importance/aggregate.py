"""From sums over samples to importance per unit. Pure: numpy only; collecting the sums is in `hooks`.

arXiv:2407.14679, section 2.2: activations are aggregated first along the sequence, then along the batch. The nine
combinations are compared in its Table 11; (batch=l2, sequence=mean) is the one the paper uses.

Shape letters: L layers, H hidden, F ffn, N query heads, G query groups.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nemo_minitron.errors import ConfigError, ScoresError
from nemo_minitron.importance.scores import (
    BLOCK_INFLUENCE,
    DEFAULT_AGGREGATION,
    SEQUENCE_STATISTICS,
    WIDTH_AXES,
    Scores,
)

BATCH_AGGREGATIONS = ("mean", "l2", "var")


def aggregate(scores: Scores, axis: str, *, batch: str = DEFAULT_AGGREGATION["batch"],
              sequence: str = DEFAULT_AGGREGATION["sequence"]) -> npt.NDArray[np.float64]:
    """Aggregate one width axis over samples (arXiv:2407.14679, section 2.2 and Table 11).

    First, when the scores were collected, along the sequence. With a_1..a_S the activations of one unit at the S
    tokens of one sample:

    - mean: `(1/S) * sum_s |a_s|`
    - l2:   `sqrt(sum_s a_s^2)`
    - var:  `(1/S) * sum_s (a_s - abar)^2`, abar the signed mean over the S tokens

    Then, here, along the batch. With x_1..x_n (all >= 0) that statistic of each of the n calibration samples:

    - mean: `(1/n) * sum_i x_i`
    - l2:   `sqrt(sum_i x_i^2)` (no denominator)
    - var:  `(1/n) * sum_i (x_i - xbar)^2 = (1/n) * sum_i x_i^2 - xbar^2`, clipped at 0 against rounding

    Returns:
        float64, global, [rows, units]: [L, F] (ffn), [L, N] (heads), [L, G] (groups) or [2L, H] (hidden; input
        norm and pre-MLP norm of each layer, in order).

    Raises:
        ScoresError: the axis, or this sequence statistic of it, was not collected.
        ConfigError: an unknown aggregation.
    """
    _check_choice("importance.batch", batch, BATCH_AGGREGATIONS)
    _check_choice("importance.sequence", sequence, SEQUENCE_STATISTICS)
    assert axis in WIDTH_AXES, axis
    name = f"{axis}.{sequence}"
    if f"{name}.sum" not in scores.tensors:
        raise ScoresError(f"the scores hold no sequence statistic '{sequence}' of axis '{axis}'",
                          expected=f"{name}.sum, collected by the score stage",
                          found="only " + ", ".join(sorted(scores.tensors)), key="importance.axes")
    total, total_of_squares = scores.tensors[f"{name}.sum"], scores.tensors[f"{name}.sum_of_squares"]
    if batch == "mean":
        return total / scores.num_samples
    if batch == "l2":
        return np.sqrt(total_of_squares)
    return np.maximum(total_of_squares / scores.num_samples - (total / scores.num_samples) ** 2, 0.0)


def importance(scores: Scores, axis: str, *, batch: str = DEFAULT_AGGREGATION["batch"],
               sequence: str = DEFAULT_AGGREGATION["sequence"]) -> npt.NDArray[np.float64]:
    """Importance of each unit of `axis`; larger means keep.

    hidden [H]: `aggregate` summed over the 2L norms, as the residual stream is shared by all layers
    (arXiv:2407.14679, section 2.2: "summed up to obtain network-wide importance scores"). ffn [L, F], heads [L, N]
    and groups [L, G]: `aggregate` as it is, each layer ranks its own units. layers [L]: block influence, one minus
    the mean over calibration tokens of the cosine between a layer's input and output (same section); `batch` and
    `sequence` do not apply. All float64 and global.

    Raises:
        ScoresError: the axis was not collected.
        ConfigError: an unknown aggregation.
    """
    if axis == "layers":
        if BLOCK_INFLUENCE not in scores.tensors:
            raise ScoresError("the scores hold no block influence", expected=BLOCK_INFLUENCE,
                              found="only " + ", ".join(sorted(scores.tensors)), key="importance.axes")
        return scores.tensors[BLOCK_INFLUENCE]
    per_row = aggregate(scores, axis, batch=batch, sequence=sequence)
    return np.sum(per_row, axis=0, dtype=np.float64) if axis == "hidden" else per_row


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError("unknown aggregation", expected="one of " + ", ".join(choices), found=repr(value), key=key)
