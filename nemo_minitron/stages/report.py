"""Stage `report`: `summary.json`, a model card in every checkpoint, and the HTML page, from the files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Manifest, read_json, write_json
from nemo_minitron.report.beside import compared
from nemo_minitron.report.card import write_card
from nemo_minitron.report.page import write_report
from nemo_minitron.report.summary import MODELS, searched, summarize
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.registry import STAGES, is_current, models_there


def run(context: Context) -> dict[str, Any]:
    """Write them into the run's directory; runs on rank 0 alone.

    The round's own part of the summary stays in its `report/round.json`; the summary has those of all rounds there are.
    """
    run_dir = context.config.run_dir
    manifests = {stage: context.manifest(stage) for stage in STAGES}
    evaluated = {name: read_json(context.stage_dir("evaluate") / f"{name}.json") for name in models_there(context)}
    entry = summarize(round_name=context.part, teacher_path=context.teacher_path(), round_dir=context.round_dir,
                      manifests=manifests, evaluated=evaluated)
    if context.config.search.is_set() and is_current(context, "search"):
        entry["search"] = searched(read_json(context.stage_dir("search") / "ranking.json"), entry["distilled"],
                                   _compared(context))
    write_json(context.stage_dir("report") / "round.json", entry)
    paths = [run_dir / name / "report" / "round.json" for name in context.round_names]
    rounds = [read_json(path) for path in paths if path.exists()]
    teacher = evaluated["teacher"]
    published = list(context.config.evaluate.published)
    beside = [compared(run_dir, rounds, Path(other)) for other in context.config.report.beside]
    write_json(run_dir / "summary.json", {
        "name": context.config.name, "heldout_tokens": teacher["num_tokens"], "heldout_bytes": teacher["num_bytes"],
        "rounds": rounds, **({"published": published} if published else {}), **({"beside": beside} if beside else {})})
    for name in evaluated:
        stage = MODELS.get(name, "correct" if "correct" in context.config.stages else None)
        if stage is not None and stage not in context.elsewhere and not (name == "teacher" and context.own_teacher):
            write_card(context.stage_dir(stage) / "checkpoint", stage=stage, manifests=manifests, evaluated=evaluated,
                       config=context.config)
    page = write_report(run_dir)
    context.say(f"[report] {page}")
    return {}


def _compared(context: Context) -> Manifest | None:
    return context.manifest("compare") if is_current(context, "compare") else None
