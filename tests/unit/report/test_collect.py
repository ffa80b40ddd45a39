from __future__ import annotations

import json
from pathlib import Path

from nemo_minitron.artifacts import Manifest, write_json
from nemo_minitron.report.collect import collect


def test_resumed_training_keeps_the_last_line_of_each_step(tmp_path: Path) -> None:
    directory = tmp_path / "r1" / "ce"
    directory.mkdir(parents=True)
    lines = [(1, 3.0), (2, 2.9), (3, 2.8), (2, 2.7), (3, 2.6)]
    text = "".join(json.dumps({"step": step, "tokens": 10 * step, "ce": ce}) + "\n" for step, ce in lines)
    (directory / "metrics.jsonl").write_text(text + '{"step": 3, "tokens": 30, "heldout_ce": null}\n')
    experiment = collect(tmp_path)
    history = experiment.rounds[0].histories["ce"]
    assert [(row["step"], row["ce"]) for row in history.training] == [(1, 3.0), (2, 2.7), (3, 2.6)]
    assert [row["tokens"] for row in history.heldout] == [30]
    assert experiment.problems == []


def test_rounds_of_the_summary_come_first_and_other_directories_follow(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"name": "n", "heldout_tokens": True, "rounds": [
        {"name": "second", "teacher": {"loss": 1.5, "num_parameters": "many"}, "controls": None, "recovery": None}]})
    manifest = Manifest(stage="score", fingerprint="", inputs={}, config={}, versions={}, world={}, times={}, result={})
    manifest.write(tmp_path / "first" / "score")
    (tmp_path / "logs").mkdir()
    experiment = collect(tmp_path)
    assert [round_.name for round_ in experiment.rounds] == ["second", "first"]
    assert experiment.heldout_tokens is None
    teacher = experiment.rounds[0].models["teacher"]
    assert (teacher.loss, teacher.num_parameters) == (1.5, None)
    assert list(experiment.rounds[1].manifests) == ["score"]


def test_an_unexpected_shape_of_a_file_is_survived(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("[1, 2]")
    (tmp_path / "commands.json").write_text('{"command": "x"}')
    (tmp_path / "r1" / "score").mkdir(parents=True)
    (tmp_path / "r1" / "score" / "manifest.json").write_text("[]")
    experiment = collect(tmp_path)
    assert experiment.commands == []
    assert experiment.rounds[0].manifests == {}
    assert len(experiment.problems) == 1
    assert experiment.problems[0].startswith("r1/score/manifest.json")
