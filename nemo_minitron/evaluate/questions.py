"""Multiple-choice questions: which of several continuations does a model find the most likely?

A task file is a JSON list, or JSON lines, of objects

    {"context": TEXT or [TEXT, ...], "continuation": TEXT or [TEXT, ...], "answer": INDEX}

where at least one of the first two is a list, with one entry for each option; two lists are of equal length. The
option whose continuation has the largest log-likelihood given its context (summed over the continuation's tokens,
nats) is chosen, of equal ones the first; `answer` counts from 0. Winogrande-style questions have one context for
each option, the sentence up to the blank with the option put in, and one continuation, the rest of the sentence.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.errors import DataError

KEY = "importance.depth.task"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question: context and continuation of each option, and which option is right."""

    options: tuple[tuple[str, str], ...]
    answer: int


def read_questions(path: Path, *, key: str = KEY) -> list[Question]:
    """The questions of a task file; `key` is what the user has to change where it is of no use.

    Raises:
        DataError: no file, no JSON, or a row of another form; names the row of a list, or the line, from 1.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("the task file cannot be read", expected=f"a JSON file at {path}", found=str(error),
                        key=key) from None
    if text.lstrip().startswith("["):
        rows = {f"row {number} of {path}": row for number, row in enumerate(_parsed(text, str(path), key), 1)}
    else:  # not splitlines(): JSON texts may hold U+2028 and its like as they are
        rows = {where: _parsed(line, where, key) for where, line in
                ((f"line {number} of {path}", line) for number, line in enumerate(text.split("\n"), 1)) if line.strip()}
    if not rows:
        raise DataError("the task file is empty", expected=f"questions in {path}", found="none", key=key)
    return [_question(row, where, key) for where, row in rows.items()]


def _parsed(text: str, where: str, key: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError("the task file is not JSON", expected=f"a JSON list or JSON lines in {where}",
                        found=str(error), key=key) from None


def _question(row: Any, where: str, key: str) -> Question:
    if not isinstance(row, dict):
        raise _wrong(where, key, "an object with context, continuation and answer", type(row).__name__)
    texts: dict[str, Any] = {}
    for field in ("context", "continuation"):
        value = row.get(field)
        listed = isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
        if not listed and not isinstance(value, str):
            raise _wrong(where, key, f"{field} to be text or a list of texts", repr(value)[:60])
        texts[field] = value
    lengths = {len(value) for value in texts.values() if isinstance(value, list)}
    if len(lengths) != 1 or (count := lengths.pop()) < 2:
        raise _wrong(where, key, "a list of two or more options as context or continuation (or both, of equal length)",
                     "lists of " + (", ".join(map(str, sorted(lengths))) or "fewer"))
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < count:
        raise _wrong(where, key, f"answer to be an index from 0 to {count - 1}", repr(answer)[:60])
    contexts, continuations = (value if isinstance(value, list) else [value] * count for value in texts.values())
    if not all(continuations):
        raise _wrong(where, key, "a continuation of each option", "an empty one")
    return Question(tuple(zip(contexts, continuations, strict=True)), answer)


def _wrong(where: str, key: str, expected: str, found: str) -> DataError:
    return DataError(f"wrong form in {where}", expected=expected, found=found, key=key)


def accuracy(questions: Sequence[Question], nats: Sequence[float]) -> float:
    """Fraction of the questions whose right option has the smallest of `nats`, given for all options in order."""
    right, first = 0, 0
    for question in questions:
        of_question = nats[first : first + len(question.options)]
        right += int(np.argmin(of_question)) == question.answer
        first += len(question.options)
    return right / len(questions)
