"""Stage `prune`: scores -> plan -> surgery on the checkpoint's files; no process group, no model."""

from __future__ import annotations

from typing import Any

from nemo_minitron.artifacts import write_json
from nemo_minitron.checkpoint.digest import read_checkpoint
from nemo_minitron.errors import ScoresError
from nemo_minitron.importance.scores import Scores
from nemo_minitron.prune.plan import make_plan
from nemo_minitron.prune.surgery import prune_checkpoint
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.targets import how_to_rank, layer_choice, resolved_target, sizes_of


def run(context: Context) -> dict[str, Any]:
    """Write `plan.json` and `checkpoint/`; runs on rank 0 alone."""
    config = context.config
    directory = context.stage_dir("prune")
    teacher = context.teacher()
    scores = Scores.load(context.scores_path())
    if scores.source_digest != teacher.weights_digest:
        raise ScoresError("these scores are of another model", expected=f"weights {teacher.weights_digest[:12]}",
                          found=scores.source_digest[:12], key="prune.scores or teacher.path")
    target = resolved_target(teacher.arch, config.prune)
    plan = make_plan(teacher.arch, sizes_of(target), scores, ranking=how_to_rank(config.importance),
                     layers=layer_choice(config.prune), head_residual=config.prune.head_residual)
    write_json(directory / "plan.json", plan.to_dict())
    prune_checkpoint(teacher.path, plan, directory / "checkpoint")
    pruned = read_checkpoint(directory / "checkpoint")
    source, left = plan.source.num_non_embedding_parameters(), plan.target.num_non_embedding_parameters()
    context.say(f"[prune] non-embedding parameters {source:,} -> {left:,} ({left / source:.1%})")
    return {"weights_digest": pruned.weights_digest, "scores_digest": plan.scores_digest,
            "arch": plan.target.to_dict(), "source_arch": plan.source.to_dict()}
