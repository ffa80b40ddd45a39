"""Stage `search`: every candidate is pruned from the same scores and distilled for a while; the best is chosen.

arXiv:2407.14679, section 3 (lightweight neural architecture search). A candidate's stages are ordinary ones, in
`search/CANDIDATE/STAGE`, so that a search that was killed goes on with the candidate and the step it was at. Candidates
run one after another in the same processes, each on all ranks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Candidate, read_json, write_json
from nemo_minitron.evaluate.loss import heldout_loss
from nemo_minitron.model.build import load_model, transformer_config
from nemo_minitron.search import ranking
from nemo_minitron.search.recipe import candidates_of
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import prepared_data, split_samples
from nemo_minitron.stages.execute import execute, has_begun
from nemo_minitron.stages.registry import due_stages
from nemo_minitron.stages.rounds import candidate_context, search_steps
from nemo_minitron.stages.targets import sizes_of
from nemo_minitron.training.resume import sealed_points


def run(context: Context) -> dict[str, Any]:
    """Write `ranking.json`; every rank takes part."""
    search = context.config.search
    found = candidates_of(context.source_model().arch, search)
    archs = {ranking.candidate_name(arch): arch for arch in found.candidates}
    contexts = {name: candidate_context(context, name, sizes_of(arch)) for name, arch in archs.items()}
    for arch in archs.values():
        context.layout.check(arch, name="candidate", seq_length=context.config.data.seq_length)
    context.say(f"[search] {len(archs)} candidates of {found.num_combinations} combinations")
    ends = ranking.rung_steps(search_steps(context.config), rungs=search.rungs, keep=search.keep)
    present, measured, rungs = list(archs), {}, []
    for end in ends:
        for name in present:
            measured[name] = _advance(contexts[name], name, archs[name], end=end, last=end == ends[-1])
        losses = [measured[name].loss for name in present]
        kept = present if end == ends[-1] else [present[i] for i in ranking.survivors(losses, search.keep)]
        rungs.append({"step": end, "candidates": present, "kept": kept})
        present = kept
    return _choose(context, list(measured.values()), rungs)


def _choose(context: Context, measured: list[Candidate], rungs: list[dict[str, Any]]) -> dict[str, Any]:
    order = ranking.ranked(measured)
    first, before = order[0], ranking.best_after_pruning(measured)
    rows = ranking.stability(order)
    record = {"chosen": ranking.as_dict(first), "best_after_pruning": ranking.as_dict(before),
              "candidates": [ranking.as_dict(one) for one in order], "stability": rows,
              "safe_step": ranking.safe_step(rows), "rungs": rungs,
              "heldout_samples": context.config.train.eval_samples}
    if context.rank == 0:
        write_json(context.stage_dir("search") / "ranking.json", record)
    context.barrier()
    context.say(f"[search] chosen: {first.name}, held-out {first.loss:.4f} nats/token after {first.step} steps "
                f"(right after pruning {first.pruned_loss:.4f}; {before.name} was best then)")
    return {"num_candidates": len(order), "chosen": first.name, "best_after_pruning": before.name,
            "losses": {one.name: one.loss for one in order}, "steps": first.step}


def _advance(context: Context, name: str, arch: ArchSpec, *, end: int, last: bool) -> Candidate:
    """Prune the candidate, measure it, and distil it up to step `end`, as far as that is not done."""
    due = _due(context)
    if "prune" in due:
        execute(context, ["prune"])
    pruned_loss = _pruned_loss(context)
    if "distill" in due and (last or not context.share(_has_reached(context, end))):
        execute(dataclasses.replace(context, pause_step=None if last else end), ["distill"])
    curve = context.share(_curve(context.stage_dir("distill") / "metrics.jsonl", end) if context.rank == 0 else None)
    manifest = context.manifest("distill")
    return Candidate(name=name, arch=arch, sizes=sizes_of(arch), pruned_loss=pruned_loss, curve=curve,
                     seconds=None if manifest is None else manifest.result["seconds"])


def _due(context: Context) -> list[str]:
    due: list[str] = context.share(due_stages(context) if context.rank == 0 else None)
    return due


def _has_reached(context: Context, end: int) -> bool:
    """Whether the candidate was paused at this step, or later, by this very recipe (rank 0 decides)."""
    points = sealed_points(context.stage_dir("distill") / "resume")
    return has_begun(context, "distill") and bool(points) and points[0].step >= end


def _pruned_loss(context: Context) -> float:
    """Held-out loss before any training, nats/token, on the samples that looks on the way are at."""
    config = context.config
    student = context.student()
    prepared = prepared_data(context, student.path, student.arch)
    key = {"weights_digest": student.weights_digest, "data_digest": prepared.digest,
           "seq_length": config.data.seq_length, "samples": config.train.eval_samples}
    path = context.stage_dir("prune") / "loss.json"
    known = read_json(path) if path.exists() else {}
    found: dict[str, Any] | None = context.share(known if known.items() >= key.items() else None)
    if found is None:
        model = load_model(student.arch, student.path, transformer_config(student.arch, context.layout))
        result = heldout_loss(model, split_samples(context, prepared, "heldout", student.arch), layout=context.layout,
                              micro_batch_size=config.evaluate.micro_batch_size,
                              max_samples=config.train.eval_samples, chunk_tokens=config.train.chunk_tokens)
        found = {**key, "loss": result.loss}
        context.barrier()
        if context.rank == 0:
            write_json(path, found)
    context.say(f"[search] {context.part.rpartition('/')[2]}: held-out {found['loss']:.4f} nats/token after pruning")
    return float(found["loss"])


def _curve(path: Path, end: int) -> tuple[tuple[int, int, float], ...]:
    """(step, tokens, held-out loss) of the looks up to step `end`; the last line of a step counts."""
    looks: dict[int, tuple[int, int, float]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "heldout_ce" in line and line["step"] <= end:
            looks[line["step"]] = (line["step"], line["tokens"], line["heldout_ce"])
    return tuple(looks[step] for step in sorted(looks))
