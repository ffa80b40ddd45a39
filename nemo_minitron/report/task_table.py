"""The page's table of task scores: every model of the round side by side, and published ones."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.report import formats
from nemo_minitron.report.collect import Round, TaskScore
from nemo_minitron.report.markup import Html
from nemo_minitron.report.published import PUBLISHED, SHOTS
from nemo_minitron.report.tables import MODEL_NAMES, Row, table


def task_table(round_: Round, published: Sequence[str]) -> Html:
    """One row a task; scores in percent, plus or minus one standard error."""
    models = [key for key in MODEL_NAMES if any(key in scores for scores in round_.tasks.values())]
    known = [name for name in published if name in PUBLISHED]
    headers = [("task", ""), ("metric", ""), ("shots", ""), ("questions", ""),
               *[(MODEL_NAMES[key], "%") for key in models], *[(name, "published, %") for name in known]]
    rows = []
    for task, scores in round_.tasks.items():
        first = next(iter(scores.values()))
        rows.append(Row(task, [
            first.metric, formats.integer(first.num_fewshot), formats.integer(first.num_samples),
            *[_cell(scores.get(key)) for key in models], *[_published(name, task, first) for name in known]]))
    caption = "Plus or minus one standard error, as lm-evaluation-harness computes it."
    if known:
        tables = "; ".join(f"{name}: {PUBLISHED[name].table}" for name in known)
        caption += (f" Published scores, where the run used as many shots, are those printed in {tables}. They are of "
                    "other models on the whole test sets, and of other prompts where the papers' differ from "
                    "lm-evaluation-harness's.")
    return table(headers, rows, caption=caption)


def _cell(score: TaskScore | None) -> str:
    if score is None or score.value is None:
        return formats.MISSING
    error = "" if score.stderr is None else f" \u00b1 {100 * score.stderr:.1f}"
    return f"{100 * score.value:.1f}{error}"


def _published(name: str, task: str, run: TaskScore) -> str:
    value = PUBLISHED[name].scores.get(task)
    return f"{value:.1f}" if value is not None and run.num_fewshot == SHOTS[task] else formats.MISSING
