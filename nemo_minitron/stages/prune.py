"""Stage `prune`: scores -> plan -> surgery on the checkpoint's files; no process group, no model."""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import write_json
from nemo_minitron.checkpoint.digest import read_checkpoint
from nemo_minitron.config import TargetConfig
from nemo_minitron.errors import ConfigError, ScoresError
from nemo_minitron.importance.scores import Scores
from nemo_minitron.prune.plan import make_plan, target_arch
from nemo_minitron.prune.surgery import prune_checkpoint
from nemo_minitron.stages.context import Context


def target_sizes(target: TargetConfig) -> dict[str, int]:
    """The sizes that the recipe names.

    Raises:
        ConfigError: it names none.
    """
    sizes = {name: size for name, size in dataclasses.asdict(target).items() if size is not None}
    if not sizes:
        names = ", ".join(field.name for field in dataclasses.fields(target))
        raise ConfigError("no target to prune to", expected=f"at least one of {names}", found="none",
                          key="prune.target")
    return sizes


def check_target(source: ArchSpec, target: TargetConfig) -> ArchSpec:
    """The architecture after pruning, or a `UserError` before anything has run."""
    return target_arch(source, target_sizes(target))


def run(context: Context) -> dict[str, Any]:
    """Write `plan.json` and `checkpoint/`; runs on rank 0 alone."""
    config = context.config
    directory = context.stage_dir("prune")
    teacher = context.teacher()
    scores = Scores.load(context.stage_dir("score"))
    if scores.source_digest != teacher.weights_digest:
        raise ScoresError("these scores are of another model", expected=f"weights {teacher.weights_digest[:12]}",
                          found=scores.source_digest[:12], key="teacher.path")
    plan = make_plan(teacher.arch, target_sizes(config.prune.target), scores, batch=config.importance.batch,
                     sequence=config.importance.sequence)
    write_json(directory / "plan.json", plan.to_dict())
    prune_checkpoint(teacher.path, plan, directory / "checkpoint")
    pruned = read_checkpoint(directory / "checkpoint")
    source, target = plan.source.num_non_embedding_parameters(), plan.target.num_non_embedding_parameters()
    context.say(f"[prune] non-embedding parameters {source:,} -> {target:,} ({target / source:.1%})")
    return {"weights_digest": pruned.weights_digest, "scores_digest": plan.scores_digest,
            "arch": plan.target.to_dict(), "source_arch": plan.source.to_dict()}
