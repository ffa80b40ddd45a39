"""From sums over samples to importance per unit. Pure: numpy only; collecting the sums is in `hooks`.

arXiv:2407.14679, section 2.2: activations are aggregated first along the sequence, then along the batch. The nine
combinations are compared in its Table 11; (batch=l2, sequence=mean) is the one the paper uses.

Shape letters: L layers, H hidden, F ffn, N query heads, G query groups, D head_dim.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from nemo_minitron.arch import ArchSpec
from nemo_minitron.errors import ConfigError, ScoresError
from nemo_minitron.importance.scores import (
    BLOCK_INFLUENCE,
    DEFAULT_AGGREGATION,
    SEQUENCE_STATISTICS,
    STATIC_METHODS,
    Scores,
)

BATCH_AGGREGATIONS = ("mean", "l2", "var")
METHODS = ("activations", *STATIC_METHODS)
NORMS = ("input", "pre_mlp", "final")
RANKINGS = ("per_layer", "summed")

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """How collected scores become importance. No choice here needs another forward pass.

    - method: activations, or scores that are importance as they are (magnitude, random, iterative).
    - batch, sequence: see `aggregate`.
    - norms: whose outputs count for hidden channels. The official code takes the input and the pre-MLP norm of every
      layer and leaves the final norm out (the default); arXiv:2407.14679 says "LN(X)" without naming norms.
    - ranking: "per_layer", each layer ranks its own neurons and heads (the official code, the default), or
      "summed", scores are summed over layers first and all layers keep the same indices (the paper's text,
      section 2.2: "layer-wise scores are then summed up to obtain network-wide importance scores for each axis").
    """

    method: str = "activations"
    batch: str = DEFAULT_AGGREGATION["batch"]
    sequence: str = DEFAULT_AGGREGATION["sequence"]
    norms: tuple[str, ...] = ("input", "pre_mlp")
    ranking: str = "per_layer"

    def check(self) -> Ranking:
        """Return self, or raise `ConfigError` for a choice that does not exist."""
        for key, value, choices in (("method", self.method, METHODS), ("batch", self.batch, BATCH_AGGREGATIONS),
                                    ("sequence", self.sequence, SEQUENCE_STATISTICS),
                                    ("ranking", self.ranking, RANKINGS)):
            if value not in choices:
                raise ConfigError("bad value", expected="one of " + ", ".join(choices), found=repr(value),
                                  key=f"importance.{key}")
        if not self.norms or len(set(self.norms)) < len(self.norms) or not set(self.norms) <= set(NORMS):
            raise ConfigError("bad value", expected="one or more of " + ", ".join(NORMS), found=repr(self.norms),
                              key="importance.norms")
        return self


def aggregate(scores: Scores, axis: str, *, batch: str = DEFAULT_AGGREGATION["batch"],
              sequence: str = DEFAULT_AGGREGATION["sequence"]) -> Array:
    """Aggregate what was measured on one width axis over samples (arXiv:2407.14679, section 2.2 and Table 11).

    First, when the scores were collected, along the sequence. With a_1..a_S the activations of one unit at the S
    tokens of one sample:

    - mean: `(1/S) * sum_s |a_s|`
    - l2:   `sqrt(sum_s a_s^2)`
    - var:  `(1/S) * sum_s (a_s - abar)^2`, abar the signed mean over the S tokens

    Then, here, along the batch. With x_1..x_n (all >= 0) that statistic of each of the n calibration samples:

    - mean: `(1/n) * sum_i x_i`
    - l2:   `sqrt(sum_i x_i^2)` (no denominator)
    - var:  `(1/n) * sum_i (x_i - xbar)^2 = (1/n) * sum_i x_i^2 - xbar^2`, clipped at 0 against rounding

    Where channels of the heads' outputs were measured, a head's (group's) importance is the L2 norm over its D
    (heads_per_group * D) channels of the above (the official code); else the per-token L2 norm was measured
    (the paper).

    Returns:
        float64, global, [rows, units]: [L, F] (ffn), [L, N] (heads), [L, G] (groups) or [2L + 1, H] (hidden; see
        `scores.width_shape`).

    Raises:
        ScoresError: the axis, or this sequence statistic of it, was not collected.
        ConfigError: an unknown aggregation.
    """
    Ranking(batch=batch, sequence=sequence).check()
    channels = axis in ("heads", "groups") and f"{axis}.{sequence}.sum" not in scores.tensors
    name = f"{'head_channels' if channels else axis}.{sequence}"
    if f"{name}.sum" not in scores.tensors:
        raise _missing(scores, axis, f"{name}.sum")
    total, total_of_squares = scores.tensors[f"{name}.sum"], scores.tensors[f"{name}.sum_of_squares"]
    if batch == "mean":
        per_unit = total / scores.num_samples
    elif batch == "l2":
        per_unit = np.sqrt(total_of_squares)
    else:
        per_unit = np.maximum(total_of_squares / scores.num_samples - (total / scores.num_samples) ** 2, 0.0)
    if not channels:
        return per_unit
    units = scores.source.num_attention_heads if axis == "heads" else scores.source.num_query_groups
    norms: Array = np.linalg.norm(per_unit.reshape(scores.source.num_layers, units, -1), axis=2)
    return norms


def importance(scores: Scores, axis: str, how: Ranking | None = None) -> Array:
    """Importance of each unit of `axis`; larger means keep. All float64 and global.

    hidden [H]: `aggregate` summed over the chosen norms of all layers, as the residual stream is shared by them
    (arXiv:2407.14679, section 2.2). ffn [L, F], heads [L, N] and groups [L, G]: `aggregate` as it is, or with
    `ranking` "summed" the sum over layers, the same in each row. layers [L]: block influence, one minus the mean
    over calibration tokens of the cosine between a layer's input and output (same section); batch, sequence and
    ranking do not apply.

    Raises:
        ScoresError: the axis was not collected.
        ConfigError: an unknown choice.
    """
    how = (how or Ranking()).check()
    if how.method != "activations":
        name = f"{axis}.{how.method}"
        if name not in scores.tensors:
            raise _missing(scores, axis, name)
        per_row = scores.tensors[name]
    elif axis == "layers":
        if BLOCK_INFLUENCE not in scores.tensors:
            raise _missing(scores, axis, BLOCK_INFLUENCE)
        return scores.tensors[BLOCK_INFLUENCE]
    else:
        per_row = aggregate(scores, axis, batch=how.batch, sequence=how.sequence)
        if axis == "hidden":
            per_row = per_row[_norm_rows(scores.source, how.norms)]
    if axis == "hidden":
        return np.sum(per_row, axis=0, dtype=np.float64)
    if how.ranking == "summed" and axis != "layers":
        return np.broadcast_to(np.sum(per_row, axis=0, dtype=np.float64), per_row.shape)
    return per_row


def _norm_rows(arch: ArchSpec, norms: tuple[str, ...]) -> list[int]:
    rows = {"input": range(0, 2 * arch.num_layers, 2), "pre_mlp": range(1, 2 * arch.num_layers, 2),
            "final": range(2 * arch.num_layers, 2 * arch.num_layers + 1)}
    return sorted(row for norm in norms for row in rows[norm])


def _missing(scores: Scores, axis: str, name: str) -> ScoresError:
    return ScoresError(f"axis '{axis}' needs a score that was not collected", expected=name,
                       found="only " + ", ".join(sorted(scores.tensors)), key="importance")
