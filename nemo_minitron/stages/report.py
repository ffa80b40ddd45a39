"""Stage `report`: `summary.json`, a model card in every checkpoint, and the HTML page, from the files alone."""

from __future__ import annotations

from typing import Any

from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.report.card import write_card
from nemo_minitron.report.page import write_report
from nemo_minitron.report.summary import summarize
from nemo_minitron.stages.context import ROUND, Context
from nemo_minitron.stages.evaluate import MODELS, models_there
from nemo_minitron.stages.registry import STAGES


def run(context: Context) -> dict[str, Any]:
    """Write them into the run's directory; runs on rank 0 alone."""
    run_dir = context.config.run_dir
    manifests = {stage: context.manifest(stage) for stage in STAGES}
    evaluated = {name: read_json(context.stage_dir("evaluate") / f"{name}.json") for name in models_there(context)}
    summary = summarize(name=context.config.name, round_name=ROUND, teacher_path=context.teacher_path(),
                        round_dir=context.round_dir, manifests=manifests, evaluated=evaluated,
                        published=context.config.evaluate.published)
    write_json(run_dir / "summary.json", summary)
    for name in evaluated:
        stage = MODELS.get(name, "correct" if "correct" in context.config.stages else None)
        if stage is not None:
            write_card(context.stage_dir(stage) / "checkpoint", stage=stage, manifests=manifests, evaluated=evaluated,
                       config=context.config)
    page = write_report(run_dir)
    context.say(f"[report] {page}")
    return {}
