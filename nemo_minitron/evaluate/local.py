"""Questions of known tasks from local files, in the forms in which they are passed around. No network.

A folder with `test/SUBJECT_test.csv` and `dev/SUBJECT_dev.csv` (header question,choice0..choice3,answer; answer 0 to 3)
is MMLU. A JSON list of {instruction, answer} as LLM-Adapters writes it is WinoGrande or ARC, told apart by the words of
the instruction, from which the parts of the question are taken back out. Every other file is read by `questions`. What
is told here are the fields that lm_eval's own tasks of these names work on: their prompts are lm_eval's.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from nemo_minitron.errors import DataError
from nemo_minitron.evaluate.questions import Question, read_questions

KEY = "evaluate.tasks"
_WINOGRANDE = re.compile(r"given sentence: (.*?)\n+Option1: (.*?) Option2: (.*?) Answer format: (\S+)$", re.DOTALL)
_ARC = re.compile(r"to the question: (.*?)\n+Answer1: (.*?)\n+Answer format: (\S+)$", re.DOTALL)
_MMLU_FIELDS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class LocalTask:
    """`form` is mmlu, winogrande, arc or questions.

    `subjects` has, for each subject (one called "" where there are none), the rows of the splits test and dev; it is
    empty where the form is `questions`.
    """

    form: str
    subjects: dict[str, dict[str, Rows]] = dataclasses.field(default_factory=dict)
    questions: tuple[Question, ...] = ()


def task_files(path: Path) -> list[Path]:
    """The files that make up a local task, for its digest."""
    return sorted(path.rglob("*.csv")) if path.is_dir() else [path]


def read_local(path: Path) -> LocalTask:
    """The task in `path`, a file or a folder.

    Raises:
        DataError: nothing is there, or it has another form; names the file and the row, from 1.
    """
    if path.is_dir():
        return LocalTask("mmlu", _mmlu(path))
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else None
    except (OSError, ValueError):
        rows = None  # the reader of questions says what is wrong
    if not (isinstance(rows, list) and rows and isinstance(rows[0], dict) and "instruction" in rows[0]):
        return LocalTask("questions", questions=tuple(read_questions(path, key=KEY)))
    form = "winogrande" if _WINOGRANDE.search(str(rows[0]["instruction"])) else "arc"
    take_apart = _winogrande if form == "winogrande" else _arc
    return LocalTask(form, {"": {"test": [take_apart(row, f"row {number} of {path}")
                                          for number, row in enumerate(rows, 1)]}})


def _mmlu(folder: Path) -> dict[str, dict[str, Rows]]:
    tests = sorted(folder.glob("test/*_test.csv"))
    if not tests:
        raise DataError("no MMLU in the folder of a task", expected=f"test/SUBJECT_test.csv in {folder}", found="none",
                        key=KEY)
    subjects = {}
    for test in tests:
        subject = test.name.removesuffix("_test.csv")
        dev = folder / "dev" / f"{subject}_dev.csv"
        subjects[subject] = {"test": _mmlu_rows(test), "dev": _mmlu_rows(dev)}
    return subjects


def _mmlu_rows(path: Path) -> Rows:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("a task file cannot be read", expected=f"CSV in {path}", found=str(error), key=KEY) from None
    rows = []
    for number, row in enumerate(table, 1):
        if set(row) != set(_MMLU_FIELDS) or None in row.values() or row["answer"] not in ("0", "1", "2", "3"):
            raise _wrong(f"row {number} of {path}", ",".join(_MMLU_FIELDS) + " with an answer from 0 to 3",
                         ",".join(str(field) for field in row) + f" with {row.get('answer')!r}")
        rows.append({"question": row["question"], "choices": [row[f"choice{index}"] for index in range(4)],
                     "answer": int(row["answer"])})
    return rows


def _winogrande(row: Any, where: str) -> dict[str, Any]:
    sentence, first, second = _parts(_WINOGRANDE, row, where, "a sentence with Option1 and Option2")
    answer = row.get("answer")
    if answer not in ("option1", "option2") or sentence.count("_") != 1:
        raise _wrong(where, "one _ in the sentence, and option1 or option2 as the answer",
                     f"{sentence.count('_')} of them, and {answer!r}")
    return {"sentence": sentence, "option1": first, "option2": second, "answer": answer.removeprefix("option")}


def _arc(row: Any, where: str) -> dict[str, Any]:
    question, answers = _parts(_ARC, row, where, "a question with Answer1, Answer2, ...")
    texts = re.split(r"\s+Answer\d: ", answers)
    labels = [str(number) for number in range(1, len(texts) + 1)]
    label = str(row.get("answer")).removeprefix("answer")
    if label not in labels:
        raise _wrong(where, f"an answer from answer1 to answer{len(texts)}", repr(row.get("answer")))
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": label}


def _parts(pattern: re.Pattern[str], row: Any, where: str, expected: str) -> list[str]:
    """The groups of `pattern` in the row's instruction, but the last, which is the wanted form of the answer."""
    text = row.get("instruction") if isinstance(row, dict) else None
    match = pattern.search(text) if isinstance(text, str) else None
    if match is None:
        raise _wrong(where, f"an instruction that has {expected}", repr(text)[:60])
    return list(match.groups()[:-1])


def _wrong(where: str, expected: str, found: str) -> DataError:
    return DataError(f"wrong form in {where}", expected=expected, found=found, key=KEY)
