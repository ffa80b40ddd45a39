"""Another run's numbers beside this one's: losses of every model, and every training step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import read_json
from nemo_minitron.errors import ConfigError
from nemo_minitron.report import formats
from nemo_minitron.report.collect import TRAINED_STAGES
from nemo_minitron.report.markup import Html, tag
from nemo_minitron.report.tables import MODEL_NAMES, Row, table


def check_beside(runs: Sequence[str], rounds: Sequence[str]) -> None:
    """Raise `ConfigError` for a folder that is not a finished run's, or of one without any of these rounds."""
    for run in runs:
        if not (Path(run) / "summary.json").is_file():
            raise ConfigError("no run to show beside this one", found=run, key="report.beside",
                              expected="the folder of a finished run, with a summary.json")
        there = [entry["name"] for entry in read_json(Path(run) / "summary.json")["rounds"]]
        if not set(there) & set(rounds):
            raise ConfigError("a run with no round in common", key="report.beside", expected=f"one of "
                              f"{', '.join(rounds)}", found=f"{', '.join(there)} in {run}")


def compared(run_dir: Path, rounds: list[Mapping[str, Any]], other: Path) -> dict[str, Any]:
    """This run's `rounds` of its summary against those of the finished run in `other`.

    `models` has rows (round, model, loss here, loss there), held-out and in nats/token; `trainings` rows (round, stage,
    steps that both took, largest difference of a step's training loss in nats/token). Only what both have is there.

    Raises:
        ConfigError: `other` has no model of a round in common with this run.
    """
    there = {entry["name"]: entry for entry in read_json(other / "summary.json")["rounds"]}
    models, trainings = [], []
    for entry in rounds:
        name = entry["name"]
        losses, others = dict(_losses(entry)), dict(_losses(there.get(name, {})))
        models += [[name, model, loss, others[model]] for model, loss in losses.items() if model in others]
        for stage in TRAINED_STAGES:
            mine, theirs = (_steps(folder / name / stage / "metrics.jsonl") for folder in (run_dir, other))
            if both := sorted(mine.keys() & theirs.keys()):
                trainings.append([name, stage, len(both), max(abs(mine[step] - theirs[step]) for step in both)])
    if not models:
        raise ConfigError("a run with no model in common", key="report.beside", found=f"{', '.join(there)} in {other}",
                          expected=f"models of {', '.join(entry['name'] for entry in rounds)}")
    return {"run": str(other), "models": models, "trainings": trainings}


def beside_section(found: list[dict[str, Any]]) -> list[Html]:
    """A table for each of the other runs."""
    return [tag("section", tag("h2", "Beside ", Path(one["run"]).parent.name, "/", Path(one["run"]).name), _models(one),
                _trainings(one)) for one in found]


def _models(one: dict[str, Any]) -> Html:
    rows = [Row(f"{name}, {MODEL_NAMES[model]}", [f"{here:.6f}", f"{there:.6f}", difference(here - there)])
            for name, model, here, there in one["models"]]
    return table([("model", ""), ("this run", "nats/token"), ("the other", "nats/token"), ("difference", "nats/token")],
                 rows, caption=f"Held-out losses of this run and of {one['run']}.")


def _trainings(one: dict[str, Any]) -> Html:
    rows = [Row(f"{name}, {stage}", [formats.integer(steps), difference(largest)])
            for name, stage, steps, largest in one["trainings"]]
    return table([("training", ""), ("steps", "of both"), ("largest difference", "nats/token")], rows,
                 caption="Of the training loss at the same step.") if rows else Html("")


def difference(value: float) -> str:
    """Nats/token with two digits, in powers of ten: what is looked for is far below a thousandth."""
    return "0" if value == 0 else ("" if value > 0 else formats.MINUS) + f"{abs(value):.1e}"


def _losses(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for model, found in {**entry, **entry.get("controls", {})}.items():
        if model in MODEL_NAMES and isinstance(found, dict):
            yield model, found["loss"]


def _steps(path: Path) -> dict[int, float]:
    """Training loss by step; empty where there is no such file."""
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}
