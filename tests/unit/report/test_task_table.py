"""Scores of tasks side by side, with standard errors, and published ones where they are of the same shots."""

import re

import pytest

from nemo_minitron.errors import ConfigError
from nemo_minitron.report import formats
from nemo_minitron.report.collect import Round, TaskScore, collect
from nemo_minitron.report.published import PUBLISHED, SHOTS, check_published
from nemo_minitron.report.task_table import task_table
from tests.unit.report.test_page import build_outputs, summary, write_json


def score(value, stderr, shots=5):
    return TaskScore(metric="acc", value=value, stderr=stderr, num_samples=1267, num_fewshot=shots)


def cells(html):
    """Texts of the body's rows."""
    rows = re.findall(r"<tr>(.*?)</tr>", str(html), re.DOTALL)
    found = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<.*?>|\u00a0", " ", cell).strip() for cell in row] for row in found]


def a_round(tasks):
    return Round(name="r", models={}, histories={}, manifests={}, tasks=tasks, recovery=None, excess=None,
                 excess_vs_scratch=None, plan=None, importance=None)


def test_models_stand_side_by_side_with_standard_errors():
    html = task_table(a_round({"winogrande": {"teacher": score(0.8361, 0.0104), "pruned": score(0.5, None),
                                              "distilled": score(0.79, 0.0114)}}), ["Minitron-8B"])
    row = next(row for row in cells(html) if row[0] == "winogrande")
    assert row[1:3] == ["acc", "5"]
    assert row[4:] == ["83.6 \u00b1 1.0", "50.0", "79.0 \u00b1 1.1", "79.0"]
    assert "Minitron-8B: arXiv:2407.14679, Table 2" in str(html)


def test_no_published_score_of_other_shots_or_another_task():
    html = task_table(a_round({"winogrande": {"teacher": score(0.8, 0.01, shots=0)},
                               "mine": {"teacher": score(0.1, 0.01)}}), ["Minitron-8B"])
    assert [row[-1] for row in cells(html) if row[0] in ("winogrande", "mine")] == [formats.MISSING] * 2


def test_scores_are_collected_from_the_summary(tmp_path):
    directory = build_outputs(tmp_path)
    data = summary("demo", controls=True) | {"published": ["Minitron-4B"]}
    tasks = {"mmlu": {"metric": "acc", "num_samples": 14, "num_fewshot": 5, "version": 1,
                      "metrics": {"acc": {"value": 0.25, "stderr": 0.1}, "other": {"value": 1.0, "stderr": None}}}}
    data["rounds"][0]["distilled"]["tasks"] = tasks
    data["rounds"][0]["controls"]["ce"]["tasks"] = tasks
    write_json(directory / "summary.json", data)
    found = collect(directory)
    expected = TaskScore(metric="acc", value=0.25, stderr=0.1, num_samples=14, num_fewshot=5)
    assert found.rounds[0].tasks == {"mmlu": {"distilled": expected, "ce": expected}}
    assert found.published == ["Minitron-4B"]


def test_published_rows_are_the_papers():
    """arXiv:2407.14679, Table 2 (Minitron-8B) and arXiv:2408.11796v4, Table 1 (width-pruned Llama, no HumanEval)."""
    assert PUBLISHED["Minitron-8B"].scores == {
        "winogrande": 79.0, "arc_challenge": 52.6, "mmlu": 63.8, "hellaswag": 80.7, "gsm8k": 51.3,
        "truthfulqa_mc2": 42.6, "xlsum_en": 31.2, "mbpp": 35.2, "humaneval": 31.6}
    assert PUBLISHED["Llama-3.1-Minitron-4B-Width"].scores.keys() == SHOTS.keys() - {"humaneval"}


def test_unknown_published_model():
    with pytest.raises(ConfigError, match=r"expected Nemotron-4-15B, .*'Minitron-9B'.*evaluate\.published"):
        check_published(["Minitron-8B", "Minitron-9B"])
