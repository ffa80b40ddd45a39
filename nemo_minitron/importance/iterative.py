"""Importance measured anew on the way to a target, in T steps (arXiv:2407.14679, section 2.2, "iterative"). Pure.

At step i of T the widths are cut from `d_s - i (d_s - d_t) / T` to `d_s - (i + 1) (d_s - d_t) / T`, and what is left
is scored again. What comes out is importance like any other: a unit that went at a later step has more of it. The
paper finds that it helps nothing after retraining (its Table 12).

Shape letters: L layers, H hidden, F ffn, N query heads, G query groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Plan
from nemo_minitron.importance.aggregate import Ranking, importance
from nemo_minitron.importance.scores import AXES, WIDTH_AXES, Scores, width_shape


def sizes_after(step: int, steps: int, source: ArchSpec, target: ArchSpec,
                divisors: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the model after step `step` (from 0) of `steps`; after the last one they are the target's.

    Those in between are multiples of `divisors` (by size name; 1 where absent), never outside source and target.
    Heads shrink by whole heads in every group.
    """
    assert 0 <= step < steps, (step, steps)

    def between(first: int, last: int, divisor: int = 1) -> int:
        if step == steps - 1:
            return last
        exact = first - (step + 1) * (first - last) / steps
        return min(first, max(last, divisor * round(exact / divisor)))

    groups = between(source.num_query_groups, target.num_query_groups)
    return {
        "num_layers": between(source.num_layers, target.num_layers),
        **{name: between(getattr(source, name), getattr(target, name), divisors.get(name, 1))
           for name in ("hidden_size", "ffn_hidden_size")},
        "num_attention_heads": groups * between(source.heads_per_group, target.heads_per_group),
        "num_query_groups": groups,
    }


class Survival:
    """How long each unit of the source has stayed; `tensors` has it as importance.

    A unit's value is the step at which it was measured last, plus half of its importance then as a fraction of its
    row's largest. So units that go together are ordered by importance, and all that stay are above all that go.
    """

    def __init__(self, source: ArchSpec) -> None:
        """Start with the whole of `source`."""
        self._step = 0
        self._layers = tuple(range(source.num_layers))
        self._units: dict[str, list[tuple[int, ...]]] = {}
        self._values: dict[str, npt.NDArray[np.float64]] = {"layers": np.zeros(source.num_layers)}
        for axis in WIDTH_AXES:
            rows, size = (1 if axis == "hidden" else source.num_layers), width_shape(source, axis)[1]
            self._units[axis] = [tuple(range(size))] * rows
            self._values[axis] = np.zeros((rows, size))

    def add(self, scores: Scores, plan: Plan, how: Ranking) -> None:
        """Take in one step: `scores` of the present model, and the `plan` that cuts it next."""
        self._values["layers"][list(self._layers)] = self._step + _fractions(importance(scores, "layers"))
        for axis in WIDTH_AXES:
            per_row = np.atleast_2d(importance(scores, axis, how))
            rows = (0,) if axis == "hidden" else self._layers
            for row, units, values in zip(rows, self._units[axis], per_row, strict=True):
                self._values[axis][row, list(units)] = self._step + _fractions(values)
        kept = {"hidden": (plan.hidden,), "ffn": plan.ffn, "heads": plan.heads, "groups": plan.groups}
        for axis, indices in kept.items():
            before = self._units[axis] if axis == "hidden" else [self._units[axis][layer] for layer in plan.layers]
            self._units[axis] = [tuple(units[index] for index in row)
                                 for units, row in zip(before, indices, strict=True)]
        self._layers = tuple(self._layers[layer] for layer in plan.layers)
        self._step += 1

    def tensors(self) -> dict[str, npt.NDArray[np.float64]]:
        """`{axis}.iterative`: hidden [1, H], ffn [L, F], heads [L, N], groups [L, G], layers [L]; float64."""
        return {f"{axis}.iterative": self._values[axis] for axis in AXES}


def _fractions(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Half of each value as a fraction of the largest: from 0 to 1/2."""
    return 0.5 * values / np.maximum(values.max(), np.finfo(np.float64).tiny)
