"""Printed scores of published base models, in percent, each with the table that prints it. Pure data.

Tasks have lm_eval's names where it has them. The shots are those of the papers' tables; "xlsum_en" is XL-Sum in
English, 3 shots on 20% of it (ROUGE-L). The papers sample HumanEval and MBPP at temperature 0.2 and top-p 0.95.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from nemo_minitron.errors import ConfigError

SHOTS = {"winogrande": 5, "arc_challenge": 25, "mmlu": 5, "hellaswag": 10, "gsm8k": 5, "truthfulqa_mc2": 0,
         "xlsum_en": 3, "mbpp": 0, "humaneval": 0}
"""Solved examples before each question, by task."""

_COMPACT_LARGE = "arXiv:2407.14679, Table 2"
_COMPACT_SMALL = "arXiv:2407.14679, Table 3"
_PRACTICE = "arXiv:2408.11796v4, Table 1"


@dataclasses.dataclass(frozen=True)
class Published:
    """`scores` in percent by task; `table` prints them."""

    table: str
    scores: dict[str, float]


def _row(table: str, *values: float | None) -> Published:
    """Values in the order of SHOTS; None where the table has none."""
    return Published(table, {task: value for task, value in zip(SHOTS, values, strict=True) if value is not None})


PUBLISHED: dict[str, Published] = {
    "Nemotron-4-15B": _row(_COMPACT_LARGE, 83.6, 58.8, 66.6, 84.6, 48.5, 40.7, 32, 38, 35.4),
    "Nemotron-3-8B": _row(_COMPACT_LARGE, 75.9, 52.8, 54.7, 78.5, 24.0, 36.5, 30.9, 27.04, 20.7),
    "Minitron-8B": _row(_COMPACT_LARGE, 79.0, 52.6, 63.8, 80.7, 51.3, 42.6, 31.2, 35.2, 31.6),
    "Minitron-4B": _row(_COMPACT_SMALL, 74.0, 50.9, 58.6, 75.0, 24.1, 42.9, 29.5, 28.2, 23.3),
    "Llama-3.1-8B": _row(_PRACTICE, 77.3, 57.9, 65.3, 81.8, 48.6, 45.0, 30.0, 42.3, 24.8),
    "Llama-3.1-Minitron-4B-Width": _row(_PRACTICE, 73.5, 55.6, 60.5, 76.1, 41.2, 42.9, 28.7, 32.4, None),
    "Llama-3.1-Minitron-4B-Depth": _row(_PRACTICE, 72.1, 52.6, 58.7, 73.2, 16.8, 38.2, 27.2, 30.7, None),
    "Mistral-NeMo-12B": _row(_PRACTICE, 82.2, 65.1, 69.0, 85.2, 56.4, 49.8, 33.4, 42.6, 23.8),
    "Mistral-NeMo-12B-FT": _row(_PRACTICE, 82.7, 62.3, 70.1, 85.3, 55.7, 48.3, 31.9, 47.9, 23.8),
    "Mistral-NeMo-Minitron-8B": _row(_PRACTICE, 80.4, 64.4, 69.5, 83.0, 58.5, 47.6, 32.0, 43.8, 36.2),
}


def check_published(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a model that is not in the list."""
    for name in names:
        if name not in PUBLISHED:
            raise ConfigError("unknown published model", expected=", ".join(PUBLISHED), found=repr(name),
                              key="evaluate.published")
