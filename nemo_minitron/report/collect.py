"""Read `outputs/NAME` into plain values. Pure reading: decides nothing about how the page looks.

A stage that has not run leaves None or an empty list. A file that is there but cannot be read leaves the same and
one line in `Experiment.problems`, so that the page says what it does not show.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Manifest, Plan, read_json
from nemo_minitron.errors import ScoresError, UserError
from nemo_minitron.importance.aggregate import Ranking, importance
from nemo_minitron.importance.scores import DEFAULT_AGGREGATION, Scores

STAGES = ("initialize", "correct", "score", "search", "prune", "cache_teacher", "generate", "distill", "ce", "scratch",
          "scratch_until", "align", "compare", "evaluate", "report")
"""In the order in which they run; other stage directories are not looked at."""

TRAINED_STAGES = ("correct", "distill", "ce", "scratch", "scratch_until", "align")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """One model of `summary.json`. `loss` in nats/token, mean over the held-out tokens; None where unknown."""

    loss: float | None
    num_parameters: float | None
    num_non_embedding_parameters: float | None
    tokens: float | None
    seconds: float | None
    tokens_per_s: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A model's score in one task: `value` and `stderr` of `metric`, over `num_samples` questions."""

    metric: str
    value: float | None
    stderr: float | None
    num_samples: float | None
    num_fewshot: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """A stage's `metrics.jsonl`: `training` and `heldout` lines by ascending step, each with its numbers by name."""

    training: list[dict[str, float]]
    heldout: list[dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
    """Importance as lists: hidden [H], ffn [L, F], layers [L]; None for an axis that was not scored."""

    hidden: list[float] | None
    ffn: list[list[float]] | None
    layers: list[float] | None
    num_samples: int
    batch: str
    sequence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One round. `models` has the keys teacher, pruned, distilled, aligned and those of controls, as far as measured.

    `tasks` has the scores of each task by the same keys, `answers` the losses (nats/token) on the held-out answers of
    each training of the alignment.
    """

    name: str
    models: dict[str, ModelFigures]
    recovery: float | None
    excess: float | None
    excess_vs_scratch: float | None
    plan: Plan | None
    importance: Importance | None
    histories: dict[str, History]
    manifests: dict[str, Manifest]
    tasks: dict[str, dict[str, TaskScore]] = dataclasses.field(default_factory=dict)
    answers: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    search: dict[str, Any] | None = None
    """`ranking.json` of the stage `search`."""
    scratch_token_ratio: float | None = None
    """Training tokens of `scratch_until` over those of the distillation, and whether it reached the same loss."""
    scratch_reached: bool = False
    compared: dict[str, Any] | None = None
    """Losses of the chosen candidate and of the best right after pruning, where both were distilled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that the page shows. `commands` holds (command words, ISO start time)."""

    name: str
    heldout_tokens: float | None
    heldout_bytes: float | None
    rounds: list[Round]
    config: str | None
    commands: list[tuple[list[str], str]]
    problems: list[str]
    published: list[str] = dataclasses.field(default_factory=list)
    beside: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Of each run that is shown beside this one, what `report.beside.compared` found."""


def collect(output_dir: Path) -> Experiment:
    """Read everything under `output_dir`.

    Raises:
        UserError: `output_dir` is not a directory.
    """
    if not output_dir.is_dir():
        raise UserError("no results to report", expected=f"the directory {output_dir}", found="nothing", key="name")
    problems: list[str] = []
    summary = _as_dict(_json(output_dir / "summary.json", output_dir, problems))
    entries = {str(entry.get("name")): entry for entry in _as_list(summary.get("rounds")) if isinstance(entry, dict)}
    rounds = [_round(name, entry, output_dir, problems) for name, entry in entries.items()]
    rounds += [_round(path.name, {}, output_dir, problems) for path in sorted(output_dir.iterdir())
               if path.name not in entries and _has_stages(path)]
    return Experiment(
        name=str(summary.get("name") or output_dir.resolve().name),
        heldout_tokens=_number(summary.get("heldout_tokens")), heldout_bytes=_number(summary.get("heldout_bytes")),
        rounds=rounds, config=_text(output_dir / "config.yaml", output_dir, problems),
        commands=_commands(output_dir, problems), problems=problems,
        published=[str(name) for name in _as_list(summary.get("published"))],
        beside=[found for found in _as_list(summary.get("beside")) if isinstance(found, dict)],
    )


def _has_stages(path: Path) -> bool:
    return any((path / stage / file).is_file() for stage in STAGES for file in ("manifest.json", "metrics.jsonl"))


def _round(name: str, entry: dict[str, Any], output_dir: Path, problems: list[str]) -> Round:
    directory = output_dir / name
    models = {key: _model(entry[key]) for key in ("teacher", "pruned", "distilled", "aligned")
              if isinstance(entry.get(key), dict)}
    controls = _as_dict(entry.get("controls"))
    models |= {key: _model(controls[key]) for key in ("ce", "scratch", "scratch_until")
               if isinstance(controls.get(key), dict)}
    until = _as_dict(controls.get("scratch_until"))
    tasks = _tasks({key: _as_dict({**entry, **controls}.get(key)).get("tasks") for key in models})
    answers = _answers({key: _as_dict({**entry, **controls}.get(key)).get("answers") for key in models})
    manifests = {stage: manifest for stage in STAGES
                 if (manifest := _manifest(directory / stage, output_dir, problems)) is not None}
    histories = {stage: history for stage in TRAINED_STAGES
                 if (history := _history(directory / stage / "metrics.jsonl", output_dir, problems)) is not None}
    ranking = _as_dict(_json(directory / "search" / "ranking.json", output_dir, problems)) or None
    plan = _plan(directory / "prune" / "plan.json", output_dir, problems)
    return Round(
        name=name, models=models, histories=histories, manifests=manifests, tasks=tasks, answers=answers,
        search=ranking,
        compared=_as_dict(_as_dict(entry.get("search")).get("compared")) or None,
        recovery=_number(entry.get("recovery")), excess=_number(entry.get("excess")),
        excess_vs_scratch=_number(entry.get("excess_vs_scratch")),
        scratch_token_ratio=_number(until.get("token_ratio")), scratch_reached=until.get("reached") is True,
        plan=plan, importance=_importance(directory / "score", plan, manifests.get("prune"), output_dir, problems),
    )


def _model(data: dict[str, Any]) -> ModelFigures:
    return ModelFigures(**{field.name: _number(data.get(field.name)) for field in dataclasses.fields(ModelFigures)})


def _tasks(by_model: dict[str, Any]) -> dict[str, dict[str, TaskScore]]:
    """Task -> model -> score, from each model's `tasks`."""
    found: dict[str, dict[str, TaskScore]] = {}
    for model, tasks in by_model.items():
        for task, scores in _as_dict(tasks).items():
            data = _as_dict(scores)
            shown = _as_dict(_as_dict(data.get("metrics")).get(str(data.get("metric"))))
            found.setdefault(task, {})[model] = TaskScore(
                metric=str(data.get("metric")), value=_number(shown.get("value")), stderr=_number(shown.get("stderr")),
                num_samples=_number(data.get("num_samples")), num_fewshot=_number(data.get("num_fewshot")))
    return found


def _answers(by_model: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Training of the alignment -> model -> loss, from each model's `answers`."""
    found: dict[str, dict[str, float]] = {}
    for model, answers in by_model.items():
        for phase, data in _as_dict(answers).items():
            loss = _number(_as_dict(data).get("loss"))
            if loss is not None:
                found.setdefault(phase, {})[model] = loss
    return found


def _manifest(directory: Path, output_dir: Path, problems: list[str]) -> Manifest | None:
    data = _json(directory / "manifest.json", output_dir, problems)
    if data is None:
        return None
    try:
        manifest = Manifest(**data)
        for name in ("world", "times", "result", "versions", "config"):
            if not isinstance(getattr(manifest, name), dict):
                raise TypeError(f"{name} is not an object")
    except TypeError as error:
        problems.append(f"{_relative(directory / 'manifest.json', output_dir)}: {error}")
        return None
    return manifest


def _plan(path: Path, output_dir: Path, problems: list[str]) -> Plan | None:
    data = _json(path, output_dir, problems)
    if data is None:
        return None
    try:
        return Plan.from_dict(data)
    except (UserError, KeyError, TypeError, ValueError) as error:
        problems.append(f"{_relative(path, output_dir)}: not a plan ({error!r})")
        return None


def _importance(directory: Path, plan: Plan | None, prune: Manifest | None, output_dir: Path,
                problems: list[str]) -> Importance | None:
    """Aggregated as the prune stage did, where its manifest says how, else with the default."""
    if not (directory / "scores.json").is_file():
        return None
    try:
        scores = Scores.load(directory)
        if plan is not None and plan.source != scores.source:
            raise ScoresError("the scores belong to another model than the plan")
        if plan is not None and plan.scores_digest not in (None, scores.digest()):
            return None  # the plan was made from scores of another run
        asked = _as_dict(prune.config.get("importance")) if prune else {}
        choice = {key: str(asked.get(key, default)) for key, default in DEFAULT_AGGREGATION.items()}
        method = "iterative" if asked.get("iterations", 1) != 1 else str(asked.get("method", "activations"))
        how = Ranking(method=method, norms=tuple(asked.get("norms", ("input", "pre_mlp"))),
                      ranking=str(asked.get("ranking", "per_layer")), **choice)
        axes = ("hidden", "ffn", "layers") if method == "activations" else ("hidden", "ffn")
        found = {axis: importance(scores, axis, how).tolist() for axis in axes if axis in scores.axes()}
    except UserError as error:
        problems.append(f"{_relative(directory, output_dir)}: {error}")
        return None
    return Importance(hidden=found.get("hidden"), ffn=found.get("ffn"), layers=found.get("layers"),
                      num_samples=scores.num_samples, **choice)


def _history(path: Path, output_dir: Path, problems: list[str]) -> History | None:
    """A resumed stage repeats steps: the last line of a step counts. Broken lines are counted, not fatal."""
    content = _text(path, output_dir, problems)
    if content is None:
        return None
    training: dict[float, dict[str, float]] = {}
    heldout: dict[float, dict[str, float]] = {}
    num_broken = 0
    for line in content.splitlines():
        try:
            data = json.loads(line)
            numbers = {key: number for key, value in data.items() if (number := _number(value)) is not None}
            rows = heldout if "heldout_ce" in data else training
            rows[numbers["step"]] = {"tokens": numbers["tokens"], **numbers}
        except (ValueError, AttributeError, KeyError):
            num_broken += bool(line.strip())
    if num_broken:
        problems.append(f"{_relative(path, output_dir)}: {num_broken} lines are not metrics and were left out")
    return History(training=[training[step] for step in sorted(training)],
                   heldout=[heldout[step] for step in sorted(heldout)])


def _commands(output_dir: Path, problems: list[str]) -> list[tuple[list[str], str]]:
    entries = _as_list(_json(output_dir / "commands.json", output_dir, problems))
    return [([str(word) for word in entry["command"]], str(entry.get("started") or ""))
            for entry in entries if isinstance(entry, dict) and isinstance(entry.get("command"), list)]


def _json(path: Path, output_dir: Path, problems: list[str]) -> Any:
    """Parsed JSON; None where the file is absent, and with a line in `problems` where it is not JSON."""
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except (UserError, OSError):
        problems.append(f"{_relative(path, output_dir)}: not valid JSON")
        return None


def _text(path: Path, output_dir: Path, problems: list[str]) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{_relative(path, output_dir)}: {error.strerror}")
        return None


def _relative(path: Path, output_dir: Path) -> str:
    return path.relative_to(output_dir).as_posix()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
