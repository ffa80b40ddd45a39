"""Stage `prune`: scores -> plan -> surgery on the checkpoint's files; no process group, no model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Checkpoint, read_json, write_json
from nemo_minitron.checkpoint.digest import read_checkpoint
from nemo_minitron.data.tokenizer import check_same_tokenizer
from nemo_minitron.errors import ArchError, ScoresError
from nemo_minitron.importance.scores import Scores
from nemo_minitron.prune.plan import make_plan
from nemo_minitron.prune.surgery import prune_checkpoint
from nemo_minitron.prune.target import target_arch
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.targets import how_to_rank, layer_choice, resolved_target, sizes_of


def run(context: Context) -> dict[str, Any]:
    """Write `plan.json` and `checkpoint/`; runs on rank 0 alone."""
    config = context.config
    directory = context.stage_dir("prune")
    teacher = context.source_model()
    if config.prune.student is not None:
        return _adopt(context, teacher, Path(config.prune.student))
    scores = Scores.load(context.scores_path())
    if scores.source_digest != teacher.weights_digest:
        raise ScoresError("these scores are of another model", expected=f"weights {teacher.weights_digest[:12]}",
                          found=scores.source_digest[:12], key="prune.scores or teacher.path")
    target = chosen_target(context, teacher.arch)
    plan = make_plan(teacher.arch, sizes_of(target), scores, ranking=how_to_rank(config.importance),
                     layers=layer_choice(config.prune), head_residual=config.prune.head_residual)
    write_json(directory / "plan.json", plan.to_dict())
    prune_checkpoint(teacher.path, plan, directory / "checkpoint")
    pruned = read_checkpoint(directory / "checkpoint")
    source, left = plan.source.num_non_embedding_parameters(), plan.target.num_non_embedding_parameters()
    context.say(f"[prune] non-embedding parameters {source:,} -> {left:,} ({left / source:.1%})")
    return {"weights_digest": pruned.weights_digest, "scores_digest": plan.scores_digest,
            "arch": plan.target.to_dict(), "source_arch": plan.source.to_dict()}


def chosen_target(context: Context, source: ArchSpec) -> ArchSpec:
    """The architecture after pruning: the one that the recipe's search chose, else the one that `prune` asks for."""
    if not context.config.search.is_set():
        return resolved_target(source, context.config.prune)
    return target_arch(source, read_json(context.stage_dir("search") / "ranking.json")["chosen"]["sizes"])


def _adopt(context: Context, teacher: Checkpoint, path: Path) -> dict[str, Any]:
    """Take the model in `path` as the student, where it knows the same tokens."""
    student = read_checkpoint(path)
    check_same_tokenizer(teacher.path, path, key="prune.student")
    if student.arch.vocab_size != teacher.arch.vocab_size:
        raise ArchError("teacher and student have vocabularies of different size", key="prune.student",
                        expected=f"{teacher.arch.vocab_size} tokens", found=str(student.arch.vocab_size))
    directory = context.stage_dir("prune")
    (directory / "plan.json").unlink(missing_ok=True)
    partial = directory / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(path, partial)
    shutil.rmtree(directory / "checkpoint", ignore_errors=True)
    partial.rename(directory / "checkpoint")
    source, size = teacher.arch.num_non_embedding_parameters(), student.arch.num_non_embedding_parameters()
    context.say(f"[prune] {path} is the student: {size:,} non-embedding parameters ({size / source:.1%})")
    if size > source:
        context.say("[prune] warning: the student is larger than its teacher")
    return {"weights_digest": student.weights_digest, "scores_digest": None, "arch": student.arch.to_dict(),
            "source_arch": teacher.arch.to_dict()}
