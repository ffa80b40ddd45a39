"""Stage `align`: supervised fine-tuning on conversations, cross-entropy of their answers (arXiv:2408.11796, section 4).

Each training of the recipe is one of its own (optimizer, learning rate, resume points) in a folder of its own,
`align/NAME`; the last one's weights become `align/checkpoint`, and `align/metrics.jsonl` has the lines of all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Checkpoint, read_json, write_json
from nemo_minitron.checkpoint.directory import CHAT_TEMPLATE
from nemo_minitron.stages.aligning import (
    STAGE,
    align_phases,
    keys_of_align,
    phase_context,
    start_path,
    take_answers,
)
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.train import student_arguments, train_stage
from nemo_minitron.training.module import TrainingModule

_DONE = "phase.json"
"""Written last into the folder of a training."""


def run(context: Context) -> dict[str, Any]:
    """Train in all phases that are not done; every rank takes part."""
    config, directory = context.config, context.stage_dir(STAGE)
    phases, results = align_phases(config), []
    path = start_path(context)
    for number, phase in enumerate(phases):
        folder = directory / phase.name
        result = context.share(read_json(folder / _DONE) if (folder / _DONE).exists() else None)
        if result is None:
            result = _train(context, number, context.read(path))
        results.append({"name": phase.name} | result)
        path = folder / "checkpoint"
    if context.rank == 0:
        _publish(path, directory / "checkpoint", config.align.chat_template)
        _join_metrics(directory, [phase.name for phase in phases])
    context.barrier()
    seconds, tokens = (sum(result[key] for result in results) for key in ("seconds", "tokens"))
    return {"weights_digest": results[-1]["weights_digest"], "start_digest": results[0]["start_digest"],
            "arch": results[-1]["arch"], "phases": results, "tokens": tokens,
            "steps": sum(result["steps"] for result in results), "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1) if seconds else 0.0}


def _train(context: Context, number: int, start: Checkpoint) -> dict[str, Any]:
    """One training from `start`; returns what is kept of it."""
    phase, tuned = align_phases(context.config)[number], phase_context(context, number)
    folder = context.stage_dir(STAGE) / phase.name
    if phase.source == "generate" and context.rank == 0:
        take_answers(context, number)
    context.barrier()
    with keys_of_align(context.config, number):
        module = TrainingModule(**student_arguments(tuned, start))
        result = train_stage(tuned, f"{STAGE}/{phase.name}", module, start=start, tokens=phase.tokens)
    if context.rank == 0:
        write_json(folder / _DONE, result)
        shutil.rmtree(folder / "resume", ignore_errors=True)
        shutil.rmtree(folder / "best", ignore_errors=True)
    context.barrier()
    return result


def _publish(trained: Path, directory: Path, template: str | None) -> None:
    """Give the last training's weights their place, with the recipe's template, unless a killed run has done so."""
    if not trained.exists():
        return
    if template is not None:
        shutil.copyfile(template, trained / CHAT_TEMPLATE)
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(trained, directory)


def _join_metrics(directory: Path, names: list[str]) -> None:
    """Write the lines of all trainings into one file, with steps, tokens and seconds counted on."""
    joined, before = [], {"step": 0, "tokens": 0, "seconds": 0.0}
    for name in names:
        lines = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text("utf-8").splitlines()]
        joined += [line | {key: line[key] + done for key, done in before.items() if key in line} | {"phase": name}
                   for line in lines]
        before = {key: max((line[key] for line in joined if key in line), default=0) for key in before}
    path = directory / "metrics.jsonl"
    neighbour = path.with_name(f".{path.name}")
    neighbour.write_text("".join(json.dumps(line) + "\n" for line in joined), encoding="utf-8")
    neighbour.replace(path)
