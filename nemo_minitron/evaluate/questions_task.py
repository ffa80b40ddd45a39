"""A file of `questions` as a task of lm-evaluation-harness. Imports lm_eval.

A class of its own because lm_eval's YAML tasks vary either the contexts or the continuations of a question's options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task

from nemo_minitron.evaluate.questions import Question


class QuestionsTask(Task):
    """Accuracy, and accuracy by log-likelihood per byte of the continuation (lm_eval's acc_norm is per character)."""

    VERSION = 1
    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, name: str, questions: Sequence[Question]) -> None:
        """`name`: what results are called."""
        self._questions = list(questions)
        super().__init__(config={"task": name})
        self._config.task = name

    def download(self, *_: Any, **__: Any) -> None:
        """Nothing: the questions are there."""

    def has_training_docs(self) -> bool:
        """There are none."""
        return False

    def has_validation_docs(self) -> bool:
        """There are none."""
        return False

    def has_test_docs(self) -> bool:
        """All questions."""
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        """All questions."""
        return [{"contexts": [context for context, _ in question.options],
                 "continuations": [continuation for _, continuation in question.options],
                 "answer": question.answer} for question in self._questions]

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        """Not what is asked, which differs by option."""
        return ""

    def doc_to_target(self, doc: dict[str, Any]) -> int:
        """The right option."""
        return int(doc["answer"])

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """One request for each option."""
        pairs = zip(doc["contexts"], doc["continuations"], strict=True)
        return [Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=number,
                         metadata=kwargs["metadata"]) for number, pair in enumerate(pairs)]

    def process_results(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """Whether the likeliest option is the right one; of equal ones the first."""
        log_probs = np.array([log_prob for log_prob, _ in results])
        lengths = np.array([len(text.encode()) for text in doc["continuations"]])
        return {"acc": float(log_probs.argmax() == doc["answer"]),
                "acc_bytes": float((log_probs / lengths).argmax() == doc["answer"])}

    def aggregation(self) -> dict[str, Callable[..., float]]:
        """Means over the questions."""
        return {"acc": mean, "acc_bytes": mean}

    def higher_is_better(self) -> dict[str, bool]:
        """Both."""
        return {"acc": True, "acc_bytes": True}
